"""The reward functions that recipes bring along, found and called as a run finds and calls them."""

from __future__ import annotations

from typing import Any

import pytest

from llmcore_hf import resources
from llmcore_hf.alignment import rewards


def load(name: str) -> Any:
    return rewards.load(str(resources.path("recipes") / name), max_completion_length=32)


def conversation(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize("as_completion", [str, conversation])
def test_a_concise_answer_is_rewarded_and_no_answer_is_not(as_completion: Any) -> None:
    logged: dict[str, float] = {}
    texts = ["", " \n", "a", "a" * 40, "a" * 60, "a" * 80, "a" * 200]
    found = load("ppo/my_rewards.py:concise")(
        completions=[as_completion(text) for text in texts], log_metric=logged.__setitem__, prompts=["q"] * len(texts)
    )
    assert found == [0, 0, 1, 1, 0.5, 0, 0]
    assert logged == {"concise/characters": pytest.approx(381 / 7)}


def test_covered_words_are_counted_once_whatever_their_case() -> None:
    covers = load("ppo/my_rewards.py:covers")
    assert covers(completions=["the cat sat sat", "nothing"], output=["The dog sat", "The dog sat"]) == [2 / 3, 0]
    assert covers(completions=["a"], output=[""]) == [0]


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ("So she pays $1,234.", True),
        ("1234.0", True),
        ("1234 apples and 2 pears", False),
        ("-1234", False),
        ("I do not know.", False),
        ("", False),
    ],
)
def test_the_last_number_of_a_grade_school_answer_counts(completion: str, right: bool) -> None:
    correct_number = load("grpo/gsm8k.py:correct_number")
    solution = "She buys 2 x 617 = <<2*617=1234>>1234 apples.\n#### 1,234"
    for given in (completion, conversation(completion)):
        assert correct_number(completions=[given], output=[solution]) == [float(right)]


def test_a_solution_without_a_number_is_matched_by_nothing() -> None:
    assert load("grpo/gsm8k.py:correct_number")(completions=["no number"], output=["none here"]) == [0]
