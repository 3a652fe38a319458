"""Quiz items: reading them from `learning/quizzes/level<n>.yaml`, and grading an answer. `schema/quiz.schema.json` describes them."""

from __future__ import annotations

import functools
import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmcore_hf import resources
from llmcore_hf.learning import evidence
from llmcore_hf.learning.claims import holds
from llmcore_hf.learning.formulas import evaluate
from llmcore_hf.learning.texts import Text, read_yaml

LEVELS = (1, 2, 3, 4, 5)
LETTERS = "ABCDEFGH"
THOUSANDS = re.compile(
    r"[+-]?[1-9]\d{0,2}(,\d{3})+(?!\d|,)"
)  # a comma elsewhere may be a decimal one: it is not guessed at


@dataclass(frozen=True)
class Choice:
    """A choice of a question, or a step of an order; `why` says why it is right, wrong, or stands where it stands."""

    text: Text
    why: Text
    right: bool


@dataclass(frozen=True)
class Item:
    """One item. Which fields are filled depends on `type`."""

    id: str
    level: int
    module: str
    type: str  # single, multiple, numeric, ordering, short, curve
    ask: Text
    explain: Text
    backing: str  # the test or the source that the answer rests on
    choices: tuple[Choice, ...] = ()  # single, multiple, curve; ordering: the steps in the right order
    answer: float | None = None  # numeric
    tolerance: float = 0.0
    traps: tuple[dict[str, Any], ...] = ()  # numeric: common wrong numbers, each with its reason
    points: tuple[dict[str, Any], ...] = ()  # short: what has to be mentioned, `any` of some words
    curve: dict[str, Any] | None = None  # `x`, `series`, `produced_by`
    run: dict[str, Any] | None = (
        None  # `module`, `values`, `when`, `ask_zh`, `ask_en`, `answer`: what the learner's own run adds
    )


@dataclass(frozen=True)
class Verdict:
    right: bool
    notes: list[str]  # what to say about the single choices, steps, points


class Unreadable(Exception):
    """The answer is not of the form that the item asks for; the message says what is."""


@functools.cache
def load(level: int) -> tuple[Item, ...]:
    rows = read_yaml(resources.path(f"learning/quizzes/level{level}.yaml"))
    return tuple(_item(row, level) for row in rows)


def all_items() -> list[Item]:
    return [item for level in LEVELS for item in load(level)]


def _item(row: dict[str, Any], level: int) -> Item:
    steps = row.get("choices", row.get("steps", ()))
    return Item(
        id=row["id"],
        level=level,
        module=row["module"],
        type=row["type"],
        ask=_text(row["ask"]),
        explain=_text(row["explain"]),
        backing=row.get("test") or row["source"],
        choices=tuple(Choice(_text(step), _text(step, "why_"), step.get("right", True)) for step in steps),
        answer=row.get("answer"),
        tolerance=row.get("tolerance", 0.0),
        traps=tuple(row.get("traps", ())),
        points=tuple(row.get("points", ())),
        curve=row.get("curve"),
        run=row.get("run"),
    )


def _text(row: dict[str, Any], prefix: str = "") -> Text:
    return {"zh": row[f"{prefix}zh"], "en": row[f"{prefix}en"]}


def about_run(item: Item) -> Item:
    """The item, asked about the learner's own latest run where there is one that has the values and meets `when`."""
    if item.run is None or (run := evidence.latest(item.run["module"])) is None:
        return item
    if not all(holds(condition, run) for condition in item.run.get("when", ())):
        return item
    values = {name: run.look_up(path) for name, path in item.run["values"].items()}
    if any(not isinstance(value, int | float) or not math.isfinite(value) for value in values.values()):
        return item
    ask = {language: item.run[f"ask_{language}"].format(**values) for language in ("zh", "en")}
    answer = float(evaluate(item.run["answer"], values)) if "answer" in item.run else item.answer
    # the traps are those of the general question, whose numbers are others
    traps = () if "answer" in item.run else item.traps
    return Item(**{**item.__dict__, "ask": ask, "answer": answer, "traps": traps, "run": None})


# ---------------------------------------------------------------- grading


