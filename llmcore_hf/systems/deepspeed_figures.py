"""The picture of the `deepspeed` lesson: losses, memory, gradients during the backward pass, and traffic of every engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmcore_hf import lesson
from llmcore_hf.systems import formulas

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from llmcore_hf.systems.deepspeed import Outcome

HELD = {"parameters": "#1f77b4", "gradients": "#ff7f0e", "master": "#8c564b", "optimizer": "#9467bd"}
STAGES = ("#7f7f7f", "#1f77b4", "#2ca02c", "#d62728")
KINDS = {
    "all_reduce": "#1f77b4",
    "reduce": "#17becf",
    "broadcast": "#bcbd22",
    "all_gather": "#2ca02c",
    "reduce_scatter": "#98df8a",
}
TIMES_SENT = {"all_reduce": 2}  # the others send their buffer once


def draw(alone: dict[str, Any], outcomes: list[Outcome]) -> Figure:
    shapes = [tuple(weight.shape) for weight in alone["weights"].values()]
    n_parameters = sum(weight.numel() for weight in alone["weights"].values())
    figure, axes = lesson.pyplot().subplots(2, 2, figsize=(14, 10.4), layout="constrained")
    _draw_losses(axes[0, 0], alone, outcomes)
    _draw_memory(axes[0, 1], outcomes, shapes, n_parameters)
    _draw_gradients(axes[1, 0], outcomes, n_parameters)
    _draw_traffic(axes[1, 1], outcomes, n_parameters)
    n_ranks = len(outcomes[0].ranks)
    figure.suptitle(f"ZeRO on {n_ranks} ranks: the same training, less on each rank", fontweight="bold")
    return figure


def _draw_losses(axis: Axes, alone: dict[str, Any], outcomes: list[Outcome]) -> None:
    steps = range(1, len(alone["losses"]) + 1)
    axis.plot(steps, alone["losses"], color="black", linewidth=6, alpha=0.2, label="one process")
    wide = [o for o in outcomes if not o.engine.bf16]
    narrow = [o for o in outcomes if o.engine.bf16 and o.engine.stage > 0]
    former = [o for o in outcomes if o.engine.bf16 and o.engine.stage == 0]
    # One line for those that no eye could tell apart.
    for alike, line, color, names in (
        (wide, "--", "#1f77b4", f"each of {len(wide)} engines in float32"),
        (narrow, ":", "#d62728", "zero 1, 2, 3 in bfloat16"),
        (former, "-.", "#8c564b", "zero 0 in bfloat16 (see the README)"),
    ):
        if alike:
            apart = max(outcome.apart(alone)["losses"] for outcome in alike)
            label = f"{names}, at most {apart:.1g} from it"
            axis.plot(steps, alike[0].losses, line, color=color, linewidth=1.5, label=label)
    axis.set(xlabel="optimizer step", ylabel="training loss")
    axis.set_title("Do they learn the same? (the curves lie on each other)", fontsize=11)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8.5, frameon=False)


def _draw_memory(axis: Axes, outcomes: list[Outcome], shapes: formulas.Shapes, n_parameters: int) -> None:
    """Bytes per parameter on a rank; black ticks are the sums of the formula."""
    for row, outcome in enumerate(outcomes):
        held, left = outcome.held(outcome.ranks[0]), 0.0
        for kind, color in HELD.items():
            width = held[kind] / n_parameters
            axis.barh(row, width, left=left, color=color, label=kind if row == 0 else None)
            left += width
        expected = sum(formulas.rank_bytes(outcome.engine, shapes, len(outcome.ranks), 0).values()) / n_parameters
        label = "formula" if row == 0 else None
        axis.plot([expected] * 2, [row - 0.45, row + 0.45], color="black", linewidth=2, label=label)
        axis.text(max(left, expected) + 0.2, row, f"{left:.2f}", va="center", fontsize=9)
    axis.set_yticks(range(len(outcomes)), [outcome.engine.name for outcome in outcomes])
    axis.invert_yaxis()
    axis.set_xlim(0, 1.1 * axis.get_xlim()[1])
    axis.set_xlabel("bytes per parameter")
    axis.set_title("What does rank 0 hold?", fontsize=11)
    axis.legend(fontsize=9, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncol=5)


def _draw_gradients(axis: Axes, outcomes: list[Outcome], n_parameters: int) -> None:
    """Gradients that the first rank holds while they come in, and what is left when the backward pass has ended."""
    for outcome in outcomes:
        engine, rank = outcome.engine, outcome.ranks[0]
        if engine.kind != "deepspeed" or engine.bf16:
            continue
        trace = [n / n_parameters for n in rank["gradient_trace"]]
        width, alpha = (5, 0.4) if engine.stage == 0 else (1.5, 1)  # stage 1 lies on it
        axis.plot(
            range(1, len(trace) + 1),
            trace,
            color=STAGES[engine.stage],
            linewidth=width,
            alpha=alpha,
            label=engine.name,
        )
        axis.plot(
            len(trace) + 2, rank["gradients_at_rest"] / n_parameters, "D", color=STAGES[engine.stage], markersize=6
        )
        if engine.stage == 2:
            first = 1 + max(range(1, len(trace)), key=lambda i: trace[i] - trace[i - 1])  # where it jumps
            axis.annotate(
                "stage 2: rank 0 owns the front of the model,\nwhose gradients come last. At the first of\n"
                "them DeepSpeed makes room for all",
                (first, trace[first - 1]),
                (0.03, 0.97),
                textcoords="axes fraction",
                va="top",
                fontsize=8.5,
                color=STAGES[2],
                arrowprops={"arrowstyle": "->", "color": STAGES[2]},
            )
    axis.set_ylim(0, 1.3 * axis.get_ylim()[1])
    axis.set(
        xlabel="parameters whose gradient has come in, during one backward pass",
        ylabel="bytes of gradients on rank 0, per parameter",
    )
    axis.set_title("What tells stage 1 from stage 2? The peak (diamonds: after the pass)", fontsize=11)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=9, frameon=False, loc="upper right", ncol=2)


def _draw_traffic(axis: Axes, outcomes: list[Outcome], n_parameters: int) -> None:
    for row, outcome in enumerate(outcomes):
        whole, left = n_parameters * (2 if outcome.engine.bf16 else 4), 0.0
        for kinds in outcome.sent(outcome.ranks[0]).values():
            for kind, n_bytes in kinds.items():
                width = TIMES_SENT.get(kind, 1) * n_bytes / whole
                axis.barh(row, width, left=left, color=KINDS[kind], edgecolor="white")
                left += width
        calls = sum(e["calls"] for kinds in outcome.ranks[0]["collectives"].values() for e in kinds.values())
        axis.text(
            left + 0.05, row, f"{left:.2f} psi in {calls} call{'s' if calls > 1 else ''}", va="center", fontsize=9
        )
    axis.set_yticks(range(len(outcomes)), [outcome.engine.name for outcome in outcomes])
    axis.invert_yaxis()
    axis.set_xlim(0, 4.2)
    axis.set_xlabel("sent per step, in units of all parameters (psi); an all-reduce counts twice")
    axis.set_title("What does rank 0 send?", fontsize=11)
    handles = [lesson.pyplot().Rectangle((0, 0), 1, 1, color=color, label=kind) for kind, color in KINDS.items()]
    axis.legend(handles=handles, fontsize=9, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncol=5)
