"""The bubble of a pipeline, computed from spans that are known."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from llmcore_hf.systems import megatron
from llmcore_hf.systems.formulas import expected_in_flight
from llmcore_hf.systems.megatron import Bubble
from llmcore_hf.systems.pipeline import Span, cpu_bubble, ideal_bubble, in_flight, least_cpu, measured_bubble


def gpipe(n_ranks: int, n_microbatches: int, forward: float = 1.0, backward: float = 2.0) -> list[list[Span]]:
    """The textbook drawing of GPipe: forward in a diagonal, then backward in a diagonal the other way."""
    ranks = []
    turn = (n_ranks - 1 + n_microbatches) * forward  # the last rank has done all its forward passes
    for rank in range(n_ranks):
        starts = [(rank + i) * forward for i in range(n_microbatches)]
        spans: list[Span] = [("forward", rank, i, t, t + forward, forward) for i, t in enumerate(starts)]
        starts = [turn + (n_ranks - 1 - rank + i) * backward for i in range(n_microbatches)]
        ranks.append(spans + [("backward", rank, i, t, t + backward, backward) for i, t in enumerate(starts)])
    return ranks


def one_f_one_b() -> list[list[Span]]:
    """p = 2, m = 4, forward 1, backward 2: Figure 4 of Narayanan et al. 2021, drawn by hand."""
    first = [("F", 0, 0), ("F", 1, 1), ("B", 0, 4), ("F", 2, 6), ("B", 1, 7), ("F", 3, 9), ("B", 2, 10), ("B", 3, 13)]
    last = [("F", 0, 1), ("B", 0, 2), ("F", 1, 4), ("B", 1, 5), ("F", 2, 7), ("B", 2, 8), ("F", 3, 10), ("B", 3, 11)]
    kinds = {"F": ("forward", 1.0), "B": ("backward", 2.0)}
    return [
        [(kinds[k][0], rank, i, float(t), t + kinds[k][1], kinds[k][1]) for k, i, t in spans]
        for rank, spans in enumerate((first, last))
    ]


@pytest.mark.parametrize(
    ("p", "m", "v", "share"), [(4, 4, 1, 3 / 7), (4, 16, 1, 3 / 19), (4, 8, 2, 3 / 19), (2, 4, 1, 0.2), (1, 4, 1, 0.0)]
)
def test_the_formula(p: int, m: int, v: int, share: float) -> None:
    assert ideal_bubble(p, m, v) == pytest.approx(share)


@pytest.mark.parametrize(("p", "m"), [(2, 4), (4, 4), (4, 8), (8, 3)])
def test_the_bubble_of_a_drawn_gpipe_is_the_formula(p: int, m: int) -> None:
    spans = gpipe(p, m)
    assert measured_bubble(spans) == pytest.approx(ideal_bubble(p, m))
    assert cpu_bubble(spans) == pytest.approx(ideal_bubble(p, m))
    assert [in_flight(rank) for rank in spans] == [m] * p == [expected_in_flight("gpipe", p, r, m) for r in range(p)]


def test_the_bubble_of_a_drawn_1f1b_is_the_formula() -> None:
    spans = one_f_one_b()
    assert measured_bubble(spans) == pytest.approx(0.2) == cpu_bubble(spans)
    assert [in_flight(rank) for rank in spans] == [2, 1] == [expected_in_flight("1f1b", 2, r, 4) for r in range(2)]


def test_the_clock_sees_a_pause_and_cpu_time_does_not() -> None:
    spans = [
        [(k, s, i, start + 5 * (start >= 6), end + 5 * (start >= 6), cpu) for k, s, i, start, end, cpu in rank]
        for rank in one_f_one_b()
    ]
    assert measured_bubble(spans) == pytest.approx(1 - 24 / (20 * 2)) and cpu_bubble(spans) == pytest.approx(0.2)


def test_a_slow_stage_makes_the_other_wait() -> None:
    spans = [[(*span[:5], span[5] * (3 if rank else 1)) for span in spans] for rank, spans in enumerate(one_f_one_b())]
    assert cpu_bubble(spans) > 0.3


def test_one_slow_step_does_not_count() -> None:
    quiet = one_f_one_b()
    busy = [[(*span[:5], span[5] * (3 if span[2] == 1 else 1)) for span in rank] for rank in quiet]
    assert cpu_bubble(busy) != pytest.approx(0.2) and cpu_bubble(least_cpu([busy, quiet])) == pytest.approx(0.2)


def test_spans_that_are_no_whole_step_are_refused() -> None:
    spans = one_f_one_b()
    del spans[1][0]  # the last stage never sees microbatch 0
    with pytest.raises(ValueError, match="not one step"):
        cpu_bubble(spans)


def test_interleaving_keeps_more_microbatches_than_1f1b() -> None:
    assert [expected_in_flight("interleaved", 4, rank, 8, 2) for rank in range(4)] == [11, 9, 7, 5]
    assert [expected_in_flight("1f1b", 4, rank, 2) for rank in range(4)] == [2, 2, 2, 1]  # never more than there are


# ---------------------------------------------------------------- the checks of `megatron`


def taking_turns(ranks: list[list[Span]]) -> list[list[Span]]:
    """The same computations in the same order, one at a time: no two ranks ever compute at once."""
    clock = 0.0
    serial: list[list[Span]] = [[] for _ in ranks]
    for rank, span in sorted(
        ((rank, span) for rank, spans in enumerate(ranks) for span in spans), key=lambda e: e[1][3]
    ):
        length = span[4] - span[3]
        serial[rank].append((*span[:3], clock, clock + length, span[5]))
        clock += length
    return serial


def drawn(change: Any = lambda spans: spans) -> list[Bubble]:
    return [
        Bubble.of("gpipe", 4, 1, [change(gpipe(2, 4))], by_cpu=True),
        Bubble.of("1f1b", 4, 1, [change(one_f_one_b())], by_cpu=True),
    ]


def verdicts(computed: list[Bubble], declared: list[Bubble] | None = None) -> dict[str, bool | None]:
    made = megatron.pipeline_checks(computed, [] if declared is None else declared)
    return {check.id.removeprefix("megatron."): check.passed for check in made}


RIGHT = dict.fromkeys(
    ("microbatches_in_flight", "bubble_by_cpu_time", "bubble_by_the_clock", "bubble_of_declared_times"), True
)


def test_a_pipeline_whose_ranks_take_turns_fails_by_the_clock() -> None:
    assert verdicts(drawn()) == RIGHT
    serial = drawn(taking_turns)
    assert [b.clock for b in serial] == [[pytest.approx(0.5)], [pytest.approx(0.5)]]
    for bubble in serial:
        assert verdicts([bubble]) == {**RIGHT, "bubble_by_the_clock": False}


def test_on_a_gpu_nothing_is_said_about_cpu_time() -> None:
    assert verdicts([Bubble.of("gpipe", 4, 1, [gpipe(2, 4)], by_cpu=False)]) == {**RIGHT, "bubble_by_cpu_time": None}


INTERLEAVED = Bubble("interleaved", 2, 4, 2, [1 / 9], 1 / 9, [5, 3], [])
DECLARED = Bubble("gpipe", 4, 8, 1, [3 / 11], None, [8] * 4, [])


@pytest.mark.parametrize(
    ("change", "check"),
    [
        ({"cpu": 1 / 9 + 0.05}, "bubble_by_cpu_time"),
        ({"cpu": 1 / 9 - 0.05}, "bubble_by_cpu_time"),
        ({"clock": [0.9, 1 / 9 + 0.26]}, "bubble_by_the_clock"),
        ({"clock": [1 / 9 - 0.11]}, "bubble_by_the_clock"),
        ({"in_flight": [5, 4]}, "microbatches_in_flight"),
    ],
)
def test_a_bubble_that_is_not_the_formula_fails_its_check(change: dict[str, Any], check: str) -> None:
    busy = dataclasses.replace(INTERLEAVED, clock=[0.9, 1 / 9 + 0.18], cpu=1 / 9 + 0.03)  # as seen under load
    assert verdicts([INTERLEAVED]) == RIGHT == verdicts([busy])
    assert verdicts([dataclasses.replace(INTERLEAVED, **change)]) == {**RIGHT, check: False}


@pytest.mark.parametrize("apart", [0.16, -0.02])
def test_a_bubble_of_declared_times_lies_close_to_the_formula(apart: float) -> None:
    assert verdicts([], [dataclasses.replace(DECLARED, clock=[3 / 11 + 0.13])]) == RIGHT
    found = verdicts([], [dataclasses.replace(DECLARED, clock=[3 / 11 + apart])])
    assert found == {**RIGHT, "bubble_of_declared_times": False}


def test_ranks_that_keep_more_microbatches_than_the_schedule_fail_in_both_pipelines() -> None:
    found = verdicts([INTERLEAVED], [dataclasses.replace(DECLARED, in_flight=[8, 8, 8, 7])])
    assert found == {**RIGHT, "microbatches_in_flight": False}
