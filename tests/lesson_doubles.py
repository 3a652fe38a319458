"""What stands in for a run directory or an environment in the tests of lessons."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np


class FakeRun:
    """What `run` needs of a run directory."""

    def __init__(self) -> None:
        self.checks, self.summary, self.history, self.files = [], {}, [], {}

    def log(self, row: dict) -> None:
        self.history.append(row)

    def write(self, name: str, content: str | bytes) -> None:
        self.files[name] = content


class ShortEpisodes:
    """Stands in for a vector environment: observations count the steps, the n-th episode is cut after n + 1 steps."""

    spec = SimpleNamespace(max_episode_steps=20)

    def __init__(self, num_envs: int) -> None:
        self.n, self.t = num_envs, 0

    def reset(self, seed: int) -> tuple[np.ndarray, dict]:
        return np.zeros((self.n, 4), dtype=np.float32), {}

    def step(self, actions: np.ndarray) -> tuple:
        self.t += 1
        truncated = np.arange(self.n) < self.t
        return np.full((self.n, 4), self.t, np.float32), np.ones(self.n), np.zeros(self.n, bool), truncated, {}

    def close(self) -> None:
        pass
