"""The two pictures of the `megatron` lesson: all layouts side by side, and who holds and computes what when."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from llmcore_hf import lesson

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from llmcore_hf.systems.megatron import Args, Bubble, Outcome

KINDS = {"all_reduce": "#1f77b4", "all_gather": "#2ca02c", "reduce_scatter": "#98df8a", "send": "#ff7f0e"}
# What a rank of a ring of n sends, over the size of the buffer. All groups of this lesson have two ranks.
GROUP = 2
SENT = {"all_reduce": 2 * (GROUP - 1) / GROUP, "all_gather": (GROUP - 1) / GROUP, "reduce_scatter": (GROUP - 1) / GROUP}
SENT |= {"send": 1.0}
HELD = {"parameters": "#1f77b4", "gradients": "#ff7f0e", "optimizer": "#9467bd", "activations": "#c7c7c7"}
FORWARD, BACKWARD = ("#6baed6", "#c6dbef"), ("#fd8d3c", "#fdd0a2")  # first and second chunk
TITLES = {"gpipe": "GPipe", "1f1b": "1F1B", "interleaved": "interleaved 1F1B, two chunks"}


def draw_layouts(alone: dict[str, Any], outcomes: list[Outcome], args: Args) -> Figure:
    """Loss, distance from one process, memory and communication of every layout."""
    figure, axes = lesson.pyplot().subplots(2, 2, figsize=(14, 9.6), layout="constrained")
    right = [o for o in outcomes if o.layout.reduces_norm_gradients]
    _draw_losses(axes[0, 0], alone, outcomes)
    _draw_distances(axes[0, 1], alone, outcomes, args.tolerance)
    _draw_memory(axes[1, 0], alone, right)
    _draw_communication(axes[1, 1], right)
    figure.suptitle(
        f"One model ({args.architecture}), many layouts: the same training, other memory, other messages",
        fontweight="bold",
    )
    return figure


def _draw_losses(axis: Axes, alone: dict[str, Any], outcomes: list[Outcome]) -> None:
    steps = range(1, len(alone["losses"]) + 1)
    axis.plot(steps, alone["losses"], color="black", linewidth=5, alpha=0.25, label="one process")
    right = [o for o in outcomes if o.layout.reduces_norm_gradients]
    apart = max(outcome.apart(alone)["loss"] for outcome in right)
    # One line for all: no eye could tell them apart.
    label = f"each of {len(right)} layouts, at most {apart:.0e} from it"
    axis.plot(steps, right[0].losses, "--", color="#1f77b4", linewidth=1.3, label=label)
    for wrong in (o for o in outcomes if not o.layout.reduces_norm_gradients):
        label = f"{wrong.layout.name}, {wrong.apart(alone)['loss']:.0e} from it"
        axis.plot(steps, wrong.losses, ":", color="#d62728", linewidth=2, label=label)
    axis.set(xlabel="optimizer step", ylabel="training loss")
    axis.set_title("Do they learn the same? (the curves lie on each other)", fontsize=11)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=9, frameon=False)


def _draw_distances(axis: Axes, alone: dict[str, Any], outcomes: list[Outcome], tolerance: float) -> None:
    names = [outcome.layout.name for outcome in outcomes]
    markers = {"loss": "o", "gradients": "s", "weights": "^"}
    for quantity, marker in markers.items():
        values = [max(outcome.apart(alone)[quantity], 1e-12) for outcome in outcomes]
        axis.plot(values, range(len(names)), marker, label=f"{quantity}", markersize=7)
    axis.axvline(tolerance, color="black", linestyle=":", label=f"tolerance {tolerance:g}")
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set(xscale="log", xlabel="largest absolute difference from one process")
    axis.set_title("How equal is equal? Rounding, and one plan that is wrong", fontsize=11)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=9, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncol=4)


def _draw_memory(axis: Axes, alone: dict[str, Any], outcomes: list[Outcome]) -> None:
    rows = [("one process", {**alone["bytes"], "activations": alone["activation_bytes"]})]
    for outcome in outcomes:
        fullest = max(outcome.ranks, key=lambda rank: sum(rank["bytes"].values()) + rank["activation_bytes"])
        rows.append((outcome.layout.name, {**fullest["bytes"], "activations": fullest["activation_bytes"]}))
    for i, (_, held) in enumerate(rows):
        left = 0.0
        for kind, color in HELD.items():
            width = held[kind] / 2**20
            axis.barh(i, width, left=left, color=color, label=kind if i == 0 else None)
            left += width
        axis.text(left, i, f" {left:.2f}", va="center", fontsize=9)
    axis.set_yticks(range(len(rows)), [name for name, _ in rows])
    axis.invert_yaxis()
    axis.set_xlim(0, 1.1 * axis.get_xlim()[1])
    axis.set_xlabel("MiB on the fullest rank (activations: most at one time)")
    axis.set_title("What does a rank hold?", fontsize=11)
    axis.legend(fontsize=9, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncol=4)


def _draw_communication(axis: Axes, outcomes: list[Outcome]) -> None:
    for i, outcome in enumerate(outcomes):
        sent = max((_sent(rank) for rank in outcome.ranks), key=lambda kinds: sum(kinds.values()))
        left = 0.0
        for kind, n_bytes in sent.items():
            axis.barh(i, n_bytes / 2**20, left=left, color=KINDS[kind])
            left += n_bytes / 2**20
        calls = max(_calls(rank) for rank in outcome.ranks)
        axis.text(left, i, f" {left:.2f} in {calls} call{'s' if calls > 1 else ''}", va="center", fontsize=9)
    axis.set_yticks(range(len(outcomes)), [outcome.layout.name for outcome in outcomes])
    axis.invert_yaxis()
    axis.set_xlim(0, 1.3 * axis.get_xlim()[1])
    handles = [lesson.pyplot().Rectangle((0, 0), 1, 1, color=color, label=kind) for kind, color in KINDS.items()]
    axis.legend(handles=handles, fontsize=9, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncol=5)
    axis.set_xlabel("MiB sent per step by the busiest rank (collectives as rings)")
    axis.set_title("What does a rank send? (reduce-scatter + all-gather = all-reduce)", fontsize=11)


def _sent(rank: dict[str, Any]) -> dict[str, float]:
    """Collective -> bytes a rank sends, over all phases."""
    sent = dict.fromkeys(KINDS, 0.0)
    for kinds in rank["collectives"].values():
        for kind in kinds.keys() & sent.keys():
            sent[kind] += SENT[kind] * kinds[kind]["bytes"]
    return sent


def _calls(rank: dict[str, Any]) -> int:
    return sum(entry["calls"] for kinds in rank["collectives"].values() for entry in kinds.values())


def draw_parallelism(
    outcome: Outcome, alone: dict[str, Any], computed: list[Bubble], declared: list[Bubble], args: Args
) -> Figure:
    """Above: the parts of the model that each rank of the 3D layout holds. Below: schedules, from real timestamps."""
    figure = lesson.pyplot().figure(figsize=(15, 15), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1.5))
    _draw_holdings(above.subplots(), outcome, alone)
    axes = below.subplots(len(computed), 2)
    for row, (left, right) in enumerate(zip(computed, declared, strict=True)):
        by_cpu = "" if left.cpu is None else f"by CPU time {left.cpu:.3f}, "
        _draw_gantt(axes[row, 0], left, by_cpu)
        _draw_gantt(axes[row, 1], right, "")
    sleeping = f"Stages that sleep: forward {args.stage_seconds * 1000:g} ms, backward twice (declared times)"
    for column, text in enumerate(("Stages that compute", sleeping)):
        axes[0, column].annotate(
            text, (0.5, 1.32), xycoords="axes fraction", ha="center", fontsize=12, fontweight="bold"
        )
    plt = lesson.pyplot()
    shades = {"forward": FORWARD[0], "forward, second chunk": FORWARD[1]}
    shades |= {"backward": BACKWARD[0], "backward, second chunk": BACKWARD[1]}
    handles = [plt.Rectangle((0, 0), 1, 1, facecolor=c, edgecolor="white", label=text) for text, c in shades.items()]
    below.legend(handles=handles, loc="outside lower center", ncol=4, fontsize=10, frameon=False)
    return figure


def _draw_holdings(axis: Axes, outcome: Outcome, alone: dict[str, Any]) -> None:
    """One row per rank, one column per part of the model; the darker, the larger the share of the part."""
    sizes = _elements({name: list(weight.shape) for name, weight in alone["weights"].items()})
    columns = list(sizes)
    colors = {0: "#1f77b4", 1: "#2ca02c"}  # by replica
    for row, rank in enumerate(outcome.ranks):
        for part, held in _elements(rank["tensors"]).items():
            shares = {kind: n / sizes[part][kind] for kind, n in held.items()}
            share = sum(held.values()) / sum(sizes[part].values())
            x = columns.index(part)
            color = colors[rank["coordinates"]["dp"]]
            axis.add_patch(
                lesson.pyplot().Rectangle((x, row), 0.96, 0.9, color=color, alpha=0.25 + 0.6 * share, linewidth=0)
            )
            text = "\n".join(f"{kind} {value:.0%}".strip() for kind, value in shares.items())
            axis.text(x + 0.48, row + 0.45, text, ha="center", va="center", fontsize=8.5, linespacing=0.95)
    labels = []
    for number, rank in enumerate(outcome.ranks):
        place = rank["coordinates"]
        labels.append(f"rank {number}: stage {place['pp']}, replica {place['dp']}, slice {place['tp']}")
    axis.set_yticks([row + 0.45 for row in range(len(labels))], labels)
    axis.set_xticks([x + 0.48 for x in range(len(columns))], columns)
    axis.set(xlim=(0, len(columns)), ylim=(len(labels), -0.05))
    axis.tick_params(length=0)
    for side in axis.spines.values():
        side.set_visible(False)
    axis.set_title(
        "3D, pp x dp x tp = 2 x 2 x 2: which share of which part does a rank hold? (blue and green: the two replicas)",
        fontsize=12,
        fontweight="bold",
    )


def _elements(tensors: dict[str, list[int]]) -> dict[str, dict[str, int]]:
    """Part of the model -> its elements; of a layer, matrices and norms apart, because norms are not split."""
    found: dict[str, dict[str, int]] = {}
    for name, shape in tensors.items():
        part = _part(name)
        kind = ("norms" if "norm" in name else "matrices") if part.startswith("layer") else ""
        kinds = found.setdefault(part, {})
        kinds[kind] = kinds.get(kind, 0) + math.prod(shape)
    return found


def _part(name: str) -> str:
    """The column of a parameter: `layer 0`, `embedding`, `norm` or `head`."""
    if ".layers." in name:
        return f"layer {name.split('.layers.')[1].split('.')[0]}"
    return {"model.embed_tokens.weight": "embedding", "model.norm.weight": "last norm"}.get(name, "head")


def _draw_gantt(axis: Axes, bubble: Bubble, more: str) -> None:
    begin = min(span[3] for rank in bubble.spans for span in rank)
    end = max(span[4] for rank in bubble.spans for span in rank)
    for row, spans in enumerate(bubble.spans):
        for kind, stage, microbatch, start, stop, _ in spans:
            color = (FORWARD if kind == "forward" else BACKWARD)[stage // bubble.n_ranks]
            width = (stop - start) * 1000
            left = (start - begin) * 1000
            axis.barh(row, width, 0.8, left=left, color=color, edgecolor="white", linewidth=0.6)
            if stop - start > 0.012 * (end - begin):
                axis.text(left + width / 2, row, str(microbatch), ha="center", va="center", fontsize=7.5)
    axis.set_yticks(range(bubble.n_ranks), [f"rank {rank}" for rank in range(bubble.n_ranks)])
    axis.invert_yaxis()
    axis.set_xlabel("milliseconds since the step began", fontsize=9)
    title = f"{TITLES[bubble.schedule]}, p = {bubble.n_ranks}, m = {bubble.n_microbatches}\n"
    title += f"idle {min(bubble.clock):.3f} by the clock, {more}formula {bubble.ideal:.3f}"
    axis.set_title(title, fontsize=10.5)
