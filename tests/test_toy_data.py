"""Toy data: always the same, held out by answer, in both languages, preferring ascending order."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from itertools import combinations
from typing import TYPE_CHECKING, Any

import pytest

from llmcore_hf.data import toy

if TYPE_CHECKING:
    from datasets import DatasetDict

SPLITS = ("train", "validation", "test")
PINNED = "d040d2f1b235fe70"
LOADED = {
    "toy-sort": ("sft", 0),
    "toy-sort-preference": ("preference", 0),
    "toy-sort-noisy-preference": ("preference", 0),
}
FINGERPRINTS = {
    "toy-sort": "a135295eb3c2cc94",
    "toy-sort-preference": "1e8b29a06fade4bc",
    "toy-sort-noisy-preference": "35ca519a224de186",
}


@pytest.fixture(scope="module")
def sft_data() -> DatasetDict:
    return toy.toy_sort()


@pytest.fixture(scope="module")
def preference_data() -> DatasetDict:
    return toy.toy_sort_preference()


def digits_of(row: dict[str, Any]) -> str:
    return re.sub(r"\D", "", row["prompt"][0]["content"])


def answers(rows: Any) -> set[str]:
    """The multisets of digits asked for, each as its ascending string."""
    return {"".join(sorted(digits_of(row))) for row in rows}


@pytest.mark.parametrize("make", [toy.toy_sort, toy.toy_sort_preference])
def test_no_answer_stands_in_two_splits(make: Any) -> None:
    data = make()
    assert set(data) == set(SPLITS)
    for a, b in combinations(SPLITS, 2):
        assert not answers(data[a]) & answers(data[b])


def test_the_warm_start_and_the_tokenizer_see_no_held_out_answer(sft_data: DatasetDict) -> None:
    seen = {"".join(sorted(answer)) for _, answer in toy.undecided_corpus(6400)}
    seen |= {"".join(sorted(re.sub(r"\D", "", text))) for text in toy.tokenizer_corpus()}
    for split in ("validation", "test"):
        assert not seen & answers(sft_data[split])


def test_the_held_out_splits_hold_many_different_answers(sft_data: DatasetDict) -> None:
    assert len(answers(sft_data["test"])) >= 80
    assert len(answers(sft_data["validation"])) >= 40


def test_chosen_is_ascending_and_rejected_descending(preference_data: DatasetDict) -> None:
    for split in SPLITS:
        for row in preference_data[split]:
            digits = digits_of(row)
            assert row["chosen"] == [{"role": "assistant", "content": "".join(sorted(digits))}]
            assert row["rejected"] == [{"role": "assistant", "content": "".join(sorted(digits, reverse=True))}]
            assert row["chosen"] != row["rejected"]


@pytest.fixture(scope="module")
def noisy_data() -> DatasetDict:
    return toy.toy_sort_noisy_preference()


def test_noisy_pairs_are_two_orders_of_the_digits(noisy_data: DatasetDict) -> None:
    for split in SPLITS:
        for row in noisy_data[split]:
            chosen, rejected = (row[side][0]["content"] for side in ("chosen", "rejected"))
            assert sorted(chosen) == sorted(rejected) == sorted(digits_of(row)) and chosen != rejected


@pytest.mark.parametrize(("answer", "inversions"), [("0466", 0), ("6640", 5), ("3210", 6), ("0132", 1), ("6604", 4)])
def test_the_true_reward_counts_inversions(answer: str, inversions: int) -> None:
    assert toy.true_reward(answer) == -inversions


def test_noisy_labels_are_those_of_a_bradley_terry_annotator(noisy_data: DatasetDict) -> None:
    """Of the pairs whose rewards differ by d, the better one is chosen in a share sigmoid(d), within 4 standard errors."""
    right: dict[float, list[bool]] = {}
    for row in noisy_data["train"]:
        chosen, rejected = (toy.true_reward(row[side][0]["content"]) for side in ("chosen", "rejected"))
        right.setdefault(abs(chosen - rejected), []).append(chosen > rejected)
    assert set(right) == {0, 1, 2, 3, 4, 5, 6}
    for difference in range(1, 7):
        p, seen = 1 / (1 + math.exp(-difference)), right[difference]
        assert abs(sum(seen) / len(seen) - p) < 4 * math.sqrt(p * (1 - p) / len(seen)), difference
    errors = sum(not all(right[d][i : i + 1]) for d in range(1, 7) for i in range(len(right[d])))
    assert errors / len(noisy_data["train"]) > 0.1  # annotators that err


def test_the_completion_is_the_sorted_digits(sft_data: DatasetDict) -> None:
    for split in SPLITS:
        for row in sft_data[split]:
            assert row["completion"] == [{"role": "assistant", "content": "".join(sorted(digits_of(row)))}]
            assert [message["role"] for message in row["prompt"]] == ["user"]


@pytest.mark.parametrize("split", SPLITS)
def test_both_languages_occur_in_each_split(sft_data: DatasetDict, split: str) -> None:
    chinese = [bool(re.search(r"[\u4e00-\u9fff]", row["prompt"][0]["content"])) for row in sft_data[split]]
    assert 0.3 < sum(chinese) / len(chinese) < 0.7


def test_no_question_is_asked_twice(sft_data: DatasetDict) -> None:
    for split in SPLITS:
        prompts = Counter(row["prompt"][0]["content"] for row in sft_data[split])
        assert max(prompts.values()) == 1
        assert len(prompts) == toy.SPLIT_SIZES[split]


def test_the_digits_of_a_question_are_shuffled(sft_data: DatasetDict) -> None:
    rows = sft_data["test"]
    already_sorted = sum(digits_of(row) == row["completion"][0]["content"] for row in rows)
    assert already_sorted / len(rows) < 0.2


def test_data_are_the_same_each_time(sft_data: DatasetDict) -> None:
    import random

    random.seed(1234)  # the global generator has no say
    again = toy.toy_sort()
    assert {split: again[split].to_list() for split in SPLITS} == {s: sft_data[s].to_list() for s in SPLITS}


def test_data_are_those_of_every_other_machine(sft_data: DatasetDict) -> None:
    """Pinned: a change here changes every published figure, so it must be a decision."""
    digest = hashlib.sha256()
    for split in SPLITS:
        digest.update(split.encode())
        for row in sft_data[split]:
            digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False).encode())
    assert digest.hexdigest()[:16] == PINNED


def test_the_fingerprint_is_that_of_every_other_machine() -> None:
    """Pinned: published summaries hold it."""
    from llmcore_hf.data.loading import DataArguments, load

    found = {name: load(DataArguments(name, max_eval_samples=None), *of).fingerprint for name, of in LOADED.items()}
    assert found == FINGERPRINTS


def test_the_warm_start_answers_either_way_half_and_half() -> None:
    pairs = toy.undecided_corpus(2000)
    up = sum(answer == "".join(sorted(answer)) for _, answer in pairs)
    down = sum(answer == "".join(sorted(answer, reverse=True)) for _, answer in pairs)
    assert up + down == len(pairs)
    assert 0.45 < up / len(pairs) < 0.55


def test_a_multiset_without_a_preference_is_left_out() -> None:
    multisets = [m for split in toy.split_multisets().values() for m in split]
    assert all(len(set(m)) > 1 for m in multisets)
    assert len(multisets) == len(set(multisets)) == 705  # C(13, 4) multisets of four digits, less ten like 7777
