"""Properties of `value_iteration`. Reference: the exact values of every deterministic policy, by linear equations."""

import itertools

import torch

from llmcore_hf.learning.grading import equal, true


def _mdp(n_states, n_actions, seed):
    generator = torch.Generator().manual_seed(seed)
    transitions = torch.rand(n_states, n_actions, n_states, generator=generator)
    transitions[:, 0, 0] = 3  # far from doubly stochastic
    transitions = transitions / transitions.sum(-1, keepdim=True)
    return {"transitions": transitions, "rewards": torch.randn(n_states, n_actions, generator=generator)}


def _value_of(policy, transitions, rewards, gamma):
    states = torch.arange(len(rewards))
    p, r = transitions[states, policy].double(), rewards[states, policy].double()
    return torch.linalg.solve(torch.eye(len(r), dtype=torch.float64) - gamma * p, r)


def _best(transitions, rewards, gamma):
    n_states, n_actions = rewards.shape
    policies = itertools.product(range(n_actions), repeat=n_states)
    return torch.stack([_value_of(torch.tensor(p), transitions, rewards, gamma) for p in policies]).max(0).values


def _cases(tolerance=1e-5):
    for seed, gamma in enumerate((0.5, 0.8, 0.9)):
        yield {**_mdp(4, 3, seed), "gamma": gamma, "tolerance": tolerance}


def values_are_optimal(task):
    for case in _cases():
        values, _ = task.value_iteration(**case)
        equal(values, _best(case["transitions"], case["rewards"], case["gamma"]).float(), 1e-3, **case)


def policy_is_optimal(task):
    for case in _cases():
        _, policy = task.value_iteration(**case)
        shape = list(getattr(policy, "shape", ()))
        true(shape == [4], "a policy of shape (4,)", policy, **case)
        mdp = case["transitions"], case["rewards"], case["gamma"]
        found = _value_of(policy.long(), *mdp)
        true(torch.allclose(found, _best(*mdp), atol=1e-3), f"a policy worth {_best(*mdp).tolist()}", policy, **case)


def gamma_zero_is_the_best_reward(task):
    case = {**_mdp(4, 3, 7), "gamma": 0.0, "tolerance": 1e-5}
    equal(task.value_iteration(**case)[0], case["rewards"].max(1).values, **case)


def stops_within_the_tolerance(task):
    for case in _cases(1e-4):
        values, _ = task.value_iteration(**case)
        again = (case["rewards"] + case["gamma"] * torch.einsum("sat,t->sa", case["transitions"], values)).amax(1)
        largest = (again - values).abs().max().item()
        true(largest <= 1.1e-4, "a largest change of at most 0.0001", largest, **case)


def far_rewards_reach_the_start(task):
    n = 6  # walk right for nothing; the last state pays 1 and is left for an absorbing one
    transitions = torch.zeros(n + 1, 2, n + 1)
    for state in range(n):
        transitions[state, 0, max(state - 1, 0)] = transitions[state, 1, state + 1] = 1.0
    transitions[n, :, n] = 1.0
    rewards = torch.zeros(n + 1, 2)
    rewards[n - 1, 1] = 1.0
    case = {"transitions": transitions, "rewards": rewards, "gamma": 0.9, "tolerance": 1e-6}
    expected = torch.tensor([0.9 ** (n - 1 - state) for state in range(n)] + [0.0])
    equal(task.value_iteration(**case)[0], expected, **case)
