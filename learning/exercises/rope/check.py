"""Properties of `rope`. References: Llama in transformers, and what a rotation leaves alone."""

import math

import torch

from llmcore_hf.learning.grading import equal


def _case(positions, size=8, theta=10000.0, seed=0):
    x = torch.randn(1, 2, len(positions), size, generator=torch.Generator().manual_seed(seed))
    return {"x": x, "positions": torch.tensor(positions), "theta": theta}


def agrees_with_transformers(task):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    for positions, theta in (([0, 1, 2], 10000.0), ([5, 6, 40], 500.0)):
        case = _case(positions, theta=theta)
        rotary = {"rope_type": "default", "rope_theta": theta}
        config = LlamaConfig(hidden_size=16, num_attention_heads=2, head_dim=8, rope_parameters=rotary)
        cos, sin = LlamaRotaryEmbedding(config)(case["x"], case["positions"][None])
        expected, _ = apply_rotary_pos_emb(case["x"], case["x"], cos, sin)
        equal(task.rope(**case), expected, **case)


def position_zero_changes_nothing(task):
    case = _case([0])
    equal(task.rope(**case), case["x"], **case)


def lengths_stay(task):
    case = _case([1, 7, 100])
    equal(task.rope(**case).norm(dim=-1), case["x"].norm(dim=-1), **case)


def only_the_distance_counts(task):
    near, far = _case([2, 5]), _case([32, 35])
    products = []
    for case in (near, far):
        rotated = task.rope(**case)
        products.append((rotated[:, :, 0] * rotated[:, :, 1]).sum(-1))
    equal(products[1], products[0], 1e-3, **far)


def first_pair_turns_by_one_radian(task):
    x = torch.zeros(1, 1, 1, 4)
    x[..., 0] = x[..., 1] = 1.0  # the first of either pair
    case = {"x": x, "positions": torch.tensor([3]), "theta": 100.0}
    slow = 3 * 100.0 ** (-2 / 4)
    expected = torch.tensor([math.cos(3), math.cos(slow), math.sin(3), math.sin(slow)])
    equal(task.rope(**case)[0, 0, 0], expected, **case)
