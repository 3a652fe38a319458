"""What the learner did: answers to quiz items and results of exercises, in one readable JSON file.

The file is replaced whole under a lock, so a kill at any moment leaves the former or the new one, and two processes lose
nothing of each other. A file that cannot be read is kept under another name and reported, never overwritten.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llmcore_hf.durability import write_atomically
from llmcore_hf.errors import UserError
from llmcore_hf.learning.texts import say

SCHEMA_VERSION = 1
LOCK_SECONDS = 20
PLACE = "LLMCORE_HF_STATE"  # environment variable: another file


def state_file() -> Path:
    """`$LLMCORE_HF_STATE`, else `llmcore_hf/state.json` in the user's data directory."""
    if given := os.environ.get(PLACE):
        return Path(given).expanduser()
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "llmcore_hf" / "state.json"


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def read() -> dict[str, Any]:
    """The state: `answers`, a list of `{item, right, at}` in the order they were given, and `exercises`, id -> result."""
    if not state_file().exists():
        return _empty()
    with _locked() as file:
        return _load(file)


def record_answer(item: str, right: bool) -> None:
    """Add one answer to a quiz item."""
    with _changing() as state:
        state["answers"].append({"item": item, "right": right, "at": now()})


def record_exercise(exercise: str, passed: bool) -> None:
    """Keep the result of an exercise. Once passed, it stays passed."""
    with _changing() as state:
        before = state["exercises"].get(exercise, {})
        if not before.get("passed"):
            state["exercises"][exercise] = {"passed": passed, "at": now()}


@contextlib.contextmanager
def _changing() -> Iterator[dict[str, Any]]:
    with _locked() as file:
        state = _load(file)
        yield state
        write_atomically(file, json.dumps(state, ensure_ascii=False, indent=1) + "\n")


@contextlib.contextmanager
def _locked() -> Iterator[Path]:
    """Raises `UserError` when the file cannot be locked or written."""
    from filelock import FileLock, Timeout

    file = state_file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock", timeout=LOCK_SECONDS):
            yield file
    except Timeout:
        raise UserError(
            say(
                zh=f"{file} 被另一个进程锁了 {LOCK_SECONDS} 秒：结束它再试",
                en=f"{file} has been locked by another process for {LOCK_SECONDS} s: end it and try again",
            )
        ) from None
    except OSError as error:
        why = error.strerror or error
        raise UserError(
            say(
                zh=f"{file} 不能写（{why}）：用环境变量 {PLACE} 指定另一个文件",
                en=f"{file} cannot be written ({why}): name another file in {PLACE}",
            )
        ) from None


def _empty() -> dict[str, Any]:
    return {"schema_version": SCHEMA_VERSION, "answers": [], "exercises": {}}


def _load(file: Path) -> dict[str, Any]:
    """The content of the file; an empty state when there is none, or when it had to be put aside."""
    if not file.exists():
        return _empty()
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(state, dict) and isinstance(state.get("schema_version"), int) and state["schema_version"] > 0:
            if state["schema_version"] > SCHEMA_VERSION:
                raise UserError(
                    say(
                        zh=f"{file} 是更新版本的程序写的：请升级程序，或用 {PLACE} 指定另一个文件",
                        en=f"{file} was written by a newer version of this program: update it, or name another file in {PLACE}",
                    )
                )
            _check(state)
            return dict(state)
        raise ValueError("it has no schema_version")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        _put_aside(file, error)
        return _empty()


def _check(state: dict[str, Any]) -> None:
    if not (isinstance(state["answers"], list) and isinstance(state["exercises"], dict)):
        raise ValueError("answers is no list, or exercises no mapping")
    for answer in state["answers"]:
        if not (isinstance(answer["item"], str) and isinstance(answer["right"], bool)):
            raise ValueError("an answer is not of the form {item, right, at}")
        if datetime.fromisoformat(answer["at"]).tzinfo is None:
            raise ValueError("the time of an answer has no time zone")
    for result in state["exercises"].values():
        if not isinstance(result["passed"], bool):
            raise ValueError("the result of an exercise is not of the form {passed, at}")


def _put_aside(file: Path, error: Exception) -> None:
    stamp, number = f"{datetime.now(UTC):%Y%m%d-%H%M%S}", 0
    while (backup := file.with_name(f"{file.stem}.damaged-{stamp}-{number}{file.suffix}")).exists():
        number += 1
    os.replace(file, backup)
    print(
        say(
            zh=f"{file} 已损坏（{error}）：原文件留作 {backup}，新文件从空白开始",
            en=f"{file} is damaged ({error}): kept as {backup}; a new one begins empty",
        ),
        file=sys.stderr,
    )
