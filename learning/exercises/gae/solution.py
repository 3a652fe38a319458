"""Reference solution of `gae`."""

import torch
from torch import Tensor


def gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    done: Tensor,
    gamma: float,
    lam: float,
) -> Tensor:
    deltas = rewards + gamma * next_values * ~terminated - values
    advantages, running = torch.zeros_like(rewards), 0.0
    for t in reversed(range(len(rewards))):
        running = deltas[t] + gamma * lam * running * ~done[t]
        advantages[t] = running
    return advantages
