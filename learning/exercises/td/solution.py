"""Reference solution of `td`."""

import torch
from torch import Tensor


def td0(transitions: list[tuple[int, float, int, bool]], n_states: int, alpha: float, gamma: float) -> Tensor:
    values = torch.zeros(n_states)
    for state, reward, next_state, terminated in transitions:
        target = reward if terminated else reward + gamma * values[next_state]
        values[state] += alpha * (target - values[state])
    return values
