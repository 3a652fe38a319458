"""`llmcore launch`: start a module in several processes, with an accelerate configuration that ships with the project.

    llmcore launch --accelerate_config zero2 --num_processes 4 --module sft --config my.yaml

is `accelerate launch --config_file .../accelerate_configs/zero2.yaml --num_processes 4 --module llmcore_hf --module sft ...`,
from any directory and from an installed wheel. What would not work is told in one sentence before any process starts; how
long machines wait for each other is bounded; and a process that ends with an error has said why itself, so its exit code is
handed on without the launcher's own traceback.
"""

from __future__ import annotations

import difflib
import importlib.util
import logging
import os
import re
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmcore_hf import meeting, registry, resources
from llmcore_hf.config import Request, check_names_and_kinds, read_request, read_yaml
from llmcore_hf.distributed import (
    GPU_ONLY,
    NO_OFFLOAD,
    NO_STAGE_3,
    NOT_SAVED,
    NUM_MACHINES,
    NUM_PROCESSES,
    STAGE_3,
    has_gpu,
)
from llmcore_hf.errors import ConfigError, UserError

USAGE = """\
usage: {prog} launch --accelerate_config NAME [launch options] --module MODULE [options of the module]

NAME is one of {names}, or the path of a YAML file of accelerate.
Launch options (those of the file when left out; several machines need all of them but the last):
  --num_processes N          processes, over all machines
  --num_machines N           machines
  --machine_rank R           which of them this is, from 0
  --main_process_ip HOST     address of machine 0
  --main_process_port PORT   free port of machine 0; the same on all machines
  --join_timeout SECONDS     how long processes and machines wait for each other at the start (300)
"""
LAUNCH_OPTIONS = {
    "--num_processes": int,
    "--num_machines": int,
    "--machine_rank": int,
    "--main_process_ip": str,
    "--main_process_port": int,
    "--join_timeout": int,
}
AT_LEAST = {"num_processes": 1, "num_machines": 1, "machine_rank": 0, "main_process_port": 0, "join_timeout": 1}
MISSING_DEEPSPEED = (
    "DeepSpeed is not installed. After torch: pip install -c constraints.txt -e '.[deepspeed]' (in a checkout), or "
    "pip install 'llmcore-hf[deepspeed]'"
)


@dataclass
class Launch:
    """What a command line of `launch` asks for.

    Attributes:
        path: the file of accelerate's configuration.
        chosen: launch options of the command line, `--num_processes` -> its value.
        settings: the file's settings, with the launch options over them.
        module_argv: the command line of the module.
    """

    path: Path
    chosen: dict[str, Any]
    settings: dict[str, Any]
    module_argv: list[str]

    @property
    def n_machines(self) -> int:
        return int(self.settings.get("num_machines") or 1)


def main(argv: list[str], program: str) -> int:
    """Start the processes, wait for their end, and return the exit code: that of the first one that failed.

    Raises:
        ConfigError: an option is wrong, or this machine cannot do what the configuration asks for.
        UserError: not all machines met in time.
    """
    if not argv or "--help" in argv or "-h" in argv:
        print(USAGE.format(prog=program, names=", ".join(names())))
        return 0 if argv else 2
    launch = read(argv)
    _export(launch.settings)
    if launch.n_machines > 1:
        _meet_machines(launch)
    return _run(launch)


def read(argv: list[str]) -> Launch:
    """Read and check a command line.

    Raises:
        ConfigError: see `main`.
    """
    chosen, rest, problems = _split(argv)
    config, request = chosen.pop("--accelerate_config", None), None
    if config is None:
        problems.append(f"--accelerate_config is missing: {', '.join(names())}, or a path")
    try:
        request = read_request(rest)
    except ConfigError as error:
        problems += error.problems
    if problems or config is None or request is None:
        raise ConfigError(problems)
    path = find(config)
    settings = {**read_yaml(path), **{name[2:]: value for name, value in chosen.items()}}
    if problems := number_problems(settings, chosen, path) or launch_problems(settings, path.stem, str(request.module)):
        raise ConfigError(problems)
    _check_module(request, int(settings.get("num_processes") or 1))
    return Launch(path, chosen, settings, rest)


