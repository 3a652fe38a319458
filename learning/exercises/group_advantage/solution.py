"""Reference solution of `group_advantage`."""

from torch import Tensor


def group_advantages(rewards: Tensor, num_generations: int) -> Tensor:
    groups = rewards.view(-1, num_generations)  # (N, G)
    mean, std = groups.mean(1, keepdim=True), groups.std(1, keepdim=True)
    return ((groups - mean) / (std + 1e-4)).flatten()
