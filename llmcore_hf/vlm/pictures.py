"""Pictures of a run: held-out images with question and answer, and where the model looks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from llmcore_hf.curves import HELD_OUT, REJECTED, SHARE, TRAIN, Line, Panel, draw, png, pyplot
from llmcore_hf.vlm.data import answer_of, question_of

RIGHT, WRONG = "#2ca02c", "#d62728"
COLUMNS = 6
ARCHITECTURES = ("#1f77b4", "#ff7f0e", "#2ca02c")  # compared side by side
PARTS = ("vision tower", "connector", "language model")
LAYERS = ("#9ecae1", "#3182bd", "#08519c")  # of a stacked bar


def grid(title: str, rows: Sequence[dict[str, Any]], answers: Sequence[str]) -> bytes:
    """PNG of the images with question, answer (green when right) and, when it is wrong, the truth."""
    n_rows = -(-len(rows) // COLUMNS)
    figure, axes = pyplot().subplots(
        n_rows, COLUMNS, figsize=(2.1 * COLUMNS, 2.75 * n_rows), squeeze=False, layout="constrained"
    )
    figure.suptitle(_ascii(title), fontsize=13, fontweight="bold")
    for axis, row, answer in zip(axes.flat, rows, answers, strict=False):
        truth = answer_of(row)
        right = answer.strip() == truth.strip()
        axis.imshow(row["images"][-1], interpolation="nearest")
        axis.set_title(_wrap(question_of(row)), fontsize=8.5)
        axis.set_xlabel(
            _wrap(answer if right else f"{answer}\ntruth: {truth}"), fontsize=8.5, color=RIGHT if right else WRONG
        )
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
    return png(figure)


def attention(
    title: str, rows: Sequence[dict[str, Any]], maps: np.ndarray, names: Sequence[str], captions: Sequence[str]
) -> bytes:
    """PNG of each image and, beside it, the same image lit where the attention is; the brightest patch has the largest weight.

    Args:
        maps: (N, K, side, side), weights of K maps for each of N images.
        names: K titles.
        captions: N texts, one for each image.
    """
    n, k = maps.shape[:2]
    figure, axes = pyplot().subplots(n, k + 1, figsize=(1.9 * (k + 1), 2.2 * n), squeeze=False, layout="constrained")
    figure.suptitle(_ascii(title), fontsize=12, fontweight="bold")
    for i, row in enumerate(rows):
        image = row["images"][-1]
        width, height = image.size
        for j, axis in enumerate(axes[i]):
            axis.imshow(image, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            if j:  # a dark veil that lifts where the weight is
                weights = maps[i, j - 1]
                veil = np.zeros((*weights.shape, 4))
                veil[..., 3] = 0.85 * (1 - weights / max(weights.max(), 1e-9))
                axis.imshow(veil, extent=(-0.5, width - 0.5, height - 0.5, -0.5), interpolation="nearest")
                axis.set_xlabel(f"largest {weights.max():.2f}", fontsize=7.5)
            if i == 0:
                axis.set_title("image" if j == 0 else names[j - 1], fontsize=9)
        axes[i][0].set_xlabel(_wrap(captions[i], 24), fontsize=8)
    return png(figure)


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


def _wrap(text: str, width: int = 22) -> str:
    import textwrap

    return "\n".join(line for part in _ascii(text).split("\n") for line in textwrap.wrap(part, width)[:3])


def _ascii(text: str) -> str:
    """The bundled font has no CJK glyphs: what it cannot draw becomes a question mark, not an empty box."""
    return text.encode("ascii", "replace").decode().replace("$", r"\$")
