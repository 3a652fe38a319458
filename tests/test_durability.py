"""Whole files, marked checkpoints, stopping, and disks that fail: everything that needs no training."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

from llmcore_hf import durability, resume, run_dir
from llmcore_hf.config import Config
from llmcore_hf.durability import (
    MARKER,
    Interrupted,
    StopRequest,
    checkpoints,
    incompleteness,
    last_complete,
    mark_complete,
    move_into_place,
    read_marker,
    storage_trouble,
    write_atomically,
)
from llmcore_hf.errors import ConfigError, UserError
from llmcore_hf.registry import Module
from llmcore_hf.run_dir import RunDirectory, execute

FAKE = Module("fake", 1, 1, "假", "Fake", "fake_lesson")


def make_checkpoint(run: Path, step: int, mark: bool = True) -> Path:
    folder = run / f"checkpoint-{step}"
    (folder / "shards").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"12345")
    (folder / "shards" / "optimizer.pt").write_bytes(b"123")
    if mark:
        mark_complete(folder, step)
    return folder


def bare_run(path: Path, **values: object) -> RunDirectory:
    options = Config("fake", False, {"seed": 1, **values}, {}, parts=())
    return RunDirectory(path, FAKE, options, [])


def test_nothing_of_it_needs_torch() -> None:
    code = "import sys, llmcore_hf.durability, llmcore_hf.resume; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.strip() == "False", result.stderr


# ---------------------------------------------------------------- whole files


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    write_atomically(tmp_path / "a.txt", "old")

    def refuse(*args: object) -> None:
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(durability.os, call, refuse)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(tmp_path / "a.txt", "new content")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.txt", "old")]


def test_a_file_limit_of_the_system_leaves_the_old_file(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a.txt", "old")
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, former[1]))
    try:
        with pytest.raises(OSError) as caught:
            write_atomically(tmp_path / "a.txt", "x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
    assert "ulimit -f" in str(storage_trouble(caught.value, tmp_path))
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.txt", "old")]


def test_files_are_moved_into_place_over_older_ones(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("old")
    (tmp_path / ".model" / "adapter").mkdir(parents=True)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "old").write_text("old")
    (tmp_path / ".model" / "model").write_text("new")
    (tmp_path / ".model" / "adapter" / "weights").write_text("new")
    move_into_place(tmp_path / ".model")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "model"]
    assert (tmp_path / "model").read_text() == "new"
    assert [p.name for p in (tmp_path / "adapter").iterdir()] == ["weights"]


@pytest.mark.parametrize("finish", [lambda folder: mark_complete(folder, 5), move_into_place])
def test_files_are_on_the_disk_before_they_are_marked_or_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finish
) -> None:
    folder = make_checkpoint(tmp_path, 5, mark=False)
    files = {path.stat().st_ino for path in folder.rglob("*") if path.is_file()}
    calls: list[int | None] = []  # the file that is written out, None for a rename
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(durability.os, "fsync", lambda number: calls.append(os.fstat(number).st_ino) or fsync(number))
    monkeypatch.setattr(durability.os, "replace", lambda *names: calls.append(None) or replace(*names))
    finish(folder)
    assert files <= set(calls[: calls.index(None)])


# ---------------------------------------------------------------- checkpoints


def test_a_marked_checkpoint_is_complete(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, 5, mark=False)
    (folder / "shards" / MARKER).write_text("not the marker")
    mark_complete(folder, 5, data_fingerprint="f")
    assert incompleteness(folder) is None
    assert read_marker(folder) == {
        "step": 5,
        "data_fingerprint": "f",
        "files": {"model.safetensors": 5, f"shards/{MARKER}": 14, "shards/optimizer.pt": 3},
    }
    mark_complete(folder, 5)  # the marker does not count itself
    assert incompleteness(folder) is None


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda c: (c / MARKER).unlink(), "no complete.json"),
        (lambda c: (c / MARKER).write_text('{"step": 5, "fi'), "no complete.json"),
        (lambda c: (c / MARKER).write_text("[]"), "no complete.json"),
        (lambda c: (c / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda c: (c / "model.safetensors").write_bytes(b"123"), "model.safetensors has 3 of 5 bytes"),
        (lambda c: (c / "model.safetensors").write_bytes(b"1234567"), "model.safetensors has 7 of 5 bytes"),
        (lambda c: shutil.rmtree(c / "shards"), "shards/optimizer.pt is missing"),
        (lambda c: mark_complete(c, 5, weights_only=True), "--save_only_model"),
    ],
)
def test_a_damaged_checkpoint_says_what_it_lacks(tmp_path: Path, damage, reason: str) -> None:
    folder = make_checkpoint(tmp_path, 5)
    damage(folder)
    assert reason in str(incompleteness(folder))


def test_checkpoints_are_ordered_by_number(tmp_path: Path) -> None:
    for step in (10, 9, 100):
        make_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-7").write_text("a file")
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]


def test_the_last_complete_checkpoint_is_found_behind_broken_ones(tmp_path: Path) -> None:
    assert last_complete(tmp_path) == (None, {}) == last_complete(tmp_path / "missing")
    make_checkpoint(tmp_path, 3)
    whole = make_checkpoint(tmp_path, 5)
    broken = [make_checkpoint(tmp_path, 7, mark=False), make_checkpoint(tmp_path, 9, mark=False)]
    found, passed_over = last_complete(tmp_path)
    assert found == whole and list(passed_over) == broken[::-1]


def config_of(**values: object) -> Config:
    return Config("fake", False, dict(values), {}, parts=())


def test_last_passes_over_a_broken_checkpoint_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = make_checkpoint(tmp_path, 5)
    broken = make_checkpoint(tmp_path, 7, mark=False)
    resume.check(tmp_path, "last", FAKE, config_of())
    assert resume.find(tmp_path, "last") == whole
    err = capsys.readouterr().err
    assert err.count("passed over") == 1 and str(broken) in err and "no complete.json" in err


def test_a_broken_checkpoint_that_is_named_is_refused_with_the_one_to_take(tmp_path: Path) -> None:
    whole, broken = make_checkpoint(tmp_path, 5), make_checkpoint(tmp_path, 7, mark=False)
    with pytest.raises(ConfigError) as caught:
        resume.find(tmp_path, str(broken))
    assert "no complete.json" in str(caught.value) and f"the newest complete one is {whole}" in str(caught.value)


def test_without_a_complete_checkpoint_the_reasons_are_told(tmp_path: Path) -> None:
    broken = make_checkpoint(tmp_path, 7, mark=False)
    with pytest.raises(ConfigError) as caught:
        resume.find(tmp_path, "last")
    assert str(broken) in str(caught.value) and "start again" in str(caught.value)


def test_a_checkpoint_is_not_continued_in_another_runs_directory(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "b", 9)
    with pytest.raises(ConfigError, match="another run"):
        resume.check(tmp_path / "b", str(make_checkpoint(tmp_path / "a", 5)), FAKE, config_of())
    (tmp_path / "new").mkdir()
    resume.check(tmp_path / "new", str(tmp_path / "a" / "checkpoint-5"), FAKE, config_of())


@pytest.mark.parametrize(
    ("summary", "refused"),
    [('{"status": "ok"}', True), ('{"status": "interrupted"}', False), ('{"status": "failed"}', False), (None, True)],
)
def test_the_last_step_is_resumed_only_when_the_end_is_missing(
    tmp_path: Path, summary: str | None, refused: bool
) -> None:
    make_checkpoint(tmp_path, 5)
    if summary:
        (tmp_path / "summary.json").write_text(summary)
    if refused:
        with pytest.raises(ConfigError, match="raise --max_steps"):
            resume.check(tmp_path, "last", FAKE, config_of(max_steps=5))
    else:
        resume.check(tmp_path, "last", FAKE, config_of(max_steps=5))
    with pytest.raises(ConfigError, match="raise --max_steps"):
        resume.check(tmp_path, "last", FAKE, config_of(max_steps=4))


def test_changed_options_are_named_and_cadence_is_not() -> None:
    former = {
        "learning_rate": 0.1,
        "weight_decay": 0.1,
        "eval_steps": 5,
        "save_steps": 5,
        "logging_steps": 1,
        "max_steps": 4,
    }
    values = {name: 2 * value for name, value in former.items()} | {"new": 1, "seed": 1}
    always = ["--learning_rate 0.1 -> 0.2", "--weight_decay 0.1 -> 0.2", "--eval_steps 5 -> 10"]
    for schedule in ("linear", "cosine", "constant", "constant_with_warmup"):
        by_steps = [] if "constant" in schedule else ["--max_steps 4 -> 8"]
        found = resume.changes({**former, "seed": 1}, config_of(**values, lr_scheduler_type=schedule))
        assert found == always + by_steps, schedule


# ---------------------------------------------------------------- the log history of a run that was killed


def test_a_torn_last_line_and_a_former_end_are_left_out(tmp_path: Path) -> None:
    rows = [{"step": 1, "loss": 3.0}, {"step": 2, "train_runtime": 1.0}, {"step": 2, "loss": 2.0}, {"step": 3}]
    (tmp_path / "log_history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 2, "lo')
    run = bare_run(tmp_path)
    run.rewind(2, tmp_path)
    assert run.history == [rows[0], rows[2]]
    assert [json.loads(line) for line in (tmp_path / "log_history.jsonl").read_text().splitlines()] == run.history


def test_a_run_that_goes_on_in_another_directory_takes_the_history_along(tmp_path: Path) -> None:
    former, new = tmp_path / "former", tmp_path / "new"
    former.mkdir()
    new.mkdir()
    run = bare_run(new)
    (former / "log_history.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n')
    run.rewind(1, former)
    assert run.history == [{"step": 1, "loss": 3.0}]
    assert (run.path / "log_history.jsonl").read_text() == '{"step": 1, "loss": 3.0}\n'
    assert len((former / "log_history.jsonl").read_text().splitlines()) == 2


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    (tmp_path / "log_history.jsonl").write_text('{"step": 1}\n{"step"\n{"step": 2}\n')
    with pytest.raises(UserError, match="line 2 is not a row"):
        bare_run(tmp_path).rewind(2, tmp_path)


# ---------------------------------------------------------------- stopping


@pytest.fixture(autouse=True)
def handlers_come_back() -> Iterator[None]:
    before = [signal.getsignal(number) for number in durability.SIGNALS]
    yield
    after = [signal.getsignal(number) for number in durability.SIGNALS]
    for number, handler in zip(durability.SIGNALS, before, strict=True):
        signal.signal(number, handler)
    assert after == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_while_training_a_signal_only_asks(number: int, code: int, capfd: pytest.CaptureFixture[str]) -> None:
    with StopRequest() as stop:
        with stop.deferring():
            assert not stop.requested
            os.kill(os.getpid(), number)
            assert stop.requested
            os.kill(os.getpid(), signal.SIGTERM)  # a launcher passes it on
        assert stop.exit_code == code
    err = capfd.readouterr().err
    assert err.count("stopping after this step and saving a checkpoint") == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_elsewhere_a_signal_ends_the_run(number: int, code: int) -> None:
    with StopRequest() as stop:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
        assert stop.exit_code == code


ONE_LONG_CALL = """
import os, signal, sys, time
from llmcore_hf.durability import StopRequest
with StopRequest() as stop, stop.deferring():
    os.kill(os.getpid(), signal.SIGINT)
    print("asked", flush=True)
    sum(range(10**11))  # one call into C: no handler of Python's would run before it ends
