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


def check_launch() -> None:
    """Refuse a launch that asked for several processes and got one.

    `accelerate launch --cpu --num_processes 2` and `distributed_type: MULTI_CPU` start a single process, without
    a word, unless mpirun is used. What they leave behind is a master port without a world size.

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
