"""Workers that die, and the supervisor that starts again from the last whole checkpoint."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_systems_workers import workers_below

from llmcore_hf.errors import ConfigError
from llmcore_hf.run_dir import Diverged
from llmcore_hf.systems import data_parallel, elastic, parallel, workers
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


JOB = Job(ModelShape(), Training(3, 4, 8, 1, 1e-3, 1e-5, 0), "nowhere", 1)


def launches(monkeypatch: pytest.MonkeyPatch, *outcomes: Any) -> list[tuple[Any, ...]]:
    """Let the workers end as told, one outcome per start, the last one for all that follow. Returns what they were started with."""
    started: list[tuple[Any, ...]] = []

    def launch(work: Any, n_ranks: int, *args: Any, device: str) -> Any:
        outcome = outcomes[min(len(started), len(outcomes) - 1)]
        started.append((n_ranks, *args))
        if isinstance(outcome, Exception):
            raise outcome
        return [outcome] * n_ranks

    monkeypatch.setattr(workers, "launch", launch)
    return started


DEATH = WorkerFailed("worker 1 of 2 ended before its work was done (SIGKILL)")
END = {"begin": 2, "losses": [3.0, 2.5, 2.0], "weights": {"w": torch.ones(1)}}


def test_a_job_that_always_dies_is_given_up_with_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    started = launches(monkeypatch, DEATH)
    with pytest.raises(WorkerFailed, match=r"given up after 3 restarts.*worker 1 of 2 .*SIGKILL"):
        elastic.supervise(JOB, torch.zeros(3, 4, 9), 2, kill_at=2, max_restarts=3)
    assert len(started) == 4


def test_a_worker_that_nobody_meant_to_kill_is_started_anew(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started = launches(monkeypatch, DEATH, END)
    found = elastic.supervise(JOB, torch.zeros(3, 4, 9), 2)
    assert (found.restarts, found.resumed_at, found.killed_at, len(started)) == (1, [2], 0, 2)
    assert "worker 1 of 2" in (said := capsys.readouterr().out) and "(1 of 3)" in said


def test_only_the_first_workers_are_killed_on_purpose(monkeypatch: pytest.MonkeyPatch) -> None:
    started = launches(monkeypatch, DEATH, END)
    assert elastic.supervise(JOB, torch.zeros(3, 4, 9), 2, kill_at=2).restarts == 1
    assert [args[-1] for args in started] == [2, None]


def test_a_loss_that_is_no_number_ends_the_job_with_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    started = launches(monkeypatch, {**END, "losses": [3.0, float("nan")]})
    with pytest.raises(Diverged, match=r"nan in step 2: lower --learning_rate \(0.001\)"):
        elastic.supervise(JOB, torch.zeros(3, 4, 9), 2)
    assert len(started) == 1


class Here:
    """What `elastic.run` asks of a run directory."""

    def __init__(self) -> None:
        self.checks: list[Any] = []
        self.rows: list[dict[str, Any]] = []
        self.files: dict[str, Any] = {}

    def log(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def write(self, name: str, content: Any) -> None:
        self.files[name] = content


def test_every_run_of_the_lesson_outlives_the_death_of_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the undisturbed one, and those that read its checkpoint: with one and with four ranks."""
    started: list[int] = []

    def launch(work: Any, n_ranks: int, job: Job, batches: Any, kill_at: int | None, device: str) -> Any:
        started.append(n_ranks)
        if len(started) % 2:  # every other start ends early
            raise DEATH
        Path(job.folder, "checkpoint-2").mkdir(parents=True, exist_ok=True)
        return [{**END, "losses": [3.0, 2.5, 2.0]}] * n_ranks

    monkeypatch.setattr(workers, "launch", launch)
    args = Args(max_steps=3, save_steps=2, kills=1)
    run_dir: Any = Here()
    elastic.run(SimpleNamespace(part=lambda kind: args), run_dir)  # type: ignore[arg-type]
    assert started == [2, 2, 2, 2, 1, 1, 4, 4]
    assert [row["loss"] for row in run_dir.rows] == [3.0, 2.5, 2.0]
    assert list(run_dir.files) == ["results.json", "training_curves.png"]


