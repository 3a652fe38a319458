"""What a layout must hold and send, from the papers: computed from sizes alone, to be held against what was measured.

B sequences of T tokens per step, H the hidden size, I that of the MLP, V the vocabulary, L layers; each data-parallel rank
sees B / dp sequences, cut into m microbatches when there is a pipeline.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from llmcore_hf.systems.data_parallel import Engine
from llmcore_hf.systems.parallel import Layout, ModelShape, Training
from llmcore_hf.systems.pipeline import BETWEEN_STAGES

N_BYTES = {"float32": 4, "float64": 8}
Collected = dict[str, dict[str, dict[str, int]]]  # phase -> collective -> {"calls", "bytes"}, as `Collectives.as_dict`


@dataclass(frozen=True)
class Part:
    """What one pipeline rank holds: its stages, how many layers they have, and whether the two ends are among them."""

    stages: tuple[int, ...]
    n_stages: int
    n_layers: int

    @classmethod
    def of(cls, layout: Layout, shape: ModelShape, pp_rank: int) -> Part:
        n_stages = layout.pp * layout.n_chunks
        stages = tuple(range(pp_rank, n_stages, layout.pp))
        return cls(stages, n_stages, shape.num_hidden_layers * len(stages) // n_stages)

    @property
    def embeds(self) -> bool:
        return 0 in self.stages

    @property
    def predicts(self) -> bool:
        return self.n_stages - 1 in self.stages


def expected_parameters(layout: Layout, shape: ModelShape, pp_rank: int) -> int:
    """Parameters a rank holds: matrices are divided by tp, norms are not.

    A layer has 4 H^2 in attention (as many key and value heads as query heads), 3 H I in its gated MLP, and two norms of H;
    Qwen3 adds two norms per layer of the head size, Qwen2 biases of q, k, v.
    """
    part = Part.of(layout, shape, pp_rank)
    hidden, head = shape.hidden_size, shape.hidden_size // shape.num_attention_heads
    split = 4 * hidden**2 + 3 * hidden * shape.intermediate_size
    split += 3 * hidden if shape.architecture == "qwen2" else 0
    kept = 2 * hidden + (2 * head if shape.architecture == "qwen3" else 0)
    ends = (part.embeds + part.predicts) * shape.vocab_size * hidden
    return part.n_layers * (split // layout.tp + kept) + ends // layout.tp + (hidden if part.predicts else 0)


def expected_bytes(layout: Layout, shape: ModelShape, training: Training, pp_rank: int) -> dict[str, int]:
    """Bytes of parameters, gradients, and the two moments of Adam."""
    held = expected_parameters(layout, shape, pp_rank) * N_BYTES[training.dtype]
    return {"parameters": held, "gradients": held, "optimizer": 2 * held}


def expected_in_flight(schedule: str, n_ranks: int, rank: int, n_microbatches: int, n_chunks: int = 1) -> int:
    """Microbatches (times chunks) whose activations a rank keeps at most: Narayanan et al. 2021, section 2.2.

    GPipe keeps all. 1F1B keeps as many as there are stages from this one to the end. Interleaving begins with
    (v - 1) p + 2 (p - rank - 1) forward passes before it alternates.
    """
    if schedule == "gpipe":
        return n_microbatches
    if schedule == "1f1b":
        return min(n_microbatches, n_ranks - rank)
    return min(n_microbatches * n_chunks, (n_chunks - 1) * n_ranks + 2 * (n_ranks - rank - 1) + 1)


def expected_collectives(layout: Layout, shape: ModelShape, training: Training, pp_rank: int) -> Collected:
    """Every collective of one step of a rank, by phase.

    Tensor parallel: two all-reduces of the hidden states per layer forward and two backward (Shoeybi et al. 2019, section
    3), one more forward for the embedding and one backward for the head, both split by vocabulary. Sequence parallel
    replaces each by an all-gather and a reduce-scatter (Korthikanti et al. 2022, section 4.2.2). The loss on split logits
    takes three all-reduces of one number per token: the largest logit, the sum of exponentials, the label's logit.
    Norm weights that see only a part of the heads, or of the sequence, sum their gradients. Data parallel alone (DDP): one
    all-reduce per bucket of gradients, see `gradient_buckets`; with tp or pp one buffer of all gradients. Pipelines: an
    activation forward and its gradient backward over each border between stages.
    """
    part = Part.of(layout, shape, pp_rank)
    sent: dict[str, dict[str, dict[str, int]]] = defaultdict(dict)

    def add(phase: str, kind: str, calls: int, n_bytes: int) -> None:
        if calls:
            entry = sent[phase].setdefault(kind, {"calls": 0, "bytes": 0})
            entry["calls"] += calls
            entry["bytes"] += n_bytes

    size = N_BYTES[training.dtype]
    m = training.n_microbatches if layout.pp > 1 else 1
    tokens = training.batch_size // layout.dp * training.seq_length  # per rank and step
    hidden = tokens * shape.hidden_size * size  # bytes of the hidden states of all microbatches
    if layout.tp > 1:
        in_layers, embeds, predicts = 2 * part.n_layers, int(part.embeds), int(part.predicts)
        for phase, gathers, scatters in (
            ("forward", in_layers + predicts, in_layers + embeds),
            ("backward", in_layers + embeds, in_layers + predicts),
        ):
            if layout.sequence_parallel:
                add(phase, "all_gather", gathers * m, gathers * hidden)
                add(phase, "reduce_scatter", scatters * m, scatters * hidden)
            else:
                # Forward what was scattered is reduced; backward it is the gradient on the way in, once for each gather.
                reduces = scatters
                add(phase, "all_reduce", reduces * m, reduces * hidden)
        add("loss" if layout.pp == 1 else BETWEEN_STAGES, "all_reduce", 3 * m * predicts, 3 * tokens * size * predicts)
        norms = _norms_to_reduce(layout, shape, part)
        add("gradients", "all_reduce", len(norms), sum(norms) * size)
    if layout.dp > 1:
        whole = expected_bytes(layout, shape, training, pp_rank)["gradients"]
        if layout.dp == layout.world_size:  # DDP, which sends while gradients come in
            add("backward", "all_reduce", len(gradient_buckets([n * size for n in gradient_order(shape)])), whole)
        else:
            add("gradients", "all_reduce", 1, whole)
    if layout.pp > 1:
        borders = sum((stage > 0) + (stage < part.n_stages - 1) for stage in part.stages)
        message = hidden // (layout.tp if layout.sequence_parallel else 1)
        for kind in ("send", "recv"):
            add(BETWEEN_STAGES, kind, borders * m, borders * message)
    return dict(sent)


def _norms_to_reduce(layout: Layout, shape: ModelShape, part: Part) -> list[int]:
    """Sizes of the norm weights whose gradients are partial sums."""
    head = shape.hidden_size // shape.num_attention_heads
    found = []
    if shape.architecture == "qwen3" and layout.reduces_norm_gradients:
        found += [head] * (2 * part.n_layers)
    if layout.sequence_parallel:
        found += [shape.hidden_size] * (2 * part.n_layers + int(part.predicts))
    return found


# DDP's default: a small bucket first, so that sending begins early (`dist._DEFAULT_FIRST_BUCKET_BYTES`, `bucket_cap_mb`).
FIRST_BUCKET_BYTES, BUCKET_BYTES = 2**20, 25 * 2**20


def gradient_buckets(n_bytes: list[int]) -> list[int]:
    """Bytes of the buckets into which DDP gathers gradients, one all-reduce each, in the order in which they come in.

    A bucket is sent when it holds at least its limit; a gradient is never split (Li et al. 2020, arXiv:2006.15704, section
    4.2; the limits are PyTorch's).
    """
    buckets: list[int] = []
    open_bucket = 0
    for n in n_bytes:
        open_bucket += n
        if open_bucket >= (BUCKET_BYTES if buckets else FIRST_BUCKET_BYTES):
            buckets.append(open_bucket)
            open_bucket = 0
    return [*buckets, open_bucket] if open_bucket else buckets


def gradient_order(shape: ModelShape) -> list[int]:
    """Elements of every parameter, in the order in which the backward pass ends with its gradient: from the head down.

    After its first step DDP orders its buckets in this way.
    """
    hidden, inner, head = shape.hidden_size, shape.intermediate_size, shape.hidden_size // shape.num_attention_heads
    bias = [hidden] if shape.architecture == "qwen2" else []
    norm = [head] if shape.architecture == "qwen3" else []
    q = k = [*norm, *bias, hidden**2]
    v = [*bias, hidden**2]
    mlp, attention = 3 * [hidden * inner], [hidden**2, *v, *k, *q]
    layer = [*mlp, hidden, *attention, hidden]
    ends = shape.vocab_size * hidden
    return [ends, hidden, *(shape.num_hidden_layers * layer), ends]


def differences(found: Any, expected: Any, path: str = "") -> list[str]:
    """Where two nested mappings differ, one line each."""
    if isinstance(found, dict) and isinstance(expected, dict):
        keys = sorted({*found, *expected})
        return [line for k in keys for line in differences(found.get(k), expected.get(k), f"{path}/{k}")]
    return [] if found == expected else [f"{path.strip('/')}: {found} instead of {expected}"]


# ---------------------------------------------------------------------------------------------------------------------
# Data parallel: ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054)
# ---------------------------------------------------------------------------------------------------------------------


Shapes = list[tuple[int, ...]]  # of the parameters, in the order of the model


def _bytes_per_element(engine: Engine) -> dict[str, int]:
    """In bfloat16 a parameter takes 2 bytes, its gradient 2, and the optimizer 12: a float32 copy (`master`) and two moments.

    DeepSpeed's stages 1 to 3 keep such a copy in float32, too, where it is no use.
    """
    width = 2 if engine.bf16 else 4
    has_master = engine.kind == "deepspeed" and (engine.bf16 or engine.stage >= 1)
    return {"parameters": width, "gradients": width, "master": 4 * has_master, "optimizer": 8}


def _sharded(engine: Engine) -> set[str]:
    """What a rank holds a share of; it holds the rest whole."""
    stage = {"fsdp2": 3, "zero_redundancy": 1, "ddp": 0}.get(engine.kind, engine.stage)
    return {
        kind for kind, least in (("parameters", 3), ("gradients", 2), ("master", 1), ("optimizer", 1)) if stage >= least
    }


def zero_bytes(engine: Engine, n_parameters: int, n_ranks: int) -> dict[str, float]:
    """Bytes a rank holds, section 3.1 and Figure 1: what is sharded is divided by the number of ranks."""
    return {
        kind: width * n_parameters / (n_ranks if kind in _sharded(engine) else 1)
        for kind, width in _bytes_per_element(engine).items()
    }


def rank_bytes(engine: Engine, shapes: Shapes, n_ranks: int, rank: int) -> dict[str, int]:
    """The same for real tensors, which do not divide evenly; see `shares`.

    DeepSpeed's stage 2 keeps a gradient on each rank that owns a part of it, whole (`copy_grads_in_partition` in its
    `runtime/zero/stage_1_and_2.py`): the smaller the shares, the more those at their ends weigh.
    """
    share, whole, sharded = shares(engine, shapes, n_ranks)[rank], _count(shapes), _sharded(engine)
    elements = {kind: share if kind in sharded else whole for kind in _bytes_per_element(engine)}
    if engine.kind == "deepspeed" and engine.stage == 2:
        elements["gradients"] = _touched(shapes, share * rank, share * (rank + 1))
    return {kind: width * elements[kind] for kind, width in _bytes_per_element(engine).items()}


def shares(engine: Engine, shapes: Shapes, n_ranks: int) -> list[int]:
    """Elements of every rank where an engine shards.

    FSDP2 deals out rows, ceil(rows / N) to a rank as long as there are any; ZeroRedundancyOptimizer whole tensors, the
    largest first, each to the rank that has least. DeepSpeed's stages 1 and 2 cut the tensors, strung together, into equal
    pieces of an even length, its stage 3 each tensor into equal pieces; both pad with zeros.
    """
    sizes = [math.prod(shape) for shape in shapes]
    if engine.kind == "fsdp2":
        return [sum(_rows(rows, n_ranks, rank) * math.prod(rest) for rows, *rest in shapes) for rank in range(n_ranks)]
    if engine.kind == "zero_redundancy":
        given = [0] * n_ranks
        for size in sorted(sizes, reverse=True):
            given[given.index(min(given))] += size
        return given
    if engine.kind == "deepspeed" and engine.stage in (1, 2):
        return [2 * math.ceil(sum(sizes) / (2 * n_ranks))] * n_ranks
    if engine.kind == "deepspeed" and engine.stage == 3:
        return [sum(math.ceil(size / n_ranks) for size in sizes)] * n_ranks
    return [sum(sizes)] * n_ranks


def _count(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes)


def _rows(rows: int, n_ranks: int, rank: int) -> int:
    each = math.ceil(rows / n_ranks)
    return min(each, max(0, rows - rank * each))


def _touched(shapes: Shapes, begin: int, end: int) -> int:
    """Elements of all tensors that lie, strung together, at least in part between `begin` and `end`, and of the padding."""
    found, place = 0, 0
    for shape in shapes:
        size = math.prod(shape)
        if place < end and place + size > begin:
            found += size
        place += size
    return found + max(0, end - max(begin, place))


def zero_traffic(engine: Engine, n_parameters: int, n_padded: int | None = None) -> dict[str, dict[str, int]]:
    """Bytes of the buffers of each collective, by phase, section 7.

    An all-reduce sends twice its buffer (a reduce-scatter and an all-gather), the others once: plain data parallel and
    stages 1, 2 send 2 psi, stage 3 sends 3 psi, parameters being gathered forward and backward.

    Args:
        n_padded: elements of all shares together, where padding makes them more than there are parameters.
    """
    width = 2 if engine.bf16 else 4
    whole, padded = n_parameters * width, (n_padded or n_parameters) * width
    if engine.kind == "fsdp2":
        again = {"all_gather": padded} if engine.reshard else {}
        return {"forward": {"all_gather": padded}, "backward": {"reduce_scatter": padded, **again}}
    if engine.kind == "zero_redundancy":
        return {"backward": {"all_reduce": whole}, "step": {"broadcast": whole}}
    if engine.kind == "ddp" or engine.stage == 0:
        return {"backward": {"all_reduce": whole}}
    if engine.stage in (1, 2):
        return {"backward": {"reduce": whole}, "step": {"all_gather": padded}}
    return {"forward": {"all_gather": padded}, "backward": {"all_gather": padded, "reduce_scatter": padded}}


def rank_traffic(engine: Engine, shapes: Shapes, n_ranks: int) -> dict[str, dict[str, int]]:
    """The same for real tensors: every rank's share is as large as the largest one."""
    return zero_traffic(engine, _count(shapes), n_ranks * max(shares(engine, shapes, n_ranks)))
