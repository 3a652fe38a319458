"""ZeRO: data parallelism without a copy of everything on every rank. DeepSpeed's stages 0 to 3, beside PyTorch's own engines.

Plain data parallelism keeps parameters, gradients and Adam's state on every rank. With psi parameters trained in bfloat16, N ranks,
and K = 12 bytes of optimizer state per parameter (float32 copy, two moments), a rank holds

    stage 0   2 psi + 2 psi + K psi                 nothing is sharded
    stage 1   2 psi + 2 psi + K psi / N             optimizer state
    stage 2   2 psi + (2 + K) psi / N               and gradients
    stage 3   (2 + 2 + K) psi / N                   and parameters

and sends 2 psi per step, with stage 3 3 psi (Rajbhandari et al. 2020, arXiv:1910.02054, sections 3 and 7). The run starts its own
processes and trains one model with every engine: DDP, ZeroRedundancyOptimizer (stage 1), FSDP2 `fully_shard` without and with
resharding (stages 2 and 3), DeepSpeed 0 to 3 in float32 and bfloat16. Losses and weights must equal one process; what a rank holds
must be within 5 % of the formulas, what it sends exactly them; and a checkpoint of two ranks must go on in one.

How this differs from a run on GPUs: transport is gloo over loopback (with `--device cuda`, NCCL and a GPU for each process), the
optimizer PyTorch's AdamW (DeepSpeed's own would be compiled for minutes), no operator of DeepSpeed is compiled, and there is no
offload (there is nothing to offload to). Buckets are small, so that memory shows the model. A gradient is reduced to the rank that
owns it, as in the paper; DeepSpeed's default sends it to all.
"""

from __future__ import annotations

import importlib.util
import json
import math
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from llmcore_hf import lesson
from llmcore_hf.checks import Check
from llmcore_hf.config import Config
from llmcore_hf.errors import UserError
from llmcore_hf.launch import MISSING_DEEPSPEED
from llmcore_hf.run_dir import finite
from llmcore_hf.systems import data_parallel, formulas, parallel, workers
from llmcore_hf.systems.data_parallel import Engine
from llmcore_hf.systems.devices import DeviceArguments
from llmcore_hf.systems.parallel import ModelShape, Training
from llmcore_hf.systems.text import VOCAB_SIZE, packed_batches

if TYPE_CHECKING:
    from llmcore_hf.run_dir import RunDirectory

FLOAT32 = (
    Engine("ddp", "ddp"),
    Engine("zero_redundancy", "zero_redundancy"),
    Engine("fsdp2", "fsdp2"),
    Engine("fsdp2, reshard", "fsdp2", reshard=True),
    *(Engine(f"zero {stage}", "deepspeed", stage) for stage in range(4)),
)
BFLOAT16 = tuple(Engine(f"zero {stage}, bf16", "deepspeed", stage, bf16=True) for stage in range(4))
# What the model and its optimizer must be wrapped in: libraries fall back to something else without a word.
CLASSES = {
    "ddp": ("DistributedDataParallel", "AdamW"),
    "zero_redundancy": ("DistributedDataParallel", "ZeroRedundancyOptimizer"),
    "fsdp2": ("FSDP", "AdamW"),
}
DEEPSPEED_OPTIMIZERS = ("AdamW", "DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3")
# (stage, ranks) that save, (stage, ranks) that go on. DeepSpeed's universal checkpoints change the number of ranks freely, the
# stage among 1 and 2.
CHECKPOINTS = (((2, 2), (1, 1)), ((3, 2), (3, 1)))
MAX_PROCESSES = 16
MEMORY_TOLERANCE = 0.05
SMALL = 64  # bytes: norms and flags that every rank must know
BF16_TOLERANCE = 0.05  # of a loss, against float32; seen: 0.004 to 0.006


