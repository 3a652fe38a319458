"""Properties of `dpo_loss`. References: torch's binary cross-entropy, and the gradient as the paper gives it."""

import math

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from llmcore_hf.learning.grading import equal, true

NAMES = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")


def _case(beta=0.3, n=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {**{name: -10 * torch.rand(n, generator=generator) for name in NAMES}, "beta": beta}


def _difference(case):
    chosen, rejected, ref_chosen, ref_rejected = (case[name] for name in NAMES)
    return case["beta"] * (chosen - rejected - ref_chosen + ref_rejected)


def ln2_at_the_start(task):
    case = _case()
    case |= {"ref_chosen_logps": case["chosen_logps"].clone(), "ref_rejected_logps": case["rejected_logps"].clone()}
    equal(task.dpo_loss(**case), math.log(2), **case)


def is_a_binary_classification(task):
    for beta, seed in ((0.1, 0), (0.5, 1), (1.0, 2)):
        case = _case(beta, seed=seed)
        logits = _difference(case)
        equal(task.dpo_loss(**case), binary_cross_entropy_with_logits(logits, torch.ones_like(logits)).item(), **case)


def only_differences_count(task):
    case = _case()
    shifted = {**case, "chosen_logps": case["chosen_logps"] - 7.0, "rejected_logps": case["rejected_logps"] - 7.0}
    equal(task.dpo_loss(**shifted), task.dpo_loss(**case).item(), **shifted)


def gradient_is_that_of_the_paper(task):
    case = _case(beta=0.5)
    for name, sign in (("chosen_logps", -1.0), ("rejected_logps", 1.0)):
        given = {**case, name: case[name].clone().requires_grad_()}
        task.dpo_loss(**given).backward()
        expected = sign * case["beta"] * torch.sigmoid(-_difference(case)) / len(case[name])
        equal(given[name].grad, expected, gradient_with_respect_to=name, **case)


def large_differences_stay_finite(task):
    for gap in (500.0, -500.0):
        case = {name: torch.zeros(2) for name in NAMES} | {"chosen_logps": torch.full((2,), gap), "beta": 1.0}
        found = task.dpo_loss(**case)
        true(math.isfinite(float(found)), "a finite loss", found, **case)
        equal(found, max(-gap, 0.0), **case)
