"""The package's metrics against values worked out by hand."""

from __future__ import annotations

import math
import socket
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

numbers = st.floats(-50, 50, allow_nan=False)


def compute(name: str, predictions: list, references: list) -> dict[str, Any]:
    from llmcore_hf import metrics  # here, so that the temporary dataset cache is set when `datasets` loads

    return getattr(metrics, name)().compute(predictions=predictions, references=references)


@pytest.mark.parametrize("name", ["Calibration", "ExactMatch", "Perplexity", "Preference"])
def test_metrics_are_evaluate_metrics(name: str) -> None:
    import evaluate

    from llmcore_hf import metrics

    metric = getattr(metrics, name)()
    assert isinstance(metric, evaluate.Metric)
    assert metric.description and metric.inputs_description


def test_nothing_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a metric opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert compute("ExactMatch", ["a"], ["a"])["exact_match"] == 1.0


# --- exact match --------------------------------------------------------------------------------------------------


def test_exact_match_by_hand() -> None:
    found = compute(
        "ExactMatch", ["0466", " 0466\n", "6640", "", "你好", "A"], ["0466", "0466", "0466", "", "你好", "a"]
    )
    assert found["scores"] == [1.0, 1.0, 0.0, 1.0, 1.0, 0.0]
    assert found["exact_match"] == pytest.approx(4 / 6)


def test_white_space_inside_an_answer_counts() -> None:
    assert compute("ExactMatch", ["1 2"], ["12"])["exact_match"] == 0.0


# --- perplexity ---------------------------------------------------------------------------------------------------


def test_perplexity_by_hand() -> None:
    """Two texts of 1 and 3 tokens: exp((2 + 3) / 4), not the mean of exp(2) and exp(1)."""
    found = compute("Perplexity", [-2.0, -3.0], [1, 3])
    assert found["nll"] == pytest.approx(1.25)
    assert found["perplexity"] == pytest.approx(math.exp(1.25))


@pytest.mark.parametrize("vocabulary", [2, 320])
def test_a_uniform_model_is_as_perplexed_as_its_vocabulary_is_large(vocabulary: int) -> None:
    lengths = [3, 10, 7]
    found = compute("Perplexity", [-n * math.log(vocabulary) for n in lengths], lengths)
    assert found["perplexity"] == pytest.approx(vocabulary)


def test_a_certain_model_has_perplexity_one() -> None:
    assert compute("Perplexity", [0.0, 0.0], [4, 2])["perplexity"] == 1.0


def test_an_overflowing_perplexity_is_infinite() -> None:
    assert compute("Perplexity", [-10_000.0], [1])["perplexity"] == math.inf


@given(rows=st.lists(st.tuples(st.floats(-50, 0), st.integers(1, 20)), min_size=1, max_size=10))
@settings(max_examples=25, deadline=None)
def test_perplexity_pools_tokens(rows: list[tuple[float, int]]) -> None:
    logprobs, counts = zip(*rows, strict=True)
    found = compute("Perplexity", list(logprobs), list(counts))
    assert found["perplexity"] == pytest.approx(math.exp(-sum(logprobs) / sum(counts)))
    assert found["perplexity"] >= 1.0


# --- preference ---------------------------------------------------------------------------------------------------


def test_preference_by_hand() -> None:
    found = compute("Preference", [-1.0, -5.0, -2.0, 0.0], [-2.0, -3.0, -2.0, -0.5])
    assert found["scores"] == [1.0, 0.0, 0.5, 1.0]
    assert found["accuracy"] == pytest.approx(2.5 / 4)
    assert found["margin"] == pytest.approx((1.0 - 2.0 + 0.0 + 0.5) / 4)


def test_equal_scores_are_a_coin_toss_and_not_a_win() -> None:
    found = compute("Preference", [0.0] * 5, [0.0] * 5)
    assert (found["accuracy"], found["margin"]) == (0.5, 0.0)


@given(pairs=st.lists(st.tuples(numbers, numbers), min_size=1, max_size=10))
@settings(max_examples=25, deadline=None)
def test_swapping_the_sides_mirrors_the_preference(pairs: list[tuple[float, float]]) -> None:
    chosen, rejected = map(list, zip(*pairs, strict=True))
    right, swapped = compute("Preference", chosen, rejected), compute("Preference", rejected, chosen)
    assert right["accuracy"] + swapped["accuracy"] == pytest.approx(1.0)
    assert right["margin"] == pytest.approx(-swapped["margin"])


@pytest.mark.parametrize("name", ["ExactMatch", "Perplexity", "Preference"])
def test_unequal_lengths_are_refused(name: str) -> None:
    predictions, references = (["a", "b"], ["a"]) if name == "ExactMatch" else ([1, 2], [1])
    with pytest.raises(ValueError):
        compute(name, predictions, references)


# --- calibration --------------------------------------------------------------------------------------------------


def test_calibration_by_hand() -> None:
    """Bins of width 0.05: .61 and .63 with one event of two, .97, .99 and 1 with three of three."""
    found = compute("Calibration", [0.61, 0.63, 0.97, 0.99, 1.0], [1, 0, 1, 1, 1])
    assert found["counts"] == [2, 3]  # probability 1 belongs to the last bin
    assert found["probabilities"] == pytest.approx([0.62, 2.96 / 3])
    assert found["shares"] == pytest.approx([0.5, 1.0])
    assert found["expected_calibration_error"] == pytest.approx((2 * 0.12 + 3 * (0.04 / 3)) / 5)


def test_half_an_event_counts_half() -> None:
    assert compute("Calibration", [0.5, 0.5], [0.5, 0.5])["expected_calibration_error"] == pytest.approx(0.0)


def test_errors_in_opposite_directions_do_not_cancel() -> None:
    assert compute("Calibration", [0.22, 0.82] * 4, [1, 1, 0, 0] * 2)["expected_calibration_error"] == pytest.approx(
        0.3
    )
    assert compute("Calibration", [0.52] * 8, [1, 1, 0, 0] * 2)["expected_calibration_error"] == pytest.approx(0.02)


@given(st.lists(st.tuples(st.floats(0, 1), st.sampled_from([0.0, 1.0])), min_size=1, max_size=30))
@settings(deadline=None, max_examples=30)
def test_calibration_equals_a_plain_loop(cases: list) -> None:
    found = compute("Calibration", *map(list, zip(*cases, strict=True)))
    error = 0.0
    for i in range(20):
        held = [(p, y) for p, y in cases if (i <= p * 20 < i + 1) or (i == 19 and p == 1)]
        error += abs(sum(p for p, _ in held) - sum(y for _, y in held)) / len(cases)
    assert found["expected_calibration_error"] == pytest.approx(error, abs=1e-12)
    assert sum(found["counts"]) == len(cases)
