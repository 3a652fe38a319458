"""Reference solution of `value_iteration`."""

import torch
from torch import Tensor


def value_iteration(transitions: Tensor, rewards: Tensor, gamma: float, tolerance: float) -> tuple[Tensor, Tensor]:
    values = torch.zeros(len(rewards))
    change = float("inf")
    while change > tolerance:
        q = rewards + gamma * transitions @ values  # (S, A)
        change = (q.max(1).values - values).abs().max().item()
        values = q.max(1).values
    return values, q.argmax(1)
