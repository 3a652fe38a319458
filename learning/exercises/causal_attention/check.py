"""Properties of `causal_attention`. References: torch's attention, and what a query may and may not see."""

import torch
from torch.nn.functional import scaled_dot_product_attention

from llmcore_hf.learning.grading import equal, true


def _case(n_queries=4, n_keys=4, size=4, batch=1, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    lengths = {"query": n_queries, "key": n_keys, "value": n_keys}
    return {name: scale * torch.randn(batch, 2, n, size, generator=generator) for name, n in lengths.items()}


def agrees_with_torch(task):
    for n, size in ((4, 4), (1, 8), (7, 2)):
        case = _case(n, n, size)
        equal(task.causal_attention(**case), scaled_dot_product_attention(**case, is_causal=True), **case)


def future_changes_nothing(task):
    case = _case(5, 5)
    other = {**case, "key": case["key"].clone(), "value": case["value"].clone()}
    other["key"][:, :, 3:] += 4.0
    other["value"][:, :, 3:] -= 9.0
    equal(task.causal_attention(**other)[:, :, :3], task.causal_attention(**case)[:, :, :3], **other)


def first_token_sees_itself(task):
    case = _case(3, 3)
    equal(task.causal_attention(**case)[:, :, 0], case["value"][:, :, 0], **case)


def scale_is_the_root_of_the_head_size(task):
    # one query, two keys, D = 4: the scores are 2 and 0, once divided by the root, and the values 1 and 0
    key = torch.zeros(1, 1, 2, 4)
    key[0, 0, 0, 0] = 4.0
    value = torch.zeros(1, 1, 2, 4)
    value[0, 0, 0] = 1.0
    query = torch.zeros(1, 1, 2, 4)
    query[..., 0] = 1.0
    case = {"query": query, "key": key, "value": value}
    expected = torch.full((4,), 1 / (1 + torch.tensor(-2.0).exp().item()))
    equal(task.causal_attention(**case)[0, 0, 1], expected, **case)


def decodes_with_a_cache(task):
    whole = _case(6, 6)
    for n in (1, 3):
        case = {**whole, "query": whole["query"][:, :, -n:]}
        expected = scaled_dot_product_attention(**whole, is_causal=True)[:, :, -n:]
        equal(task.causal_attention(**case), expected, **case)


def large_scores_stay_finite(task):
    case = _case(3, 3, scale=60.0)
    found = task.causal_attention(**case)
    true(bool(torch.isfinite(found).all()), "finite outputs", found, **case)
    equal(found, scaled_dot_product_attention(**case, is_causal=True), 1e-3, **case)
