"""Which checkpoint a run goes on from, whether that makes sense, and the command that does it."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from llmcore_hf import distributed
from llmcore_hf.config import NOT_REPEATED, Config, plain, read_yaml
from llmcore_hf.durability import checkpoints, incompleteness, last_complete, read_marker
from llmcore_hf.errors import ConfigError
from llmcore_hf.registry import Module

LAST = ("last", "true")  # values of --resume_from_checkpoint that mean the newest one
# Options that change what is shown and kept, not what is trained. How often a run evaluates is not among them: each
# evaluation draws from the random numbers that dropout and shuffling use.
NO_EFFECT: tuple[str, ...] = (
    *("logging_", "log_", "save_", "hub_", "push_to_hub", "report_to", "run_name", "project", "trackio_"),
    *("disable_tqdm", "max_generation_samples", "max_new_tokens", "per_device_eval_batch_size"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor"),
)
CONSTANT = ("constant", "constant_with_warmup")  # schedules that do not depend on the number of steps


def find(run_dir: Path, resume: str) -> Path:
    """The checkpoint that `--resume_from_checkpoint` names; `last` is the newest complete one.

    Raises:
        ConfigError: there is none, or the one that is named is not complete.
    """
    newest, passed_over = last_complete(run_dir)
    named = Path(resume).expanduser()
    if resume.lower() in LAST:
        if newest:
            return newest
        problem = "; ".join(f"{path} cannot be resumed: {reason}" for path, reason in passed_over.items())
    else:
        reason = incompleteness(named) if named.is_dir() else ""
        if reason is None:
            return named
        problem = f"it cannot be resumed: {reason}" if reason else ""
        if named.is_dir() and checkpoints(named):
            problem = (
                f"that is the directory of a run, not a checkpoint: --output_dir {named} --resume_from_checkpoint last"
            )
            raise ConfigError([f"--resume_from_checkpoint {resume}: {problem} goes on with it"])
    problem = problem or f"there is no such checkpoint (looked in {run_dir})"
    way_out = f"; the newest complete one is {newest}" if newest else "; there is no complete one: start again"
    raise ConfigError([f"--resume_from_checkpoint {resume}: {problem}{way_out}"])


def check_seen_by_all(checkpoint: Path) -> None:
    """Refuse a checkpoint that some processes cannot read: each of them loads it.

    Raises:
        ConfigError: some cannot.
    """
    if blind := distributed.ranks_without(read_marker(checkpoint) is not None):
        ranks = ", ".join(map(str, blind))
        raise ConfigError(
            [
                f"{checkpoint} cannot be read whole by process{'es' * (len(blind) > 1)} {ranks}: all machines need the "
                "same --output_dir, in a folder that they share. Copy the whole run directory there, and start again"
            ]
        )


def last_step(checkpoint: Path) -> int:
    """Optimizer steps done when the (complete) checkpoint was written."""
    marker = read_marker(checkpoint)
    assert marker is not None
    return int(marker["step"])


def check(run_dir: Path, resume: str, module: Module, config: Config) -> None:
    """Refuse, before anything is written, to resume what is not there, another module's run, or a finished one.

    Newer checkpoints that `last` passes over are named on stderr.

    Raises:
        ConfigError: with the way out.
    """
    if module.stages:
        _check_stages(run_dir, resume, module.name)
        return
    checkpoint = find(run_dir, resume)
    if resume.lower() in LAST:
        for path, reason in last_complete(run_dir)[1].items():
            print(f"{path} is passed over: {reason}", file=sys.stderr)
    home = checkpoint.absolute().parent
    if home.resolve() != run_dir.resolve() and run_dir.is_dir() and any(run_dir.iterdir()):
        raise ConfigError(
            [
                f"--resume_from_checkpoint {resume} belongs to another run than --output_dir {run_dir}: leave out "
                "--output_dir to go on in its own directory, or name a new one"
            ]
        )
    if (name := options_of(home).get("module", module.name)) != module.name:
        raise ConfigError([f"--resume_from_checkpoint {resume}: {home} is a run of `{name}`, not of `{module.name}`"])
    step, max_steps = last_step(checkpoint), config.values.get("max_steps", -1)
    if 0 < max_steps < step or (max_steps == step and _has_ended(home)):
        raise ConfigError([f"{checkpoint} has already done {step} steps: raise --max_steps to go on"])


def _check_stages(run_dir: Path, resume: str, module: str) -> None:
    """A run of stages goes on in its own directory, in the stage that has not ended."""
    if resume.lower() not in LAST:
        raise ConfigError([f"--resume_from_checkpoint {resume}: `{module}` goes on with `last` and --output_dir"])
    if options_of(run_dir).get("module") != module:
        raise ConfigError([f"--resume_from_checkpoint {resume}: {run_dir} holds no run of `{module}`"])
    if (run_dir / "summary.json").exists() and _has_ended(run_dir):
        raise ConfigError([f"--resume_from_checkpoint {resume}: the run in {run_dir} has ended"])


def _has_ended(run_dir: Path) -> bool:
    """A run that stopped between its last step and its end still has to be evaluated and saved."""
    try:
        summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return True
    return summary.get("status") == "ok"


def options_of(run_dir: Path) -> dict[str, Any]:
    """The options that a run was last started with; empty when that is not known."""
    file = run_dir / "resolved_config.yaml"
    return read_yaml(file) if file.exists() else {}


def changes(former: dict[str, Any], config: Config) -> list[str]:
    """Options that decide what is trained and have another value than before; `--name old -> new` each."""
    free: tuple[str, ...] = NOT_REPEATED
    if str(plain(config.values.get("lr_scheduler_type"))) in CONSTANT:
        free += ("max_steps", "num_train_epochs")
    return [
        f"--{name} {former[name]} -> {plain(value)}"
        for name, value in config.values.items()
        if name in former and former[name] != plain(value) and name not in free and not name.startswith(NO_EFFECT)
    ]


def command(run_dir: Path) -> str:
    """The command that goes on with the run in `run_dir`, to be pasted in the folder where the run was started."""
    options = ["--config", f"{run_dir}/resolved_config.yaml", "--output_dir", str(run_dir)]
    text = shlex.join([*options, "--resume_from_checkpoint", "last"])
    script = os.path.basename(sys.argv[0]) == "run.py"
    if distributed.world_size() > 1 and distributed.asked_for()[0]:
        return f"{distributed.program()} launch [options of the launcher] {text}"
    if distributed.world_size() > 1:
        return f"accelerate launch [options of the launcher] {sys.argv[0] if script else '-m llmcore_hf'} {text}"
    return f"python {shlex.quote(sys.argv[0])} {text}" if script else f"{distributed.program()} {text}"
