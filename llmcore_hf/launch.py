"""`llmcore launch`: start a module in several processes, with an accelerate configuration that ships with the project.

    llmcore launch --accelerate_config zero2 --num_processes 4 --module sft --config my.yaml

is `accelerate launch --config_file .../accelerate_configs/zero2.yaml --num_processes 4 --module llmcore_hf --module sft ...`,
from any directory and from an installed wheel, after a look at whether this machine can do it. A launcher prints its own
traceback when a process ends with an error; what is known beforehand is told here, in one sentence and before any process starts.
"""

from __future__ import annotations

import difflib
import importlib.util
import itertools
import os
import socket
import sys
from pathlib import Path
from typing import Any

from llmcore_hf import resources
from llmcore_hf.config import read_yaml
from llmcore_hf.distributed import GPU_ONLY, NO_OFFLOAD, NO_STAGE_3, NOT_SAVED, STAGE_3, has_gpu
from llmcore_hf.errors import ConfigError

USAGE = """\
usage: {prog} launch --accelerate_config NAME [launch options] --module MODULE [options of the module]

NAME is one of {names}, or the path of a YAML file of accelerate.
Launch options (those of the file when left out; several machines need the last three):
  --num_processes N          processes, over all machines
  --num_machines N           machines
  --machine_rank R           which of them this is, from 0
  --main_process_ip HOST     address of machine 0
  --main_process_port PORT   free port of machine 0; the same on all machines
"""
LAUNCH_OPTIONS = {
    "--num_processes": int,
    "--num_machines": int,
    "--machine_rank": int,
    "--main_process_ip": str,
    "--main_process_port": int,
}
MISSING_DEEPSPEED = (
    "DeepSpeed is not installed. After torch: pip install -c constraints.txt -e '.[deepspeed]' (in a checkout), or "
    "pip install 'llmcore-hf[deepspeed]'"
)


def main(argv: list[str], program: str) -> int:
    """Replace this process by the launcher; only `--help` and its like return, with an exit code.

    Raises:
        ConfigError: an option is wrong, or this machine cannot do what the configuration asks for.
    """
    if not argv or "--help" in argv or "-h" in argv:
        print(USAGE.format(prog=program, names=", ".join(names())))
        return 0 if argv else 2
    command = launch_command(argv)
    sys.stdout.flush()
    os.execv(command[0], command)


def launch_command(argv: list[str]) -> list[str]:
    """The command line of `accelerate launch` for `llmcore launch *argv`; see `main` for what is raised."""
    chosen, rest, problems = _read(argv)
    config = chosen.pop("--accelerate_config", None)
    if config is None:
        problems.append(f"--accelerate_config is missing: {', '.join(names())}, or a path")
    if not any(token.partition("=")[0] in ("--module", "--config") for token in rest):
        problems.append("no --module was given; --list shows them")
    if problems:
        raise ConfigError(problems)
    path = find(str(config))
    settings = {**read_yaml(path), **{name[2:]: value for name, value in chosen.items()}}
    if problems := launch_problems(settings, path.stem, _module_of(rest)):
        raise ConfigError(problems)
    options = [text for name, value in chosen.items() for text in (name, str(value))]
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(path)]
    return [*accelerate, *options, "--module", "llmcore_hf", *rest]


def _read(argv: list[str]) -> tuple[dict[str, Any], list[str], list[str]]:
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
        if not value:
            problems.append(f"{name} needs a value")
        elif LAUNCH_OPTIONS.get(name) is int and not value.isdigit():
            problems.append(f"{name} takes a whole number, not {value!r}")
        else:
            chosen[name] = value
    return chosen, rest, problems


def _module_of(rest: list[str]) -> str | None:
    """The module that is named on the command line; None when a --config names it."""
    tokens = [part for token in rest for part in token.split("=", 1)]
    return next((name for option, name in itertools.pairwise(tokens) if option == "--module"), None)


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


def launch_problems(settings: dict[str, Any], name: str, module: str | None) -> list[str]:
    """Why a launch of `module` with these settings would fail, or do something else than it says; one sentence each."""
    problems = []
    n_processes, n_machines = int(settings.get("num_processes") or 1), int(settings.get("num_machines") or 1)
    port, address = int(settings.get("main_process_port") or 0), settings.get("main_process_ip")
    if settings.get("distributed_type") == "DEEPSPEED":
        if importlib.util.find_spec("deepspeed") is None:
            problems.append(MISSING_DEEPSPEED)
        problems += _deepspeed_problems(settings.get("deepspeed_config") or {}, name, module)
    if needs_gpu(settings) and not has_gpu():
        problems.append(GPU_ONLY.format(what=name))
    if n_machines > 1:
        if not address or not port:
            problems.append("several machines need --main_process_ip and --main_process_port, the same on all")
        if int(settings.get("machine_rank") or 0) >= n_machines:
            problems.append(f"--machine_rank {settings['machine_rank']}: machines are 0 to {n_machines - 1}")
        if n_processes % n_machines:
            problems.append(f"--num_processes {n_processes} is the total, a multiple of --num_machines {n_machines}")
    if port and int(settings.get("machine_rank") or 0) == 0 and not port_is_free(port):
        problems.append(f"--main_process_port {port} is in use on this machine: take another, or 0 for any free one")
    return problems


def _deepspeed_problems(options: dict[str, Any], name: str, module: str | None) -> list[str]:
    problems = []
    if options.get("zero_stage") == 3:
        if module is not None and module not in STAGE_3:
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
