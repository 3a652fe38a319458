"""Model parallelism as in Megatron-LM: tensor, sequence, pipeline and data parallel, alone and all together (3D).

The run starts its own processes (torch.distributed), trains one small model in every layout, and compares each with the
same training in a single process, which uses the model of `transformers` as it is: losses, the gradients of the first step
and the final weights must agree. Then it holds what each rank keeps and sends against the formulas, exactly.

    tensor parallel     Y = f(X A) B, A split by columns, B by rows: one all-reduce after B forward, one before A backward,
                        so two and two per layer (attention, MLP). Shoeybi et al. 2019, arXiv:1909.08053, section 3.
    sequence parallel   norms and residuals on T / tp tokens; each all-reduce becomes reduce-scatter + all-gather, the same
                        bytes, less memory. Korthikanti et al. 2022, arXiv:2205.05198, section 4.2.2.
    pipeline parallel   layers split into p stages, the batch into m microbatches; idle share (bubble) (p-1)/(v m + p-1) with
                        v chunks per rank. GPipe keeps m microbatches, 1F1B at most p. Narayanan et al. 2021, arXiv:2104.04473,
                        section 2.2.
    data parallel       a replica each, one all-reduce of all gradients; DDP sends a large model's in buckets, as they come in.

How this differs from Megatron-LM: its layers are CUDA code of its own, these are `transformers` layers split by DTensor plans
and `torch.distributed.pipelining`; on a CPU transport is gloo over loopback, so times show orders, not what a GPU would do (`--device
cuda` takes a GPU and NCCL for each process). Embedding and head are not tied, because the first and the last stage would have to keep
one matrix in step.
"""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmcore_hf import lesson
from llmcore_hf.checks import Check
from llmcore_hf.config import Config
from llmcore_hf.run_dir import finite
from llmcore_hf.systems import formulas, parallel, pipeline, workers
from llmcore_hf.systems.devices import DeviceArguments
from llmcore_hf.systems.parallel import Layout, ModelShape, Training
from llmcore_hf.systems.pipeline import Span, ideal_bubble
from llmcore_hf.systems.text import VOCAB_SIZE, packed_batches

if TYPE_CHECKING:
    from llmcore_hf.run_dir import RunDirectory

LAYOUTS = (
    Layout("tp", tp=2),
    Layout("tp+sp", tp=2, sequence_parallel=True),
    Layout("dp", dp=2),
    Layout("gpipe", pp=2, schedule="gpipe"),
    Layout("1f1b", pp=2),
    Layout("interleaved", pp=2, schedule="interleaved", n_chunks=2),
    Layout("3d", tp=2, pp=2, dp=2),
    Layout("3d+sp", tp=2, pp=2, dp=2, sequence_parallel=True),
)
# The plan one finds in tutorials. With Qwen3 it is wrong, and nothing says so: the comparison must find it.
PLAIN_PLAN = Layout("plain plan", tp=2, reduces_norm_gradients=False)
SLEEPING = (("gpipe", 1), ("1f1b", 1), ("interleaved", 2))  # schedules of the pipeline of four ranks, chunks per rank
# How far a bubble may lie from its formula. By CPU seconds, seen: .00 to +.01. By the clock, with other work on both cores,
# seen: -.05 to +.18; with declared times, where waiting costs no CPU: +.01 to +.06, +.13 under heavy load. Two ranks that take
# turns, so that nothing overlaps, idle half of the time by the clock: .5 = .2 + .3 must be too much.
CPU_MARGIN, CLOCK_MARGIN, SLEEP_MARGIN = 0.04, (0.1, 0.25), (0.01, 0.15)


