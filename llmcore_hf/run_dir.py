"""Everything a run leaves behind, and the frame around it: directory, status, checks, exit code.

Files are written by the main process only, whole or not at all (`durability`). From its first second the directory holds
a summary with status `interrupted`; only a run that comes to its end replaces it. So the record is true even after a
power cut.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import resource
import secrets
import shlex
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llmcore_hf import distributed, environment, resources, resume
from llmcore_hf.checks import Check
from llmcore_hf.config import NOT_REPEATED, Config, plain
from llmcore_hf.durability import Interrupted, StopRequest, last_complete, storage_trouble, write_atomically
from llmcore_hf.errors import ConfigError, UserError
from llmcore_hf.registry import Module

SCHEMA_VERSION = 1
LATEST, ASKED = "latest", "asked"  # beside the runs of a module: a link to the newest, and the runs that only ask
UNFINISHED = "The run has not come to its end: it is still going on, or it was killed."
# Bookkeeping in the log history that is no metric of the method.
NOT_METRICS = (
    "step",
    "epoch",
    "total_flos",
    "train_loss",
    "num_tokens",
    "learning_rate",
    "grad_norm",
    "episode",
    "eps",
)
HIGHER_IS_BETTER = {
    "loss": False,
    "perplexity": False,
    "mean_token_accuracy": True,
    "accuracy": True,
    "margin": True,
    "rewards/accuracies": True,
    "vqa_accuracy": True,
    "rewards/margins": True,
    "return": True,
    "reward": True,
    "sampled_reward": True,
    "objective/scores": True,
    "rms_error": False,
    "bellman_residual": False,
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
        checkpoint: the checkpoint that the run goes on from; None when it begins anew.
        stop: whether the user or the machine asked the run to stop.
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
        self.checkpoint: Path | None = None
        self.former_options: dict[str, Any] = {}
        self.stop = StopRequest()

    def resume_from(self, checkpoint: Path) -> None:
        """Go on from `checkpoint`; to be called by every process, before anything is written."""
        resume.check_seen_by_all(checkpoint)
        self.checkpoint = checkpoint
        self.former_options = resume.options_of(checkpoint.absolute().parent)
        self.summary["resumed_from"] = str(checkpoint)

    def check_exists(self) -> None:
        """Raises `FileNotFoundError` when the directory was deleted while the run goes on.

        Whoever is about to make a folder in it asks this first: `os.makedirs` would bring back a part of it.
        """
        if distributed.is_main_process() and not self.path.is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.path))

    def write(self, name: str, content: str | bytes) -> None:
        """Write one file of the run, whole or not at all. Does nothing in other processes than the main one."""
        if not distributed.is_main_process():
            return
        write_atomically(self.path / name, content)

    @contextlib.contextmanager
    def folder(self, name: str) -> Iterator[Path]:
        """A temporary folder to be filled by the main process; it replaces the folder `name` of the run, whole or not at all."""
        self.check_exists()
        scratch, final = self.path / f".{name}", self.path / name
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        try:
            yield scratch
            shutil.rmtree(final, ignore_errors=True)
            os.replace(scratch, final)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def log(self, row: dict[str, Any]) -> None:
        """Append one row to `log_history.jsonl` at once, so that it can be followed while the run goes on."""
        row = finite(row)
        self.history.append(row)
        if distributed.is_main_process():
            with open(self.path / "log_history.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(row, allow_nan=False) + "\n")

    def rewind(self, step: int, former: Path) -> None:
        """Take up the history of the run in `former`, up to `step`; what came after is trained again.

        A former end (`train_runtime`) is no longer the end, and a last line that a kill cut short is left out.

        Raises:
            UserError: another line of `log_history.jsonl` cannot be read.
        """
        file = former / "log_history.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        rows = [row for i, line in enumerate(lines) if (row := _read_row(line, file, i + 1, len(lines))) is not None]
        self.history = [row for row in rows if row["step"] <= step and "train_runtime" not in row]
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
            "peak_rss_mb": round(peak_rss_mb(), 1),
            "resumed_from": None,
            "env": environment.describe(_dtype(self.config.values), _on_cpu(self.config.values)),
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
    follow_latest(config, distributed.broadcast(linked_values(config.values)))
    path = distributed.broadcast(_prepare_in_main(module, config))
    if isinstance(path, ConfigError):
        raise path
    assert path is not None
    for part in config.parts:
        if hasattr(part, "output_dir"):
            part.output_dir = str(path)
    run = RunDirectory(path, module, config, argv)
    if (resuming := config.values.get("resume_from_checkpoint")) and not module.stages:  # stages know how far they are
        run.resume_from(distributed.broadcast(resume.find(path, resuming) if distributed.is_main_process() else path))
    code = carry_out(run)
    _leave_process_group()
    return code


def carry_out(run: RunDirectory) -> int:
    """Do what a prepared run is for, record how it ended, and return the exit code."""
    with run.stop:
        status, error, code = _guarded(lambda: _work(run), run)
        with run.stop.deferring("writing the summary"):
            return _record(run, status, error, code)


def _work(run: RunDirectory) -> None:
    if distributed.is_main_process():
        (run.path / "traceback.txt").unlink(missing_ok=True)  # of the run that is resumed
    run.write("resolved_config.yaml", run.config.to_yaml())
    run.write_summary("interrupted", _unfinished(run))
    run.module.load().run(run.config, run)


def _unfinished(run: RunDirectory) -> str:
    keeps_checkpoints = (
        plain(run.config.values.get("save_strategy", "no")) != "no" or run.checkpoint or run.module.stages
    )
    return UNFINISHED + (f" If it was killed, go on with: {resume.command(run.path)}" if keeps_checkpoints else "")


def _guarded(work: Callable[[], None], run: RunDirectory) -> tuple[str, str | None, int]:
    """Do the work; what went wrong becomes (status, error, exit code)."""
    try:
        work()
    except (KeyboardInterrupt, Interrupted) as error:
        return "interrupted", _how_it_stopped(run, error), run.stop.exit_code
    except Diverged as error:
        return "diverged", str(error), 1
    except Exception as error:
        if trouble := storage_trouble(error, run.path):
            return "failed", f"{trouble}. Once that is mended, {_way_on(run)}", 1
        return _failure(run, error)
    if failed := run.failed_checks():
        return "failed", f"checks failed: {', '.join(failed)}", 1
    return "ok", None, 0


def _failure(run: RunDirectory, error: Exception) -> tuple[str, str, int]:
    """An error that a user can mend is told; of any other the traceback is kept, too."""
    expected = isinstance(error, UserError)
    if not expected or error.__cause__ is not None:
        with contextlib.suppress(OSError):
            run.write("traceback.txt", traceback.format_exc())
    if isinstance(error, UserError):
        return "failed", str(error), error.exit_code
    if not distributed.is_main_process():
        traceback.print_exc()
    return "failed", f"{type(error).__name__}: {error} (see {run.path / 'traceback.txt'})", 1


def _how_it_stopped(run: RunDirectory, error: BaseException) -> str:
    by = "SIGTERM" if run.stop.signal == signal.SIGTERM else "the user"
    where = f" {error}" if isinstance(error, Interrupted) else ", outside training"
    return f"stopped by {by}{where}; {_way_on(run)}"


def _way_on(run: RunDirectory) -> str:
    if not run.path.is_dir() or not (run.module.stages or last_complete(run.path)[0]):
        return "start again: there is no checkpoint to go on from"
    return f"go on with: {resume.command(run.path)}"


def _record(run: RunDirectory, status: str, error: str | None, code: int) -> int:
    """Write the summary and report; a disk that does not even take the summary is told in one message."""
    try:
        run.write_summary(status, error)
    except OSError as problem:
        told = error or f"{storage_trouble(problem, run.path) or problem}. Once that is mended, {_way_on(run)}"
        print(f"{run.module.name}: {told}\n(summary.json could not be written)", file=sys.stderr)
        return code or 1
    if distributed.is_main_process():
        from llmcore_hf.report import print_report

        print_report(run.path, status, error)
    return code


def _prepare_in_main(module: Module, config: Config) -> Path | ConfigError | None:
    if not distributed.is_main_process():
        return None
    try:
        return prepare_directory(module, config)
    except ConfigError as error:
        return error


def linked_values(values: dict[str, Any]) -> dict[str, Any]:
    """The options that name something through a `latest` link, with the run that it points to now in its place.

    The link is about to point to the run that begins, which would then look for a model in its own empty directory; and a
    `resolved_config.yaml` that said `latest` would repeat another run.
    """
    inputs = {name: value for name, value in values.items() if name not in NOT_REPEATED}
    return {name: real for name, value in inputs.items() if (real := _without_latest(value)) != value}


def _without_latest(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_latest(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_latest(item) for item in value]
    if not isinstance(value, str) or LATEST not in Path(value).parts:
        return value
    path = Path(value).expanduser()
    links = [place for place in (path, *path.parents) if place.name == LATEST and os.path.islink(place)]
    if not links or not os.path.exists(path):
        return value
    real, here = path.resolve(), Path.cwd().resolve()
    return str(real.relative_to(here) if real.is_relative_to(here) else real)


def follow_latest(config: Config, found: dict[str, Any]) -> None:
    """Put what `linked_values` found into the options."""
    config.values |= found
    for part in config.parts:
        for name in found.keys() & vars(part).keys():
            setattr(part, name, found[name])


def prepare_directory(module: Module, config: Config) -> Path:
    """Make the run's directory, empty unless the run resumes. A run that only asks a model leaves `latest` to training runs.

    Raises:
        ConfigError: `--output_dir` is in use, or cannot be written.
    """
    given = config.values.get("output_dir")
    resuming = config.values.get("resume_from_checkpoint")
    root = Path("output") / module.name
    try:
        if given:
            path = Path(given).expanduser().resolve() if Path(given).is_symlink() else Path(given).expanduser()
            _keep_inputs(path, config)
            _clear_for_use(path, overwrite=config.values["overwrite_output_dir"], resuming=bool(resuming))
        elif resuming and resuming.lower() in resume.LAST:
            path = (root / LATEST).resolve()
        elif resuming:
            path = Path(resuming).expanduser().resolve().parent
        else:
            asks = module.only_asks(config)
            parent = root / ASKED if asks else root
            path = parent / f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
            path.mkdir(parents=True)
            if not asks:
                _point_latest_to(path)
        if resuming:
            resume.check(path, resuming, module, config)
    except OSError as error:
        raise ConfigError([f"the output directory cannot be made: {error}"]) from None
    return path


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


def _clear_for_use(path: Path, *, overwrite: bool, resuming: bool) -> None:
    if path.exists() and not path.is_dir():
        raise ConfigError([f"--output_dir {path} is a file"])
    if not path.exists() or not any(path.iterdir()) or resuming:
        path.mkdir(parents=True, exist_ok=True)
        return
    if not overwrite:
        goes_on = f"continue the run in it with `{resume.command(path)}`, " if last_complete(path)[0] else ""
        raise ConfigError(
            [
                f"--output_dir {path} is not empty: {goes_on}choose another name, or replace it with "
                "--overwrite_output_dir"
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
    os.replace(scratch, path.parent / LATEST)


def _read_row(line: str, file: Path, number: int, n_lines: int) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
        if isinstance(row["step"], int):
            return row
    except (ValueError, TypeError, KeyError):
        if number == n_lines:
            return None
    raise UserError(f"{file}, line {number} is not a row of a log history: mend it or remove the file")


def finite(value: Any) -> Any:
    """The same data with NaN and infinity as None: JSON has no word for them, and unknown is not 0."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def is_metric(name: str) -> bool:
    """Whether a value of a log row says something about the method; the others are bookkeeping."""
    base = name.removeprefix("eval_")
    return base not in NOT_METRICS and not base.endswith(("_per_second", "runtime", "_time"))


def summarize(history: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Per metric of the log history: first, last, best value and the step of the best."""
    series: dict[str, list[tuple[int, float]]] = {}
    for row in history:
        for name, value in row.items():
            if is_metric(name) and isinstance(value, int | float):
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


def _on_cpu(values: dict[str, Any]) -> bool:
    """Whether the run keeps to the CPU although there may be a GPU: `--use_cpu`, or a systems lesson's `--device cpu`."""
    return bool(values.get("use_cpu")) or values.get("device") == "cpu"


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


def peak_rss_mb() -> float:
    """The largest resident set this process has had so far, in MiB."""
    # Linux hands `ru_maxrss` on from a process to the program it starts, so a run started by a large process would report
    # that one's size; the high-water mark in /proc starts anew with each program.
    try:
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)[1]) / 2**10  # type: ignore[index]
    except (OSError, TypeError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, KiB elsewhere


def _leave_process_group() -> None:
    if distributed.world_size() > 1:
        from accelerate import PartialState

        PartialState().destroy_process_group()
