"""Errors a user can mend. The command line prints their message without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Something in the input or the machine is wrong; the message says what, where, and how to mend it."""

    exit_code = 1


class ConfigError(UserError):
    """Options or YAML keys are wrong. Carries every problem that was found, not only the first."""

    exit_code = 2

    def __init__(self, problems: list[str], where: str = "") -> None:
        self.problems = problems
        head = f"{len(problems)} problem{'s' if len(problems) != 1 else ''} in the options{where}:"
        super().__init__("\n".join([head, *(f"  - {problem}" for problem in problems)]))
