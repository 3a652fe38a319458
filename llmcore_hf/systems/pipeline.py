"""Pipeline schedules and their bubble: who computed what when, and how long the ranks were idle.

The schedules are those of `torch.distributed.pipelining`. Sources: GPipe, Huang et al. 2019 (arXiv:1811.06965); 1F1B and
interleaved stages, Narayanan et al. 2021 (arXiv:2104.04473, section 2.2).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, schedules

from llmcore_hf.systems.devices import now

SCHEDULES = {
    "gpipe": schedules.ScheduleGPipe,
    "1f1b": schedules.Schedule1F1B,
    "interleaved": schedules.ScheduleInterleaved1F1B,
}
BETWEEN_STAGES = "between stages"
# ("forward" or "backward", stage, microbatch, start, end, CPU seconds). Start and end are seconds of the machine's
# monotonic clock, which all processes share.
Span = tuple[str, int, int, float, float, float]


class TimedStage(PipelineStage):
    """A pipeline stage that writes down when it computed what.

    Attributes:
        spans: what it computed since the list was last cleared.

    Args:
        on_phase: is told "forward", "backward" or `BETWEEN_STAGES` when that begins.
    """

    def __init__(self, *args: Any, on_phase: Callable[[str], None] = lambda phase: None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.spans: list[Span] = []
        self.on_phase = on_phase

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        return self._timed("forward", super().forward_one_chunk, fwd_chunk_id, *args, **kwargs)

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        return self._timed("backward", super().backward_one_chunk, bwd_chunk_id, *args, **kwargs)

    def _timed(self, kind: str, compute: Callable[..., Any], microbatch: int, *args: Any, **kwargs: Any) -> Any:
        self.on_phase(kind)
        start, cpu = now(self.device), time.thread_time()
        result = compute(microbatch, *args, **kwargs)
        end, cpu = now(self.device), time.thread_time() - cpu
        self.spans.append((kind, self.stage_index, microbatch, start, end, cpu))
        self.on_phase(BETWEEN_STAGES)
        return result


def make_schedule(name: str, stages: list[TimedStage], n_microbatches: int, loss_fn: Callable[..., Tensor]) -> Any:
    """The schedule `name` over the stages of this rank: one, or several when it is interleaved."""
    stage_or_stages = stages if name == "interleaved" else stages[0]
    return SCHEDULES[name](stage_or_stages, n_microbatches=n_microbatches, loss_fn=loss_fn)


# ---------------------------------------------------------------------------------------------------------------------
# The bubble
# ---------------------------------------------------------------------------------------------------------------------


def ideal_bubble(n_ranks: int, n_microbatches: int, n_chunks: int = 1) -> float:
    """(p - 1) / (v m + p - 1): the idle share when all chunks take equally long and messages take no time.

    Narayanan et al. 2021, section 2.2, give (p - 1) / (v m), the idle time over the ideal time; this is its share of the
    time that passes.
    """
    return (n_ranks - 1) / (n_chunks * n_microbatches + n_ranks - 1)


def measured_bubble(ranks: list[list[Span]]) -> float:
    """Share of one step in which ranks do not compute, by the clock. `ranks`: the spans of each rank in this step."""
    spans = [span for rank in ranks for span in rank]
    passed = max(span[4] for span in spans) - min(span[3] for span in spans)
    return 1 - sum(span[4] - span[3] for span in spans) / (passed * len(ranks))


def cpu_bubble(ranks: list[list[Span]]) -> float:
    """The bubble of the same step if each computation had taken its CPU seconds and messages no time.

    Every rank keeps the order in which it really computed and waits for what it needs: a forward pass for the stage
    before, a backward pass for the stage after. On a machine whose cores are busy with other work the clock shows their
    work, too; this number does not.
    """
    n_stages = 1 + max(span[1] for rank in ranks for span in rank)
    waiting = [sorted(rank, key=lambda span: span[3]) for rank in ranks]
    done: dict[tuple[str, int, int], float] = {}
    clocks = [0.0] * len(ranks)
    while any(waiting):
        before = len(done)
        for rank, queue in enumerate(waiting):
            while queue and (ready := _ready_at(queue[0], n_stages, done)) is not None:
                kind, stage, microbatch, *_, cpu = queue.pop(0)
                clocks[rank] = max(clocks[rank], ready) + cpu
                done[kind, stage, microbatch] = clocks[rank]
        if len(done) == before:
            raise ValueError("these spans are not one step of a pipeline: what some wait for never ends")
    busy = sum(span[5] for rank in ranks for span in rank)
    return 1 - busy / (max(clocks) * len(ranks))


def least_cpu(steps: list[list[list[Span]]]) -> list[list[Span]]:
    """The first step's spans by rank, each with the least CPU seconds that it took in any step.

    Work of others on the same cores empties caches, and that adds CPU seconds, too.
    """
    least: dict[tuple[str, int, int], float] = {}
    for spans in (spans for ranks in steps for spans in ranks):
        for span in spans:
            least[span[:3]] = min(span[5], least.get(span[:3], span[5]))
    return [[(*span[:5], least[span[:3]]) for span in spans] for spans in steps[0]]


def _ready_at(span: Span, n_stages: int, done: dict[tuple[str, int, int], float]) -> float | None:
    """When what the computation needs from another stage is there; None when it is not known yet."""
    kind, stage, microbatch = span[:3]
    if kind == "forward":
        return 0.0 if stage == 0 else done.get(("forward", stage - 1, microbatch))
    needed = ("forward", stage, microbatch) if stage == n_stages - 1 else ("backward", stage + 1, microbatch)
    return done.get(needed)


def in_flight(spans: list[Span]) -> int:
    """The most microbatches per stage that had been through a rank's forward pass and not yet through its backward pass."""
    most = 0
    now: Counter[int] = Counter()
    for kind, stage, *_ in sorted(spans, key=lambda span: span[3]):
        now[stage] += 1 if kind == "forward" else -1
        most = max(most, sum(now.values()))
    return most


