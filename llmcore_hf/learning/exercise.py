"""Exercises (手撕): a function to fill in by hand, and a checker that says which of its properties does not hold.

`learning/exercises/<id>/` holds `exercise.yaml` (level, titles, the properties in words), `README.md` and `README.en.md`
(the task), `task.py` (to fill in), `check.py` (the properties, see `grading`) and `solution.py`. Nothing here imports
torch; the checker does, in a process of its own.
"""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmcore_hf import resources
from llmcore_hf.durability import write_atomically
from llmcore_hf.errors import UserError
from llmcore_hf.learning import state
from llmcore_hf.learning.texts import Parser, Text, WrongOptions, nearest, read_yaml, say

FOLDER = "learning/exercises"
SECONDS = 10.0  # for each property; the checkers' own inputs take milliseconds
IMPORT, TRACE_LINE = "import", re.compile(r'File "(.+)", line (\d+) in')
Row = dict[str, Any]

WORDS = {
    "title": {"zh": "# 手撕：{title}（`{id}`，Level {level}，模块 `{module}`）", "en": "# Exercise: {title} (`{id}`, level {level}, module `{module}`)"},
    "head": {"zh": "| 手撕题 | Level | 模块 | 题目 | 状态 |", "en": "| Exercise | Level | Module | Title | Status |"},
    "passed": {"zh": "通过", "en": "passed"},
    "tried": {"zh": "还没通过", "en": "not passed yet"},
    "new": {"zh": "没做过", "en": "not tried"},
    "how": {
        "zh": "填写：{file}\n检查：python scripts/exercise.py check {id}",
        "en": "To fill in: {file}\nTo check it: python scripts/exercise.py check {id} --lang en",
    },
    "inputs": {"zh": "输入", "en": "input"},
    "expected": {"zh": "应得", "en": "expected"},
    "got": {"zh": "得到", "en": "got"},
    "at": {"zh": "（第 {line} 行：{code}）", "en": " (line {line}: {code})"},
    "empty": {"zh": "还没有写：{message}", "en": "Not written yet: {message}"},
    "timeout": {
        "zh": "{seconds:g} 秒内没有结束：多半是死循环，后面的性质没有检查",
        "en": "did not end within {seconds:g} s, an endless loop most likely; the properties after it were not checked",
    },
    "crash": {
        "zh": "进程中途退出（{reason}），后面的性质没有检查",
        "en": "the process ended on the way ({reason}); the properties after it were not checked",
    },
    "import": {"zh": "文件能导入", "en": "the file can be imported"},
    "all": {"zh": "{n}/{n} 条性质通过，已记入进度。", "en": "{n} of {n} properties hold. Kept in your progress."},
    "some": {
        "zh": "{n}/{all} 条性质通过。先看第一条没过的：它给出了输入、应得和得到的值。",
        "en": "{n} of {all} properties hold. Start with the first that does not: it shows input, expected and got.",
    },
    "is_solution": {
        "zh": "{n}/{n} 条性质通过。这就是参考答案本身，不记入进度。",
        "en": "{n} of {n} properties hold. This is the reference solution itself, so it is not kept in your progress.",
    },
}  # fmt: skip


@dataclass(frozen=True)
class Exercise:
    """One folder of `learning/exercises/`."""

    id: str
    level: int
    module: str
    title: Text
    properties: dict[str, Text]  # name of the function in check.py -> what it asks for

    def file(self, name: str) -> Path:
        return resources.path(f"{FOLDER}/{self.id}/{name}")


@functools.cache
def load_all() -> dict[str, Exercise]:
    """Every exercise by its id, in the order of levels."""
    found = []
    for file in sorted(resources.path(FOLDER).glob("*/exercise.yaml")):
        source = read_yaml(file)
        found.append(Exercise(id=file.parent.name, **source))
    return {exercise.id: exercise for exercise in sorted(found, key=lambda exercise: (exercise.level, exercise.id))}


def get(id: str) -> Exercise:
    """Raises `ConfigError` when there is no such exercise; the message suggests the nearest name."""
    if found := load_all().get(id):
        return found
    hint, listed = nearest(id, load_all()), ", ".join(load_all())
    raise WrongOptions(
        say(
            zh=f"没有手撕题 `{id}`。{hint}有这些：{listed}",
            en=f"there is no exercise `{id}`.{hint} There are: {listed}",
        )
    )


