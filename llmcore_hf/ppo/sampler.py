"""Which prompts each process answers when."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class RolloutSampler(Sampler[list[int]]):
    """Batches of row numbers, one per micro-batch: the first of a rollout names this process's prompts, the others are empty.

    The Trainer fetches a batch for each micro-batch. Empty ones keep its counting of steps, and its skipping of seen
    batches on a resume, right. Every epoch is a permutation of the dataset, drawn from `seed` and `epoch` alone; its last
    rollout is filled up from the beginning of the permutation.

    Args:
        n_rows: rows of the dataset, at least 1.
        rollout_size: prompts per process and rollout.
        micro_batches: micro-batches trained per rollout.
        rank, world_size: of this process.
    """

    def __init__(
        self, n_rows: int, rollout_size: int, micro_batches: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self.n_rows, self.rollout_size, self.micro_batches, self.seed = n_rows, rollout_size, micro_batches, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = 0

    @property
    def n_rollouts(self) -> int:
        return -(-self.n_rows // (self.rollout_size * self.world_size))

    def __len__(self) -> int:
        return self.n_rollouts * self.micro_batches

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.n_rows, generator=generator)
        whole = self.rollout_size * self.world_size
        for rollout in range(self.n_rollouts):
            rows = order[torch.arange(rollout * whole, (rollout + 1) * whole) % self.n_rows]
            yield rows[self.rank :: self.world_size].tolist()
            for _ in range(self.micro_batches - 1):
                yield []
