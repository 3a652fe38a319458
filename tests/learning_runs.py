"""Runs for the tests of the course: what real toy runs (seed 42) left behind, in `tests/runs/`, whole or changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmcore_hf import registry
from llmcore_hf.learning import brief, evidence
from llmcore_hf.learning.evidence import Run

RUNS = Path(__file__).resolve().parent / "runs"
WITH_BRIEF = [module.name for module in registry.MODULES if brief.load(module.name)]


def recorded(name: str) -> Run:
    """A run as it was recorded. `dpo_sigmoid` is a failed one: likelihood displacement."""
    return evidence.read(RUNS / name)


def place(name: str, root: Path, change: Callable[[dict[str, Any]], Any] = lambda summary: None) -> Path:
    """Put a recorded run, with its summary changed, below `root` as the latest run of its module."""
    summary = json.loads((RUNS / name / "summary.json").read_text(encoding="utf-8"))
    change(summary)
    folder = root / "output" / summary["module"] / summary["run_id"]
    shutil.copytree(RUNS / name, folder)
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    link = folder.parent / "latest"
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name)
    return folder


def put(value: dict[str, Any], path: list[Any], new: Any) -> None:
    """Set the value at a claim's path; `DELETE` removes it."""
    head, *rest = path
    target: Any = {check["id"]: check for check in value["checks"]} if head == "checks" else value[head]
    for key in rest[:-1]:
        target = target[key]
    if new is DELETE:
        del target[rest[-1]]
    else:
        target[rest[-1]] = new


DELETE = object()


def check_brief(module: str, folder: Path) -> None:
    """The brief of a fresh toy run: every claim of its result holds, and it takes three minutes to say."""
    source, run = brief.require(module, "en"), evidence.read(folder, module)
    assert [claim.id for claim in source.result if claim.found(run) is None] == []
    said = "".join(brief.spoken(source, run, "zh").values())
    assert 640 <= brief.spoken_length(said, "zh") <= 750
