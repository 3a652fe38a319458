"""What both offline lessons rest on: counting a dataset, and the exact values of a policy."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch

from llmcore_hf import offline_data, offline_rl


def test_tabulate_counts_as_a_plain_loop_does() -> None:
    dataset = offline_data.cliff_walking(7, 3)
    data = offline_rl.tabulate(dataset)
    visits: dict[int, dict[int, int]] = {}
    for state, action in zip(dataset.observations.tolist(), dataset.actions.tolist(), strict=True):
        visits.setdefault(state, {}).setdefault(action, 0)
        visits[state][action] += 1
    for state in range(48):
        for action in range(4):
            count, total = visits.get(state, {}).get(action, 0), sum(visits.get(state, {}).values())
            assert data.shares[state, action] == pytest.approx(count / total if total else 0)
    assert data.start.tolist() == np.eye(48)[36].tolist()
    per_state = torch.zeros(48, dtype=torch.float64).index_add_(0, data.batch.observations, data.weights)
    assert sorted(set(per_state.tolist())) == pytest.approx([0, 1])


def test_values_of_a_policy_are_those_of_many_backups() -> None:
    model, table = offline_rl.Model.of("FrozenLake-v1"), gym.make("FrozenLake-v1").unwrapped.P
    policy = torch.randint(4, (16,), generator=torch.Generator().manual_seed(0))
    discounted, hundred = [0.0] * 16, [0.0] * 16
    for sweep in range(2000):
        for values, gamma in ((discounted, 0.95), (hundred, 1.0)):
            if gamma < 1 or sweep < 100:
                values[:] = [
                    sum(p * (r + gamma * values[s2] * (not end)) for p, s2, r, end in table[s][int(policy[s])])
                    for s in range(16)
                ]
    assert model.value(policy, 0.95).tolist() == pytest.approx(discounted)
    assert model.horizon == 100 and model.returns(policy).tolist() == pytest.approx(hundred)


def test_an_environment_without_a_table_has_no_model() -> None:
    assert offline_rl.Model.of("CartPole-v1") is None and offline_rl.Model.of(None) is None
