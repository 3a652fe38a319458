"""Where the processes of a systems lesson train: on the CPU, talking over gloo, or on a GPU each, talking over NCCL."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from llmcore_hf.lesson import LessonArguments

BACKENDS = {"cpu": "gloo", "cuda": "nccl"}


@dataclass
class DeviceArguments(LessonArguments):
    device: str = field(
        default="cpu",
        metadata={
            "help": "Where the processes train: cpu (they talk over gloo), or cuda (over NCCL, a GPU for each process).",
            "choices": list(BACKENDS),
        },
    )

    def too_few_gpus(self, n_processes: int, way_out: str = "") -> list[str]:
        """Why `n_processes` cannot train on `device`: at most one sentence. NCCL lets no two of them share a GPU."""
        n_gpus = torch.cuda.device_count()
        if self.device == "cpu" or n_gpus >= n_processes:
            return []
        return [
            f"--device cuda: each process needs a GPU of its own, {n_processes} at one time, and PyTorch sees {n_gpus} here; "
            + (f"{way_out}, or " if way_out else "")
            + "leave --device out to train on the CPU"
        ]


def own(device: str) -> torch.device:
    """The device of this process: the CPU, or the GPU that `join` has given it (the first one where nobody has)."""
    if device != "cuda":
        return torch.device(device)
    torch.set_float32_matmul_precision("highest")  # some images turn TF32 on, whose 3 digits would hide every mistake
    return torch.device(device, torch.cuda.current_device())


def join(device: str, rank: int, world_size: int, **options: Any) -> None:
    """Enter the process group of all processes on this machine, with a GPU of its own where `device` is "cuda"."""
    if device == "cuda":
        torch.cuda.set_device(rank)
        # Bound to its GPU, NCCL connects at once. A group of one must not be: DeepSpeed's issue 8248.
        if world_size > 1:
            options["device_id"] = own(device)
    dist.init_process_group(BACKENDS[device], rank=rank, world_size=world_size, **options)


def now(device: torch.device) -> float:
    """Seconds of the machine's monotonic clock, which all processes share, when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()