def _check_module(request: Request, n_processes: int) -> None:
    """What every process would find wrong with its options is found here, before the machines wait for each other."""
    module = registry.get(str(request.module))
    if n_processes > 1 and module.code is None:
        raise ConfigError([f"`{module.name}` runs in one process: start it without `launch`"])
    if request.options or request.config:  # importing the module takes seconds
        check_names_and_kinds(module, request)


def accelerate_arguments(launch: Launch) -> list[str]:
    """What `accelerate launch` is called with."""
    options = [text for name, value in launch.chosen.items() if name != "--join_timeout" for text in (name, str(value))]
    # for torch's rendezvous of the launchers, whose own bound is 15 minutes
    bound = ["--rdzv_conf", f"timeout={meeting.join_timeout()}"]
    return ["--config_file", str(launch.path), *options, *bound, "--module", "llmcore_hf", *launch.module_argv]


def _export(settings: dict[str, Any]) -> None:
    """Tell the processes what was asked for: each compares it with what it finds (`meeting`)."""
    for variable, name in ((NUM_PROCESSES, "num_processes"), (NUM_MACHINES, "num_machines")):
        os.environ.pop(variable, None)
        if settings.get(name):
            os.environ[variable] = str(settings[name])
    if settings.get("join_timeout"):
        os.environ[meeting.JOIN_TIMEOUT] = str(settings["join_timeout"])


def _meet_machines(launch: Launch) -> None:
    """Say what is waited for, and wait for machine 0 here, without torch's stack traces."""
    host, port = str(launch.settings["main_process_ip"]), int(launch.settings["main_process_port"])
    rank, n_machines, bound = int(launch.settings.get("machine_rank") or 0), launch.n_machines, meeting.join_timeout()
    if rank == 0:
        meeting.say(
            f"machine 0 of {n_machines} waits for the launchers of the others at {host}:{port}, {bound} s at most"
        )
        return
    meeting.say(f"machine {rank} of {n_machines} looks for machine 0 at {host}:{port}, {bound} s at most")
    meeting.wait_for_server(host, port, time.monotonic() + bound)


def _run(launch: Launch) -> int:
    """`accelerate launch` in this process."""
    from accelerate.commands import launch as accelerate
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    elastic = logging.getLogger("torch.distributed.elastic")  # it reports every end with a table and a traceback
    elastic.addHandler(logging.NullHandler())
    elastic.propagate = False
    try:
        accelerate.launch_command(accelerate.launch_command_parser().parse_args(accelerate_arguments(launch)))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        return _tell_end(f"process {rank}", failure.exitcode)
    except subprocess.CalledProcessError as error:  # of a single process
        return _tell_end("the process", error.returncode)
    except SignalException as error:
        return 128 + error.sigval
    except DistError as error:
        raise UserError(_not_met(launch.n_machines, str(error).splitlines()[0])) from None
    except ValueError as error:
        raise ConfigError([f"{launch.path}: accelerate refuses it: {error}"]) from None
    return 0


def _tell_end(who: str, code: int) -> int:
    """The exit code that stands for how a process ended."""
    if code < 0:
        name = signal.Signals(-code).name
        hint = " (the machine may have run out of memory)" if name == "SIGKILL" else ""
        meeting.say(f"{who} was ended by {name}{hint}")
        return 128 - code
    meeting.say(f"{who} ended with exit code {code}; the output above, or that of process 0, says why")
    return code


def _not_met(n_machines: int, reason: str) -> str:
    return (
        f"the launchers of {n_machines} machines did not meet within {meeting.join_timeout()} s ({reason}). Each machine "
        f"needs one, with the same --num_machines, --main_process_ip and --main_process_port and its own --machine_rank "
        f"from 0 to {n_machines - 1}; --join_timeout sets how long to wait, see {meeting.GUIDE}"
    )