@dataclass
class Args(DeviceArguments):
    architecture: str = field(
        default="qwen3",
        metadata={"help": "Layers of the model, from transformers.", "choices": ["qwen3", "qwen2", "llama"]},
    )
    hidden_size: int = field(default=128, metadata={"help": "Width of the model."})
    intermediate_size: int = field(default=384, metadata={"help": "Width of its MLP."})
    num_hidden_layers: int = field(
        default=8, metadata={"help": "Layers, a multiple of 4 (two ranks, two chunks each)."}
    )
    num_attention_heads: int = field(default=4, metadata={"help": "Heads, half of them on each tensor-parallel rank."})
    max_length: int = field(default=64, metadata={"help": "Tokens per sequence."})
    batch_size: int = field(default=32, metadata={"help": "Sequences per step, over all processes."})
    num_microbatches: int = field(default=4, metadata={"help": "Microbatches of a pipeline, an even number."})
    max_steps: int = field(default=20, metadata={"help": "Optimizer steps in each layout, at least 3."})
    learning_rate: float = field(default=4e-3, metadata={"help": "Learning rate of AdamW."})
    adam_epsilon: float = field(
        default=1e-5,
        metadata={
            "help": "Epsilon of AdamW. A small one (1e-8) divides rounding errors of tiny gradients by themselves, and "
            "weights of equally correct layouts part by 1e-4."
        },
    )
    dtype: str = field(
        default="float32", metadata={"help": "Precision of everything.", "choices": ["float32", "float64"]}
    )
    tolerance: float = field(
        default=1e-5, metadata={"help": "Largest difference of losses, gradients and weights from one process."}
    )
    bubble_hidden_size: int = field(
        default=256, metadata={"help": "Width of the model whose bubble is measured: computing must outweigh messages."}
    )
    bubble_steps: int = field(default=6, metadata={"help": "Steps of each schedule in that measurement, at least 3."})
    stage_seconds: float = field(
        default=0.03,
        metadata={
            "help": "Declared forward time of a stage in the pipeline of four ranks, which sleep; backward: twice."
        },
    )

    def problems(self) -> list[str]:
        head = max(2 * self.num_attention_heads, 1)
        return [
            *self.below(max_steps=3, bubble_steps=3),  # the third step is the one measured
            *self.no_multiples(
                num_hidden_layers=(4, "two pipeline ranks of two chunks"),
                num_attention_heads=(2, "two tensor-parallel ranks"),
                intermediate_size=(2, "two tensor-parallel ranks"),
                max_length=(2, "two sequence-parallel ranks"),
                num_microbatches=(2, "two pipeline ranks"),
                batch_size=(max(2 * self.num_microbatches, 1), "two data-parallel ranks times --num_microbatches"),
                hidden_size=(head, "an even size of each attention head"),
                bubble_hidden_size=(head, "an even size of each attention head"),
            ),
            *self.not_positive("learning_rate", "adam_epsilon", "tolerance", "stage_seconds"),
            *parallel.learning_rate_problems(self.learning_rate),
            *self.too_few_gpus(max(layout.world_size for layout in LAYOUTS)),
        ]

    @property
    def shape(self) -> ModelShape:
        return ModelShape(
            self.architecture,
            VOCAB_SIZE,
            self.hidden_size,
            self.intermediate_size,
            self.num_hidden_layers,
            self.num_attention_heads,
        )

    @property
    def training(self) -> Training:
        return Training(
            self.max_steps,
            self.batch_size,
            self.max_length,
            self.num_microbatches,
            self.learning_rate,
            self.adam_epsilon,
            self.seed,
            self.dtype,
            self.device,
        )


house_defaults, check = lesson.house_defaults, lesson.check


def argument_classes() -> tuple[type, ...]:
    return (Args,)


