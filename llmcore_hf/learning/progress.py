"""Progress by evidence: which days have a run that passed all its checks, and what each level still lacks.

A level is passed when all its modules have a run whose status is `ok` and none of whose checks failed or warned, every quiz item was answered right at least once, and the exercises of
the level are passed.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from llmcore_hf import registry
from llmcore_hf.durability import write_atomically
from llmcore_hf.errors import UserError
from llmcore_hf.learning import bugzoo, evidence, exercise, items, plan, quiz, state
from llmcore_hf.learning.evidence import SUMMARY, Run, tell_damaged
from llmcore_hf.learning.texts import Parser, WrongOptions, say

WORDS = {
    "title": {"zh": "# 进度", "en": "# Progress"},
    "days": {"zh": "| Day | 模块 | 运行 | 状态 | 检查 |", "en": "| Day | Module | Run | Status | Checks |"},
    "levels": {
        "zh": "| Level | 运行 | 测验 | 手撕 | 结果 |",
        "en": "| Level | Runs | Quiz | Exercises | Result |",
    },
    "zoo": {
        "zh": "找错题：{n} 种错误里认出 {found} 种，答错过 {missed} 种（`python scripts/bugzoo.py --list`）",
        "en": "Bug zoo: {found} of {n} bugs recognized, {missed} missed so far (`python scripts/bugzoo.py --list`)",
    },
    "passed": {"zh": "**通过**", "en": "**passed**"},
    "lacks": {"zh": "还差：{what}", "en": "lacks: {what}"},
    "and": {"zh": "；", "en": "; "},
    "planned": {"zh": "模块尚未加入", "en": "module not there yet"},
    "no_run": {"zh": "还没有运行", "en": "no run yet"},
    "damaged": {"zh": "记录已损坏", "en": "its record is damaged"},
    "not_passed": {"zh": "（不算）", "en": " (does not count)"},
    "lack_run": {"zh": "`{name}` 的运行", "en": "a run of `{name}`"},
    "lack_pass": {"zh": "`{name}` 的一次没有失败和警告的运行", "en": "a run of `{name}` without failures and warnings"},
    "lack_module": {"zh": "`{name}`（模块尚未加入）", "en": "`{name}` (module not there yet)"},
    "lack_quiz": {
        "zh": "测验 {n} 题（`python scripts/quiz.py --level {level}`）",
        "en": "{n} quiz items (`python scripts/quiz.py --level {level}`)",
    },
    "lack_exercise": {
        "zh": "手撕 {names}（`python scripts/exercise.py show {first}`）",
        "en": "exercises {names} (`python scripts/exercise.py show {first}`)",
    },
    "next": {"zh": "下一步：`{command}`", "en": "Next: `{command}`"},
    "none": {
        "zh": "还没有通过任何一关，不能发证书。`python scripts/progress.py` 说明还差什么。",
        "en": "no level is passed, so there is no certificate. `python scripts/progress.py` says what is missing.",
    },
    "certificate": {"zh": "# LLM-Core 学习证书", "en": "# LLM-Core certificate"},
    "certified": {
        "zh": "下列各关由运行证据、测验和手撕题核对通过。打印于 {at}。",
        "en": "The levels below were verified by runs, quiz answers and exercises. Printed {at}.",
    },
    "certificate_head": {
        "zh": "| Level | 模块 | 运行 | 检查 | summary.json 的 SHA-256 |",
        "en": "| Level | Module | Run | Checks | SHA-256 of summary.json |",
    },
    "verify": {
        "zh": "核对：`sha256sum output/<模块>/<运行>/summary.json`；文件里有命令、种子和每条检查。",
        "en": "To verify: `sha256sum output/<module>/<run>/summary.json`; the file holds the command, the seed and every check.",
    },
}


def proven(run: Run | None) -> bool:
    """Whether a run counts: it did what it says, and no check failed or warned. A check that was not made proves nothing."""
    return run is not None and run.succeeded and bool(run.with_status("pass")) and not run.with_status("warn")


def counted(runs: list[Run]) -> Run | None:
    """The newest run that counts; where none does, the latest."""
    return next((run for run in reversed(runs) if proven(run)), runs[-1] if runs else None)


def exercises() -> dict[str, int]:
    """Exercise -> its level."""
    return {name: found.level for name, found in exercise.load_all().items()}


@dataclass
class LevelProgress:
    level: int
    runs: dict[
        str, Run | None
    ]  # required module -> the run that counts, or its latest; None when there is none, or no such module
    quiz_right: int
    quiz_all: int
    exercises: dict[str, bool] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        runs = all(proven(run) for run in self.runs.values())
        return runs and self.quiz_right == self.quiz_all and all(self.exercises.values())

    def lacks(self, language: str) -> list[str]:
        """What is missing, in words."""
        found = []
        for name, run in self.runs.items():
            if not proven(run):
                word = "lack_module" if not plan.find(name) else "lack_pass" if run else "lack_run"
                found.append(WORDS[word][language].format(name=name))
        if self.quiz_right < self.quiz_all:
            left = self.quiz_all - self.quiz_right
            found.append(WORDS["lack_quiz"][language].format(n=left, level=self.level))
        if missing := [name for name, passed in self.exercises.items() if not passed]:
            found.append(WORDS["lack_exercise"][language].format(names=", ".join(missing), first=missing[0]))
        return found


@dataclass
class Progress:
    runs: dict[str, Run | None]  # every module of the registry and of the plan
    levels: list[LevelProgress]
    bugs: dict[str, str]  # bug -> whether it was recognized, as `bugzoo.standing` says
    damaged: dict[str, list[str]] = field(default_factory=dict)  # module -> what is wrong with runs left out


def collect() -> Progress:
    """Everything from the runs in `output/` and the state file."""
    the_plan, kept = plan.load(), state.read()
    names = [module.name for module in registry.MODULES]
    planned = [name for level in the_plan.levels for name in the_plan.required(level.level)]
    found = {name: evidence.all_runs(name) for name in names}
    runs = {name: counted(found[name][0]) if name in found else None for name in dict.fromkeys([*names, *planned])}
    right = quiz.answered_right(kept["answers"])
    passed = {name for name, result in kept["exercises"].items() if result["passed"]}
    levels = []
    for level in the_plan.levels:
        asked = [item.id for item in items.load(level.level)]
        levels.append(
            LevelProgress(
                level.level,
                {name: runs[name] for name in the_plan.required(level.level)},
                len(right.intersection(asked)),
                len(asked),
                {name: name in passed for name, at in exercises().items() if at == level.level},
            )
        )
    damaged = {name: wrong for name, (_, wrong) in found.items() if wrong}
    return Progress(runs, levels, bugzoo.standing(kept["answers"]), damaged)


def report(progress: Progress, language: str) -> str:
    """The days, the levels, and what to do next, as Markdown."""
    the_plan = plan.load()
    days = [(day.day, day.module) for day in the_plan.days]
    extra = [(m.day, m.name) for m in registry.MODULES if m.name not in {name for _, name in days}]
    rows = [f"| {day} | `{name}` | {_run_cells(name, progress, language)} |" for day, name in sorted(days + extra)]
    lines = [WORDS["title"][language], "", WORDS["days"][language], "| --- | --- | --- | --- | --- |", *rows]
    lines += ["", WORDS["levels"][language], "| --- | --- | --- | --- | --- |"]
    lines += [_level_row(level, language) for level in progress.levels]
    lines += ["", _zoo_line(progress.bugs, language)]
    if command := _next_command(progress):
        lines += ["", WORDS["next"][language].format(command=command)]
    return "\n".join(lines) + "\n"


def _run_cells(name: str, progress: Progress, language: str) -> str:
    run = progress.runs[name]
    if not plan.find(name):
        return f"{WORDS['planned'][language]} | | "
    if run is None:
        return f"{WORDS['damaged' if name in progress.damaged else 'no_run'][language]} | | "
    counts = "" if proven(run) else WORDS["not_passed"][language]
    checks = f"{len(run.with_status('pass'))}/{len(run.checks)}"
    return f"`{run.summary['run_id']}` | {run.summary['status']}{counts} | {checks}"


def _level_row(level: LevelProgress, language: str) -> str:
    n_runs = sum(proven(run) for run in level.runs.values())
    n_exercises = sum(level.exercises.values())
    result = (
        WORDS["passed"][language]
        if level.passed
        else WORDS["lacks"][language].format(what=WORDS["and"][language].join(level.lacks(language)))
    )
    return (
        f"| {level.level} | {n_runs}/{len(level.runs)} | {level.quiz_right}/{level.quiz_all} "
        f"| {n_exercises}/{len(level.exercises)} | {result} |"
    )


def _zoo_line(bugs: dict[str, str], language: str) -> str:
    words = list(bugs.values())
    return WORDS["zoo"][language].format(n=len(words), found=words.count("found"), missed=words.count("missed"))


def _next_command(progress: Progress) -> str | None:
    """The first thing that can be done for the first level that is not passed; after the last one, the bug zoo."""
    for level in progress.levels:
        for name, run in level.runs.items():
            if plan.find(name) and not proven(run):
                return f"python run.py --module {name} --toy"
        if level.quiz_right < level.quiz_all:
            return f"python scripts/quiz.py --level {level.level}"
        if missing := [name for name, passed in level.exercises.items() if not passed]:
            return f"python scripts/exercise.py show {missing[0]}"
    if set(progress.bugs.values()) != {"found"}:
        return "python scripts/bugzoo.py"
    return None


def certified(progress: Progress) -> list[list[str]]:
    """Level, module, run, checks and SHA-256 of the summary, for each run that a passed level rests on."""
    rows = []
    for level in progress.levels:
        for name, run in level.runs.items() if level.passed else ():
            assert run is not None
            digest = hashlib.sha256((run.path / SUMMARY).read_bytes()).hexdigest()
            checks = f"{len(run.with_status('pass'))}/{len(run.checks)}"
            rows.append([str(level.level), name, run.summary["run_id"], checks, digest])
    return rows


def certificate(progress: Progress, language: str) -> str:
    """The levels that are passed, with the hash of each run they rest on."""
    titles = [level.title[language] for level in plan.load().levels]
    lines = [WORDS["certificate"][language], "", WORDS["certified"][language].format(at=state.now()), ""]
    lines += [f"- Level {level.level}: {titles[level.level - 1]}" for level in progress.levels if level.passed]
    lines += ["", WORDS["certificate_head"][language], "| --- | --- | --- | --- | --- |"]
    lines += [f"| {' | '.join(f'`{cell}`' for cell in row)} |" for row in certified(progress)]
    return "\n".join([*lines, "", WORDS["verify"][language]]) + "\n"


def picture(progress: Progress) -> bytes:
    """The certificate as a PNG. Figures carry English text, since no font with Chinese characters is guaranteed."""
    from llmcore_hf.curves import png, pyplot

    rows = certified(progress)
    figure, axis = pyplot().subplots(figsize=(10, 1.5 + 0.35 * len(rows)))
    axis.axis("off")
    passed = [level for level in plan.load().levels if progress.levels[level.level - 1].passed]
    titles = "\n".join(f"Level {level.level}: {level.title['en']}" for level in passed)
    axis.set_title(f"LLM-Core certificate\n{titles}", fontsize=13, pad=10)
    head = ["level", "module", "run", "checks", "SHA-256 of summary.json"]
    table = axis.table(
        rows, colLabels=head, colWidths=[0.06, 0.15, 0.21, 0.08, 0.5], loc="upper center", cellLoc="left"
    )
    table.auto_set_font_size(False)
    table.set_fontsize(7)
    table.scale(1, 1.5)
    figure.text(
        0.5,
        0.04,
        f"Runs without a failure or warning, all quiz items, all exercises. {state.now()}",
        ha="center",
        fontsize=7,
    )
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    return png(figure)


def main(argv: list[str]) -> int:
    """Show the progress, or write the certificate."""
    parser = Parser(
        "progress",
        say(
            zh="每天、运行、测验、手撕，以及每关还差什么。只看证据。",
            en="Days, runs, quiz, exercises, and what each level still lacks. Evidence only.",
        ),
    )
    parser.add_argument(
        "--certificate",
        metavar="FILE",
        help=say(
            zh="写一份已通过各关的证书（.md 或 .png）", en="write a certificate of the levels passed (.md or .png)"
        ),
    )
    args = parser.parse_args(argv)
    progress = collect()
    if args.certificate:
        file = Path(args.certificate)
        if file.suffix not in (".md", ".png"):
            raise WrongOptions(
                say(
                    zh=f"--certificate {file}：文件名要以 .md 或 .png 结尾",
                    en=f"--certificate {file}: the name has to end in .md or .png",
                )
            )
        if not any(level.passed for level in progress.levels):
            raise UserError(WORDS["none"][args.lang])
        write_atomically(file, picture(progress) if file.suffix == ".png" else certificate(progress, args.lang))
        print(args.certificate)
    else:
        print(report(progress, args.lang), end="")
    return tell_damaged([message for messages in progress.damaged.values() for message in messages])
