"""Pictures of a run: held-out images with question and answer, and where the model looks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from llmcore_hf.curves import HELD_OUT, REJECTED, TRAIN, Line, Panel, draw, png, pyplot
from llmcore_hf.vlm.data import answer_of, question_of

RIGHT, WRONG = "#2ca02c", "#d62728"
COLUMNS = 6


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
    title: str, history: list[dict[str, Any]], block: dict[str, Any], loss_title: str, panels: Sequence[Panel] = ()
) -> bytes:
    """`training_curves.png`: losses, accuracy beside the blind baseline, and the result before and after."""
    shown = {
        "vqa_accuracy": "questions",
        "vqa_accuracy/shuffled": "blind: other images",
        "vqa_accuracy/blank": "blind: blank images",
        "caption_accuracy": "captions",
        "hard/vqa_accuracy": "questions, unseen pairs",
    }
    bars = {
        label: (block["before"][name], block["after"][name]) for name, label in shown.items() if name in block["after"]
    }
    standard = [
        Panel(
            loss_title,
            (Line("loss", "training", TRAIN), Line("eval_loss", "held-out (validation)", HELD_OUT, "o")),
        ),
        Panel(
            "Share of held-out questions answered right",
            (
                Line("eval_vqa_accuracy", "held-out (validation)", HELD_OUT, "o"),
                Line("eval_vqa_accuracy_blind", "blind: images of other rows", REJECTED, "o"),
            ),
        ),
    ]
    return draw(title, history, [*standard, *panels], bars)


def _wrap(text: str, width: int = 22) -> str:
    import textwrap

    return "\n".join(line for part in _ascii(text).split("\n") for line in textwrap.wrap(part, width)[:3])


def _ascii(text: str) -> str:
    """The bundled font has no CJK glyphs: what it cannot draw becomes a question mark, not an empty box."""
    return text.encode("ascii", "replace").decode().replace("$", r"\$")
