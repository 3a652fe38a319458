"""Checks a run makes on itself and stores as data.

An *invariant* holds in every correct run; when it fails, the run fails. A *learning* check says that something was
learned; it fails a toy recipe and only warns on a user's own data, where twenty steps prove nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Check:
    """One check. `passed` is None when it could not be made; `why_*` says what it means, also when it fails."""

    id: str
    kind: Literal["invariant", "learning"]
    passed: bool | None
    observed: Any
    expected: str
    why_zh: str
    why_en: str

    def status(self, toy: bool) -> str:
        if self.passed is None:
            return "skip"
        if self.passed:
            return "pass"
        return "fail" if self.kind == "invariant" or toy else "warn"

    def as_dict(self, toy: bool) -> dict[str, Any]:
        return {
            "id": self.id,
            "kind": self.kind,
            "status": self.status(toy),
            "observed": self.observed,
            "expected": self.expected,
            "why_zh": self.why_zh,
            "why_en": self.why_en,
        }

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> Check:
        """The check that `as_dict` described."""
        passed = {"pass": True, "skip": None}.get(found["status"], False)
        return cls(passed=passed, **{name: found[name] for name in found if name != "status"})
