"""Properties of `group_advantages`. Reference: Python's `statistics`."""

import statistics

import torch

from llmcore_hf.learning.grading import equal, true


def _case(g, n=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {"rewards": torch.randn(n * g, generator=generator), "num_generations": g}


def _by_definition(rewards, g):
    found = []
    for start in range(0, len(rewards), g):
        group = rewards[start : start + g].tolist()
        scale = statistics.stdev(group) + 1e-4
        found += [(reward - statistics.mean(group)) / scale for reward in group]
    return torch.tensor(found)


def is_the_standard_score_of_its_group(task):
    for g in (2, 3, 8):
        case = _case(g)
        equal(task.group_advantages(**case), _by_definition(case["rewards"], g), **case)


def sums_to_zero_in_a_group(task):
    case = _case(4)
    found = task.group_advantages(**case)
    for start in range(0, 12, 4):
        total = float(found[start : start + 4].sum())
        true(abs(total) < 1e-4, "a sum of 0 in each group", total, **case)


def groups_do_not_mix(task):
    case = _case(4)
    other = {**case, "rewards": case["rewards"].clone()}
    other["rewards"][4:8] *= 100.0
    first, second = (task.group_advantages(**given) for given in (case, other))
    equal([second[:4], second[8:]], [first[:4], first[8:]], **other)


def equal_rewards_teach_nothing(task):
    case = {"rewards": torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0]), "num_generations": 4}
    equal(task.group_advantages(**case)[:4], torch.zeros(4), **case)


def shift_changes_nothing(task):
    case = _case(4)
    shifted = {**case, "rewards": case["rewards"] + 3.0}
    equal(task.group_advantages(**shifted), task.group_advantages(**case), 1e-3, **shifted)
