"""Shared fixtures. Tests never touch the network: hub and telemetry are off before anything is imported."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}
os.environ.update(OFFLINE)
# Converted datasets go to a temporary folder, which goes when the tests end. `datasets` reads this when imported.
_DATASETS_CACHE = tempfile.TemporaryDirectory(prefix="llmcore-tests-", ignore_cleanup_errors=True)
os.environ["HF_DATASETS_CACHE"] = _DATASETS_CACHE.name

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def llmcore() -> Run:
    """Run the command line in a process of its own, from a directory of choice: `llmcore("--list", cwd=tmp_path)`."""

    def run(*argv: str, cwd: Path | None = None, timeout: int = 300, **env: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "run.py"), *argv]
        return subprocess.run(
            command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=timeout
        )

    return run


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from more threads, and lose much when the cores are busy."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
