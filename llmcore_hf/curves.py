"""`training_curves.png`: loss and the method's own metrics, training and held-out, and the result before and after."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

TRAIN, HELD_OUT, REJECTED = "#1f77b4", "#d62728", "#7f7f7f"
SHARE = (-0.03, 1.03)  # limits of an axis of shares


@dataclass(frozen=True)
class Line:
    key: str  # of a row of the log history
    label: str
    color: str
    marker: str = ""


@dataclass(frozen=True)
class Panel:
    title: str
    lines: tuple[Line, ...]
    level: float | None = None  # a horizontal line worth knowing
    level_label: str = ""
    limits: tuple[float, float] | None = None  # of the values' axis; as the values lie when there are none


def draw(
    title: str,
    history: list[dict[str, Any]],
    panels: list[Panel],
    bars: dict[str, tuple[float, float]],
    own: Sequence[Callable[[Any], None]] = (),
) -> bytes:
    """PNG of the panels, of what a module draws itself on axes of its `own`, and of bars of each held-out share
    `name -> (before, after)`, all in [0, 1].

    Panels without a single value are left out, so that no empty axes pretend to be a curve.
    """
    panels = [panel for panel in panels if any(_points(history, line.key) for line in panel.lines)]
    count = len(panels) + len(own) + bool(bars)
    columns = min(count, 2) or 1
    rows = -(-count // columns) or 1
    figure, axes = pyplot().subplots(
        rows, columns, figsize=(6.2 * columns, 3.9 * rows), squeeze=False, layout="constrained"
    )
    # The bundled font has no CJK glyphs: what it cannot draw becomes a question mark, not an empty box.
    figure.suptitle(title.encode("ascii", "replace").decode(), fontsize=13, fontweight="bold")
    flat = list(axes.flat)
    for axis, panel in zip(flat, panels, strict=False):
        _draw_panel(axis, panel, history)
    for axis, draw_on in zip(flat[len(panels) :], own, strict=False):
        draw_on(axis)
    if bars:
        _draw_bars(flat[count - 1], bars)
    for axis in flat[count:]:  # no empty cell: what is drawn last takes the rest of its row
        axis.remove()
    if count:
        flat[count - 1].set_subplotspec(flat[0].get_gridspec()[rows - 1, (count - 1) % columns :])
    return png(figure)


def pyplot() -> Any:
    """matplotlib's pyplot, drawing into files alone."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def png(figure: Any) -> bytes:
    """The figure as a PNG; it is closed."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    pyplot().close(figure)
    return buffer.getvalue()


def _points(history: list[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(row["step"], row[key]) for row in history if row.get(key) is not None]


def _draw_panel(axis: Any, panel: Panel, history: list[dict[str, Any]]) -> None:
    for line in panel.lines:
        points = _points(history, line.key)
        if points:
            steps, values = zip(*points, strict=True)
            marker = line.marker or ("o" if len(points) == 1 else "")
            style = {"marker": marker, "markersize": 4} if marker else {}
            axis.plot(steps, values, label=line.label, color=line.color, linewidth=1.6, **style)
    if panel.level is not None:
        axis.axhline(panel.level, color="black", linewidth=0.8, linestyle=":", label=panel.level_label)
    if panel.limits is not None:
        axis.set_ylim(*panel.limits)
    axis.set_title(panel.title, fontsize=11)
    axis.set_xlabel("optimizer step")
    axis.grid(alpha=0.25)
    axis.legend(fontsize=9, frameon=False)


def _draw_bars(axis: Any, bars: dict[str, tuple[float, float]]) -> None:
    names = list(bars)
    for i, name in enumerate(names):
        before, after = bars[name]
        axis.barh(i - 0.19, before, 0.36, color="#c7c7c7", label="before" if i == 0 else None)
        axis.barh(i + 0.19, after, 0.36, color="#2ca02c", label="after" if i == 0 else None)
        for offset, value in ((-0.19, before), (0.19, after)):
            axis.text(value + 0.015, i + offset, f"{value:.2f}", va="center", fontsize=9)
    axis.set_yticks(range(len(names)), names)
    axis.set_xlim(0, 1.15)
    axis.invert_yaxis()
    axis.set_xlabel("share of held-out rows")
    axis.set_title("Before and after, held-out test rows", fontsize=11)
    axis.grid(axis="x", alpha=0.25)
    axis.legend(fontsize=9, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncol=2)
