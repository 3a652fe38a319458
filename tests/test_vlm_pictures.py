"""What the pictures of the vision modules show, and what is written in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from PIL import Image

from llmcore_hf import curves, fonts
from llmcore_hf.curves import SHARE
from llmcore_hf.vlm import blip2, flamingo, pictures
from llmcore_hf.vlm.tiny import image_processor

CHINESE = "图里是什么？"


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are given back as figures."""
    for module in (curves, pictures):
        monkeypatch.setattr(module, "png", lambda figure: figure)


def row(image: Image.Image, question: str, truth: str) -> dict[str, Any]:
    return {
        "images": [image],
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": truth}],
    }


def thirds() -> Image.Image:
    """60 x 20: red on the left, green in the middle, blue on the right."""
    image = Image.new("RGB", (60, 20))
    for i in range(3):
        color = tuple(255 * (i == j) for j in range(3))
        image.paste(Image.new("RGB", (20, 20), color), (20 * i, 0))
    return image


# --- what the model sees ---


def clip_processor() -> Any:
    from transformers import CLIPImageProcessorPil

    return CLIPImageProcessorPil(size={"shortest_edge": 20}, crop_size={"height": 20, "width": 20})


def test_of_a_wide_image_clip_sees_the_middle() -> None:
    seen = pictures.seen_by(clip_processor(), thirds())
    assert seen.shape == (20, 20, 3)
    assert np.allclose(seen[:, 1:-1], [0, 1, 0], atol=0.02)


@pytest.mark.parametrize("kind", ["clip", "blip2"])
def test_an_image_of_the_right_size_is_seen_as_it_is(kind: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert np.allclose(pictures.seen_by(image_processor(kind), Image.fromarray(pixels)), pixels / 255, atol=1e-3)


def test_the_largest_weight_glows_and_the_dark_is_not_black() -> None:
    black, white = np.zeros((8, 8, 3)), np.ones((8, 8, 3))
    weights = np.array([[0.0, 0.2], [0.0, 0.05]])
    for image in (black, white):
        lit = pictures.glowing(image, weights)
        assert lit.shape == (8, 8, 3) and lit.max() <= 1
        colored = lit.max(axis=2) - lit.min(axis=2)
        assert colored[:4, 4:].min() > 0.4 and colored[:, :4].max() < 1e-9
        assert 0 < colored[4:, 4:].max() < colored[:4, 4:].min() / 2
    assert pictures.glowing(black, weights).mean(axis=2).min() > 0.3


def test_maps_lie_over_what_the_model_saw_with_the_answer_beside_the_truth(drawn: None) -> None:
    rows = [row(thirds(), "What color?", "green"), row(thirds(), "What color?", "green")]
    seen = [pictures.seen_by(clip_processor(), one["images"][0]) for one in rows]
    figure = pictures.attention("t", rows, seen, np.ones((2, 1, 4, 4)) / 16, ["layer 1"], ["green", "red"])
    first, lit, second, _ = figure.axes
    assert np.array_equal(first.images[0].get_array(), seen[0]) and lit.images[0].get_array().shape == (20, 20, 3)
    assert first.get_xlabel().split("\n") == ["What color?", "green"]
    assert second.get_xlabel().split("\n") == ["What color?", "red", "truth: green"]
    assert (first.xaxis.label.get_color(), second.xaxis.label.get_color()) == (pictures.RIGHT, pictures.WRONG)


# --- what is written ---


def bundled(name: str) -> str:
    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name)


def grid_texts(question: str, truth: str, answer: str) -> tuple[Any, Any]:
    figure = pictures.grid("t", [row(thirds(), question, truth)], [answer])
    return figure.axes[0].title, figure.axes[0].xaxis.label


def test_chinese_is_written_where_a_font_has_it(monkeypatch, drawn: None) -> None:
    """The last-resort font that matplotlib brings has a sign for everything."""
    monkeypatch.setattr(fonts, "wide_fonts", lambda: [bundled("cmr10.ttf"), bundled("LastResortHE-Regular.ttf")])
    title, label = grid_texts(CHINESE, "塔", "一座塔")
    assert title.get_text() == CHINESE and label.get_text() == "一座塔\ntruth: 塔"
    assert title.get_fontfamily() == [fonts.BUNDLED, "Last Resort High-Efficiency"]


def test_without_such_a_font_the_picture_says_so(monkeypatch, drawn: None) -> None:
    monkeypatch.setattr(fonts, "wide_fonts", lambda: [bundled("cmr10.ttf")])
    title, label = grid_texts(CHINESE, "tower", "a tower")
    assert "no font here" in title.get_text() and "?" not in title.get_text()
    assert label.get_text() == "a tower\ntruth: tower" and label.get_fontfamily() == [fonts.BUNDLED]


