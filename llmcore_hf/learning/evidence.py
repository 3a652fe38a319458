"""What the learner's own runs left behind: the latest run of a module, and single values of its summary."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from llmcore_hf.errors import UserError
from llmcore_hf.learning.texts import read_yaml, say

SUMMARY, OPTIONS = "summary.json", "resolved_config.yaml"


@dataclass
class Run:
    """One run directory: `summary` as it stands in `summary.json`."""

    path: Path
    summary: dict[str, Any]
    checks: dict[str, dict[str, Any]] = field(init=False)

    def __post_init__(self) -> None:
        self.checks = {check["id"]: check for check in self.summary["checks"]}

    @cached_property
    def options(self) -> dict[str, Any]:
        """The resolved options of the run; empty when the file is missing."""
        file = self.path / OPTIONS
        found = read_yaml(file) if file.is_file() else None
        return found if isinstance(found, dict) else {}

    @property
    def succeeded(self) -> bool:
        """The run came to its end and no check failed. A warning of a learning check is no failure."""
        return self.summary["status"] == "ok" and not self.with_status("fail")

    def with_status(self, status: str) -> list[dict[str, Any]]:
        return [check for check in self.checks.values() if check["status"] == status]

    def look_up(self, path: Sequence[str | int]) -> Any:
        """The value at `path`; None where there is none.

        A path begins with a key of the summary. After `checks` follows a check's id instead of its position, and
        `options` stands for the resolved options, which lie in a file of their own.
        """
        head = path[0]
        value: Any
        if head == "options":
            value = self.options
        else:
            value = self.checks if head == "checks" else self.summary.get(str(head))
        for key in path[1:]:
            try:
                value = value[key]
            except (KeyError, IndexError, TypeError):
                return None
        return value


def read(path: Path, module: str | None = None) -> Run:
    """The run in the directory `path`.

    Raises:
        UserError: there is no readable summary in it, or it is another module's.
    """
    file = path / SUMMARY
    if not file.is_file():
        raise UserError(
            say(
                zh=f"{path} 里没有 {SUMMARY}：请给出一次运行的目录，例如 output/dpo/latest",
                en=f"{path} holds no {SUMMARY}: name the directory of a run, such as output/dpo/latest",
            )
        )
    try:
        summary = json.loads(file.read_text(encoding="utf-8"))
        run = Run(path.resolve(), summary)
        found = summary["module"], summary["status"], summary["run_id"]
        _check(summary)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = f"{type(error).__name__}: {error}"
        raise UserError(
            say(
                zh=f"{file} 已损坏（{why}）：修好它，或删掉这个目录",
                en=f"{file} is damaged ({why}): mend it, or delete that folder",
            )
        ) from None
    if module is not None and found[0] != module:
        raise UserError(
            say(
                zh=f"{path} 是 `{found[0]}` 的运行，不是 `{module}` 的",
                en=f"{path} is a run of `{found[0]}`, not of `{module}`",
            )
        )
    return run


def _check(summary: dict[str, Any]) -> None:
    """Raises an error unless the parts that the course shows whole are of the kind that `summary.schema.json` says."""
    for check in summary["checks"]:
        for key in ("id", "status", "observed", "expected", "why_zh", "why_en"):
            check[key]
    if (block := summary.get("eval")) is not None:
        for name in ("before", "after", "ci95"):
            block[name].keys()
    f"{summary.get('wall_seconds') or 0:.0f}"


def latest(module: str, root: Path = Path("output")) -> Run | None:
    """The newest run of a module below `root`; None when there is none.

    `latest` points to it; where that link is missing (a copied folder), the newest `started_at` decides.

    Raises:
        UserError: its summary is damaged.
    """
    folder = root / module
    if (folder / "latest" / SUMMARY).is_file():
        return read(folder / "latest", module)
    runs, damaged = all_runs(module, root)
    if damaged:
        raise UserError(damaged[0])
    return runs[-1] if runs else None


def all_runs(module: str, root: Path = Path("output")) -> tuple[list[Run], list[str]]:
    """Every readable run of a module below `root`, oldest first, and for each of the others what is wrong with it."""
    runs, damaged = [], []
    for folder in sorted({file.parent.resolve() for file in (root / module).glob(f"*/{SUMMARY}")}):
        try:
            runs.append(read(folder, module))
        except UserError as error:
            damaged.append(str(error))
    return sorted(runs, key=_started_at), damaged


def tell_damaged(messages: list[str]) -> int:
    """Say which records were left out, after what could be shown; the exit code of the command: 1 if there were any."""
    for message in messages:
        print(say(zh=f"跳过：{message}", en=f"left out: {message}"), file=sys.stderr)
    return 1 if messages else 0


def _started_at(run: Run) -> str:
    return str(run.summary.get("started_at"))