# ---------------------------------------------------------------- checking


def check(exercise: Exercise, file: Path, seconds: float = SECONDS) -> list[Row]:
    """Grade `file` in a process of its own: one row per property that was reached, see `grading.grade`.

    Besides the statuses there, a row may have `timeout` or `crash`; it is then the last one. What the learner's code
    prints is shown as it comes.

    Raises:
        UserError: the file is not there, or the process could not grade.
    """
    if not file.is_file():
        offer = f"python scripts/exercise.py show {exercise.id} --save {file}"
        raise UserError(
            say(
                zh=f"{file}：没有这个文件；`{offer}` 写一份来填",
                en=f"{file}: there is no such file; `{offer}` writes one to fill in",
            )
        )
    with tempfile.TemporaryDirectory(prefix="llmcore-exercise-") as folder:
        results = Path(folder) / "results.jsonl"
        # -P: a file of the learner called torch.py or random.py must not take the library's place
        command = [
            sys.executable,
            "-P",
            "-m",
            "llmcore_hf.learning.grading",
            exercise.id,
            ",".join(exercise.properties),
        ]
        command += [str(file.resolve()), str(seconds), str(results)]
        package = str(Path(__file__).resolve().parents[2])
        paths = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
        code = subprocess.run(command, stdin=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": paths}).returncode
        rows = _read(results)
        if not rows:
            raise UserError(
                say(
                    zh=f"`{exercise.id}` 的检查程序没能启动（原因见上）",
                    en=f"the checker of `{exercise.id}` could not start (see above)",
                )
            )
        if "end" in rows[-1]:
            return [row for row in rows if "status" in row]
        trace = results.with_suffix(".trace").read_text(encoding="utf-8")
        return [*(row for row in rows if "status" in row), _cut_off(rows[-1], code, trace, file.resolve())]


def _read(results: Path) -> list[Row]:
    """The rows; a last one that was cut off is left out."""
    if not results.exists():
        return []
    lines = results.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def _cut_off(last: Row, code: int, trace: str, file: Path) -> Row:
    """What happened in the property that had begun when the process ended."""
    row: Row = {"id": last.get("begin", last.get("id")), "status": "timeout" if trace else "crash"}
    if code < 0:
        row["reason"] = signal.Signals(-code).name
    else:
        row["reason"] = f"exit {code}"
    inside = [int(line) for name, line in TRACE_LINE.findall(trace) if name == str(file)]
    if inside:  # the innermost frame comes first
        row |= {"line": inside[0], "code": file.read_text(encoding="utf-8").splitlines()[inside[0] - 1].strip()}
    return row


# ---------------------------------------------------------------- showing


def report(exercise: Exercise, rows: list[Row], language: str, seconds: float) -> str:
    """What held and what did not, for the learner."""
    lines = [WORDS["title"][language].format(**_about(exercise, language))]
    if all(row["status"] == "empty" for row in rows):
        rows, lines = [], [*lines, *_details(rows[0], language, seconds)]
    for row in rows:
        words = WORDS["import"] if row["id"] == IMPORT else exercise.properties[row["id"]]
        lines.append(f"{'✓' if row['status'] == 'pass' else '✗'} {row['id']}: {words[language]}")
        lines += [f"    {line}" for line in _details(row, language, seconds)]
    return "\n".join(lines) + "\n"


def _about(exercise: Exercise, language: str) -> dict[str, Any]:
    return {
        "id": exercise.id,
        "level": exercise.level,
        "module": exercise.module,
        "title": exercise.title[language],
        "file": exercise.file("task.py"),
    }


def _details(row: Row, language: str, seconds: float) -> list[str]:
    where = WORDS["at"][language].format(**row) if row.get("code") else ""
    if row["status"] == "fail":
        lines = [f"{WORDS['inputs'][language]}  {name} = {value}" for name, value in row["inputs"].items()]
        return [*lines, *(f"{WORDS[key][language]}  {row[key]}" for key in ("expected", "got"))]
    if row["status"] == "error":
        return [row["message"] + where]
    if row["status"] in ("empty", "timeout", "crash"):
        said = {"message": row.get("message"), "reason": row.get("reason"), "seconds": seconds}
        return [WORDS[row["status"]][language].format(**said) + where]
    return []


def listing(language: str) -> str:
    """All exercises as a table, with what the learner did."""
    done = state.read()["exercises"]
    rows = [WORDS["head"][language], "| --- | --- | --- | --- | --- |"]
    for exercise in load_all().values():
        result = done.get(exercise.id)
        word = "new" if result is None else "passed" if result["passed"] else "tried"
        cells = f"`{exercise.id}` | {exercise.level} | `{exercise.module}` | {exercise.title[language]}"
        rows.append(f"| {cells} | {WORDS[word][language]} |")
    return "\n".join(rows) + "\n"


def _show(exercise: Exercise, language: str, solution: bool, save: str | None) -> None:
    code = exercise.file("solution.py" if solution else "task.py").read_text(encoding="utf-8")
    if save:
        if Path(save).exists():
            raise UserError(
                say(
                    zh=f"{save} 已经存在：请换个文件名，免得覆盖你写的内容",
                    en=f"{save} exists already: name another file, so that nothing of yours is lost",
                )
            )
        write_atomically(Path(save), code)
        print(save)
        return
    if not solution:
        readme = exercise.file("README.md" if language == "zh" else f"README.{language}.md")
        print(readme.read_text(encoding="utf-8"))
        print(WORDS["how"][language].format(**_about(exercise, language)) + "\n")
    print(code, end="")


def _check(exercise: Exercise, file: Path, language: str, seconds: float) -> int:
    rows = check(exercise, file, seconds)
    print(report(exercise, rows, language, seconds))
    n = sum(row["status"] == "pass" for row in rows)
    passed = n == len(exercise.properties)
    if passed and file.read_bytes() == exercise.file("solution.py").read_bytes():
        print(WORDS["is_solution"][language].format(n=n))
        return 0
    state.record_exercise(exercise.id, passed)
    print(WORDS["all" if passed else "some"][language].format(n=n, all=len(exercise.properties)))
    return 0 if passed else 1


def main(argv: list[str]) -> int:
    """List the exercises, show one, or check what was written."""
    parser = Parser(
        "exercise",
        say(
            zh="手撕题：自己写函数，逐条性质和独立的参考实现对照判分。",
            en="Functions to write by hand, graded property by property against independent references.",
        ),
    )
    parser.add_argument(
        "action",
        choices=["list", "show", "check"],
        help=say(zh="list 列出全部，show 看一题，check 检查你写的", en="list all, show one, or check what you wrote"),
    )
    parser.add_argument("id", nargs="?", help=say(zh="题目的 id", en="the exercise"))
    parser.add_argument(
        "--file",
        metavar="FILE",
        help=say(zh="check：你的文件（默认是这题的 task.py）", en="check: your file (default: the exercise's task.py)"),
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=SECONDS,
        help=say(
            zh=f"check：每条性质的时限（秒，默认 {SECONDS:g}）",
            en=f"check: limit per property in seconds (default: {SECONDS:g})",
        ),
    )
    parser.add_argument(
        "--solution",
        action="store_true",
        help=say(zh="show：看参考答案，不看题目", en="show: the reference solution instead of the task"),
    )
    parser.add_argument(
        "--save",
        metavar="FILE",
        help=say(zh="show：把要填写的文件写到这里", en="show: write the file to fill in there"),
    )
    args = parser.parse_args(argv)
    problems = [say(zh=f"--{name} 只用于 `{action}`", en=f"--{name} is for `{action}`") for name, action in (("file", "check"), ("solution", "show"), ("save", "show")) if getattr(args, name) and args.action != action]  # fmt: skip
    if (args.id is None) != (args.action == "list"):
        problems.append(
            say(
                zh="`list` 后面什么都不跟；`show` 和 `check` 后面要跟题目的 id",
                en="`list` stands alone; `show` and `check` need the id of an exercise",
            )
        )
    if not args.seconds > 0:
        problems.append(
            say(zh=f"--seconds {args.seconds:g}：要大于 0", en=f"--seconds {args.seconds:g}: greater than 0")
        )
    if problems:
        raise WrongOptions(*problems)
    if args.action == "list":
        print(listing(args.lang), end="")
        return 0
    exercise = get(args.id)
    if args.action == "show":
        _show(exercise, args.lang, args.solution, args.save)
        return 0
    return _check(exercise, Path(args.file) if args.file else exercise.file("task.py"), args.lang, args.seconds)
