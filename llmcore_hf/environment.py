"""Versions and hardware: `llmcore env` for a bug report, and the `env` block of every summary."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from llmcore_hf import __version__, distributed

PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "datasets",
    "accelerate",
    "evaluate",
    "tokenizers",
    "safetensors",
    "deepspeed",
    "bitsandbytes",
    "gymnasium",
    "matplotlib",
)


def versions() -> dict[str, str | None]:
    """Version of Python, of this package and of each library; None when it is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "llmcore_hf": __version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def git_commit() -> str | None:
    """Commit of the checkout this package runs from; None outside a checkout of this project."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def device_name(use_cpu: bool = False) -> str:
    """What torch computes on: `cpu`, or the name of the accelerator."""
    import torch

    if use_cpu:
        return "cpu"
    if torch.cuda.is_available():
        return f"cuda ({torch.cuda.get_device_name(0)})"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def distributed_kind() -> str:
    """How the processes work together: `none`, `ddp`, `fsdp` or `deepspeed`."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        return "deepspeed"
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        return "fsdp"
    return "ddp" if distributed.world_size() > 1 else "none"


def describe(dtype: str, use_cpu: bool) -> dict[str, Any]:
    """The `env` block of a summary."""
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "device": device_name(use_cpu),
        "dtype": dtype,
        "world_size": distributed.world_size(),
        "distributed": distributed_kind(),
        "git_commit": git_commit(),
    }


def print_report() -> None:
    """Print versions and hardware, one per line, ready to paste."""
    import psutil
    import torch

    rows: dict[str, Any] = dict(versions())
    rows |= {
        "platform": platform.platform(),
        "git commit": git_commit(),
        "cpu cores": psutil.cpu_count(),
        "torch threads": torch.get_num_threads(),
        "memory": f"{psutil.virtual_memory().total / 2**30:.1f} GiB",
        "device": device_name(),
    }
    for i in range(torch.cuda.device_count()):
        rows[f"cuda {i}"] = torch.cuda.get_device_name(i)
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "LLMCORE_HF_CACHE"):
        rows[name] = os.environ.get(name)
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {'-' if value is None else value}")
