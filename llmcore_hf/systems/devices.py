"""Where the processes of a systems lesson train: on the CPU, talking over gloo, or on a GPU each, talking over NCCL."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

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

    def too_few_gpus(self, n_processes: int) -> list[str]:
        """Why `n_processes` cannot train on `device`: at most one sentence. NCCL lets no two of them share a GPU."""
        n_gpus = torch.cuda.device_count()
        if self.device == "cpu" or n_gpus >= n_processes:
            return []
        return [
            f"--device cuda: this run starts up to {n_processes} processes, each needs a GPU of its own, and PyTorch sees "
            f"{n_gpus} here: leave --device out to train on the CPU"
        ]


def own(device: str) -> torch.device:
    """The device of this process: the CPU, or the GPU that `use` has given it (the first one where nobody has)."""
    return torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device)


def use(device: str, local_rank: int) -> torch.device | None:
    """Give this process its GPU, if it is to have one, and return it: `init_process_group` binds NCCL to it."""
    if device != "cuda":
        return None
    torch.cuda.set_device(local_rank)
    return own(device)


def now(device: torch.device) -> float:
    """Seconds of the machine's monotonic clock, which all processes share, when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()