@dataclass
class Args(DeviceArguments):
    architecture: str = field(
        default="qwen3",
        metadata={"help": "Layers of the model, from transformers.", "choices": ["qwen3", "qwen2", "llama"]},
    )
    hidden_size: int = field(default=128, metadata={"help": "Width of the model."})
    intermediate_size: int = field(default=384, metadata={"help": "Width of its MLP."})
    num_hidden_layers: int = field(default=8, metadata={"help": "Layers."})
    num_attention_heads: int = field(default=4, metadata={"help": "Attention heads."})
    max_length: int = field(default=64, metadata={"help": "Tokens per sequence."})
    num_processes: int = field(
        default=2, metadata={"help": "Ranks, each with a share of the batch; 2 to 16, with --device cuda also 1."}
    )
    batch_size: int = field(default=32, metadata={"help": "Sequences per step, over all ranks."})
    max_steps: int = field(default=20, metadata={"help": "Optimizer steps with each engine, at least 3."})
    learning_rate: float = field(default=4e-3, metadata={"help": "Learning rate of AdamW."})
    adam_epsilon: float = field(
        default=1e-5, metadata={"help": "Epsilon of AdamW; a small one magnifies rounding errors of tiny gradients."}
    )
    tolerance: float = field(
        default=1e-5, metadata={"help": "Largest difference of losses and weights from one process, in float32."}
    )

    def problems(self) -> list[str]:
        head = max(2 * self.num_attention_heads, 1)
        too_many = (
            f"--num_processes {self.num_processes}: at most {MAX_PROCESSES} (all of them run on this machine, each with a "
            "replica of its own)"
        )
        return [
            *([too_many] if self.num_processes > MAX_PROCESSES else []),
            *self.below(
                max_steps=3,
                num_processes=1 if self.device == "cuda" else 2,
                num_hidden_layers=1,
                num_attention_heads=1,
                intermediate_size=1,
                max_length=1,
            ),
            *self.no_multiples(
                batch_size=(max(self.num_processes, 1), "a share for each of --num_processes"),
                hidden_size=(head, "an even size of each attention head"),
            ),
            *self.not_positive("learning_rate", "adam_epsilon", "tolerance"),
            *parallel.learning_rate_problems(self.learning_rate),
            *self.too_few_gpus(self.num_processes, "with one GPU, give --num_processes 1"),
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
            1,
            self.learning_rate,
            self.adam_epsilon,
            self.seed,
            device=self.device,
        )


house_defaults, check = lesson.house_defaults, lesson.check


def argument_classes() -> tuple[type, ...]:
    return (Args,)


