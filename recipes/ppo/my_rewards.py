"""Reward functions of one's own: `--reward_funcs recipes/ppo/my_rewards.py:concise`. They serve `ppo` and `grpo` alike.

A reward function gets lists with one entry per completion and returns one number for each, the higher the better; None
where it has nothing to say. The arguments come by name: `prompts`, `completions`, `completion_ids`, every further column of
the dataset, and TRL's `trainer_state`, `log_metric` and `log_extra`. Name those that are used, leave the others to `**kwargs`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

LIMIT = 40  # characters


def concise(completions: list[Any], log_metric: Callable[[str, float], None], **kwargs: Any) -> list[float]:
    """1 up to `LIMIT` characters, falling to 0 at twice as many; 0 for no answer, or the policy learns to say nothing."""
    lengths = [len(text_of(completion).strip()) for completion in completions]
    log_metric("concise/characters", sum(lengths) / len(lengths))
    return [min(max(2 - n / LIMIT, 0.0), 1.0) if n else 0.0 for n in lengths]


def covers(completions: list[Any], output: list[str], **kwargs: Any) -> list[float]:
    """Share of the words in column `output` that the completion has as well."""
    shares = []
    for completion, reference in zip(completions, output, strict=True):
        wanted = set(reference.lower().split())
        shares.append(len(wanted & set(text_of(completion).lower().split())) / max(len(wanted), 1))
    return shares


def text_of(completion: Any) -> str:
    """A completion is text when the prompt is, and the turn of the assistant when the prompt is a conversation."""
    return completion if isinstance(completion, str) else completion[0]["content"]
