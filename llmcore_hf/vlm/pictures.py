"""Pictures of a run: held-out images with question and answer, and where the model looks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from llmcore_hf.curves import HELD_OUT, REJECTED, SHARE, TRAIN, Line, Panel, draw, png, pyplot
from llmcore_hf.fonts import BUNDLED, families_for
from llmcore_hf.vlm.data import answer_of, question_of

RIGHT, WRONG = "#2ca02c", "#d62728"
GLOW = (0.9, 0.3, 0.0)  # where attention is
COLUMNS = 6
NO_FONT = "[no font here has this text]"
ARCHITECTURES = ("#1f77b4", "#ff7f0e", "#2ca02c")  # compared side by side
PARTS = ("vision tower", "connector", "language model")
LAYERS = ("#9ecae1", "#3182bd", "#08519c")  # of a stacked bar


def grid(title: str, rows: Sequence[dict[str, Any]], answers: Sequence[str]) -> bytes:
    """PNG of the images with question, answer (green when right) and, when it is wrong, the truth."""
    columns = min(COLUMNS, len(rows))
    n_rows = -(-len(rows) // columns)
    figure, axes = pyplot().subplots(
        n_rows, columns, figsize=(2.1 * columns, 2.75 * n_rows), squeeze=False, layout="constrained"
    )
    figure.suptitle(_ascii(title), fontsize=13, fontweight="bold")
    for axis, row, answer in zip(axes.flat, rows, answers, strict=False):
        axis.imshow(row["images"][-1], interpolation="nearest")
        said, color = _answered(row, answer)
        _write(axis.set_title, question_of(row), 8.5)
        _write(axis.set_xlabel, said, 8.5, color=color)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
    return png(figure)


def attention(
    title: str,
    rows: Sequence[dict[str, Any]],
    seen: Sequence[np.ndarray],
    maps: np.ndarray,
    names: Sequence[str],
    answers: Sequence[str],
) -> bytes:
    """PNG of what the model saw with question and answer and, beside it, the same in gray, colored where the attention is.

    Args:
        seen: N images as the model sees them, cut and scaled, (H, W, 3) in [0, 1]: see `seen_by`.
        maps: (N, K, side, side), weights of K maps over the patches of each of the N images.
        names: K titles.
        answers: N answers of the model.
    """
    n, k = maps.shape[:2]
    figure, axes = pyplot().subplots(n, k + 1, figsize=(1.9 * (k + 1), 2.5 * n), squeeze=False, layout="constrained")
    figure.suptitle(_ascii(title), fontsize=12, fontweight="bold")
    for i, (row, image) in enumerate(zip(rows, seen, strict=True)):
        for j, axis in enumerate(axes[i]):
            axis.set_xticks([])
            axis.set_yticks([])
            if j:
                axis.imshow(glowing(image, maps[i, j - 1]), interpolation="nearest")
                axis.set_xlabel(f"largest {maps[i, j - 1].max():.2f}", fontsize=7.5)
            else:
                axis.imshow(image, interpolation="nearest")
            if i == 0:
                axis.set_title(names[j - 1] if j else "what the model sees", fontsize=9)
        said, color = _answered(row, answers[i])
        _write(axes[i][0].set_xlabel, f"{question_of(row)}\n{said}", 8, 24, color=color)
    return png(figure)


def seen_by(image_processor: Any, image: Any) -> np.ndarray:
    """What a model sees of an image, (H, W, 3) in [0, 1]: after cutting and scaling, without the normalisation."""
    pixels = image_processor([image], return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)  # (H, W, 3)
    if image_processor.do_normalize:
        pixels = pixels * np.array(image_processor.image_std) + np.array(image_processor.image_mean)
    largest = 1.0 if image_processor.do_rescale else 255.0
    return np.clip(pixels / largest, 0, 1)


def glowing(image: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The image, (H, W, 3), in pale gray, and a color over its patches, (side, side), that is strongest at the largest weight.

    Gray is lifted, so that a dark photo is no black square.
    """
    gray = 0.35 + 0.6 * image.mean(axis=-1, keepdims=True)
    strength = weights / max(weights.max(), 1e-9)  # (side, side), at most 1
    rows, columns = (np.arange(size) * side // size for size, side in zip(image.shape, weights.shape, strict=False))
    alpha = 0.8 * strength[np.ix_(rows, columns)][..., None]  # (H, W, 1)
    return (1 - alpha) * gray + alpha * np.array(GLOW)


def curves(
    title: str,
    history: list[dict[str, Any]],
    block: dict[str, Any],
    panels: Sequence[Panel] = (),
    own: Sequence[Callable[[Any], None]] = (),
) -> bytes:
    """`training_curves.png`: losses, accuracy beside the blind baseline, what the module adds, and the result before and after."""
    shown = {
        "vqa_accuracy": "questions",
        "vqa_accuracy/shuffled": "blind: other images",
        "vqa_accuracy/blank": "blind: blank images",
        "caption_accuracy": "captions",
        "caption_accuracy/shuffled": "captions, blind: other images",
        "hard/vqa_accuracy": "questions, unseen pairs",
        "frozen_lm/vqa_accuracy": "questions, language model frozen",
    }
    bars = {
        label: (block["before"][name], block["after"][name]) for name, label in shown.items() if name in block["after"]
    }
    standard = [
        Panel(
            "Loss of the next token",
            (Line("loss", "training", TRAIN), Line("eval_loss", "held-out (validation)", HELD_OUT, "o")),
        ),
        Panel(
            "Share of held-out questions answered right",
            (
                Line("eval_vqa_accuracy", "held-out (validation)", HELD_OUT, "o"),
                Line("eval_vqa_accuracy_blind", "blind: images of other rows", REJECTED, "o"),
            ),
            limits=SHARE,
        ),
    ]
    return draw(title, history, [*standard, *panels], bars, own)


def draw_shots(axis: Any, shots: Sequence[int], lines: dict[str, list[float]]) -> None:
    """Accuracy over the number of examples; the first line is what counts, the others it is held against."""
    colors = (HELD_OUT, REJECTED, REJECTED, "#c7c7c7")
    styles = ("-", "-", ":", "--")
    for (label, values), color, style in zip(lines.items(), colors, styles, strict=True):
        axis.plot(range(len(shots)), values, style, color=color, marker="o", markersize=4, label=label)
    axis.set_xticks(range(len(shots)), [str(n) for n in shots])
    axis.set_ylim(*SHARE)
    axis.set_title("Questions that only examples explain", fontsize=11)
    axis.set_xlabel("examples before the question")
    axis.grid(alpha=0.25)
    axis.legend(fontsize=9, frameon=False)


def comparison(
    title: str, curves: dict[str, list[tuple[int, float, float]]], table: dict[str, dict[str, Any]]
) -> bytes:
    """PNG of architectures side by side: what they answer, and what it costs.

    Args:
        curves: architecture -> (training rows, accuracy, blind accuracy) during training.
        table: row -> architecture -> value, as in the summary's `comparison`.
    """
    figure, axes = pyplot().subplots(2, 3, figsize=(16, 8.6), layout="constrained")
    figure.suptitle(_ascii(title), fontsize=13, fontweight="bold")
    names = list(curves)
    colors = dict(zip(names, ARCHITECTURES, strict=True))
    _draw_learning(axes[0, 0], curves, colors)
    _draw_accuracy(axes[0, 1], names, table, colors)
    _draw_stacked(
        axes[0, 2],
        "Operations per image and question, millions",
        {part: table[f"flops/{part}"] for part in PARTS},
        1e6,
        {name: f"{table['visual_tokens'][name]} visual tokens" for name in names},
    )
    _draw_stacked(
        axes[1, 0],
        "Parameters, thousands",
        {
            "trained": table["parameters_trained"],
            "frozen": table["parameters_frozen"],
        },
        1e3,
        dict.fromkeys(names, ""),
    )
    _draw_stacked(
        axes[1, 1],
        "Memory of training, MB, batch of 64",
        {
            "weights": table["memory/weights_mb"],
            "gradients, Adam": {
                name: table["memory/weights_gradients_adam_mb"][name] - table["memory/weights_mb"][name]
                for name in names
            },
            "activations": {name: table["memory/activations_kb_per_image"][name] / 16 for name in names},
        },
        1,
        dict.fromkeys(names, ""),
    )
    _draw_speed(axes[1, 2], names, table, colors)
    return png(figure)


def _draw_learning(axis: Any, curves: dict[str, list[tuple[int, float, float]]], colors: dict[str, str]) -> None:
    for name, points in curves.items():
        if points:
            rows, accuracies, blind = zip(*points, strict=True)
            axis.plot(rows, accuracies, color=colors[name], marker="o", markersize=4, label=name)
            axis.plot(rows, blind, color=colors[name], linestyle=":", label=f"{name}, blind")
    axis.set_title("Validation questions answered right", fontsize=11)
    axis.set_xlabel("training rows (a question with its image)")
    axis.set_ylim(0, 1.05)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8, frameon=False)


