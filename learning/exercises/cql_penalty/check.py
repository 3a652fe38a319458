"""Properties of `cql_penalty`. Reference: torch's cross-entropy, which is the same function."""

import math

import torch
from torch.nn.functional import cross_entropy, one_hot

from llmcore_hf.learning.grading import equal, true


def _case(seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "q_values": scale * torch.randn(3, 4, generator=generator),
        "actions": torch.randint(4, (3,), generator=generator),
    }


def is_the_loss_of_cloning(task):
    for seed in range(3):
        case = _case(seed, 2.0)
        equal(task.cql_penalty(**case), cross_entropy(case["q_values"], case["actions"]).item(), **case)


def pushes_all_down_and_the_data_up(task):
    case = _case()
    case["q_values"].requires_grad_()
    task.cql_penalty(**case).backward()
    expected = (case["q_values"].softmax(1) - one_hot(case["actions"], 4)) / 3
    equal(case["q_values"].grad, expected, **case)


def is_never_negative(task):
    for seed in range(5):
        case = _case(seed, 5.0)
        found = float(task.cql_penalty(**case))
        true(found >= 0, "at least 0", found, **case)


def a_shift_of_all_values_is_free(task):
    case = _case()
    shifted = {**case, "q_values": case["q_values"] + torch.tensor([[5.0], [-3.0], [0.5]])}
    equal(task.cql_penalty(**shifted), task.cql_penalty(**case).item(), **shifted)


def large_values_stay_finite(task):
    case = {"q_values": torch.tensor([[800.0, 790.0], [-900.0, -900.0]]), "actions": torch.tensor([1, 0])}
    found = task.cql_penalty(**case)
    true(math.isfinite(float(found)), "a finite penalty", found, **case)
    equal(found, cross_entropy(case["q_values"], case["actions"]).item(), **case)
