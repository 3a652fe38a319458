"""Grading of exercises: the properties in an exercise's `check.py`, asked of what the learner wrote.

A property is a function of `check.py` that takes the learner's code as `task`, calls its functions by keyword, and
compares what comes back with an independent reference by `equal` or `true`. `python -m llmcore_hf.learning.grading` grades in
a process of its own, so that an endless loop or a crash in the learner's code ends that process and nothing else;
`llmcore_hf.learning.exercise` starts it and reads its rows.
"""

from __future__ import annotations

import faulthandler
import json
import math
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from llmcore_hf import resources

TOLERANCE = 1e-4  # relative and absolute: inputs are float32
IMPORT = "import"  # stands for a property while the learner's file is imported
Row = dict[str, Any]


class Mismatch(Exception):
    """What came back is not what the property asks for."""

    def __init__(self, inputs: Mapping[str, Any], expected: Any, got: Any) -> None:
        super().__init__()
        self.row = {
            "inputs": {name: show(value) for name, value in inputs.items()},
            "expected": show(expected),
            "got": show(got),
        }


class Unwritten(Exception):
    """The learner's file has no such function."""


# ---------------------------------------------------------------- what checkers say


def equal(got: Any, expected: Any, tolerance: float = TOLERANCE, /, **inputs: Any) -> None:
    """Numbers, tensors and sequences of them must agree in shape and, up to the tolerance, in value.

    Raises:
        Mismatch: they don't; it carries the inputs, by name, for the learner to see.
    """
    if not _agree(got, expected, tolerance):
        raise Mismatch(inputs, expected, got)


def true(holds: bool, expected: str, got: Any, /, **inputs: Any) -> None:
    """Raises `Mismatch` unless the condition, which `expected` puts in words, holds."""
    if not holds:
        raise Mismatch(inputs, expected, got)


def _agree(got: Any, expected: Any, tolerance: float) -> bool:
    import torch

    if isinstance(expected, list | tuple):
        same_kind = isinstance(got, list | tuple) and len(got) == len(expected)
        return same_kind and all(_agree(a, b, tolerance) for a, b in zip(got, expected, strict=True))
    if isinstance(expected, torch.Tensor):
        if not isinstance(got, torch.Tensor) or got.shape != expected.shape:
            return False
        wide = torch.float64
        return torch.allclose(got.detach().to(wide), expected.detach().to(wide), rtol=tolerance, atol=tolerance)
    if isinstance(got, torch.Tensor):
        if got.numel() != 1:
            return False
        got = got.item()
    is_number = isinstance(got, int | float) and not isinstance(got, bool)
    return is_number and math.isclose(got, expected, rel_tol=tolerance, abs_tol=tolerance)


def show(value: Any, limit: int = 600) -> str:
    """A value as a learner can type it again, tensors with their numbers rounded."""
    import torch

    if isinstance(value, torch.Tensor):
        data = value.detach().tolist()
        text = f"tensor({_rounded(data)})" if value.dim() else f"{_rounded(data)}"
    elif isinstance(value, list | tuple):
        text = f"[{', '.join(show(item, limit) for item in value)}]"
    else:
        text = f"{value}" if isinstance(value, str) else repr(_rounded(value))
    if len(text) <= limit:
        return text
    shape = f" shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else ""
    return f"{text[: limit - 1]}…{shape}"


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) and math.isfinite(value) else value


# ---------------------------------------------------------------- grading


class Task:
    """The learner's functions. Each is called by keyword, and must leave the tensors it is given alone."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(self._module, name, None)
        if not callable(function):
            raise Unwritten(f"def {name}(...)")

        def call(**inputs: Any) -> Any:
            before = {key: value._version for key, value in inputs.items() if hasattr(value, "_version")}
            shown = {key: show(value) for key, value in inputs.items() if key in before}
            found = function(**inputs)
            changed = [key for key, version in before.items() if inputs[key]._version != version]
            if changed:
                raise Mismatch(shown, f"`{changed[0]}` as it was", f"`{changed[0]}` was changed in place")
            return found

        return call


def grade(properties: list[str], check: ModuleType, module: ModuleType) -> Iterator[Row]:
    """One row per property: its `id`, its `status` (`pass`, `fail`, `empty`, `error`), and what was found."""
    task = Task(module)
    for name in properties:
        try:
            getattr(check, name)(task)
            yield {"id": name, "status": "pass"}
        except Mismatch as found:
            yield {"id": name, "status": "fail", **found.row}
        except Unwritten as error:
            yield {"id": name, "status": "empty", "message": str(error)}
        except Exception as error:
            row = _described(error, str(module.__file__))
            # torch raises NotImplementedError, too: what is not written raises it itself
            empty = isinstance(error, NotImplementedError) and row.get("code", "").startswith("raise ")
            yield {"id": name, "status": "error", **row} | ({"status": "empty", "message": str(error)} if empty else {})


def _described(error: BaseException, file: str) -> Row:
    """The error in a line, and the line of the learner's file that it came from."""
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    where = {"line": lines[-1].lineno, "code": lines[-1].line} if lines else {}
    if isinstance(error, SyntaxError) and error.filename == file:
        where = {"line": error.lineno, "code": (error.text or "").strip()}
    said = str(error).strip()
    return {"message": f"{type(error).__name__}: {said}" if said else type(error).__name__, **where}


def load(file: Path, name: str) -> ModuleType:
    """A Python file as a module of that name. Unlike an import it leaves no `__pycache__` beside the file."""
    module = ModuleType(name)
    module.__file__ = str(file)
    sys.modules[name] = module  # dataclasses look their module up
    exec(compile(file.read_bytes(), str(file), "exec"), module.__dict__)
    return module


def checker(exercise: str) -> ModuleType:
    """The `check.py` of an exercise."""
    return load(resources.path(f"learning/exercises/{exercise}/check.py"), f"check_{exercise}")


# ---------------------------------------------------------------- the process


def main(exercise: str, properties: list[str], file: Path, seconds: float, results: Path) -> None:
    """Write one row when a property begins and one when it ends, so that what killed this process is known."""
    import torch

    torch.set_num_threads(1)
    check = checker(exercise)
    with results.open("w", encoding="utf-8") as out, trace_of(results).open("w", encoding="utf-8") as trace:

        def say(row: Row) -> None:
            out.write(json.dumps(row) + "\n")
            out.flush()

        @contextmanager
        def within_time(name: str) -> Iterator[None]:
            """A thread in C ends this process when the time is over, whatever Python is doing, and says where it was."""
            say({"begin": name})
            faulthandler.dump_traceback_later(seconds, exit=True, file=trace)
            try:
                yield
            finally:
                faulthandler.cancel_dump_traceback_later()

        try:
            with within_time(IMPORT):
                module = load(file, "learner")
        except Exception as error:
            say({"id": IMPORT, "status": "error", **_described(error, str(file))})
        else:
            for name in properties:
                with within_time(name):
                    rows = list(grade([name], check, module))
                say(rows[0])
        say({"end": True})


def trace_of(results: Path) -> Path:
    return results.with_suffix(".trace")


if __name__ == "__main__":
    from llmcore_hf.learning import grading  # the module that checkers import, with the same `Mismatch`

    grading.main(sys.argv[1], sys.argv[2].split(","), Path(sys.argv[3]), float(sys.argv[4]), Path(sys.argv[5]))
