"""The learner's state survives kills, two processes at once, and damage."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from llmcore_hf.errors import UserError
from llmcore_hf.learning import state

WRITER = (
    f"import sys; sys.path.insert(0, {str(ROOT)!r});"
    "from llmcore_hf.learning import state\n"
    "for i in range(int(sys.argv[2])): state.record_answer(f'{sys.argv[1]}-{i}', True)"
)


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "folder" / "state.json"
    monkeypatch.setenv(state.PLACE, str(path))
    return path


def writer(name: str, n: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", WRITER, name, str(n)], env=os.environ)


def test_answers_and_exercises_are_kept_in_readable_json(file: Path) -> None:
    assert state.read() == {"schema_version": 1, "answers": [], "exercises": {}} and not file.exists()
    state.record_answer("l1-markov", False)
    state.record_exercise("gae", False)
    state.record_exercise("gae", True)
    state.record_exercise("gae", False)
    kept = json.loads(file.read_text(encoding="utf-8"))
    assert kept == state.read()
    assert [(a["item"], a["right"]) for a in kept["answers"]] == [("l1-markov", False)]
    assert kept["exercises"]["gae"]["passed"] is True


def test_two_processes_at_once_lose_nothing() -> None:
    both = [writer(name, 25) for name in ("a", "b")]
    assert [process.wait(timeout=60) for process in both] == [0, 0]
    found = [answer["item"] for answer in state.read()["answers"]]
    assert sorted(found) == sorted(f"{name}-{i}" for name in "ab" for i in range(25))
    for name in "ab":
        assert [item for item in found if item[0] == name] == [f"{name}-{i}" for i in range(25)]


def test_a_kill_at_any_moment_leaves_a_whole_file(file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    seen = 0
    for attempt in range(6):
        process = writer(f"k{attempt}", 100_000)
        before, deadline = seen, time.monotonic() + 30
        while time.monotonic() < deadline and len(state.read()["answers"]) <= before:
            time.sleep(0.005)
        time.sleep(0.013 * attempt)
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=30)
        answers = json.loads(file.read_text(encoding="utf-8"))["answers"]
        assert len(answers) > before
        state.record_answer("after", True)  # the lock of the dead process is gone
        seen = len(state.read()["answers"])
        assert seen == len(answers) + 1
    assert "damaged" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b"{}",
        b'{"schema_version": 1}',
        b'{"schema_version": 1, "answers": [{"item": "x"}], "exercises": {}}',
        b'{"schema_version": 1, "answers": [{"item": "x", "right": true, "at": "yesterday"}], "exercises": {}}',
        b'{"schema_version": 1, "answers": [], "exercises": {"gae": true}}',
        b'{"schema_version": 1, "answers": [], "exercises": []}',
        b'{"schema_version": 1, "answers": {}, "exercises": {}}',
        b'{"schema_version": 0, "answers": [], "exercises": {}}',
        b'{"schema_version": 1, "answers": [{"item": "x", "right": true, "at": "2026-01-01"}], "exercises": {}}',
        b"[" * 100_000,
    ],
)
def test_a_damaged_file_is_reported_and_kept(content: bytes, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.parent.mkdir()
    file.write_bytes(content)
    state.record_answer("l1-markov", True)
    (backup,) = file.parent.glob("state.damaged-*.json")
    said = capsys.readouterr().err
    assert str(file) in said and str(backup) in said and said.count("\n") == 1
    assert backup.read_bytes() == content
    assert [answer["item"] for answer in state.read()["answers"]] == ["l1-markov"]
    file.write_bytes(content)
    assert state.read()["answers"] == []
    assert len(list(file.parent.glob("state.damaged-*.json"))) == 2  # the first backup is still there


def test_the_file_of_a_newer_version_is_left_alone(file: Path) -> None:
    file.parent.mkdir()
    file.write_text('{"schema_version": 2, "answers": "otherwise"}')
    with pytest.raises(UserError, match="更新版本的程序"):
        state.record_answer("l1-markov", True)
    assert file.read_text() == '{"schema_version": 2, "answers": "otherwise"}'


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plain").write_text("")
    monkeypatch.setenv(state.PLACE, str(tmp_path / "plain" / "state.json"))
    with pytest.raises(UserError, match=state.PLACE):
        state.record_answer("l1-markov", True)


def test_the_usual_place_is_the_users_data_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(state.PLACE)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert state.state_file() == tmp_path / "llmcore_hf" / "state.json"
    monkeypatch.delenv("XDG_DATA_HOME")
    assert state.state_file() == Path.home() / ".local" / "share" / "llmcore_hf" / "state.json"
