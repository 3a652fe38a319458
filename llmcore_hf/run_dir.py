"""Everything a run leaves behind, and the frame around it: directory, status, checks, exit code.

Files are written by the main process only, under a temporary name that is then renamed, so that none is ever half
written. From its first second the directory holds a summary with status `interrupted`; only a run that comes to its
end replaces it. So the record is true even after a power cut.
"""

from __future__ import annotations

import json
import math
import os
import resource
import secrets
import shlex
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llmcore_hf import distributed, environment, resources
from llmcore_hf.checks import Check
from llmcore_hf.config import Config, read_yaml
from llmcore_hf.errors import ConfigError, UserError
from llmcore_hf.registry import Module

SCHEMA_VERSION = 1
LAST = ("last", "true")  # values of --resume_from_checkpoint that mean the newest one
UNFINISHED = "The run has not come to its end: it is still going on, or it was killed."
# Bookkeeping in the log history that is no metric of the method.
NOT_METRICS = ("step", "epoch", "total_flos", "train_loss", "num_tokens", "learning_rate", "grad_norm")
HIGHER_IS_BETTER = {
    "loss": False,
    "perplexity": False,
    "mean_token_accuracy": True,
    "rewards/accuracies": True,
    "rewards/margins": True,
}


class Diverged(Exception):
    """The loss is no longer a finite number."""