# ---------------------------------------------------------------------------------------------------------------------
# Training in every layout
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """A layout's training, put together from its ranks.

    Attributes:
        ranks: what `parallel.train` returned, by rank.
        losses: per step, the mean over data-parallel ranks.
        gradients, weights: of the whole model, by name; the gradients are those of the first step.
    """

    layout: Layout
    ranks: list[dict[str, Any]]
    losses: list[float]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]

    @classmethod
    def of(cls, layout: Layout, ranks: list[dict[str, Any]]) -> Outcome:
        known = [rank["losses"] for rank in ranks if rank["losses"][0] is not None]
        losses = [sum(step) / len(step) for step in zip(*known, strict=True)]
        gradients: dict[str, Tensor] = {}
        weights: dict[str, Tensor] = {}
        for rank in ranks:
            gradients |= rank["gradients"]
            weights |= rank["weights"]
        return cls(layout, ranks, losses, gradients, weights)

    def apart(self, alone: dict[str, Any]) -> dict[str, float]:
        """The largest differences from the training in one process."""
        return {
            "loss": parallel.furthest_apart(self.losses, alone["losses"]),
            "gradients": parallel.largest_difference(self.gradients, alone["gradients"]),
            "weights": parallel.largest_difference(self.weights, alone["weights"]),
        }

    def spans(self, step: int) -> list[list[Span]]:
        """The spans of one step, by pipeline rank; of replicas, the first is taken."""
        first = [r for r in self.ranks if r["coordinates"]["dp"] == r["coordinates"]["tp"] == 0]
        return [rank["spans"][step] for rank in first]

    def per_rank(self, key: str) -> list[int]:
        return [rank["bytes"][key] for rank in self.ranks]


def train_layout(layout: Layout, shape: ModelShape, training: Training, batches: Tensor) -> Outcome:
    start = time.monotonic()
    common = (shape, training, batches)
    ranks = workers.launch(parallel.train, layout.world_size, layout, *common, device=training.device)
    print(f"{layout.name}: {layout.world_size} processes, {time.monotonic() - start:.1f} s", flush=True)
    return Outcome.of(layout, ranks)


def measure_bubbles(args: Args) -> dict[str, Outcome]:
    """Two ranks that really compute, in each schedule: a wider model, so that messages weigh little."""
    shape = dataclasses.replace(args.shape, hidden_size=args.bubble_hidden_size)
    shape = dataclasses.replace(shape, intermediate_size=3 * args.bubble_hidden_size, num_hidden_layers=4)
    training = dataclasses.replace(
        args.training, max_steps=args.bubble_steps, batch_size=2 * args.num_microbatches, seq_length=128
    )
    batches = packed_batches(training.max_steps, training.batch_size, training.seq_length, args.seed)
    layouts = [
        dataclasses.replace(layout, name=f"{layout.name}, wide")
        for layout in LAYOUTS
        if layout.name in pipeline.SCHEDULES
    ]
    return {layout.schedule: train_layout(layout, shape, training, batches) for layout in layouts}