"""


def test_a_second_ctrl_c_leaves_at_once() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", ONE_LONG_CALL], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "asked\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=5)
    assert process.returncode == -signal.SIGINT and "Traceback" not in err


def test_a_child_leaves_the_decision_to_its_parent(capfd: pytest.CaptureFixture[str]) -> None:
    with StopRequest() as stop, stop.deferring():
        child = os.fork()
        if child == 0:  # a worker of a data loader gets the Ctrl-C too
            os.kill(os.getpid(), signal.SIGINT)
            os._exit(7 if stop.requested else 0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        child = os.fork()
        if child == 0:  # how a pool ends its workers
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        assert not stop.requested
    assert capfd.readouterr().err == ""


def test_outside_the_main_thread_nothing_is_touched() -> None:
    import threading

    seen: list[object] = []

    def work() -> None:
        with StopRequest():
            seen.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def executed(monkeypatch: pytest.MonkeyPatch, path: Path, work) -> tuple[int, RunDirectory]:
    """A run of `work`, a loop that uses no Trainer."""
    import types

    code = types.ModuleType("fake_lesson")
    code.run = lambda config, run: work(run)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fake_lesson", code)
    runs: list[RunDirectory] = []
    monkeypatch.setattr(run_dir, "RunDirectory", lambda *args: runs.append(RunDirectory(*args)) or runs[0])
    options = {"seed": 1, "output_dir": str(path), "overwrite_output_dir": False, "resume_from_checkpoint": None}
    module = FAKE
    return execute(module, Config("fake", False, options, dict.fromkeys(options, "x"), parts=()), []), runs[0]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_loop_of_our_own_stops_with_a_checkpoint(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: int, code: int
) -> None:
    def work(run: RunDirectory) -> None:
        with run.stop.deferring():
            for step in range(1, 10):
                if step == 3:
                    os.kill(os.getpid(), number)
                if run.stop.requested:
                    raise Interrupted(step, make_checkpoint(run.path, step))

    returned, _ = executed(monkeypatch, tmp_path / "run", work)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (returned, summary["status"]) == (code, "interrupted")
    assert "after step 3; saved" in summary["error"] and "--resume_from_checkpoint last" in summary["error"]
    assert last_complete(tmp_path / "run")[0] == tmp_path / "run" / "checkpoint-3"


def test_a_stop_outside_training_says_that_there_is_nothing_to_go_on_from(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    returned, _ = executed(monkeypatch, tmp_path / "run", lambda run: os.kill(os.getpid(), signal.SIGTERM))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (returned, summary["status"]) == (143, "interrupted")
    assert "outside training" in summary["error"] and "start again" in summary["error"]


# ---------------------------------------------------------------- disks


def os_error(number: int, file: Path | None = None) -> OSError:
    return OSError(number, os.strerror(number), str(file)) if file else OSError(number, os.strerror(number))


def test_a_disk_is_recognised_in_the_errors_of_the_system_and_of_the_libraries(tmp_path: Path) -> None:
    from safetensors import SafetensorError

    safetensors = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    torch = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")
    for error, text in [
        (os_error(errno.ENOSPC), "the disk is full"),
        (os_error(errno.EDQUOT), "quota"),
        (os_error(errno.EROFS, tmp_path / "x"), "read-only"),
        (os_error(errno.EACCES, tmp_path / "x"), "not permitted"),
        (os_error(errno.ENOENT, tmp_path / "x" / "y"), "is gone"),
        (safetensors, "the disk is full"),
        (torch, "disk is full, or"),
    ]:
        assert text in str(storage_trouble(error, tmp_path)), error
        wrapped = UserError("cannot go on")
        wrapped.__cause__ = error
        assert text in str(storage_trouble(wrapped, tmp_path))
    assert f"MB free in {tmp_path}" in str(storage_trouble(os_error(errno.ENOSPC), tmp_path))
    in_a_cache = os_error(errno.ENOSPC, tmp_path.parent / "file")  # which may lie on another disk
    assert f"MB free in {tmp_path.parent})" in str(storage_trouble(in_a_cache, tmp_path))


def test_other_errors_are_not_the_disks(tmp_path: Path) -> None:
    for error in (
        os_error(errno.ENOENT, tmp_path.parent / "dataset.json"),
        os_error(errno.EACCES, tmp_path.parent / "dataset.json"),
        RuntimeError("shape mismatch"),
        os_error(errno.ECONNREFUSED),
    ):
        assert storage_trouble(error, tmp_path) is None, error


def test_whatever_fails_in_a_directory_that_is_gone_is_told_as_that(tmp_path: Path) -> None:
    assert "is gone" in str(storage_trouble(RuntimeError("odd"), tmp_path / "run"))


def test_on_another_machine_the_directory_need_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert storage_trouble(RuntimeError("odd"), tmp_path / "run") is None


@pytest.mark.parametrize("then", ["log", "write", "check_exists"])
def test_a_directory_that_vanishes_is_told_once_and_not_brought_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], then: str
) -> None:
    def work(run: RunDirectory) -> None:
        shutil.rmtree(run.path)
        {
            "log": lambda: run.log({"step": 1}),
            "write": lambda: run.write("a", "b"),
            "check_exists": run.check_exists,
        }[then]()

    code, _ = executed(monkeypatch, tmp_path / "run", work)
    err = capsys.readouterr().err
    assert code == 1 and not (tmp_path / "run").exists()
    assert err.count("is gone") == 1 and "Traceback" not in err


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KB; only root may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", folder], capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_one_message_and_nothing_is_half_written(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, run = executed(monkeypatch, small_disk / "run", lambda run: run.write("big", "x" * 100_000))
    err = capsys.readouterr().err
    assert code == 1 and err.count("the disk is full") == 1 and "Traceback" not in err
    assert sorted(p.name for p in run.path.iterdir()) == ["resolved_config.yaml", "summary.json"]
    assert json.loads((run.path / "summary.json").read_text())["status"] == "failed"


def test_a_disk_that_takes_not_even_the_summary_is_one_message(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(run: RunDirectory) -> None:
        for number in range(1000):
            (run.path / f"filler-{number}").write_text("x" * 1000)

    code, run = executed(monkeypatch, small_disk / "run", work)
    err = capsys.readouterr().err
    assert code == 1 and err.count("the disk is full") == 1 and "Traceback" not in err
    assert "summary.json could not be written" in err
    assert json.loads((run.path / "summary.json").read_text())["status"] == "interrupted"


def test_a_read_only_disk_is_one_message(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(run: RunDirectory) -> None:
        subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
        run.log({"step": 1, "loss": 1.0})

    code, run = executed(monkeypatch, small_disk / "run", work)
    err = capsys.readouterr().err
    assert code == 1 and err.count("read-only") == 1 and "Traceback" not in err
    assert sorted(p.name for p in run.path.iterdir()) == ["resolved_config.yaml", "summary.json"]
