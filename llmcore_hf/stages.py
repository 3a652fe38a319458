"""Modules that run other modules one after the other, each in a directory of its own, and put their evidence together."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmcore_hf import distributed, registry
from llmcore_hf.config import Config
from llmcore_hf.durability import Interrupted, last_complete
from llmcore_hf.errors import UserError
from llmcore_hf.run_dir import Diverged, RunDirectory, carry_out, is_metric


def run_stage(stage: str, config: Config, folder: Path, run_dir: RunDirectory) -> None:
    """Run a stage to its end, from its last checkpoint when it has one; nothing when it has ended before.

    Raises:
        Interrupted, KeyboardInterrupt: the run was asked to stop.
        Diverged: the stage diverged.
        UserError: the stage failed; the message is the stage's own.
    """
    if distributed.broadcast(_has_ended(folder)):
        say(f"stage {stage}: done before ({folder})")
        return
    checkpoint = distributed.broadcast(last_complete(folder)[0] if folder.is_dir() else None)
    if distributed.is_main_process():
        if checkpoint is None:
            shutil.rmtree(folder, ignore_errors=True)  # it had saved nothing yet
        folder.mkdir(exist_ok=True)
    say(f"stage {stage}: " + (f"goes on from {checkpoint}" if checkpoint else "begins"))
    stage_run = RunDirectory(folder, registry.get(stage), config, [])
    stage_run.command = run_dir.command
    if checkpoint:
        stage_run.resume_from(checkpoint)
    if carry_out(stage_run) == 0:
        distributed.broadcast(None)  # what comes next reads what the main process has written by now
        return
    if stage_run.stop.requested:
        run_dir.stop.signal = stage_run.stop.signal
        saved = last_complete(folder)[0]
        if saved:
            raise Interrupted(int(saved.name.removeprefix("checkpoint-")), saved)
        raise KeyboardInterrupt
    summary = read_summary(folder)
    message = f"stage {stage} {summary['status']}: {summary['error']} ({folder / 'summary.json'})"
    raise (Diverged if summary["status"] == "diverged" else UserError)(message)


def _has_ended(folder: Path) -> bool:
    try:
        return read_summary(folder)["status"] == "ok"
    except (OSError, ValueError):
        return False


def read_summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return found


def read_history(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "log_history.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def say(text: str) -> None:
    if distributed.is_main_process():
        print(text, flush=True)


def merged_history(folders: Mapping[str, Path]) -> list[dict[str, Any]]:
    """What all stages logged about their methods; the steps go on, and each name begins with its stage."""
    rows, offset = [], 0
    for stage, folder in folders.items():
        found = read_history(folder)
        for row in found:
            named = {f"{stage}/{name}": value for name, value in row.items() if is_metric(name)}
            if named:
                rows.append({"step": offset + row["step"], **named})
        offset += max(row["step"] for row in found)
    return rows


def merged_eval(summaries: Mapping[str, Any]) -> dict[str, Any]:
    """The `eval` blocks of all stages in one, each metric named after its stage."""
    return {
        part: {
            f"{stage}/{name}": value
            for stage, summary in summaries.items()
            for name, value in summary["eval"].get(part, {}).items()
        }
        for part in ("before", "after", "delta", "ci95", "n")
    }