@dataclass
class Bubble:
    """The idle share of one schedule.

    Attributes:
        clock: of single steps, the first (warm-up) left out.
        cpu: by the CPU seconds of each computation, the least over the steps; None where stages sleep, or use a GPU.
        spans: of the step with the smallest bubble, by rank.
    """

    schedule: str
    n_ranks: int
    n_microbatches: int
    n_chunks: int
    clock: list[float]
    cpu: float | None
    in_flight: list[int]
    spans: list[list[Span]]

    @classmethod
    def of(
        cls, schedule: str, n_microbatches: int, n_chunks: int, steps: list[list[list[Span]]], by_cpu: bool
    ) -> Bubble:
        clock = [pipeline.measured_bubble(step) for step in steps]
        best = steps[clock.index(min(clock))]
        cpu = pipeline.cpu_bubble(pipeline.least_cpu(steps)) if by_cpu else None
        in_flight = [pipeline.in_flight(rank) for rank in best]
        return cls(schedule, len(best), n_microbatches, n_chunks, clock, cpu, in_flight, best)

    @property
    def ideal(self) -> float:
        return ideal_bubble(self.n_ranks, self.n_microbatches, self.n_chunks)

    @property
    def expected_in_flight(self) -> list[int]:
        return [
            formulas.expected_in_flight(self.schedule, self.n_ranks, rank, self.n_microbatches, self.n_chunks)
            for rank in range(self.n_ranks)
        ]

    def as_dict(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        del values["spans"]
        return {**values, "ideal": self.ideal}


def computed_bubbles(args: Args) -> list[Bubble]:
    outcomes = measure_bubbles(args)
    return [
        Bubble.of(
            name,
            args.num_microbatches,
            outcome.layout.n_chunks,
            [outcome.spans(step) for step in range(1, args.bubble_steps)],
            by_cpu=args.device == "cpu",
        )
        for name, outcome in outcomes.items()
    ]


def declared_bubbles(args: Args) -> list[Bubble]:
    """Four ranks that sleep for a declared time: more ranks than cores, and the schedule still shows."""
    cases = [(name, n_chunks, 8) for name, n_chunks in SLEEPING]
    start = time.monotonic()
    ranks = workers.launch(pipeline.run_sleeping, 4, cases, args.stage_seconds)
    print(f"four sleeping stages: 4 processes, {time.monotonic() - start:.1f} s", flush=True)
    found = []
    for i, (name, n_chunks, n_microbatches) in enumerate(cases):
        steps = [list(spans) for spans in zip(*(rank[i] for rank in ranks), strict=True)]
        found.append(Bubble.of(name, n_microbatches, n_chunks, steps, by_cpu=False))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# What must hold
# ---------------------------------------------------------------------------------------------------------------------


def equality_checks(
    outcomes: list[Outcome], plain: Outcome | None, alone: dict[str, Any], tolerance: float
) -> list[Check]:
    apart = {outcome.layout.name: outcome.apart(alone) for outcome in outcomes}
    reasons = {
        "loss": (
            "每一步的损失都应与单进程相同：切分只改变谁来算，不改变算什么。",
            "The loss of every step must equal that of one process: splitting changes who computes, not what.",
        ),
        "gradients": (
            "第一步的梯度逐个元素相同；漏掉一次归约，损失在第一步看不出来，梯度看得出来。",
            "The gradients of the first step agree element by element; a missing reduction does not show in the first "
            "loss, but it shows here.",
        ),
        "weights": (
            "训练结束时权重相同：误差没有积累。",
            "The weights agree at the end of training: nothing has added up.",
        ),
    }
    checks = [
        Check(
            f"megatron.{quantity}_equal_one_process",
            "invariant",
            all(values[quantity] <= tolerance for values in apart.values()),
            {name: values[quantity] for name, values in apart.items()},
            f"at most {tolerance:g} apart in every layout",
            *why,
        )
        for quantity, why in reasons.items()
    ]
    wrong = plain.apart(alone)["gradients"] if plain else None
    checks.append(
        Check(
            "megatron.comparison_finds_the_wrong_plan",
            "invariant",
            None if wrong is None else wrong > tolerance,
            wrong,
            f"the plain plan's gradients are more than {tolerance:g} apart",
            "反例：Qwen3 的 q_norm、k_norm 在每个进程上只看到自己的头，常见的切分方案漏掉它们的梯度求和，而且不报错。"
            "上面的比较必须抓得住它。只有 qwen3 有这两个归一化。",
            "A counterexample: each process sees only its own heads through Qwen3's q_norm and k_norm, and the usual plan "
            "does not add their gradients up, without a word. The comparison above must catch it. Only qwen3 has them.",
        )
    )
    return checks


def formula_checks(outcomes: list[Outcome], shape: ModelShape, training: Training) -> list[Check]:
    sent, held = [], []
    for outcome in outcomes:
        for number, rank in enumerate(outcome.ranks):
            where, pp_rank = f"{outcome.layout.name}, rank {number}", rank["coordinates"]["pp"]
            expected = formulas.expected_collectives(outcome.layout, shape, training, pp_rank)
            sent += [f"{where}: {line}" for line in formulas.differences(rank["collectives"], expected)]
            n_bytes = formulas.expected_bytes(outcome.layout, shape, training, pp_rank)
            held += [f"{where}: {line}" for line in formulas.differences(rank["bytes"], n_bytes)]
    n_ranks = sum(len(outcome.ranks) for outcome in outcomes)
    return [
        Check(
            "megatron.collectives_match_the_formulas",
            "invariant",
            not sent,
            {"ranks compared": n_ranks, "differences": "; ".join(sent) or "none"},
            "calls and bytes of every collective, in every phase, on every rank: exactly the formula",
            "张量并行每层前向 2 次、反向 2 次 all-reduce；序列并行换成 reduce-scatter 加 all-gather；流水线在每条边界上每个微批"
            "来回各一次；数据并行每个梯度桶一次（DDP 的第一个桶 1 MiB，之后 25 MiB）。一次也不能多。",
            "Tensor parallel: two all-reduces per layer forward and two backward; sequence parallel: reduce-scatter and "
            "all-gather instead; a pipeline: one message each way per border and microbatch; data parallel: one per bucket of "
            "gradients (DDP: the first of 1 MiB, then 25 MiB). Not one more.",
        ),
        Check(
            "megatron.memory_matches_the_formulas",
            "invariant",
            not held,
            {"ranks compared": n_ranks, "differences": "; ".join(held) or "none"},
            "bytes of parameters, gradients and Adam's moments on every rank: exactly the formula",
            "参数、梯度、优化器状态按 tp、pp 切开，dp 不切；归一化权重每个 tp 进程一份。",
            "Parameters, gradients and optimizer state are split by tp and pp, not by dp; every tp rank keeps the norms.",
        ),
    ]


def activation_check(outcomes: dict[str, Outcome]) -> Check:
    """Peak bytes that wait for the backward pass, on the first rank."""
    kept = {name: outcome.ranks[0]["activation_bytes"] for name, outcome in outcomes.items()}
    return Check(
        "megatron.activations_shrink",
        "invariant",
        kept["1f1b"] < kept["gpipe"] and kept["tp+sp"] < kept["tp"],
        kept,
        "1f1b keeps less than gpipe, and sequence parallel less than tensor parallel alone",
        "1F1B 尽早做反向，最多保留 p 个微批的激活，GPipe 保留全部 m 个；序列并行把归一化和残差的激活也切开。",
        "1F1B goes backward as early as it can and keeps at most p microbatches, GPipe all m; sequence parallel also splits "
        "the activations of norms and residuals.",
    )


def pipeline_checks(computed: list[Bubble], declared: list[Bubble]) -> list[Check]:
    every = [*computed, *declared]
    on_gpu = any(b.cpu is None for b in computed)
    low, high = CLOCK_MARGIN
    low_sleeping, high_sleeping = SLEEP_MARGIN
    return [
        Check(
            "megatron.microbatches_in_flight",
            "invariant",
            all(bubble.in_flight == bubble.expected_in_flight for bubble in every),
            {f"{b.schedule}, p = {b.n_ranks}": str(b.in_flight) for b in every},
            "; ".join(f"{b.schedule}, p = {b.n_ranks}: {b.expected_in_flight}" for b in every),
            "从真实时间戳数出来：做过前向、还没做反向的微批最多有几个。这决定激活占多少显存。",
            "Counted from real timestamps: how many microbatches had gone forward and not yet backward. It decides how much "
            "memory activations take.",
        ),
        Check(
            "megatron.bubble_by_cpu_time",
            "invariant",
            None if on_gpu else all(b.cpu is not None and abs(b.cpu - b.ideal) <= CPU_MARGIN for b in computed),
            {b.schedule: b.cpu for b in computed},
            "; ".join(f"{b.schedule} {b.ideal:.3f}" for b in computed) + f", within {CPU_MARGIN}",
            "两个进程真实计算，按真实执行次序、用每次计算的 CPU 时间重排：气泡等于 (p-1)/(vm+p-1)，不受机器上其他程序影响。",
            "Two ranks that really compute, laid out in the order they ran with the CPU seconds of each computation: the "
            "bubble is (p-1)/(vm+p-1), whatever else the machine does.",
        ),
        Check(
            "megatron.bubble_by_the_clock",
            "invariant",
            all(b.ideal - low <= min(b.clock) <= b.ideal + high for b in computed),
            {b.schedule: min(b.clock) for b in computed},
            "; ".join(f"{b.schedule} {b.ideal:.3f}" for b in computed) + f", from -{low} to +{high}, best step",
            "同一件事按时钟量：多出来的是通信、调度和其他程序占用的时间。",
            "The same by the clock: what is added are messages, scheduling, and other programs on the cores.",
        ),
        Check(
            "megatron.bubble_of_declared_times",
            "invariant",
            all(b.ideal - low_sleeping <= min(b.clock) <= b.ideal + high_sleeping for b in declared),
            {b.schedule: min(b.clock) for b in declared},
            "; ".join(f"{b.schedule} {b.ideal:.3f}" for b in declared)
            + f", from -{low_sleeping} to +{high_sleeping}, best step",
            "四个进程、每段用睡眠代替计算（声明的时间）：核数不够时也能看清调度；调度和消息是真的，计算不是。",
            "Four ranks whose stages sleep for a declared time: with fewer cores than ranks the schedule still shows. "
            "Schedule and messages are real, the computation is not.",
        ),
    ]


def learning_check(losses: list[float]) -> Check:
    return Check(
        "megatron.loss_fell",
        "learning",
        losses[-1] < 0.9 * losses[0],
        {"first": losses[0], "last": losses[-1]},
        "the last loss is below 0.9 of the first",
        "模型确实在学：否则各种布局相等也说明不了什么。",
        "The model does learn; otherwise equal layouts would prove little.",
    )


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


def run(config: Config, run_dir: RunDirectory) -> None:
    """Train in one process and in every layout, measure the bubbles, check, draw."""
    from llmcore_hf.systems import megatron_figures as figures

    args = config.part(Args)
    shape, training = args.shape, args.training
    batches = packed_batches(training.max_steps, training.batch_size, training.seq_length, args.seed)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = parallel.train_alone(shape, training, batches)
    torch.set_num_threads(before)
    outcomes = {layout.name: train_layout(layout, shape, training, batches) for layout in LAYOUTS}
    plain = train_layout(PLAIN_PLAN, shape, training, batches) if args.architecture == "qwen3" else None
    computed, declared = computed_bubbles(args), declared_bubbles(args)

    for step, loss in enumerate(alone["losses"]):
        run_dir.log({"step": step + 1, "loss": loss} | {f"loss/{n}": o.losses[step] for n, o in outcomes.items()})
    run_dir.summary["model"] = {
        "name_or_path": f"{args.architecture}, {args.num_hidden_layers} layers of {args.hidden_size}, random weights",
        "n_params": (n_params := sum(weight.numel() for weight in alone["weights"].values())),
        "n_trainable": n_params,
        "peft": None,
        "pad_token": None,
        "eos_token": None,
        "pad_is_eos": None,
    }
    run_dir.checks += equality_checks(list(outcomes.values()), plain, alone, args.tolerance)
    run_dir.checks += formula_checks(list(outcomes.values()), shape, training)
    run_dir.checks += [
        activation_check(outcomes),
        *pipeline_checks(computed, declared),
        learning_check(alone["losses"]),
    ]
    run_dir.write(
        "results.json", json.dumps(finite(results(alone, outcomes, plain, computed, declared)), indent=1) + "\n"
    )
    shown = [*outcomes.values(), plain] if plain else list(outcomes.values())
    run_dir.write("training_curves.png", lesson.png(figures.draw_layouts(alone, shown, args)))
    run_dir.write(
        "parallelism.png", lesson.png(figures.draw_parallelism(outcomes["3d"], alone, computed, declared, args))
    )


def results(
    alone: dict[str, Any],
    outcomes: dict[str, Outcome],
    plain: Outcome | None,
    computed: list[Bubble],
    declared: list[Bubble],
) -> dict[str, Any]:
    """All numbers of the run, for `results.json`."""
    keys = ("coordinates", "bytes", "activation_bytes", "collectives", "seconds", "cpu_seconds")
    table: dict[str, Any] = {
        "one process": {key: alone[key] for key in ("losses", "bytes", "activation_bytes", "seconds", "cpu_seconds")}
    }
    for outcome in [*outcomes.values(), *([plain] if plain else [])]:
        table[outcome.layout.name] = {
            "losses": outcome.losses,
            "apart_from_one_process": outcome.apart(alone),
            "ranks": [{key: rank[key] for key in keys} for rank in outcome.ranks],
        }
    return {
        "layouts": table,
        "bubble_computed": [bubble.as_dict() for bubble in computed],
        "bubble_declared": [bubble.as_dict() for bubble in declared],
    }