# ---------------------------------------------------------------------------------------------------------------------
# What must hold
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What one engine did, by rank; see `data_parallel.train_with`."""

    engine: Engine
    ranks: list[dict[str, Any]]

    @property
    def losses(self) -> list[float]:
        return self.ranks[0]["losses"]

    @property
    def gradient_peak(self) -> int:
        return max(max(rank["gradient_trace"]) for rank in self.ranks)

    def held(self, rank: dict[str, Any]) -> dict[str, int]:
        """Bytes by kind. Gradients: the most there are, or, where they are sharded, those that stay after the backward pass."""
        sharded = self.engine.kind == "fsdp2" or self.engine.stage >= 2
        gradients = rank["gradients_at_rest"] if sharded else max(rank["gradient_trace"])
        return {**rank["bytes"], "gradients": gradients}

    def sent(self, rank: dict[str, Any]) -> dict[str, dict[str, int]]:
        """phase -> collective -> bytes, norms and flags left out."""
        found: dict[str, dict[str, int]] = {}
        for phase, kinds in rank["collectives"].items():
            large = {kind: entry["bytes"] for kind, entry in kinds.items() if entry["bytes"] > SMALL}
            if large:
                found[phase] = large
        return found

    def apart(self, alone: dict[str, Any]) -> dict[str, float]:
        """The largest differences of losses and final weights from the training in one process."""
        return {
            "losses": parallel.furthest_apart(self.losses, alone["losses"]),
            "weights": parallel.largest_difference(self.ranks[0]["weights"], alone["weights"]),
        }


def equality_checks(outcomes: list[Outcome], alone: dict[str, Any], tolerance: float) -> list[Check]:
    apart = {o.engine.name: o.apart(alone) for o in outcomes if not o.engine.bf16}
    # DeepSpeed's stage 0 in bfloat16 runs through its former FP16 optimizer and parts from the others (0.12 seen).
    bf16 = {o.engine.name: o.apart(alone)["losses"] for o in outcomes if o.engine.bf16 and o.engine.stage > 0}
    return [
        Check(
            f"deepspeed.{quantity}_equal_one_process",
            "invariant",
            all(values[quantity] <= tolerance for values in apart.values()),
            {name: values[quantity] for name, values in apart.items()},
            f"at most {tolerance:g} apart with every engine, in float32",
            "切分的是状态，不是计算：每种引擎都与单进程得到同样的结果。",
            "State is sharded, not the computation: every engine gives what one process gives.",
        )
        for quantity in ("losses", "weights")
    ] + [
        Check(
            "deepspeed.bf16_stays_close",
            "invariant",
            all(value <= BF16_TOLERANCE for value in bf16.values()),
            bf16,
            f"losses of stages 1, 2, 3 in bfloat16 at most {BF16_TOLERANCE} from float32",
            "bfloat16 只有 8 位有效数字，但优化器用 float32 的权重副本累积更新，所以跟得上。",
            "bfloat16 has 8 significant bits, but the optimizer adds its updates to float32 copies of the weights.",
        )
    ]


def engine_check(outcomes: list[Outcome]) -> Check:
    """Did what was asked for run? Wrappers fall back silently, above all on a CPU."""
    wrong = []
    for outcome in outcomes:
        engine, classes = outcome.engine, outcome.ranks[0]["classes"]
        expected = CLASSES.get(engine.kind, ("DeepSpeedEngine", DEEPSPEED_OPTIMIZERS[engine.stage]))
        if engine.kind == "deepspeed" and engine.stage == 0 and engine.bf16:
            expected = ("DeepSpeedEngine", "FP16_UnfusedOptimizer")
        if not classes[0].startswith(expected[0]) or classes[1] != expected[1]:
            wrong.append(f"{engine.name}: {classes[0]} and {classes[1]}")
    return Check(
        "deepspeed.the_engine_asked_for_ran",
        "invariant",
        not wrong,
        {"engines": len(outcomes), "others": "; ".join(wrong) or "none"},
        "the classes of model and optimizer are those of the engine",
        "在 CPU 上，库会悄悄退回普通 DDP；那样一切照样“相等”，却什么也没证明。",
        "On a CPU libraries fall back to plain DDP without a word; all would be equal, and nothing shown.",
    )


def memory_checks(outcomes: list[Outcome], shapes: formulas.Shapes) -> list[Check]:
    off: dict[str, float] = {}
    n_ranks, sizes = len(outcomes[0].ranks), [math.prod(shape) for shape in shapes]
    for outcome in outcomes:
        for number, rank in enumerate(outcome.ranks):
            held, expected = outcome.held(rank), formulas.rank_bytes(outcome.engine, shapes, n_ranks, number)
            worst = max(abs(held[kind] - n) / n if n else float(held[kind]) for kind, n in expected.items())
            off[outcome.engine.name] = max(worst, off.get(outcome.engine.name, 0.0))
    peaks = {o.engine.stage: o.gradient_peak for o in outcomes if o.engine.kind == "deepspeed" and not o.engine.bf16}
    whole, kept = (
        4 * sum(sizes),
        max(
            formulas.rank_bytes(Engine("", "deepspeed", stage), shapes, n_ranks, rank)["gradients"]
            for stage in (2, 3)
            for rank in range(n_ranks)
        ),
    )
    # While a stage shards, the gradients of embedding and head, larger than a bucket, come in whole.
    limit = (1 + MEMORY_TOLERANCE) * kept + 2 * 4 * max(sizes)
    return [
        Check(
            "deepspeed.memory_matches_the_formulas",
            "invariant",
            all(value <= MEMORY_TOLERANCE for value in off.values()),
            off,
            f"parameters, gradients, master weights and moments of every rank within {MEMORY_TOLERANCE:.0%} of the formula",
            "每个进程持有的字节数与 ZeRO 论文的公式相符：切分的部分除以进程数；除不尽时按各引擎的分法算（阶段 2 在边界上的梯度，"
            "相邻两个进程各留完整的一份）。",
            "What a rank holds is what the ZeRO paper says: the sharded parts are divided by the number of ranks; where they do "
            "not divide evenly, in the way of the engine (stage 2 keeps a gradient across a border whole on both sides).",
        ),
        Check(
            "deepspeed.the_peak_tells_stage_1_from_stage_2",
            "invariant",
            None if n_ranks == 1 else min(peaks[0], peaks[1]) >= whole and max(peaks[2], peaks[3]) <= limit,
            {f"zero {stage}": peak for stage, peak in peaks.items()},
            f"stages 0 and 1 at least {whole} bytes of gradients at one time, stages 2 and 3 at most {limit:.0f}",
            "反向结束后阶段 1 和 2 持有的梯度一样多，差别在峰值：阶段 1 要等全部梯度算完才归约，阶段 2 边算边归约、边释放。",
            "After the backward pass stages 1 and 2 hold the same gradients; the difference is the peak: stage 1 reduces when "
            "all have come in, stage 2 on the way, and frees what others own.",
        ),
    ]


def traffic_check(outcomes: list[Outcome], shapes: formulas.Shapes) -> Check:
    """Of several ranks: one has nothing to send, and some engines leave out the call."""
    wrong = []
    for outcome in outcomes:
        expected = formulas.rank_traffic(outcome.engine, shapes, len(outcome.ranks))
        for number, rank in enumerate(outcome.ranks):
            lines = formulas.differences(outcome.sent(rank), expected)
            wrong += [f"{outcome.engine.name}, rank {number}: {line}" for line in lines]
    return Check(
        "deepspeed.communication_matches_the_formulas",
        "invariant",
        None if len(outcomes[0].ranks) == 1 else not wrong,
        {"engines": len(outcomes), "differences": "; ".join(wrong) or "none"},
        "bytes of every collective in every phase: exactly the formula (norms and flags of a few bytes left out)",
        "阶段 0、1、2 每步发送 2 psi，阶段 3 发送 3 psi：参数前向、反向各收集一次。内存省了，通信多一半。",
        "Stages 0, 1, 2 send 2 psi a step, stage 3 sends 3 psi: parameters are gathered forward and backward. It saves memory "
        "for half as much traffic again.",
    )


def checkpoint_check(apart: dict[str, float], tolerance: float) -> Check:
    return Check(
        "deepspeed.a_checkpoint_changes_stage_and_world_size",
        "invariant",
        all(value <= tolerance for value in apart.values()),
        apart,
        f"losses after going on at most {tolerance:g} from those of a run that was never stopped",
        "每个进程只存自己的一片，换进程数就读不回来；转成通用（universal）检查点后，每个参数一个文件，怎么分都行。",
        "Every rank saves its shard, which another number of ranks cannot read; the universal checkpoint has a file per "
        "parameter, and can be split in any way.",
    )


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


def run(config: Config, run_dir: RunDirectory) -> None:
    """Train in one process and with every engine, go on from checkpoints, check, draw.

    Raises:
        UserError: DeepSpeed is not installed.
    """
    from llmcore_hf.systems import deepspeed_figures as figures

    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(MISSING_DEEPSPEED)
    args = config.part(Args)
    shape, training = args.shape, args.training
    batches = packed_batches(training.max_steps, training.batch_size, training.seq_length, args.seed)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = parallel.train_alone(shape, training, batches)
    torch.set_num_threads(before)
    outcomes = train_engines(args.num_processes, shape, training, batches)
    resumed = {}
    for (first, n), (then, m) in CHECKPOINTS:
        n = min(n, args.num_processes)
        resumed[f"zero {first}, {n} ranks -> zero {then}, {m} rank"] = go_on(
            (first, n), (then, m), shape, training, batches, alone["losses"]
        )
    shapes = [tuple(weight.shape) for weight in alone["weights"].values()]
    n_parameters = sum(math.prod(shape) for shape in shapes)
    for step, loss in enumerate(alone["losses"]):
        run_dir.log({"step": step + 1, "loss": loss} | {f"loss/{o.engine.name}": o.losses[step] for o in outcomes})
    run_dir.summary["model"] = {
        "name_or_path": f"{args.architecture}, {args.num_hidden_layers} layers of {args.hidden_size}, random weights",
        "n_params": n_parameters,
        "n_trainable": n_parameters,
        "peft": None,
        "pad_token": None,
        "eos_token": None,
        "pad_is_eos": None,
    }
    run_dir.checks += [*equality_checks(outcomes, alone, args.tolerance), engine_check(outcomes)]
    run_dir.checks += [*memory_checks(outcomes, shapes), traffic_check(outcomes, shapes)]
    run_dir.checks += [checkpoint_check(resumed, args.tolerance), learning_check(alone["losses"])]
    run_dir.write("results.json", json.dumps(finite(results(outcomes, alone, resumed)), indent=1) + "\n")
    run_dir.write("training_curves.png", lesson.png(figures.draw(alone, outcomes)))


def train_engines(n_ranks: int, shape: ModelShape, training: Training, batches: torch.Tensor) -> list[Outcome]:
    """All engines, one after the other, in the same processes: importing DeepSpeed takes longer than the training."""
    start = time.monotonic()
    engines = [*FLOAT32, *BFLOAT16]
    # 16 ranks on two cores take 200 seconds for the toy's eight steps.
    how: dict[str, Any] = {"device": training.device, "timeout": 300 + 60 * n_ranks}
    ranks = workers.launch(data_parallel.train_all, n_ranks, engines, shape, training, batches, **how)
    print(f"{len(engines)} engines in {n_ranks} processes: {time.monotonic() - start:.1f} s", flush=True)
    return [Outcome(engine, [rank[i] for rank in ranks]) for i, engine in enumerate(engines)]


def go_on(
    first: tuple[int, int],
    then: tuple[int, int],
    shape: ModelShape,
    training: Training,
    batches: torch.Tensor,
    losses: list[float],
) -> float:
    """Train half of the batches as `first` (stage, ranks), the rest as `then`; how far are the losses from `losses`?"""
    half = len(batches) // 2
    saving, loading = (Engine(f"zero {stage}", "deepspeed", stage) for stage, _ in (first, then))
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="llmcore-checkpoint-") as folder:
        launch, common = partial(workers.launch, device=training.device), (shape, training)
        [begun, *_] = launch(data_parallel.train_and_save, first[1], saving, *common, batches[:half], folder)
        [ended, *_] = launch(data_parallel.load_and_train, then[1], loading, *common, batches[half:], folder)
    print(f"checkpoint of {first[1]} ranks, read by {then[1]}: {time.monotonic() - start:.1f} s", flush=True)
    return parallel.furthest_apart([*begun, *ended], losses)


def learning_check(losses: list[float]) -> Check:
    return Check(
        "deepspeed.loss_fell",
        "learning",
        losses[-1] < 0.9 * losses[0],
        {"first": losses[0], "last": losses[-1]},
        "the last loss is below 0.9 of the first",
        "模型确实在学：否则各引擎相等也说明不了什么。",
        "The model does learn; otherwise equal engines would prove little.",
    )


def results(outcomes: list[Outcome], alone: dict[str, Any], resumed: dict[str, float]) -> dict[str, Any]:
    """All numbers of the run, for `results.json`."""
    keys = ("bytes", "gradient_trace", "gradients_at_rest", "collectives", "classes", "seconds", "cpu_seconds")
    table = {
        outcome.engine.name: {
            "losses": outcome.losses,
            "apart_from_one_process": outcome.apart(alone),
            "ranks": [{key: rank[key] for key in keys} for rank in outcome.ranks],
        }
        for outcome in outcomes
    }
    return {"one process": {"losses": alone["losses"]}, "engines": table, "checkpoints": resumed}
