"""The reward of the GSM8K recipes: `--reward_funcs recipes/grpo/gsm8k.py:correct_number`, from the root of the checkout."""

from __future__ import annotations

import re
from typing import Any

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def correct_number(completions: list[Any], output: list[str], **kwargs: Any) -> list[float]:
    """1 where the last number of the completion is the last of column `output`, the solution, which ends in `#### 42`."""
    pairs = zip(completions, output, strict=True)
    return [float(last_number(text_of(c)) == last_number(solution) is not None) for c, solution in pairs]


def last_number(text: str) -> float | None:
    """The last number in a text, commas between thousands left out; None when there is none."""
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def text_of(completion: Any) -> str:
    """A completion is text when the prompt is, and the turn of the assistant when the prompt is a conversation."""
    return completion if isinstance(completion, str) else completion[0]["content"]
