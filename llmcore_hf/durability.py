"""What lets a run outlive a kill, a full disk and Ctrl-C: whole files, marked checkpoints, a stop that is asked for.

Every trainer uses it, Hugging Face's and our own loops alike, so nothing here needs torch or a Trainer. A loop of our own:

    with run.stop.deferring():
        for step in range(1, max_steps + 1):
            ...
            if run.stop.requested:
                checkpoint = run.path / f"checkpoint-{step}"
                ...  # save everything that a resumed run needs
                mark_complete(checkpoint, step)
                raise Interrupted(step, checkpoint)
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmcore_hf.distributed import is_main_process

MARKER = "complete.json"
CHECKPOINT = re.compile(r"checkpoint-(\d+)")  # Hugging Face's name of a checkpoint folder
SIGNALS = (signal.SIGINT, signal.SIGTERM)
TROUBLE = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file grew larger than is allowed here (`ulimit -f`)",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "writing is not permitted",
    errno.EPERM: "writing is not permitted",
    errno.EIO: "the disk reports an input/output error",
}
# Errors that speak of the disk wherever they come from; the others must name a file of the run.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


# ---------------------------------------------------------------- whole files


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all: under a scratch name beside it, to the disk, then renamed.

    Raises:
        OSError: it cannot be written, or its folder is gone. `path` is then what it was before.
    """
    scratch = path.parent / f".{path.name}.tmp"  # `/` and `.` have no name; the system then says that they are folders
    try:
        with open(scratch, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except BaseException:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)
        raise


def move_into_place(folder: Path) -> None:
    """Move the files of `folder` into its parent, each in one step, and remove it. Existing files are replaced."""
    _to_disk(folder)
    for entry in sorted(folder.iterdir()):
        target = folder.parent / entry.name
        if entry.is_dir() and target.is_dir():
            shutil.rmtree(target)  # a folder cannot be renamed over one that holds files
        os.replace(entry, target)
    folder.rmdir()


def _to_disk(folder: Path) -> None:
    """Wait until every file in `folder` is on the disk, so that what is renamed or marked later survives a power cut."""
    for file in _files(folder):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


# ---------------------------------------------------------------- checkpoints


def checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoint folders of a run, whole or not, oldest first."""
    found = [path for path in run_dir.glob("checkpoint-*") if CHECKPOINT.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def mark_complete(checkpoint: Path, step: int, **about: Any) -> None:
    """Say that `checkpoint` is whole: its step, the size of each file, and what else a resumed run asks of it.

    To be called last, by the main process, when every process has written its part.
    """
    _to_disk(checkpoint)
    sizes = {
        file.relative_to(checkpoint).as_posix(): file.stat().st_size
        for file in _files(checkpoint)
        if file != checkpoint / MARKER
    }
    write_atomically(checkpoint / MARKER, json.dumps({"step": step, **about, "files": sizes}, indent=1) + "\n")


def read_marker(checkpoint: Path) -> dict[str, Any] | None:
    """What `mark_complete` wrote; None where there is nothing of the kind."""
    try:
        marker = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    whole = isinstance(marker, dict) and isinstance(marker.get("step"), int) and isinstance(marker.get("files"), dict)
    return marker if whole else None


def incompleteness(checkpoint: Path) -> str | None:
    """What a checkpoint lacks to go on from it; None when it lacks nothing."""
    marker = read_marker(checkpoint)
    if marker is None:
        return f"it has no {MARKER}: its writing did not come to an end, or another program wrote it"
    for name, size in marker["files"].items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} of {size} bytes"
    return "it holds weights alone (--save_only_model)" if marker.get("weights_only") else None


def last_complete(run_dir: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint to go on from, and the newer ones that are passed over, each with the reason."""
    passed_over: dict[Path, str] = {}
    for checkpoint in reversed(checkpoints(run_dir)):
        reason = incompleteness(checkpoint)
        if reason is None:
            return checkpoint, passed_over
        passed_over[checkpoint] = reason
    return None, passed_over


# ---------------------------------------------------------------- stopping


class Interrupted(Exception):
    """A run was asked to stop, and did so after `step`, with `checkpoint` saved."""

    def __init__(self, step: int, checkpoint: Path | None) -> None:
        self.step, self.checkpoint = step, checkpoint
        super().__init__(f"after step {step}" + (f"; saved {checkpoint}" if checkpoint else ""))


