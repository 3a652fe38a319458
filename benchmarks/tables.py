"""Put a generated table between its markers in `benchmarks/README.md`."""

from __future__ import annotations

import platform
import re
from pathlib import Path

README = Path(__file__).with_name("README.md")


def replace(name: str, table: str) -> None:
    """Raises `ValueError` when the README has no markers of that name."""
    text = README.read_text(encoding="utf-8")
    current(name)
    README.write_text(_between(name).sub(lambda _: f"{_begin(name)}\n{table}\n{_end(name)}", text), encoding="utf-8")
    print(table)


def current(name: str) -> str:
    """What stands between the markers now. Raises `ValueError` when the README has no markers of that name."""
    found = _between(name).search(README.read_text(encoding="utf-8"))
    if not found:
        raise ValueError(f"{README} has no markers for `{name}`")
    return found[1].strip("\n")


def _between(name: str) -> re.Pattern[str]:
    return re.compile(re.escape(_begin(name)) + "(.*?)" + re.escape(_end(name)), re.DOTALL)


def _begin(name: str) -> str:
    return f"<!-- {name}: begin -->"


def _end(name: str) -> str:
    return f"<!-- {name}: end -->"


def machine() -> str:
    """One line about where the numbers were measured."""
    import os

    import psutil
    import torch

    memory = psutil.virtual_memory().total / 2**30
    return (
        f"{os.cpu_count()} CPU cores, {memory:.0f} GiB memory, Python {platform.python_version()}, "
        f"torch {torch.__version__}, no GPU used"
    )