class RunDirectory:
    """One run's directory. Modules fill `summary` and `checks`; `execute` writes them.

    Attributes:
        path: the directory; the same in every process.
        summary: blocks of `summary.json` that the module knows (`data`, `model`, `eval`, `samples`).
        checks: what the run found out about itself.
        history: rows of `log_history.jsonl` written so far.
    """

    def __init__(self, path: Path, module: Module, config: Config, argv: list[str]) -> None:
        self.path = path
        self.module = module
        self.config = config
        self.checks: list[Check] = []
        self.history: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.command = _command(argv)
        self.started_at = datetime.now(UTC).isoformat(timespec="seconds")

    def write(self, name: str, content: str | bytes) -> None:
        """Write one file of the run, whole or not at all. Does nothing in other processes than the main one."""
        if not distributed.is_main_process():
            return
        target = self.path / name
        scratch = target.with_name(f".{name}.tmp")
        scratch.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(scratch, target)

    def log(self, row: dict[str, Any]) -> None:
        """Append one row to `log_history.jsonl` at once, so that it can be followed while the run goes on."""
        row = finite(row)
        self.history.append(row)
        if distributed.is_main_process():
            with open(self.path / "log_history.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(row, allow_nan=False) + "\n")

    def rewind(self, step: int) -> None:
        """Take up the history of the run that is resumed, up to `step`; what came after is trained again."""
        file = self.path / "log_history.jsonl"
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
        self.history = [row for row in rows if row["step"] <= step]
        self.write(file.name, "".join(json.dumps(row) + "\n" for row in self.history))

    def write_summary(self, status: str, error: str | None) -> None:
        """Write `summary.json`. Raises `jsonschema.ValidationError` when it breaks the shipped schema."""
        if not distributed.is_main_process():
            return
        summary = finite(self._assemble(status, error))
        validate_summary(summary)
        self.write("summary.json", json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    def _assemble(self, status: str, error: str | None) -> dict[str, Any]:
        unknown = dict.fromkeys(("data", "model", "eval", "resumed_from"))
        return {
            "schema_version": SCHEMA_VERSION,
            "run_id": self.path.name,
            "module": self.module.name,
            "status": status,
            "error": error,
            "toy": self.config.toy,
            "command": self.command,
            "seed": self.config.values["seed"],
            "started_at": self.started_at,
            "wall_seconds": round(_seconds_since_start(), 3),
            "peak_rss_mb": round(_peak_rss_mb(), 1),
            "resumed_from": None,
            "env": environment.describe(_dtype(self.config.values), bool(self.config.values.get("use_cpu"))),
            **unknown,
            "metrics": summarize(self.history),
            "checks": [check.as_dict(self.config.toy) for check in self.checks],
            "samples": [],
            **self.summary,
            "artifacts": sorted(p.name for p in self.path.iterdir() if not p.name.startswith(".")),
        }

    def failed_checks(self) -> list[str]:
        return [check.id for check in self.checks if check.status(self.config.toy) == "fail"]


def execute(module: Module, config: Config, argv: list[str]) -> int:
    """Run `module` in a directory of its own and return the exit code.

    Raises:
        ConfigError: the output directory cannot be used. Everything later is caught and told in the summary.
    """
    distributed.check_world_size()
    path = distributed.broadcast(_prepare_in_main(module, config))
    if isinstance(path, ConfigError):
        raise path
    assert path is not None
    for part in config.parts:
        if hasattr(part, "output_dir"):
            part.output_dir = str(path)
    run = RunDirectory(path, module, config, argv)
    if distributed.is_main_process():
        (path / "traceback.txt").unlink(missing_ok=True)  # of the run that is resumed
    run.write("resolved_config.yaml", config.to_yaml())
    run.write_summary("interrupted", UNFINISHED)
    status, error, code = _guarded(lambda: module.load().run(config, run), run)
    run.write_summary(status, error)
    if distributed.is_main_process():
        from llmcore_hf.report import print_report

        print_report(path, status, error)
    _leave_process_group()
    return code


def _guarded(work: Callable[[], None], run: RunDirectory) -> tuple[str, str | None, int]:
    """Do the work; what went wrong becomes (status, error, exit code)."""
    try:
        work()
    except KeyboardInterrupt:
        return "interrupted", "stopped by the user", 130
    except Diverged as error:
        return "diverged", str(error), 1
    except UserError as error:
        if error.__cause__ is not None:
            run.write("traceback.txt", traceback.format_exc())
        return "failed", str(error), error.exit_code
    except Exception as error:
        run.write("traceback.txt", traceback.format_exc())
        if not distributed.is_main_process():
            traceback.print_exc()
        return "failed", f"{type(error).__name__}: {error} (see {run.path / 'traceback.txt'})", 1
    if failed := run.failed_checks():
        return "failed", f"checks failed: {', '.join(failed)}", 1
    return "ok", None, 0


def _prepare_in_main(module: Module, config: Config) -> Path | ConfigError | None:
    if not distributed.is_main_process():
        return None
    try:
        return prepare_directory(module.name, config)
    except ConfigError as error:
        return error


def prepare_directory(module: str, config: Config) -> Path:
    """Make the run's directory, empty unless the run resumes.

    Raises:
        ConfigError: `--output_dir` is in use, or cannot be written.
    """
    given = config.values.get("output_dir")
    resume = config.values.get("resume_from_checkpoint")
    root = Path("output") / module
    try:
        if given:
            path = Path(given).expanduser().resolve() if Path(given).is_symlink() else Path(given).expanduser()
            _keep_inputs(path, config)
            _clear_for_use(path, overwrite=config.values["overwrite_output_dir"], resume=bool(resume))
        elif resume and resume.lower() in LAST:
            path = (root / "latest").resolve()
        elif resume:
            path = Path(resume).expanduser().resolve().parent
        else:
            path = root / f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
            path.mkdir(parents=True)
            _point_latest_to(path)
        if resume:
            _check_resume(path, resume, module, config)
    except OSError as error:
        raise ConfigError([f"the output directory cannot be made: {error}"]) from None
    return path


def checkpoint_of(path: Path, resume: str) -> Path | None:
    """The checkpoint folder that `--resume_from_checkpoint` names in the run directory `path`; None without one."""
    from transformers.trainer_utils import get_last_checkpoint

    if resume.lower() not in LAST:
        return Path(resume).expanduser() if Path(resume).expanduser().is_dir() else None
    found = get_last_checkpoint(str(path)) if path.is_dir() else None
    return Path(found) if found else None


def last_step(checkpoint: Path) -> int:
    """Optimizer steps done when the checkpoint was written."""
    return int(json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["global_step"])


def _check_resume(path: Path, resume: str, module: str, config: Config) -> None:
    """Refuse, before anything is written, to resume what is not there, another module's run, or a finished one."""
    checkpoint = checkpoint_of(path, resume)
    if checkpoint is None or not (checkpoint / "trainer_state.json").exists():
        raise ConfigError([f"--resume_from_checkpoint {resume}: there is no such checkpoint (looked in {path})"])
    former = path / "resolved_config.yaml"
    if former.exists() and (name := read_yaml(former).get("module")) != module:
        raise ConfigError([f"--resume_from_checkpoint {resume}: {path} is a run of `{name}`, not of `{module}`"])
    max_steps = config.values.get("max_steps", -1)
    if 0 < max_steps <= last_step(checkpoint):
        raise ConfigError([f"{checkpoint} has already done {last_step(checkpoint)} steps: raise --max_steps to go on"])


def _keep_inputs(path: Path, config: Config) -> None:
    """Refuse to overwrite the directory that the run is about to read from."""
    for name in ("model_name_or_path", "dataset_name"):
        source = config.values.get(name)
        if config.values["overwrite_output_dir"] and source:
            place = Path(source).expanduser().resolve()
            if place.exists() and place.is_relative_to(path.resolve()):
                raise ConfigError(
                    [f"--overwrite_output_dir would delete --{name} {source}: choose another --output_dir"]
                )


def _clear_for_use(path: Path, *, overwrite: bool, resume: bool) -> None:
    if path.exists() and not path.is_dir():
        raise ConfigError([f"--output_dir {path} is a file"])
    if not path.exists() or not any(path.iterdir()) or resume:
        path.mkdir(parents=True, exist_ok=True)
        return
    if not overwrite:
        raise ConfigError(
            [
                f"--output_dir {path} is not empty: continue the run in it with --resume_from_checkpoint last, "
                "choose another name, or replace it with --overwrite_output_dir"
            ]
        )
    if not all((path / name).exists() for name in ("resolved_config.yaml", "summary.json")):
        raise ConfigError([f"--output_dir {path} was not made by a run, so --overwrite_output_dir will not delete it"])
    shutil.rmtree(path)
    path.mkdir()


def _point_latest_to(path: Path) -> None:
    """Let `latest` beside the run directory point to it, replacing the former link in one step."""
    scratch = path.parent / f".latest-{path.name}"
    scratch.symlink_to(path.name)
    os.replace(scratch, path.parent / "latest")


def finite(value: Any) -> Any:
    """The same data with NaN and infinity as None: JSON has no word for them, and unknown is not 0."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def summarize(history: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Per metric of the log history: first, last, best value and the step of the best."""
    series: dict[str, list[tuple[int, float]]] = {}
    for row in history:
        for name, value in row.items():
            base = name.removeprefix("eval_")
            skip = base in NOT_METRICS or base.endswith(("_per_second", "runtime", "_time"))
            if not skip and isinstance(value, int | float):
                series.setdefault(name, []).append((row["step"], value))
    return {name: _first_last_best(points, _direction(name)) for name, points in series.items()}


def _direction(name: str) -> bool | None:
    return HIGHER_IS_BETTER.get(name.removeprefix("eval_"))


def _first_last_best(points: list[tuple[int, float]], higher_is_better: bool | None) -> dict[str, Any]:
    result = {"first": points[0][1], "last": points[-1][1], "best": None, "best_step": None}
    if higher_is_better is not None:
        pick = max if higher_is_better else min
        result["best_step"], result["best"] = pick(points, key=lambda point: point[1])
    return {**result, "higher_is_better": higher_is_better}


def validate_summary(summary: dict[str, Any]) -> None:
    """Raises `jsonschema.ValidationError` when `summary` breaks the shipped schema."""
    import jsonschema

    schema = json.loads(resources.path("schema/summary.schema.json").read_text(encoding="utf-8"))
    jsonschema.validate(summary, schema)


def _dtype(values: dict[str, Any]) -> str:
    """Precision of the computation: mixed precision when it is on, else that of the weights."""
    if values.get("bf16"):
        return "bfloat16 (mixed)"
    if values.get("fp16"):
        return "float16 (mixed)"
    return str(values.get("dtype") or "float32")


def _command(argv: list[str]) -> str:
    shown, hide = [os.path.basename(sys.argv[0])], False
    for token in argv:
        name, has_value, _ = token.partition("=")
        if name.replace("-", "_") == "__hub_token":
            token, hide = (f"{name}=***" if has_value else name), not has_value
        elif hide:
            token, hide = "***", False
        shown.append(token)
    return shlex.join(shown)


def _seconds_since_start() -> float:
    """Wall time since the process began, imports included."""
    import psutil

    return time.time() - psutil.Process().create_time()


def _peak_rss_mb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, KiB elsewhere


def _leave_process_group() -> None:
    if distributed.world_size() > 1:
        from accelerate import PartialState

        PartialState().destroy_process_group()
