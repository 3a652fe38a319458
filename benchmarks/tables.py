"""Put a generated table between its markers in `benchmarks/README.md`."""

from __future__ import annotations

import platform
import re
from pathlib import Path

README = Path(__file__).with_name("README.md")


def replace(name: str, table: str) -> None:
    """Raises `ValueError` when the README has no markers of that name."""
    text = README.read_text(encoding="utf-8")
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"{README} has no markers for `{name}`")
    README.write_text(pattern.sub(lambda _: f"{begin}\n{table}\n{end}", text), encoding="utf-8")
    print(table)


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
