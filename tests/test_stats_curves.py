"""Intervals of a paired change, and the picture of a run."""

from __future__ import annotations

import math
import struct
import warnings
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmcore_hf.curves import HELD_OUT, TRAIN, Line, Panel, draw
from llmcore_hf.stats import Z95, paired_interval, share_interval

# ---------------------------------------------------------------- stats


def pairs(gained: int, lost: int, right: int, wrong: int) -> tuple[list[float], list[float]]:
    """Scores before and after of rows that became right, became wrong, stayed right, stayed wrong."""
    before = [0.0] * gained + [1.0] * lost + [1.0] * right + [0.0] * wrong
    after = [1.0] * gained + [0.0] * lost + [1.0] * right + [0.0] * wrong
    return before, after


def test_the_interval_of_a_share_is_agresti_and_mins() -> None:
    # Half an observation in each cell: (12.5 - 3.5) / 32, and the Wald interval of those counts.
    low, high = paired_interval(*pairs(gained=12, lost=3, right=5, wrong=10))
    half = 1.96 * math.sqrt(12.5 + 3.5 - (12.5 - 3.5) ** 2 / 32) / 32
    assert low == pytest.approx(9 / 32 - half, abs=1e-4) and high == pytest.approx(9 / 32 + half, abs=1e-4)


def test_the_interval_of_a_mean_is_the_normal_one() -> None:
    before, after = [0.0, 1.0, 2.0, 3.0], [1.5, 2.0, 4.0, 3.5]  # differences 1.5, 1, 2, 0.5
    standard_error = math.sqrt(((0.25**2) * 2 + (0.75**2) * 2) / 3 / 4)
    low, high = paired_interval(before, after)
    assert (low + high) / 2 == pytest.approx(1.25)
    assert (high - low) / 2 == pytest.approx(1.959964 * standard_error)


def test_the_quantile_is_the_one_of_95_percent() -> None:
    assert 0.5 * (1 + math.erf(Z95 / math.sqrt(2))) == pytest.approx(0.975, abs=1e-12)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=200))
def test_the_interval_of_a_share_lies_in_range_and_turns_with_the_samples(rows: list[tuple[bool, bool]]) -> None:
    before, after = [float(b) for b, _ in rows], [float(a) for _, a in rows]
    low, high = paired_interval(before, after)
    assert -1 <= low < high <= 1
    assert paired_interval(after, before) == pytest.approx((-high, -low))
    adjusted = sum(a - b for b, a in zip(before, after, strict=True)) / (len(rows) + 2)
    assert low <= adjusted <= high


@given(st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3)), min_size=1, max_size=50))
def test_the_interval_of_a_mean_turns_with_the_samples(rows: list[tuple[float, float]]) -> None:
    before, after = [b for b, _ in rows], [a for _, a in rows]
    low, high = paired_interval(before, after)
    assert low <= high
    assert paired_interval(after, before) == pytest.approx((-high, -low), abs=1e-9)


def test_rows_that_did_not_change_leave_the_question_open() -> None:
    low, high = paired_interval(*pairs(gained=0, lost=0, right=10, wrong=10))
    assert low < 0 < high


def test_one_lucky_row_is_no_proof_and_many_are() -> None:
    assert paired_interval(*pairs(1, 0, 0, 0))[0] < 0
    assert paired_interval(*pairs(3, 0, 0, 17))[0] < 0
    assert paired_interval(*pairs(20, 0, 0, 0))[0] > 0
    # rows that all gained say "a lot", not "exactly everything"
    assert paired_interval(*pairs(20, 0, 0, 0))[0] < 1


def test_the_interval_narrows_with_more_rows() -> None:
    few, many = paired_interval(*pairs(5, 1, 2, 2)), paired_interval(*pairs(50, 10, 20, 20))
    assert many[1] - many[0] < few[1] - few[0]


@pytest.mark.parametrize(("gain", "loss"), [(0.2, 0.1), (0.5, 0.02), (0.05, 0.05), (0.8, 0.05)])
def test_the_interval_covers_the_truth_about_95_times_in_100(gain: float, loss: float) -> None:
    """Summed exactly over all outcomes of 40 rows, each of which gains or loses with the given probability."""
    n, covered = 40, 0.0
    for gained in range(n + 1):
        for lost in range(n + 1 - gained):
            low, high = paired_interval(*pairs(gained, lost, 0, n - gained - lost))
            if low <= gain - loss <= high:
                ways = math.comb(n, gained) * math.comb(n - gained, lost)
                covered += ways * gain**gained * loss**lost * (1 - gain - loss) ** (n - gained - lost)
    assert 0.93 <= covered <= 0.995


@pytest.mark.parametrize(("before", "after"), [([], []), ([1.0], []), ([1.0], [1.0, 2.0])])
def test_samples_of_different_rows_are_refused(before: list[float], after: list[float]) -> None:
    with pytest.raises(ValueError, match="same rows"):
        paired_interval(before, after)


