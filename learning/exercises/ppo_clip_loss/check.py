"""Properties of `ppo_clip_loss`. References: the definition in plain numbers, and what it means for single tokens."""

import math

import torch

from llmcore_hf.learning.grading import equal, true

EPSILON = 0.2


def _case(seed=0):
    generator = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(2, 3, generator=generator)
    return {
        "logprobs": old + 0.5 * torch.randn(2, 3, generator=generator),
        "old_logprobs": old,
        "advantages": torch.randn(2, 3, generator=generator),
        "mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
        "cliprange": EPSILON,
    }


def _token(ratio, advantage):
    """One token whose ratio has moved that far."""
    one = torch.ones(1, 1)
    old = -one
    logprobs = (old + math.log(ratio)).requires_grad_()
    case = {"logprobs": logprobs, "old_logprobs": old, "advantages": advantage * one, "mask": one}
    return {**case, "cliprange": EPSILON}


def _gradient(task, case, name="logprobs"):
    case = {**case, name: case[name].detach().clone().requires_grad_()}
    task.ppo_clip_loss(**case).backward()
    return case[name].grad


def is_the_clipped_objective(task):
    for seed in range(4):
        case = _case(seed)
        rows = zip(
            *(case[name].flatten().tolist() for name in ("logprobs", "old_logprobs", "advantages", "mask")), strict=True
        )
        terms = []
        for new, old, advantage, counts in rows:
            ratio = math.exp(new - old)
            inside = min(max(ratio, 1 - EPSILON), 1 + EPSILON)
            if counts:
                terms.append(min(ratio * advantage, inside * advantage))
        equal(task.ppo_clip_loss(**case), -sum(terms) / len(terms), **case)


def first_step_is_the_policy_gradient(task):
    case = _case()
    case["logprobs"] = case["old_logprobs"].clone()
    equal(_gradient(task, case), -case["advantages"] * case["mask"] / 5, **case)


def good_token_stops_at_the_range(task):
    for ratio, advantage in ((1.5, 2.0), (0.5, -2.0)):
        case = _token(ratio, advantage)
        equal(_gradient(task, case), torch.zeros(1, 1), ratio=ratio, **case)


def wrong_way_is_pulled_back(task):
    for ratio, advantage in ((1.5, -2.0), (0.5, 2.0)):
        case = _token(ratio, advantage)
        equal(_gradient(task, case), torch.full((1, 1), -ratio * advantage), ratio=ratio, **case)


def padding_counts_for_nothing(task):
    case, other = _case(), _case()
    for name in ("logprobs", "old_logprobs", "advantages"):
        other[name][1, 2] = -50.0 if name == "old_logprobs" else 30.0
    equal(task.ppo_clip_loss(**other), task.ppo_clip_loss(**case).item(), **other)


def only_the_policy_gets_a_gradient(task):
    case = _case()
    leaves = {name: case[name].clone().requires_grad_() for name in ("logprobs", "old_logprobs", "advantages")}
    task.ppo_clip_loss(**{**case, **leaves}).backward()
    for name in ("old_logprobs", "advantages"):
        grad = leaves[name].grad
        true(grad is None or not grad.any(), f"no gradient for {name}", grad, **case)
    true(leaves["logprobs"].grad is not None, "a gradient for logprobs", leaves["logprobs"].grad, **case)