def _split(argv: list[str]) -> tuple[dict[str, Any], list[str], list[str]]:
    """Launch options, what is left for the module, and problems. A launch option may stand anywhere."""
    chosen: dict[str, Any] = {}
    rest, problems, tokens = [], [], list(argv)
    while tokens:
        token = tokens.pop(0)
        name, has_value, value = token.partition("=")
        if name != "--accelerate_config" and name not in LAUNCH_OPTIONS:
            rest.append(token)
            continue
        if not has_value and tokens and not tokens[0].startswith("--"):
            value = tokens.pop(0)
        if value:
            chosen[name] = value
        else:
            problems.append(f"{name} needs a value")
    return chosen, rest, problems


def names() -> list[str]:
    """The configurations that ship with the project."""
    return sorted(path.stem for path in resources.path("accelerate_configs").glob("*.yaml"))


def find(config: str) -> Path:
    """The file of a configuration, given by name or path.

    Raises:
        ConfigError: there is neither.
    """
    if config in names():
        return resources.path(f"accelerate_configs/{config}.yaml")
    if Path(config).expanduser().is_file():
        return Path(config).expanduser().resolve()
    near = difflib.get_close_matches(config, names(), n=1)
    hint = f" (did you mean `{near[0]}`?)" if near else ""
    raise ConfigError([f"--accelerate_config {config}: no such file, and none of {', '.join(names())}{hint}"])


def number_problems(settings: dict[str, Any], chosen: dict[str, Any], file: Path) -> list[str]:
    """Numbers that are none, or out of range, from the command line (`chosen`) or from the file."""
    problems = []
    for name, least in AT_LEAST.items():
        value = settings.get(name)
        if value is None:
            continue
        shown = f"--{name}" if f"--{name}" in chosen else f"{file}: `{name}`"
        if not re.fullmatch("[0-9]+", str(value)):
            problems.append(f"{shown} takes a whole number, not {value!r}")
        elif int(value) < least:
            problems.append(f"{shown} is at least {least}, not {value}")
        elif name == "main_process_port" and int(value) >= 2**16:
            problems.append(f"{shown} {value}: a port is a number from 1 to 65535")
    return problems


def launch_problems(settings: dict[str, Any], name: str, module: str) -> list[str]:
    """Why a launch of `module` with these settings would fail, or do something else than it says; one sentence each."""
    problems = []
    n_processes, n_machines = int(settings.get("num_processes") or 1), int(settings.get("num_machines") or 1)
    port, address = int(settings.get("main_process_port") or 0), settings.get("main_process_ip")
    rank = int(settings.get("machine_rank") or 0)
    if settings.get("distributed_type") == "DEEPSPEED":
        if importlib.util.find_spec("deepspeed") is None:
            problems.append(MISSING_DEEPSPEED)
        problems += _deepspeed_problems(settings.get("deepspeed_config") or {}, name, module)
    if needs_gpu(settings) and not has_gpu():
        problems.append(GPU_ONLY.format(what=name))
    if n_machines > 1:
        if not address or not port:
            problems.append("several machines need --main_process_ip and --main_process_port, the same on all")
        if rank >= n_machines:
            problems.append(f"--machine_rank {rank}: machines are 0 to {n_machines - 1}")
        if n_processes % n_machines:
            problems.append(f"--num_processes {n_processes} is the total, a multiple of --num_machines {n_machines}")
    if port and rank == 0 and not port_is_free(port):
        problems.append(f"--main_process_port {port} is in use on this machine: take another, or 0 for any free one")
    return problems


def _deepspeed_problems(options: dict[str, Any], name: str, module: str) -> list[str]:
    problems = []
    if options.get("zero_stage") == 3:
        if module not in STAGE_3:
            problems.append(NO_STAGE_3.format(module=module))
        if not options.get("zero3_save_16bit_model"):
            problems.append(NOT_SAVED)
    devices = (options.get("offload_optimizer_device"), options.get("offload_param_device"))
    if any(device not in (None, "none") for device in devices) and not has_gpu():
        problems.append(NO_OFFLOAD.format(what=name))
    return problems


def needs_gpu(settings: dict[str, Any]) -> bool:
    """FSDP and everything built on it."""
    return settings.get("distributed_type") == "FSDP" or bool(settings.get("parallelism_config"))


def port_is_free(port: int) -> bool:
    """Whether a server could listen on this port of this machine now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True
