"""The plan of 14 days and five levels (`learning/plan.yaml`), held against the registry of what exists.

`LEARNING_GUIDE.md` and `LEARNING_GUIDE.en.md` are generated from both: `python scripts/roadmap.py --update`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from llmcore_hf import registry, resources
from llmcore_hf.durability import write_atomically
from llmcore_hf.errors import UserError
from llmcore_hf.learning import exercise
from llmcore_hf.learning.texts import LANGUAGES, Parser, Text, WrongOptions, nearest, read_yaml, say
from llmcore_hf.registry import Module

GUIDES = {"zh": "LEARNING_GUIDE.md", "en": "LEARNING_GUIDE.en.md"}


@dataclass(frozen=True)
class Day:
    day: int
    level: int
    module: str
    goal: Text
    concept: Text

    @property
    def command(self) -> str:
        return f"python run.py --module {self.module} --toy"


@dataclass(frozen=True)
class Level:
    level: int
    title: Text
    modules: tuple[str, ...]
    checkpoints: tuple[Text, ...]


@dataclass(frozen=True)
class Plan:
    daily: tuple[Text, ...]
    days: tuple[Day, ...]
    levels: tuple[Level, ...]

    def required(self, level: int) -> list[str]:
        """The modules a learner has to run for a level: those of its days, and those its checkpoints name."""
        days = [day.module for day in self.days if day.level == level]
        return list(dict.fromkeys([*days, *self.levels[level - 1].modules]))


@functools.cache
def load() -> Plan:
    source = read_yaml(resources.path("learning/plan.yaml"))
    levels = (
        Level(row["level"], row["title"], tuple(row["modules"]), tuple(row["checkpoints"])) for row in source["levels"]
    )
    return Plan(tuple(source["daily"]), tuple(Day(**row) for row in source["days"]), tuple(levels))


def find(name: str) -> Module | None:
    """The module called `name` when it exists."""
    return next((module for module in registry.MODULES if module.name == name), None)


def require(name: str) -> Module:
    """The module called `name`.

    Raises:
        UserError: it is planned but not there yet.
        ConfigError: there is no such module; the message suggests the nearest name.
    """
    plan = load()
    planned = {day.module: f"day {day.day}" for day in plan.days}
    planned = {name: f"level {level.level}" for level in plan.levels for name in level.modules} | planned
    if find(name) is None and name in planned:
        raise UserError(
            say(
                zh=f"`{name}`（{planned[name]}）在计划里，但还没有加入：`python run.py --list` 列出已有的模块",
                en=f"`{name}` ({planned[name]}) is planned, but not there yet: `python run.py --list` shows what is",
            )
        )
    if not (module := find(name)):
        names = [module.name for module in registry.MODULES]
        listed, hint = ", ".join(names), nearest(name, names)
        raise WrongOptions(
            say(
                zh=f"没有模块 `{name}`。{hint}有这些：{listed}",
                en=f"there is no module `{name}`.{hint} There are: {listed}",
            )
        )
    return module


# ---------------------------------------------------------------- the guide

WORDS = {
    "days": {
        "zh": "| Day | 目标 | 命令 | 必须掌握的概念 | 状态 |",
        "en": "| Day | Goal | Command | The concept to master | Status |",
    },
    "there": {"zh": "[可运行](recipes/{name}/)", "en": "[runs](recipes/{name}/)"},
    "missing": {"zh": "尚未加入", "en": "not there yet"},
    "more": {
        "zh": "同一天还可以跑（不在 14 天的必做之内）：",
        "en": "More lessons for the same days (not among the 14 that count):",
    },
    "level": {"zh": "### Level {level}：{title} ({modules})", "en": "### Level {level}: {title} ({modules})"},
    "evidence": {"zh": "运行证据：", "en": "Evidence from runs: "},
    "exercises": {"zh": "手撕：{links}", "en": "Exercises: {links}"},
    "pending": {"zh": "（尚未加入：{names}）", "en": " (not there yet: {names})"},
}


def daily_list(language: str) -> str:
    return "\n".join(f"{number}. {text[language]}" for number, text in enumerate(load().daily, 1))


def days_table(language: str) -> str:
    """One row per promised day, and the registry's other lessons below it."""
    plan = load()
    lines = [WORDS["days"][language], "| --- | --- | --- | --- | --- |"]
    for day in plan.days:
        word = "there" if find(day.module) else "missing"
        status = WORDS[word][language].format(name=day.module)
        lines.append(f"| {day.day} | {day.goal[language]} | `{day.command}` | {day.concept[language]} | {status} |")
    counted = {name for level in plan.levels for name in plan.required(level.level)}
    others = [module for module in registry.MODULES if module.name not in counted]
    if others:
        lines += ["", WORDS["more"][language], ""]
    for module in sorted(others, key=lambda module: module.day):
        title = {"zh": module.title_zh, "en": module.title_en}[language]
        lines.append(f"- Day {module.day}: `python run.py --module {module.name} --toy` ({title})")
    return "\n".join(lines)