# ---------------------------------------------------------------------------------------------------------------------
# More ranks than cores: stages whose times are declared, not computed
# ---------------------------------------------------------------------------------------------------------------------


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        time.sleep(seconds)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        time.sleep(2 * ctx.seconds)  # a backward pass multiplies matrices twice where a forward pass does once
        return grads[0], None


class SleepingStage(nn.Module):
    """Takes a declared time: `seconds` forward, twice that backward. It computes nothing."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        return _Sleep.apply(x * self.weight, self.seconds)


def run_sleeping(cases: list[tuple[str, int, int]], seconds: float, n_steps: int = 3) -> list[list[list[Span]]]:
    """Steps of each case (schedule, chunks per rank, microbatches) with sleeping stages, in one rank of a pipeline.

    `seconds` is the forward time of a whole rank; with several chunks each takes its share.

    Returns:
        the spans of this rank, by case and step.
    """
    return [_run_sleeping(*case, seconds, n_steps) for case in cases]


def _run_sleeping(name: str, n_chunks: int, n_microbatches: int, seconds: float, n_steps: int) -> list[list[Span]]:
    rank, n_ranks = dist.get_rank(), dist.get_world_size()
    n_stages = n_ranks * n_chunks
    stages = [
        TimedStage(SleepingStage(seconds / n_chunks), i, n_stages, torch.device("cpu"), group=dist.group.WORLD)
        for i in range(rank, n_stages, n_ranks)
    ]
    schedule = make_schedule(name, stages, n_microbatches, lambda output, target: output.mean())
    x = torch.ones(n_microbatches, 1)
    inputs = (x,) if rank == 0 else ()
    target = {"target": x, "losses": []} if rank == n_ranks - 1 else {}
    steps = []
    for _ in range(1 + n_steps):  # in the first one the stages tell each other the shapes of their messages
        dist.barrier()
        schedule.step(*inputs, **target, return_outputs=False)
        steps.append(take_spans(stages))
    return steps[1:]


def take_spans(stages: list[TimedStage]) -> list[Span]:
    """What the stages of this rank have computed since this was last asked."""
    spans = [span for stage in stages for span in stage.spans]
    for stage in stages:
        stage.spans.clear()
    return spans
