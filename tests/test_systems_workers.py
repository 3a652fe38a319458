"""Worker processes: what they return, what happens when one fails, and that none is left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from conftest import ROOT

from llmcore_hf.errors import UserError
from llmcore_hf.systems import workers
from llmcore_hf.systems.workers import WorkerFailed


def add_up(x: torch.Tensor) -> dict[str, Any]:
    total = x + dist.get_rank()
    dist.all_reduce(total)
    return {"rank": dist.get_rank(), "size": dist.get_world_size(), "total": total, "env": os.environ["WORLD_SIZE"]}


def raise_in_rank_1() -> None:
    if dist.get_rank() == 1:
        raise ValueError("rank 1 does not like this")
    dist.barrier()


def die_in_rank_1() -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def wait_for_ever() -> None:
    if dist.get_rank() == 0:
        dist.recv(torch.zeros(1), src=1)
    time.sleep(3600)


def workers_below(pid: int) -> list[psutil.Process]:
    """The workers: children of the server that forks them, which is itself a child of `pid`. What has just ended is left out."""
    found = []
    for server in psutil.Process(pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):
            found += server.children()
    return found


def no_worker_lives() -> bool:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if not workers_below(os.getpid()):
            return True
        time.sleep(0.1)
    return False


class Ended:
    """Workers that have ended as told, in place of real ones."""

    def __init__(self, error: Exception, *exit_codes: int) -> None:
        self.error = error
        self.processes = [SimpleNamespace(exitcode=n, is_alive=lambda: False, join=lambda: None) for n in exit_codes]

    def join(self, timeout: float, grace_period: float) -> bool:
        raise self.error


def raised(rank: int) -> torch.multiprocessing.ProcessRaisedException:
    return torch.multiprocessing.ProcessRaisedException("its traceback", rank, 4711)


def ended(context: Any, folder: Path) -> None:
    workers._join(context, time.monotonic() + 9, 9, folder)


def test_why_a_worker_did_not_get_into_the_group_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "1.txt").write_text("did not get into the process group: no address")
    with pytest.raises(UserError, match=r"^worker 1 of 2 did not get into the process group: no address$") as failure:
        ended(Ended(raised(1), -signal.SIGTERM, 1), tmp_path)
    assert not isinstance(failure.value, WorkerFailed)  # a supervisor would start them again


def test_the_worker_that_was_killed_is_named_not_the_one_that_lost_its_connection(tmp_path: Path) -> None:
    with pytest.raises(WorkerFailed, match=r"worker 1 of 3 .*\(SIGKILL\)"):
        ended(Ended(raised(0), 1, -signal.SIGKILL, -signal.SIGTERM), tmp_path)


def test_a_mistake_in_the_work_keeps_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="its traceback"):
        ended(Ended(raised(0), 1, -signal.SIGTERM), tmp_path)


def test_a_network_interface_that_is_not_there_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, one_thread: None
) -> None:
    """The worker itself, in this process: what it writes down is what `_join` tells."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "set by the worker, and put back by this")
    monkeypatch.setattr(workers.signal, "signal", lambda *args: None)
    monkeypatch.setattr(workers, "_leave_with_parent", lambda: None)
    store = dist.TCPStore(workers.HOST, 0, is_master=True, wait_for_workers=False)
    with pytest.raises((RuntimeError, ValueError), match="nosuch0"):
        workers._worker(0, add_up, 1, store.port, str(tmp_path), "cpu", 9.0, ())
    told = (tmp_path / "0.txt").read_text()
    assert (
        told.startswith("did not get into the process group: Unable to find address for: nosuch0. ")
        and len(told.splitlines()) == 1
    )
    assert not dist.is_initialized() and "nosuch0 (GLOO_SOCKET_IFNAME" in told


@pytest.mark.slow
def test_workers_form_one_group_and_what_they_return_comes_by_rank() -> None:
    found = workers.launch(add_up, 3, torch.tensor([1.0, 2.0]))
    assert [f["rank"] for f in found] == [0, 1, 2] and {f["size"] for f in found} == {3}
    assert all(torch.equal(f["total"], torch.tensor([6.0, 9.0])) and f["env"] == "3" for f in found)
    assert no_worker_lives()


@pytest.mark.slow
def test_what_a_worker_raises_is_raised_with_its_traceback_and_the_others_end() -> None:
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="rank 1 does not like this"):
        workers.launch(raise_in_rank_1, 2)
    assert no_worker_lives()


@pytest.mark.slow
def test_a_killed_worker_ends_the_others_within_seconds() -> None:
    start = time.monotonic()
    with pytest.raises(WorkerFailed, match=r"worker 1 of 2 .*SIGKILL"):
        workers.launch(die_in_rank_1, 2)
    assert time.monotonic() - start < 60 and no_worker_lives()


@pytest.mark.slow
def test_workers_that_hang_are_stopped() -> None:
    with pytest.raises(WorkerFailed, match="no result after 3 s"):
        workers.launch(wait_for_ever, 2, timeout=3)
    assert no_worker_lives()


LESSON = """
import signal
import sys
sys.path.insert(0, {tests!r})
signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background of a shell ignores it
from llmcore_hf.systems import workers
from test_systems_workers import wait_for_ever
if __name__ == "__main__":
    print("started", flush=True)
    workers.launch(wait_for_ever, 2)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
@pytest.mark.slow
def test_workers_end_with_the_process_that_started_them(tmp_path, number: signal.Signals) -> None:
    script = tmp_path / "lesson.py"
    script.write_text(LESSON.format(tests=str(ROOT / "tests")))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env
    )
    deadline = time.monotonic() + 150
    while len(found := workers_below(process.pid)) < 2:
        assert time.monotonic() < deadline and process.poll() is None, "the workers did not start"
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(number)
    process.wait(timeout=60)
    _, alive = psutil.wait_procs(found, timeout=60)
    for orphan in alive:
        orphan.kill()
    assert not alive