def levels_list(language: str) -> str:
    """Each level with its checkpoints and the modules whose runs count for it."""
    plan, parts = load(), []
    for level in plan.levels:
        names = ", ".join(f"`{name}`" for name in level.modules)
        head = WORDS["level"][language].format(level=level.level, title=level.title[language], modules=names)
        required = plan.required(level.level)
        missing = ", ".join(f"`{name}`" for name in required if not find(name))
        evidence = WORDS["evidence"][language] + ", ".join(f"`{name}`" for name in required)
        pending = WORDS["pending"][language].format(names=missing) if missing else ""
        boxes = [f"- [ ] {text[language]}" for text in level.checkpoints]
        parts.append("\n".join([head, "", *boxes, "", evidence + pending, "", _exercises(level.level, language)]))
    return "\n\n".join(parts)


def _exercises(level: int, language: str) -> str:
    page = "README.md" if language == "zh" else f"README.{language}.md"
    found = [e for e in exercise.load_all().values() if e.level == level]
    links = ", ".join(f"[{e.title[language]}](learning/exercises/{e.id}/{page})" for e in found)
    return WORDS["exercises"][language].format(links=links)


GENERATED = {"daily": daily_list, "days": days_table, "levels": levels_list}


def replace_between(text: str, name: str, content: str, file: str) -> str:
    """`text` with what stands between the markers `<!-- name:begin -->` and `<!-- name:end -->` replaced.

    Raises:
        UserError: the pair of markers does not stand in the text exactly once.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise UserError(
            say(
                zh=f"{file}：要有一行 `{begin}`，它后面要有一行 `{end}`；把它们放回去再试",
                en=f"{file}: it needs one line `{begin}` and after it one line `{end}`; put them back and try again",
            )
        )
    head, tail = text[: text.index(begin) + len(begin)], text[text.index(end) :]
    return f"{head}\n{content}\n{tail}"


def updated_guide(file: Path, language: str) -> str:
    """The guide with its generated parts as the plan and the registry have them today."""
    text = file.read_text(encoding="utf-8")
    for name, make in GENERATED.items():
        text = replace_between(text, name, make(language), file.name)
    return text


def main(argv: list[str]) -> int:
    """Print the roadmap, or write its tables into the guides of a checkout."""
    parser = Parser(
        "roadmap",
        say(
            zh="14 天和五关，以及其中哪些模块已经有了。",
            en="The 14 days and five levels, and which of their modules exist.",
        ),
    )
    parser.add_argument(
        "--update",
        action="store_true",
        help=say(zh="重写 LEARNING_GUIDE.md 和 .en.md 里的表", en="rewrite the tables in LEARNING_GUIDE.md and .en.md"),
    )
    args = parser.parse_args(argv)
    if not args.update:
        print("\n\n".join(make(args.lang) for make in GENERATED.values()))
        return 0
    for language in LANGUAGES:
        file = Path(GUIDES[language])
        if not file.is_file():
            raise UserError(
                say(
                    zh=f"这个目录里没有 {file}：请在项目的代码目录里执行",
                    en=f"{file} is not in this directory: run this in a checkout of the project",
                )
            )
        write_atomically(file, updated_guide(file, language))
        print(file)
    return 0
