"""Which process this is, read from the launcher's environment variables: no torch needed."""

from __future__ import annotations

import os
import re
import sys
from typing import TypeVar

from llmcore_hf.errors import ConfigError

T = TypeVar("T")


NUM_PROCESSES, NUM_MACHINES = (
    "LLMCORE_HF_NUM_PROCESSES",
    "LLMCORE_HF_NUM_MACHINES",
)  # what `llmcore launch` was asked for


def whole_number(variable: str, default: int) -> int:
    """The value of an environment variable.

    Raises:
        ConfigError: it is no whole number.
    """
    text = os.environ.get(variable) or str(default)
    if not re.fullmatch("[0-9]+", text):
        raise ConfigError([f"the environment variable {variable} is {text!r}, not a whole number"])
    return int(text)


def world_size() -> int:
    return whole_number("WORLD_SIZE", 1)


def is_main_process() -> bool:
    return whole_number("RANK", 0) == 0


def asked_for() -> tuple[int | None, int | None]:
    """Processes (in all) and machines that `llmcore launch` was asked for; None where something else started this process."""
    return whole_number(NUM_PROCESSES, 0) or None, whole_number(NUM_MACHINES, 0) or None


def turn_to_speak() -> int:
    """Seconds this process waits before it tells an error that other processes may have as well.

    When one process ends with an error, its launcher ends the others. So the main process speaks (and ends) first, next the
    first process of every other machine, and the rest only if they are still there (an end takes a second or two).
    """
    try:
        return 0 if is_main_process() else 2 if whole_number("LOCAL_RANK", 0) == 0 else 6
    except ConfigError:
        return 0


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


def ranks_without(fact: bool) -> list[int]:
    """The processes for which `fact` does not hold. Every process asks; needs the process group when there are several."""
    if world_size() == 1:
        return [] if fact else [0]
    from accelerate.utils import gather_object

    return [rank for rank, holds in enumerate(gather_object([fact])) if not holds]


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

STARTED_ONE = (
    "{asked} processes were asked for, and accelerate started one: its configuration names a `distributed_type` that starts "
    "no others. Use one of accelerate_configs/, such as cpu_2 or ddp"
)

STAGE_3 = ("sft", "dpo", "reward", "ppo", "grpo")  # modules seen to give under ZeRO-3 what they give in one process
NO_STAGE_3 = (
    "ZeRO-3 is not supported with `{module}`: it holds weights in shards before training as well, where only "
    + ", ".join(STAGE_3)
    + " were seen to work. Use the accelerate configuration zero2 or zero1"
)
NOT_SAVED = (
    "this accelerate configuration would save no model: ZeRO-3 gathers the weights for it only with "
    "`zero3_save_16bit_model: true` in `deepspeed_config`, see accelerate_configs/zero3.yaml"
)
NO_OFFLOAD = "{what} offloads from a GPU to the CPU's memory, and there is no GPU: use zero3 or zero2 here"


def check_launch(module: str) -> None:
    """Refuse a launch that asked for one thing and got another.

    `accelerate launch --cpu --num_processes 2` and `distributed_type: MULTI_CPU` start a single process, without
    a word, unless mpirun is used. What they leave behind is a master port without a world size. FSDP2 and tensor
    parallelism become plain data parallelism on a CPU. DeepSpeed is kept from compiling there and has nothing to offload.
    ZeRO-3 is for the modules that were tried with it, and must be told to save the model.

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
    asked, _ = asked_for()
    if world_size() == 1 and asked not in (None, 1):
        raise ConfigError([STARTED_ONE.format(asked=asked)])
    if (_is_on("ACCELERATE_USE_FSDP") or _is_on("ACCELERATE_USE_PARALLELISM_CONFIG")) and not has_gpu():
        raise ConfigError([GPU_ONLY.format(what="this accelerate configuration")])
    if _is_on("ACCELERATE_USE_DEEPSPEED"):
        if os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3":
            _check_stage_3(module)
        if not has_gpu():
            devices = [os.environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what}_DEVICE") for what in ("OPTIMIZER", "PARAM")]
            if any(device not in (None, "none") for device in devices):
                raise ConfigError([NO_OFFLOAD.format(what="this accelerate configuration")])
            forbid_deepspeed_to_compile()


def _check_stage_3(module: str) -> None:
    if module not in STAGE_3:
        raise ConfigError([NO_STAGE_3.format(module=module)])
    if not _is_on("ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL"):
        raise ConfigError([NOT_SAVED])


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