def grade(item: Item, answer: str, language: str, shown: Sequence[int] | None = None) -> Verdict:
    """Grade what was typed.

    Args:
        shown: the order in which choices or steps were shown; letter A stands for `item.choices[shown[0]]`.

    Raises:
        Unreadable: the answer has not the form that the item asks for.
    """
    order = list(shown if shown is not None else range(len(item.choices)))
    answer = unicodedata.normalize("NFKC", answer)  # a Chinese keyboard also writes Ａ and ０．５
    if item.type == "numeric":
        return _grade_number(item, answer, language)
    if item.type == "short":
        return _grade_points(item, answer, language)
    letters = [order[LETTERS.index(letter)] for letter in _letters(item, answer)]
    if item.type == "ordering":
        notes = [f"{n}. {choice.text[language]}: {choice.why[language]}" for n, choice in enumerate(item.choices, 1)]
        return Verdict(letters == list(range(len(item.choices))), notes)
    notes = [
        f"{LETTERS[place]} {'✓' if item.choices[index].right else '✗'} {item.choices[index].why[language]}"
        for place, index in enumerate(order)
    ]
    return Verdict(set(letters) == {i for i, choice in enumerate(item.choices) if choice.right}, notes)


def _letters(item: Item, answer: str) -> list[str]:
    letters = [char for char in answer.upper() if not (char.isspace() or char in ",，、;>")]
    known = LETTERS[: len(item.choices)]
    wrong = [letter for letter in letters if letter not in known]
    if wrong or len(set(letters)) != len(letters):
        raise Unreadable(f"{known[0]}-{known[-1]}")
    if item.type in ("single", "curve") and len(letters) != 1:
        raise Unreadable(f"1 × {known[0]}-{known[-1]}")
    if item.type == "ordering" and len(letters) != len(known):
        raise Unreadable(f"{len(known)} × {known[0]}-{known[-1]}")
    return letters


def _grade_number(item: Item, answer: str, language: str) -> Verdict:
    assert item.answer is not None
    text = answer.strip().replace("−", "-")
    text = text.replace(",", "") if THOUSANDS.match(text) else text
    try:
        number = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise Unreadable("0.693, -13, 1e-3, 50%") from None
    right = abs(number - item.answer) <= max(item.tolerance, 1e-9 * abs(item.answer))  # never true of nan and inf
    hit = [trap for trap in item.traps if abs(number - trap["value"]) <= item.tolerance]
    return Verdict(right, [f"{number:g}: {trap[f'why_{language}']}" for trap in hit if not right])


def _grade_points(item: Item, answer: str, language: str) -> Verdict:
    said = answer.lower()
    if len(re.sub(r"\W", "", said)) < 2:
        raise Unreadable("…")
    found = [any(word.lower() in said for word in point["any"]) for point in item.points]
    notes = [f"{'✓' if hit else '✗'} {point[language]}" for hit, point in zip(found, item.points, strict=True)]
    return Verdict(all(found), notes)


# ---------------------------------------------------------------- showing


def solution(item: Item, language: str) -> str:
    """The right answer in a line, with the choices in the order of the source."""
    if item.type == "numeric":
        return f"{item.answer:g}"
    if item.type == "short":
        return "; ".join(point[language] for point in item.points)
    if item.type == "ordering":
        return " → ".join(choice.text[language] for choice in item.choices)
    return "; ".join(choice.text[language] for choice in item.choices if choice.right)


def chart(curve: dict[str, Any], height: int = 10) -> str:
    """A curve of a run in characters: one column per logged step, one sign per series, and the range of each axis."""
    series: dict[str, list[float]] = curve["series"]
    values = [value for line in series.values() for value in line]
    low, high = min(values), max(values)
    width, scale = len(curve["x"]), (high - low) or 1.0
    grid = [[" "] * width for _ in range(height)]
    for sign, line in zip("ox+*", series.values(), strict=False):
        for column, value in enumerate(line):
            grid[height - 1 - round((value - low) / scale * (height - 1))][column] = sign
    edge = max(len(f"{low:g}"), len(f"{high:g}"))
    labels = [f"{high:g}", *[""] * (height - 2), f"{low:g}"]
    rows = [f"{label:>{edge}} |{'  '.join(row)}" for label, row in zip(labels, grid, strict=True)]
    names = ", ".join(f"{sign} {name}" for sign, name in zip("ox+*", series, strict=False))
    return "\n".join(
        [
            *rows,
            f"{'':>{edge}} +{'-' * (3 * width - 2)}",
            f"{'':>{edge}}  step {curve['x'][0]} .. {curve['x'][-1]}   {names}",
        ]
    )