# ---------------------------------------------------------------- shares


@pytest.mark.parametrize(
    ("share", "n", "low", "high"),
    [(0.5, 10, 0.2366, 0.7634), (0.0, 20, 0.0, 0.1611), (1.0, 20, 0.8389, 1.0), (81 / 263, 263, 0.2553, 0.3662)],
)
def test_wilson_intervals_are_the_published_ones(share: float, n: int, low: float, high: float) -> None:
    """The last: Newcombe 1998, Statistics in Medicine 17:857, table I."""
    assert share_interval(share, n) == pytest.approx((low, high), abs=1e-4)


# ---------------------------------------------------------------- curves

HISTORY = [
    {"step": 0, "eval_loss": 3.0},
    {"step": 1, "loss": 2.5},
    {"step": 2, "loss": None},  # a NaN as it stands in the log
    {"step": 3, "loss": 1.5},
    {"step": 3, "eval_loss": 1.0},
]
LOSS = Panel("Loss", (Line("loss", "training", TRAIN), Line("eval_loss", "held-out", HELD_OUT, "o")), 0.693, "ln 2")
ABSENT = Panel("Reward", (Line("rewards/margins", "training", TRAIN),))
BARS = {"exact match": (0.05, 0.91)}


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that were drawn, kept open."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kept: list[Any] = []
    monkeypatch.setattr(plt, "close", kept.append)
    yield kept
    monkeypatch.undo()
    plt.close("all")


def visible(figure: Any) -> list[Any]:
    return [axis for axis in figure.axes if axis.get_visible()]


def test_the_picture_is_a_png_large_enough_to_read() -> None:
    png = draw("A run", HISTORY, [LOSS], BARS)
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", png[16:24])
    assert width >= 900 and height >= 300


def test_curves_show_the_logged_values_and_leave_gaps_out(figures: list[Any]) -> None:
    draw("A run", HISTORY, [LOSS], {})
    [axis] = visible(figures[0])
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axis.get_lines()}
    assert drawn["training"] == [[1, 2.5], [3, 1.5]]
    assert drawn["held-out"] == [[0, 3.0], [3, 1.0]]
    assert set(drawn["ln 2"][0]) >= {0.693}


def test_a_single_value_is_visible_as_a_dot(figures: list[Any]) -> None:
    draw("A run", [{"step": 1, "loss": 1.0}], [LOSS], {})
    line = visible(figures[0])[0].get_lines()[0]
    assert line.get_marker() == "o"


def test_axes_are_labelled_and_lines_are_named(figures: list[Any]) -> None:
    draw("DPO: tiny-qwen", HISTORY, [LOSS], BARS)
    assert figures[0].get_suptitle() == "DPO: tiny-qwen"
    for axis in visible(figures[0]):
        assert axis.get_title() and axis.get_xlabel() and axis.get_legend()
    assert [text.get_text() for text in visible(figures[0])[0].get_legend().get_texts()] == [
        *("training", "held-out", "ln 2")
    ]


def test_before_and_after_are_marked_with_their_values(figures: list[Any]) -> None:
    draw("A run", HISTORY, [LOSS], BARS)
    axis = visible(figures[0])[-1]
    assert [patch.get_width() for patch in axis.patches] == [0.05, 0.91]
    assert [text.get_text() for text in axis.texts] == ["0.05", "0.91"]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["exact match"]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["before", "after"]


def test_a_panel_without_a_value_is_left_out(figures: list[Any]) -> None:
    draw("A run", HISTORY, [LOSS, ABSENT], {})
    assert [axis.get_title() for axis in visible(figures[0])] == ["Loss"]


@pytest.mark.parametrize("n_panels", range(5))
def test_any_number_of_panels_fits(n_panels: int, figures: list[Any]) -> None:
    draw("A run", HISTORY, [LOSS] * n_panels, BARS)
    assert len(visible(figures[0])) == n_panels + 1


@pytest.mark.parametrize("bars", [{}, BARS])
def test_a_module_draws_on_axes_of_its_own_between_panels_and_bars(figures: list[Any], bars: dict) -> None:
    draw("A run", HISTORY, [LOSS, ABSENT], bars, [lambda axis: axis.set_title("mine"), lambda a: a.set_title("too")])
    titles = [axis.get_title() for axis in visible(figures[0])]
    assert titles[:3] == ["Loss", "mine", "too"] and len(titles) == 3 + bool(bars)


def test_a_run_that_logged_nothing_still_gets_a_picture(figures: list[Any]) -> None:
    assert draw("A run", [], [LOSS], {}).startswith(b"\x89PNG")
    assert not visible(figures[0])


def test_figures_are_closed_again() -> None:
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    draw("A run", HISTORY, [LOSS], BARS)
    assert plt.get_fignums() == before


def test_english_labels_need_no_special_font() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert draw("DPO: tiny-qwen-base on toy-sort-preference", HISTORY, [LOSS], BARS).startswith(b"\x89PNG")
