"""Workers that die, and the supervisor that starts again from the last whole checkpoint."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from llmcore_hf.errors import ConfigError
from llmcore_hf.systems import elastic, workers
from llmcore_hf.systems.elastic import Args, Attempt, Job
from llmcore_hf.systems.parallel import ModelShape, Training
from llmcore_hf.systems.text import packed_batches
from llmcore_hf.systems.workers import WorkerFailed


@pytest.mark.parametrize(("kills", "steps"), [(1, [11]), (2, [1, 12]), (4, [1, 5, 8, 12])])
def test_workers_are_killed_all_over_the_run(kills: int, steps: list[int]) -> None:
    assert elastic.kill_steps(Args(max_steps=12, save_steps=4, kills=kills)) == steps


def attempt(killed_at: int, begin: int, restarts: int = 1, weight: float = 1.0) -> Attempt:
    result = {"begin": begin, "losses": [], "weights": {"w": torch.tensor([weight])}}
    return Attempt(killed_at, restarts, [begin], result, 1.0)


def verdict(attempts: list[Attempt], others: dict[int, dict[str, Any]] | None = None) -> list[bool | None]:
    calm = {"losses": [3.0, 2.0], "weights": {"w": torch.tensor([1.0])}}
    args = Args(max_steps=12, save_steps=4)
    return [check.passed for check in elastic.checks(calm, attempts, others or {}, args)]


def test_the_checks_fail_for_what_they_are_about() -> None:
    right = [attempt(1, 0), attempt(4, 0), attempt(5, 4), attempt(12, 8)]
    assert verdict(right) == [True, True, True, True]
    assert verdict([*right, attempt(5, 4, weight=1 + 1e-6)]) == [False, True, True, True]
    assert verdict([*right, attempt(9, 4)]) == [True, False, True, True]  # an older checkpoint than the last
    assert verdict([*right, attempt(9, 8, restarts=2)]) == [True, False, True, True]
    result = {"begin": 4, "weights": {"w": torch.tensor([1.001])}}
    assert verdict(right, {4: result}) == [True, True, False, True]


def test_a_job_that_always_dies_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []

    def die(*args: Any) -> Any:
        started.append(1)
        raise WorkerFailed("worker 0 of 2 ended")

    monkeypatch.setattr(workers, "launch", die)
    job = Job(ModelShape(), Training(3, 4, 8, 1, 1e-3, 1e-5, 0), "nowhere", 1)
    with pytest.raises(WorkerFailed):
        elastic.supervise(job, torch.zeros(3, 4, 9), 2, kill_at=2, max_restarts=3)
    assert len(started) == 4


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"kills": 0}, "at least 1"),
        ({"save_steps": 20}, "from 1 to --max_steps"),
        ({"batch_size": 6}, "multiple of 4"),
        ({"learning_rate": 0.0}, "positive"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        Args(**options)


@pytest.mark.slow
def test_a_checkpoint_that_is_not_whole_is_passed_over(tmp_path: Path) -> None:
    training = Training(4, 4, 8, 1, 4e-3, 1e-5, 0)
    job = Job(ModelShape(num_hidden_layers=1), training, str(tmp_path), 2)
    batches = packed_batches(4, 4, 8, 0)
    [calm, *_] = workers.launch(elastic.train, 2, job, batches, None)
    assert calm["begin"] == 0 and len(calm["losses"]) == 4
    (tmp_path / "checkpoint-4" / "complete.json").unlink()  # a kill in the middle of writing
    [again, *_] = workers.launch(elastic.train, 2, dataclasses.replace(job), batches, None)
    assert again["begin"] == 2 and again["losses"] == calm["losses"][2:]
