"""Claims: sentences about a run, each made only when the run's own summary holds its numbers and its preconditions.

A claim names the paths of its values in `summary.json` (`evidence.Run.look_up`), what must hold, and a sentence per
language with a place for each value. It is not made when a value is missing, when a precondition does not hold, or when
it reads a check that did not pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llmcore_hf.learning.evidence import Run
from llmcore_hf.learning.texts import LANGUAGES, Text

Path = Sequence[str | int]
NOT_FINITE = (float("inf"), float("-inf"))


@dataclass(frozen=True)
class Claim:
    """One sentence about a run.

    Attributes:
        values: name in the sentence -> path of the value.
        when: preconditions, each a mapping of one key: `passed: check id`, or `above`, `below`, `equals: [path, other]`,
            where `other` is a number, a text, or the path of another value.
    """

    id: str
    values: dict[str, Path]
    when: tuple[dict[str, Any], ...]
    text: Text

    @classmethod
    def read(cls, source: dict[str, Any]) -> Claim:
        text = {language: source[language] for language in LANGUAGES}
        return cls(source.get("id", ""), source.get("values", {}), tuple(source.get("when", ())), text)

    def found(self, run: Run) -> dict[str, Any] | None:
        """The values of this claim in `run`; None when the claim cannot be made."""
        found = {name: run.look_up(path) for name, path in self.values.items()}
        if any(value is None or value in NOT_FINITE or value != value for value in found.values()):
            return None
        read_checks = {str(path[1]) for path in self.values.values() if path[0] == "checks"}
        if any(not _passed(run, check) for check in read_checks):
            return None
        return found if all(holds(condition, run) for condition in self.when) else None

    def say(self, run: Run, language: str) -> str | None:
        """The sentence; None when the claim cannot be made."""
        found = self.found(run)
        try:
            return None if found is None else self.text[language].format(**found)
        except (ValueError, TypeError):  # a value of another kind than the sentence expects is no evidence for it
            return None


def holds(condition: dict[str, Any], run: Run) -> bool:
    """Whether one precondition holds. What is missing or is no number does not hold."""
    ((kind, operands),) = condition.items()
    if kind == "passed":
        return _passed(run, operands)
    path, other = operands
    left, right = run.look_up(path), run.look_up(other) if isinstance(other, list) else other
    if left is None or right is None:
        return False
    try:
        return COMPARISONS[kind](left, right)
    except TypeError:
        return False


COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "above": lambda left, right: left > right,
    "below": lambda left, right: left < right,
    "equals": lambda left, right: left == right,
}


def _passed(run: Run, check: str) -> bool:
    return run.checks.get(check, {}).get("status") == "pass"
