"""What a run prints when it ends: the result in a few lines, and where the evidence is."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

MARKS = {"pass": "[green]pass[/green]", "warn": "[yellow]warn[/yellow]", "fail": "[red]FAIL[/red]", "skip": "skip"}


def print_report(path: Path, status: str, error: str | None) -> None:
    from rich.console import Console
    from rich.markup import escape

    summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 120)
    if summary["eval"]:
        console.print(_results(summary["eval"]))
    for check in summary["checks"]:
        console.print(f"  {MARKS[check['status']]}  {check['id']}: {escape(show_observed(check['observed']))}")
        if check["status"] in ("warn", "fail"):
            console.print(f"        expected {escape(check['expected'])}. {escape(check['why_en'])}")
    console.print(f"\n{status}: {summary['wall_seconds']:.0f} s, {summary['peak_rss_mb']:.0f} MB, {path}/")
    if error:
        print(f"{summary['module']}: {error}", file=sys.stderr)
    elif (path / "training_curves.png").exists():
        console.print(f"Read {path}/summary.json, look at {path}/training_curves.png")


def _results(evaluation: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(title="Held-out rows", title_justify="left", box=None)
    for column in ("metric", "before", "after", "change", "95 % interval", "rows"):
        table.add_column(column, justify="left" if column == "metric" else "right", no_wrap=True)
    for name, after in evaluation["after"].items():
        interval = evaluation["ci95"].get(name)
        table.add_row(
            name,
            _number(evaluation["before"].get(name)),
            _number(after),
            _number(evaluation["delta"].get(name), sign="+"),
            f"[{_number(interval[0], '+')}, {_number(interval[1], '+')}]" if interval else "",
            str(evaluation["n"][name]),
        )
    return table


def _number(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.3f}"


def show_observed(value: Any) -> str:
    """What a check observed, in a few words."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {show_observed(item)}" for key, item in value.items())
    return str(value)
