"""The picture of the `mixed_precision` lesson: rounding, what it does to a training, the loss scale, and memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from llmcore_hf import lesson

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from llmcore_hf.systems.mixed_precision import Findings
    from llmcore_hf.systems.precision import Trajectory

LINES = {
    "fp32": ("#7f7f7f", "-"),
    "bf16 autocast": ("#1f77b4", "-"),
    "bf16 + master": ("#17becf", "--"),
    "bf16 weights": ("#d62728", "-"),
    "fp16 autocast": ("#ff7f0e", "-"),
    "fp16 + scaling": ("#2ca02c", "--"),
}
HELD = {"parameters": "#1f77b4", "gradients": "#ff7f0e", "master": "#8c564b", "optimizer": "#9467bd"}


def draw(found: Findings, n_parameters: int) -> Figure:
    figure, axes = lesson.pyplot().subplots(2, 3, figsize=(17.5, 9.6), layout="constrained")
    _draw_rounding(axes[0, 0], found)
    _draw_weights(axes[0, 1], found)
    _draw_lost(axes[0, 2], found)
    _draw_window(axes[1, 0], found)
    _draw_scale(axes[1, 1], found)
    _draw_memory(axes[1, 2], found, n_parameters)
    for axis in axes.flat:
        axis.grid(alpha=0.25)
    for axis in (*axes[0], axes[1, 1]):
        axis.xaxis.get_major_locator().set_params(integer=True)
    handles, names = axes[0, 1].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncol=len(names), frameon=False)
    figure.suptitle(
        f"Mixed precision on a {found.device.type.upper()} device: every step against float64", fontweight="bold"
    )
    return figure


def _draw_each(axis: Axes, found: Findings, values: Callable[[Trajectory], Iterable[float | None]]) -> None:
    """One line per number format over the optimizer steps; a step without a value has no point."""
    for trajectory in found.trajectories:
        color, line = LINES[trajectory.regime.name]
        points = [(i, value) for i, value in enumerate(values(trajectory), start=1) if value is not None]
        axis.plot(*zip(*points, strict=True), line, color=color, label=trajectory.regime.name)


def _draw_rounding(axis: Axes, found: Findings) -> None:
    _draw_each(axis, found, lambda trajectory: [step.gradient_error for step in trajectory.steps])
    axis.set_yscale("log")
    axis.set(xlabel="optimizer step", ylabel="|g - g64| / |g64|, same weights and batch")
    axis.set_title("How wrong is one gradient? (rounding alone)", fontsize=11)


def _draw_weights(axis: Axes, found: Findings) -> None:
    _draw_each(axis, found, found.weights_apart)
    axis.set_yscale("log")
    axis.set(xlabel="optimizer step", ylabel="|w - w64| / |w64 - start|, w64 with the same steps")
    axis.set_title("How far does the training end up? (error growth)", fontsize=11)


def _draw_lost(axis: Axes, found: Findings) -> None:
    """Formats that lose next to nothing lie on each other: one grey band, which says how many they are."""
    lost = {t.regime.name: [s.lost_updates for s in t.steps] for t in found.trajectories}
    most = {name: max((v for v in values if v is not None), default=0.0) for name, values in lost.items()}
    kept = [name for name in lost if most[name] < 0.01]
    for name in lost.keys() - kept:
        points = [(i, 100 * value) for i, value in enumerate(lost[name], start=1) if value is not None]
        axis.plot(*zip(*points, strict=True), LINES[name][1], color=LINES[name][0], label=name)
    if kept:
        text = f"the other {len(kept)}, at most {100 * max(most[name] for name in kept):.1g} % in a step"
        axis.plot([1, len(lost[kept[0]])], [0, 0], color="#7f7f7f", linewidth=6, alpha=0.4, label=text)
    axis.legend(fontsize=9, frameon=False, loc="center left")
    axis.set_ylim(-3, 103)
    axis.set(
        xlabel="optimizer step (the learning rate falls to 0)", ylabel="% of weights that a step leaves as they are"
    )
    axis.set_title("Which updates are lost? Those added to bfloat16", fontsize=11)


def _draw_window(axis: Axes, found: Findings) -> None:
    finite = [row for row in found.sweep if row["error"] is not None]
    axis.plot([r["scale"] for r in finite], [r["error"] for r in finite], "o-", color="#2ca02c", label="error")
    axis.plot([r["scale"] for r in finite], [r["underflow"] for r in finite], "s:", color="#ff7f0e", label="became 0")
    for number, row in enumerate(row for row in found.sweep if row["error"] is None):
        axis.axvline(row["scale"], color="#d62728", alpha=0.5, label="overflow" if number == 0 else None)
    axis.set_xscale("log", base=2)
    axis.set_yscale("symlog", linthresh=1e-6)
    axis.set_ylim(-3e-7, 3)
    axis.set(xlabel="loss scale", ylabel="first gradient in float16: relative error, share")
    axis.set_title("Which loss scales do? There is a window", fontsize=11)
    axis.legend(fontsize=9, frameon=False)


def _draw_scale(axis: Axes, found: Findings) -> None:
    steps = found.of("fp16 + scaling").steps
    numbers = range(1, len(steps) + 1)
    axis.step(numbers, [s.loss_scale for s in steps], where="mid", color="#2ca02c", label="loss scale")
    left_out = [(i, s.loss_scale) for i, s in zip(numbers, steps, strict=True) if s.overflow]
    if left_out:
        axis.plot(*zip(*left_out, strict=True), "X", color="#d62728", markersize=8, label="overflow: step left out")
    axis.set_yscale("log", base=2)
    axis.set(xlabel="optimizer step", ylabel="loss scale")
    axis.set_title("How does the loss scale find its place?", fontsize=11)
    axis.legend(fontsize=9, frameon=False)


def _draw_memory(axis: Axes, found: Findings, n_parameters: int) -> None:
    """Bytes per parameter; beside them the activations of one batch, and the time of a step."""
    fp32 = found.of("fp32")
    for row, trajectory in enumerate(found.trajectories):
        left = 0.0
        for kind, color in HELD.items():
            width = trajectory.n_bytes[kind] / n_parameters
            axis.barh(row, width, left=left, color=color, label=kind if row == 0 else None)
            left += width
        activations = trajectory.activation_bytes / fp32.activation_bytes
        text = f"activations {activations:.0%}\nstep {trajectory.seconds / fp32.seconds:.2f}x"
        axis.text(left + 0.3, row, text, va="center", fontsize=8.5)
    axis.set_yticks(range(len(found.trajectories)), [t.regime.name for t in found.trajectories])
    axis.invert_yaxis()
    axis.set_xlim(0, 21.5)
    axis.set_xlabel("bytes per parameter (text: activations and time of a step, fp32 = 1)")
    axis.set_title("What does it save? Not what is held per parameter", fontsize=11)
    axis.legend(fontsize=9, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncol=4)