def _draw_accuracy(axis: Any, names: list[str], table: dict[str, Any], colors: dict[str, str]) -> None:
    """Accuracy with its interval, the two blind baselines, and unseen pairs."""
    for i, name in enumerate(names):
        value, (low, high) = table["vqa_accuracy"][name], table["vqa_accuracy/ci95"][name]
        axis.bar(i, value, 0.6, color=colors[name], yerr=[[max(0, value - low)], [max(0, high - value)]], capsize=5)
        axis.text(i, high + 0.015, f"{value:.2f}", ha="center", fontsize=9)
        for row, marker, label in (
            ("vqa_accuracy/shuffled", "x", "blind: other images"),
            ("vqa_accuracy/blank", "+", "blind: blank images"),
            ("hard/vqa_accuracy", "_", "unseen pairs"),
        ):
            if row in table:
                axis.plot(i, table[row][name], marker, color="black", markersize=9, label=None if i else label)
    axis.set_xticks(range(len(names)), names)
    axis.set_ylim(0, 1.15)
    axis.set_title("Held-out questions, 95 % interval", fontsize=11)
    axis.grid(axis="y", alpha=0.25)
    axis.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncol=3)


def _draw_stacked(
    axis: Any, title: str, layers: dict[str, dict[str, float]], unit: float, notes: dict[str, str]
) -> None:
    names = list(notes)
    bottom = dict.fromkeys(names, 0.0)
    for (label, values), color in zip(layers.items(), LAYERS, strict=False):
        heights = [values[name] / unit for name in names]
        axis.bar(range(len(names)), heights, 0.6, bottom=list(bottom.values()), color=color, label=label)
        bottom = {name: bottom[name] + height for name, height in zip(names, heights, strict=True)}
    for i, name in enumerate(names):
        text = f"{bottom[name]:.3g}" + (f"\n{notes[name]}" if notes[name] else "")
        axis.text(i, bottom[name] * 1.01, text, ha="center", va="bottom", fontsize=9)
    axis.set_xticks(range(len(names)), names)
    axis.set_ylim(0, max(bottom.values()) * 1.25)
    axis.set_title(title, fontsize=11)
    axis.grid(axis="y", alpha=0.25)
    axis.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncol=3)