class StopRequest:
    """Ctrl-C and SIGTERM, as a context around a run: the first asks, a second Ctrl-C leaves at once.

    While training (`deferring`) the first signal only sets `requested`: the loop looks at it after each step, saves a
    checkpoint and raises `Interrupted`. Elsewhere there is nothing to save, and it raises `KeyboardInterrupt`.
    A SIGTERM that follows is ignored, because launchers pass one on after a Ctrl-C. The handlers of before come back
    with the end of the context. Python lets only the main thread handle signals; in any other this does nothing.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._deferred: str | None = None  # what is said when a signal has to wait
        self._former: dict[signal.Signals, Any] = {}
        self._pid = os.getpid()

    @property
    def requested(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as a shell says it: 130 after Ctrl-C, 143 after SIGTERM."""
        return 128 + (self.signal or signal.SIGINT)

    def __enter__(self) -> StopRequest:
        self._pid = os.getpid()
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *args: Any) -> None:
        for number, handler in self._former.items():
            # None: it was not installed from Python, and Python cannot bring it back
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._former = {}

    @contextlib.contextmanager
    def deferring(self, note: str = "stopping after this step and saving a checkpoint") -> Iterator[None]:
        """Let the first signal wait, because training is in progress and looks at `requested` after each step."""
        self._deferred = note
        try:
            yield
        finally:
            self._deferred = None

    def _handle(self, number: int, frame: Any) -> None:
        if os.getpid() != self._pid:
            return _handle_in_child(number)
        if self.requested:
            return  # a SIGTERM; a second SIGINT does not come here
        self.signal = signal.Signals(number)
        # The default action, not a handler of ours: Python runs handlers between bytecodes, and a step may be one call.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if self._deferred is None:
            raise KeyboardInterrupt
        if is_main_process():
            # not `print`, which may be what the signal interrupts
            with contextlib.suppress(OSError):
                os.write(2, f"\n{self.signal.name}: {self._deferred}; Ctrl-C leaves at once\n".encode())


def _handle_in_child(number: int) -> None:
    """A forked child (of a data loader, of `Dataset.map`) inherits the handler. Its parent decides what to do."""
    if number == signal.SIGTERM:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)


# ---------------------------------------------------------------- disks


def storage_trouble(error: BaseException, run_dir: Path) -> str | None:
    """What is wrong with the disk under `run_dir`, when that is what `error` comes from; None when it is not.

    `torch.save` and safetensors wrap the system's error in their own, in words; both are understood.
    """
    if is_main_process() and not run_dir.is_dir():  # on another machine it need not be
        return f"{run_dir} is gone: it was deleted or unmounted while the run went on"
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        if trouble := _trouble_of(current, run_dir):
            file = getattr(current, "filename", None)  # it may be in a cache, on another disk than the run
            place = Path(file).absolute().parent if isinstance(file, str) and not _is_below(file, run_dir) else run_dir
            return f"{trouble} ({_free(place)} free in {place})"
        current = current.__cause__ or current.__context__
    return None


def _trouble_of(error: BaseException, run_dir: Path) -> str | None:
    text = str(error)
    if isinstance(error, OSError):
        number, file = error.errno, str(error.filename or "")
        if number == errno.ENOENT and _is_below(file, run_dir):
            return f"{file} is gone"
    else:
        # safetensors: "... I/O error: No space left on device (os error 28)"
        match = re.search(r"\(os error (\d+)\)", text)
        number, file = (int(match.group(1)) if match else None), ""
        if match is None and ("PytorchStreamWriter failed writing" in text or "unexpected pos" in text):
            return (
                "a checkpoint could not be written whole: the disk is full, or no file may grow so large (`ulimit -f`)"
            )
    if number in FULL or (number in TROUBLE and (_is_below(file, run_dir) or not isinstance(error, OSError))):
        return TROUBLE[number] + (f", writing {file}" if file else "")
    return None


def _is_below(file: str, folder: Path) -> bool:
    return bool(file) and Path(file).absolute().is_relative_to(folder.absolute())


def _free(folder: Path) -> str:
    with contextlib.suppress(OSError):
        return f"{shutil.disk_usage(folder).free / 2**20:.0f} MB"
    return "an unknown number of bytes"
