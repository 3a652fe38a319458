"""Which process this is, read from the launcher's environment variables: no torch needed."""

from __future__ import annotations

import os
import sys
from typing import TypeVar

from llmcore_hf.errors import ConfigError

T = TypeVar("T")


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def program() -> str:
    """How this program is called, for a message."""
    name = os.path.basename(sys.argv[0])
    return {"run.py": "python run.py", "__main__.py": "python -m llmcore_hf"}.get(name, name)


def broadcast(value: T) -> T:
    """The main process's `value`, in every process. Needs the process group when there are several."""
    if world_size() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    box: list[T] = [value]
    broadcast_object_list(box, from_process=0)
    return box[0]


def check_world_size() -> None:
    """Refuse to go on when the process group is not as large as the launcher promised.

    Raises:
        ConfigError: it is not; each process would train alone.
    """
    if world_size() == 1:
        return
    from accelerate import PartialState

    found = PartialState().num_processes
    if found != world_size():
        raise ConfigError([f"the launcher started {world_size()} processes, but the process group has {found}"])


GPU_ONLY = (
    "{what} needs GPUs: on a CPU accelerate turns FSDP2 and tensor parallelism into plain data parallelism without a word. "
    "Use cpu_2 or zero2 here; `--module megatron` and `--module deepspeed` show both on a CPU"
)

NO_STAGE_3 = (
    "ZeRO-3 is not supported yet: it spreads the parameters before training, and the evaluation before training needs them "
    "whole. Use the accelerate configuration zero2 or zero1"
)


def check_launch() -> None:
    """Refuse a launch that asked for one thing and got another.

    `accelerate launch --cpu --num_processes 2` and `distributed_type: MULTI_CPU` start a single process, without
    a word, unless mpirun is used. What they leave behind is a master port without a world size. FSDP2 and tensor
    parallelism become plain data parallelism on a CPU. DeepSpeed is kept from compiling there, and its stage 3 is refused.

    Raises:
        ConfigError: such a launch.
    """
    launched_by_accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ
    if launched_by_accelerate and "MASTER_PORT" in os.environ and "WORLD_SIZE" not in os.environ:
        raise ConfigError(
            [
                "`accelerate launch` was asked for several processes but started one: on a CPU, `--cpu`, "
                "`--num_processes` alone and `distributed_type: MULTI_CPU` do that. Use "
                "`accelerate launch --config_file accelerate_configs/cpu_2.yaml run.py ...`, or "
                "`ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 run.py ...`"
            ]
        )
    if (_is_on("ACCELERATE_USE_FSDP") or _is_on("ACCELERATE_USE_PARALLELISM_CONFIG")) and not has_gpu():
        raise ConfigError([GPU_ONLY.format(what="this accelerate configuration")])
    if _is_on("ACCELERATE_USE_DEEPSPEED"):
        if os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3":
            raise ConfigError([NO_STAGE_3])
        if not has_gpu():
            forbid_deepspeed_to_compile()


def _is_on(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("true", "1")


def has_gpu() -> bool:
    """Whether torch sees a CUDA device."""
    import torch

    return torch.cuda.is_available()


def forbid_deepspeed_to_compile() -> None:
    """Let DeepSpeed build no operator of its own in this process.

    Left to itself it tries a compiler on each when it starts, and on a CPU builds a communication operator, which takes a
    minute and a compiler, and which only its inference uses.
    """
    import deepspeed.ops
    from deepspeed.ops.op_builder.all_ops import ALL_OPS

    vars(deepspeed.ops)["__compatible_ops__"] = dict.fromkeys(ALL_OPS, False)  # what DeepSpeed asks before it builds