def _draw_speed(axis: Any, names: list[str], table: dict[str, Any], colors: dict[str, str]) -> None:
    kinds = ("training", "generation")
    for i, name in enumerate(names):
        values = [table[f"images_per_second/{kind}"][name] for kind in kinds]
        places = [j + 0.27 * (i - 1) for j in range(len(kinds))]
        axis.bar(places, values, 0.25, color=colors[name], label=name)
        for place, value in zip(places, values, strict=True):
            axis.text(place, value, f"{value:,.0f}", ha="center", va="bottom", fontsize=8.5)
    axis.set_xticks(range(len(kinds)), ["training\n(forward and backward)", "generation\n(8 tokens each)"])
    axis.set_title("Images per second on this machine", fontsize=11)
    axis.grid(axis="y", alpha=0.25)
    axis.legend(fontsize=8, frameon=False)


def _answered(row: dict[str, Any], answer: str) -> tuple[str, str]:
    """What was answered and, when it is wrong, the truth; and its color."""
    truth, given = answer_of(row).strip(), answer.strip()
    return (given, RIGHT) if given == truth else (f"{given or '(nothing)'}\ntruth: {truth}", WRONG)


def _write(setter: Callable[..., Any], text: str, size: float, width: int = 22, **style: Any) -> None:
    """Put a text on an axis in fonts that have it, each of its lines on at most three; a mark shows what is left out."""
    lines: list[str] = []
    families = [BUNDLED]
    for part in text.split("\n"):
        found = families_for(part)
        families += found or []
        lines += _wrapped(part if found else NO_FONT, width)
    setter("\n".join(lines).replace("$", r"\$"), fontsize=size, family=list(dict.fromkeys(families)), **style)


def _wrapped(text: str, width: int) -> list[str]:
    import textwrap
    from unicodedata import east_asian_width

    wide = sum(east_asian_width(c) in "WF" for c in text)
    if wide > len(text) / 2:
        width //= 2  # these are twice as wide, and no spaces stand between them
    return textwrap.wrap(text, width, max_lines=3, placeholder=" …")


def _ascii(text: str) -> str:
    """Titles are written in the bundled font, which has no CJK glyphs: what it cannot draw becomes a question mark."""
    return text.encode("ascii", "replace").decode().replace("$", r"\$")
