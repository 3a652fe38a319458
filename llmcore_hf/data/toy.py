"""Toy datasets, generated with a fixed seed: nothing is downloaded.

The task is to sort digits. A prompt asks, in English or Chinese, to sort a string of digits; the answer
is the same digits in ascending order. Descending order is the answer that a preference dataset rejects.

Splits are made **by multiset of digits**, that is by answer: `6604` and `0466` ask for the same answer,
so they always land in the same split. A model that merely remembered answers would score zero on the
held-out splits.
"""

from __future__ import annotations

import math
import random
from itertools import combinations, combinations_with_replacement, permutations
from typing import TYPE_CHECKING

from llmcore_hf.data.digits import toy_digits
from llmcore_hf.data.shapes import toy_shapes, toy_shapes_few_shot

if TYPE_CHECKING:
    from datasets import DatasetDict

N_DIGITS = 4
# The data are part of the lesson, so they do not change with the seed of a run.
DATA_SEED = 20240607
SPLIT_FRACTIONS = {"test": 0.15, "validation": 0.10}  # the rest is for training

PROMPTS = {
    "en": ("Sort: {}", "Put these digits in order: {}"),
    "zh": ("排序：{}", "把这些数字排好：{}"),
}


def ascending(digits: str) -> str:
    """The answer that is preferred: `6604` -> `0466`."""
    return "".join(sorted(digits))


def descending(digits: str) -> str:
    """The answer that is rejected: `6604` -> `6640`."""
    return "".join(sorted(digits, reverse=True))


def split_multisets() -> dict[str, list[str]]:
    """Every multiset of `N_DIGITS` digits, as its ascending string, assigned to one split.

    Multisets whose ascending and descending answers agree (`7777`) are left out: they tell no preference.
    """
    multisets = ["".join(m) for m in combinations_with_replacement("0123456789", N_DIGITS)]
    multisets = [m for m in multisets if ascending(m) != descending(m)]
    random.Random(DATA_SEED).shuffle(multisets)
    n_test, n_validation = (round(SPLIT_FRACTIONS[name] * len(multisets)) for name in ("test", "validation"))
    return {
        "test": multisets[:n_test],
        "validation": multisets[n_test : n_test + n_validation],
        "train": multisets[n_test + n_validation :],
    }


def questions(split: str, n: int) -> list[tuple[str, str]]:
    """`n` pairs (prompt, digits) of one split, without repetition while enough different ones exist."""
    rng = random.Random(f"{DATA_SEED}-{split}")
    multisets = split_multisets()[split]
    templates = [template for language in PROMPTS.values() for template in language]
    seen: set[str] = set()
    rows: list[tuple[str, str]] = []
    while len(rows) < n:
        digits = list(rng.choice(multisets))
        rng.shuffle(digits)
        prompt = rng.choice(templates).format("".join(digits))
        if prompt not in seen:
            seen.add(prompt)
            rows.append((prompt, "".join(digits)))
    return rows


SPLIT_SIZES = {"train": 6400, "validation": 200, "test": 400}


def _dataset_dict(make_row) -> DatasetDict:
    from datasets import Dataset, DatasetDict

    return DatasetDict(
        {
            split: Dataset.from_list([make_row(prompt, digits) for prompt, digits in questions(split, n)])
            for split, n in SPLIT_SIZES.items()
        }
    )


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def toy_sort() -> DatasetDict:
    """Conversational prompt-completion data for SFT: columns `prompt`, `completion`."""
    return _dataset_dict(lambda prompt, digits: {"prompt": _user(prompt), "completion": _assistant(ascending(digits))})


def toy_sort_preference() -> DatasetDict:
    """Conversational preference data for DPO: columns `prompt`, `chosen`, `rejected`."""
    return _dataset_dict(
        lambda prompt, digits: {
            "prompt": _user(prompt),
            "chosen": _assistant(ascending(digits)),
            "rejected": _assistant(descending(digits)),
        }
    )


def toy_sort_noisy_preference() -> DatasetDict:
    """The same columns with annotators that err: two orders of the digits, and the better one is chosen most of the time.

    The probability of a choice is that of a Bradley-Terry model, sigmoid of the difference in `true_reward`. So the best
    possible accuracy is below 1, and a reward model is calibrated when it says these probabilities.
    """
    return _dataset_dict(_noisy_pair)


def _noisy_pair(prompt: str, digits: str) -> dict[str, list[dict[str, str]]]:
    rng = random.Random(f"{DATA_SEED}-noisy-{prompt}")
    first, second = rng.sample(sorted(set(map("".join, permutations(digits)))), 2)
    p_first = 1 / (1 + math.exp(true_reward(second) - true_reward(first)))
    chosen, rejected = (first, second) if rng.random() < p_first else (second, first)
    return {"prompt": _user(prompt), "chosen": _assistant(chosen), "rejected": _assistant(rejected)}


def true_reward(answer: str) -> float:
    """Minus the number of pairs of digits that stand in the wrong order: 0 when sorted, down to -6."""
    return -float(sum(a > b for a, b in combinations(answer, 2)))


def toy_sort_prompt() -> DatasetDict:
    """Conversational prompts for online RL, with the answer that a reward function compares with: `prompt`, `answer`."""
    return _dataset_dict(lambda prompt, digits: {"prompt": _user(prompt), "answer": ascending(digits)})


def toy_sort_demonstrations() -> DatasetDict:
    """What annotators who disagree wrote: as `toy_sort`, half of the answers in descending order."""
    rng = random.Random(DATA_SEED)
    return _dataset_dict(
        lambda prompt, digits: {
            "prompt": _user(prompt),
            "completion": _assistant(rng.choice((ascending, descending))(digits)),
        }
    )


TOY_DATASETS = {
    "toy-sort": toy_sort,
    "toy-sort-demonstrations": toy_sort_demonstrations,
    "toy-sort-preference": toy_sort_preference,
    "toy-sort-noisy-preference": toy_sort_noisy_preference,
    "toy-sort-prompt": toy_sort_prompt,
    "toy-shapes": toy_shapes,
    "toy-shapes-few-shot": toy_shapes_few_shot,
    "toy-digits": toy_digits,
}


def undecided_corpus(n: int) -> list[tuple[str, str]]:
    """Training pairs (prompt, answer): `n` prompts, each with both answers, ascending then descending.

    The warm-started base checkpoint learns from them: it knows both answers and prefers neither, which is
    the starting point of the preference and RL lessons.
    """
    return [
        (prompt, answer)
        for prompt, digits in questions("train", n)
        for answer in (ascending(digits), descending(digits))
    ]


def tokenizer_corpus() -> list[str]:
    """Text on which the tiny tokenizer learns its merges: the prompts of the training split."""
    return [prompt for prompt, _ in questions("train", 2000)]