def test_text_that_the_bundled_font_has_needs_no_other() -> None:
    assert fonts.families_for("Что это? é ≤ …") == [fonts.BUNDLED]


@pytest.mark.parametrize("text", ["word " * 40, "长" * 60])
def test_what_is_left_out_is_marked(monkeypatch, drawn: None, text: str) -> None:
    monkeypatch.setattr(fonts, "wide_fonts", lambda: [bundled("LastResortHE-Regular.ttf")])
    title, _ = grid_texts(text, "a", "a")
    assert title.get_text().count("\n") == 2 and title.get_text().endswith("…")
    short, _ = grid_texts("What is it?", "a", "a")
    assert "…" not in short.get_text()


def test_an_empty_answer_is_seen(drawn: None) -> None:
    assert grid_texts("What?", "a", "")[1].get_text() == "(nothing)\ntruth: a"


# --- curves ---


BLOCK = {
    "before": {"vqa_accuracy": 0.1, "frozen_lm/vqa_accuracy": 0.1},
    "after": {"vqa_accuracy": 0.9, "frozen_lm/vqa_accuracy": 0.7},
}


def panels_of(figure: Any) -> dict[str, Any]:
    return {axis.get_title(): axis for axis in figure.axes}


def values_of(axis: Any) -> dict[str, list[float]]:
    return {line.get_label(): list(line.get_ydata()) for line in axis.lines}


def test_blip2_shows_its_losses_apart_and_the_frozen_language_model(drawn: None) -> None:
    history = [
        {"step": 1, "loss": 9.0, "itc": 2.0, "itm": 3.0, "itg": 4.0, "itm_accuracy": 0.5},
        {"step": 2, "eval_loss": 1.5},
        {"step": 2, "eval_vqa_accuracy": 0.4, "eval_vqa_accuracy_blind": 0.2},
        {"step": 3, "loss": 1.0},
    ]
    lesson = blip2.LESSON
    panels = panels_of(pictures.curves("t", lesson.shown_history(history), BLOCK, lesson.panels))
    assert values_of(panels["Loss of the next token"]) == {"training": [1.0], "held-out (validation)": [1.5]}
    stage1 = values_of(panels["Stage 1: losses of the Q-Former (training)"])
    assert stage1 == {"contrastive": [2.0], "matching": [3.0], "generation": [4.0]}
    for title in ("Share of held-out questions answered right", "Stage 1: image-text pairs told right (training)"):
        assert panels[title].get_ylim() == SHARE
    bars = [label.get_text() for label in panels["Before and after, held-out test rows"].get_yticklabels()]
    assert "questions, language model frozen" in bars


def test_flamingo_shows_its_shots_beside_the_blind(drawn: None) -> None:
    values = {"": 0.8, "/shuffled": 0.3, "/blank": 0.2}
    shots = {f"shots/{n}{suffix}": value + n / 100 for n in (0, 1, 2, 4) for suffix, value in values.items()}
    block = {"before": {**BLOCK["before"], **dict.fromkeys(shots, 0.1)}, "after": {**BLOCK["after"], **shots}}
    panels = panels_of(pictures.curves("t", [], block, (), flamingo.LESSON.own_panels(block)))
    axis = panels["Questions that only examples explain"]
    found = values_of(axis)
    assert found["after training"] == pytest.approx([0.8, 0.81, 0.82, 0.84])
    assert found["blind: another image"] == pytest.approx([0.3, 0.31, 0.32, 0.34])
    assert found["blind: a blank image"][0] == 0.2 and found["before training"] == [0.1] * 4
    assert axis.get_ylim() == SHARE and [t.get_text() for t in axis.get_xticklabels()] == ["0", "1", "2", "4"]
    assert flamingo.LESSON.own_panels(BLOCK) == [], "data without examples"


def test_without_anything_to_show_there_is_a_title_alone(drawn: None) -> None:
    assert curves.draw("t", [], [], {}).axes == []


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_no_cell_is_empty(drawn: None, n: int) -> None:
    """What is drawn last reaches to the right end of the picture."""
    history = [{"step": 1, **{f"m{i}": 0.5 for i in range(n)}}]
    panels = [curves.Panel(f"p{i}", (curves.Line(f"m{i}", "a", "black"),)) for i in range(n)]
    figure = curves.draw("t", history, panels, {})
    assert len(figure.axes) == n and all(axis.get_visible() for axis in figure.axes)
    last = figure.axes[-1].get_subplotspec()
    assert last.colspan.stop == last.get_gridspec().ncols