def test_a_weight_that_is_no_number_stands_as_null_in_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(work: Any, n_ranks: int, job: Job, batches: Any, kill_at: int | None, device: str) -> Any:
        Path(job.folder, "checkpoint-2").mkdir(parents=True, exist_ok=True)
        weight = torch.full((1,), float("nan") if kill_at else 1.0)
        return [{**END, "weights": {"w": weight}}] * n_ranks

    monkeypatch.setattr(workers, "launch", launch)
    run_dir: Any = Here()
    elastic.run(SimpleNamespace(part=lambda kind: Args(max_steps=3, save_steps=2, kills=1)), run_dir)  # type: ignore[arg-type]
    assert "NaN" not in run_dir.files["results.json"]
    assert json.loads(run_dir.files["results.json"])["killed"][0]["apart"] is None
    assert run_dir.checks[0].passed is False


@pytest.mark.parametrize("rank", [0, 1])
def test_a_checkpoint_counts_when_every_rank_has_written_its_shard(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rank: int
) -> None:
    """First the shards, which all ranks wait for; then the mark, by the first rank; and no rank goes on before it."""
    order: list[str] = []

    def write(state: Any, storage_writer: Any) -> None:
        storage_writer.path.mkdir()
        order.append("shards")

    monkeypatch.setattr(elastic, "get_state_dict", lambda model, optimizer: ({}, {}))
    monkeypatch.setattr(elastic.dcp, "save", write)
    monkeypatch.setattr(elastic, "mark_complete", lambda checkpoint, step: order.append(f"mark {step}"))
    monkeypatch.setattr(elastic.dist, "get_rank", lambda: rank)
    monkeypatch.setattr(elastic.dist, "barrier", lambda: order.append("barrier"))
    elastic.save(SimpleNamespace(model=None, optimizer=None), tmp_path / "checkpoint-2", [3.0, 2.5])  # type: ignore[arg-type]
    assert order == (["shards", "mark 2", "barrier"] if rank == 0 else ["shards", "barrier"])


def test_the_loss_that_is_told_is_the_mean_over_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_parallel.dist, "all_reduce", lambda total: total.add_(5.0))  # the other rank's
    monkeypatch.setattr(data_parallel.dist, "get_world_size", lambda: 2)
    assert data_parallel.mean_over_ranks(torch.tensor(3.0)) == 4.0


def test_a_weight_that_is_no_number_is_no_equality() -> None:
    right = [attempt(1, 0), attempt(4, 0)]
    assert verdict([*right, attempt(5, 4, weight=float("nan"))])[0] is False


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"kills": 0}, "at least 1"),
        ({"save_steps": 20}, "from 1 to --max_steps"),
        ({"batch_size": 6}, "multiple of 4"),
        ({"learning_rate": 0.0}, "positive"),
        ({"learning_rate": 1e38}, "at most 3.4e.37"),
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
    assert again["begin"] == 2 and again["losses"] == calm["losses"]


@pytest.mark.slow
def test_a_worker_that_is_killed_from_outside_costs_the_steps_since_the_last_checkpoint(tmp_path: Path) -> None:
    """Nobody told the job: a thread kills one of its processes when the first checkpoint is there."""
    training = Training(60, 4, 8, 1, 4e-3, 1e-5, 0)
    job = Job(ModelShape(num_hidden_layers=1), training, str(tmp_path / "killed"), 20)
    batches = packed_batches(60, 4, 8, 0)

    def kill() -> None:
        while not (tmp_path / "killed" / "checkpoint-20" / "complete.json").exists():
            time.sleep(0.002)
        workers_below(os.getpid())[-1].kill()

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    found = elastic.supervise(job, batches, 2)
    killer.join(timeout=30)
    calm = elastic.supervise(dataclasses.replace(job, folder=str(tmp_path / "calm")), batches, 2)
    assert (calm.restarts, calm.resumed_at) == (0, [0])
    assert found.restarts == 1 and found.resumed_at[0] in (20, 40)
    assert found.result["losses"] == calm.result["losses"]
    assert parallel.largest_difference(found.result["weights"], calm.result["weights"]) == 0
