"""Properties of `td0`. References: closed forms, and the linear equations of a Markov reward process."""

import torch

from llmcore_hf.learning.grading import equal


def one_update(task):
    case = {"transitions": [(1, 2.0, 0, False)], "n_states": 3, "alpha": 0.25, "gamma": 0.9}
    equal(task.td0(**case), torch.tensor([0.0, 0.5, 0.0]), **case)
    # the second starts from V(1) = 0.5 and bootstraps from it: 0 + 0.25 (1 + 0.9 * 0.5 - 0)
    case["transitions"] = [(1, 2.0, 0, False), (2, 1.0, 1, False)]
    equal(task.td0(**case), torch.tensor([0.0, 0.5, 0.3625]), **case)


def termination_has_no_next_value(task):
    walk = [(0, 4.0, 1, False), (1, 1.0, 0, True)]  # V(0) = 2 by then, and must not count for state 1
    case = {"transitions": walk, "n_states": 2, "alpha": 0.5, "gamma": 1.0}
    equal(task.td0(**case), torch.tensor([2.0, 0.5]), **case)


def updates_come_one_after_the_other(task):
    n = 5  # backwards along a chain, step size 1: the reward of 1 arrives at every state, discounted
    walk = [(n - 1, 1.0, 0, True)] + [(state, 0.0, state + 1, False) for state in reversed(range(n - 1))]
    case = {"transitions": walk, "n_states": n, "alpha": 1.0, "gamma": 0.5}
    equal(task.td0(**case), torch.tensor([0.5 ** (n - 1 - state) for state in range(n)]), **case)


def repeated_reward_is_averaged(task):
    for n, alpha in ((1, 0.1), (4, 0.1), (7, 0.5)):
        case = {"transitions": [(0, 3.0, 0, True)] * n, "n_states": 1, "alpha": alpha, "gamma": 0.9}
        equal(task.td0(**case), torch.tensor([3.0 * (1 - (1 - alpha) ** n)]), **case)


def converges_to_the_true_values(task):
    rewards, gamma = torch.tensor([1.0, -2.0, 0.5]), 0.7
    walk = [(state, rewards[state].item(), (state + 1) % 3, False) for state in range(3)]
    cycle = torch.eye(3).roll(1, 1)  # state i goes to i + 1
    expected = torch.linalg.solve(torch.eye(3) - gamma * cycle, rewards)
    case = {"transitions": walk * 300, "n_states": 3, "alpha": 0.5, "gamma": gamma}
    equal(task.td0(**case), expected, 1e-3, **case)
