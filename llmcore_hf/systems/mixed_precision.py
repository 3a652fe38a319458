"""Mixed precision: which numbers may be short, and which may not.

    float32    8 bits of exponent, 24 significant    eps 1.2e-7    3.4e38 at most
    bfloat16   8                    8                    7.8e-3    3.4e38            range of float32, 2 to 3 digits
    float16    5                   11                    9.8e-4    65504             3 to 4 digits, gradients below 6e-8 are 0

Products of matrices may be short: `torch.autocast` rounds what goes in, adds up longer, and the error is that of one rounding. A sum
over many steps may not: a bfloat16 weight w does not notice an update below |w| 2^-9, so the weights that updates are added to stay in
float32 (Micikevicius et al. 2018, arXiv:1710.03740, section 3.1). And float16 needs its loss scaled, or small gradients become 0
(section 3.2); the scale doubles until something overflows, and that step is left out. The run trains one model in seven regimes on the
same batches, and holds every gradient, loss and weight against float64.

How this differs from a run on a GPU: on a CPU the same formats go through PyTorch's CPU kernels, and rounding, ranges, memory and the
loss scale (`torch.amp.GradScaler`, the same class) are real; speed is not a GPU's. A CPU without instructions for float16 multiplies it
in software, which is slower than float32; the summary says so. TF32 and FP8 exist on GPUs only and are not shown.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from llmcore_hf import lesson
from llmcore_hf.checks import Check
from llmcore_hf.config import Config
from llmcore_hf.run_dir import finite
from llmcore_hf.systems import precision
from llmcore_hf.systems.parallel import ModelShape, Training, learning_rate_problems, require_finite
from llmcore_hf.systems.precision import REFERENCE, REGIMES, Regime, Scaling, Trajectory
from llmcore_hf.systems.text import VOCAB_SIZE, packed_batches

if TYPE_CHECKING:
    from llmcore_hf.run_dir import RunDirectory

FORMATS = (torch.float32, torch.bfloat16, torch.float16)
ROUNDINGS = 8  # a gradient is wrong by a few eps at most; seen: 0.5 to 3
SWEEP = range(-20, 41, 4)  # exponents of the loss scale: far below the window, and far above it
UPDATE, N_UPDATES = 1e-3, 1000  # what is added to 1, and how often
CLOSE = 0.05  # of a loss, at the end
SAME_LOSS = ("fp32", "bf16 autocast", "bf16 + master", "fp16 + scaling")


@dataclass
class Args(lesson.LessonArguments):
    hidden_size: int = field(default=128, metadata={"help": "Width of the model, a multiple of 8."})
    num_hidden_layers: int = field(default=4, metadata={"help": "Layers."})
    max_length: int = field(default=64, metadata={"help": "Tokens per sequence."})
    batch_size: int = field(default=16, metadata={"help": "Sequences per step."})
    max_steps: int = field(default=100, metadata={"help": "Optimizer steps in each regime, at least 4."})
    learning_rate: float = field(default=4e-3, metadata={"help": "Learning rate of AdamW; it falls linearly to 0."})
    adam_epsilon: float = field(default=1e-8, metadata={"help": "Epsilon of AdamW."})
    init_scale: float = field(default=65536.0, metadata={"help": "Loss scale of the first step (GradScaler: 65536)."})
    growth_interval: int = field(
        default=20,
        metadata={"help": "Steps without an overflow after which the loss scale doubles (GradScaler: 2000)."},
    )

    def problems(self) -> list[str]:
        return [
            *self.below(max_steps=4, num_hidden_layers=1, max_length=1, batch_size=1, growth_interval=1),
            *self.no_multiples(hidden_size=(8, "four attention heads of an even size")),
            *self.not_positive("learning_rate", "adam_epsilon", "init_scale"),
            *learning_rate_problems(self.learning_rate),
        ]


house_defaults, check = lesson.house_defaults, lesson.check


def argument_classes() -> tuple[type, ...]:
    return (Args,)


# ---------------------------------------------------------------------------------------------------------------------
# What the run finds out
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Findings:
    """Everything measured.

    Attributes:
        reference: the training in float64.
        with_steps_left_out: the same without the steps that loss scaling left out.
        start: the weights before the first step, float64.
        sweep: see `precision.scale_sweep`.
        sums: name -> 1 plus many small updates in that format; see `precision.add_up`.
        matmul: format -> seconds of one product of matrices.
    """

    device: torch.device
    reference: Trajectory
    with_steps_left_out: Trajectory
    trajectories: list[Trajectory]
    start: list[torch.Tensor]
    sweep: list[dict[str, Any]]
    limits: dict[str, dict[str, float]]
    sums: dict[str, float]
    matmul: dict[str, float]

    def of(self, name: str) -> Trajectory:
        return next(t for t in self.trajectories if t.regime.name == name)

    def exact(self, trajectory: Trajectory) -> Trajectory:
        """The float64 training that makes the same steps."""
        return self.with_steps_left_out if trajectory.regime.scaled else self.reference

    def weights_apart(self, trajectory: Trajectory) -> list[float | None]:
        """After each step: distance of the weights from those of float64, in units of the way these have come."""
        apart = []
        for found, exact in zip(trajectory.weights, self.exact(trajectory).weights, strict=True):
            way = precision.distance(exact, self.start)
            apart.append(precision.distance(found, exact) / way if way else None)
        return apart

    def losses_apart(self, trajectory: Trajectory) -> list[float]:
        return [abs(a - b) for a, b in zip(trajectory.losses, self.exact(trajectory).losses, strict=True)]


def run(config: Config, run_dir: RunDirectory) -> None:
    """Train in every regime, look at the formats themselves, check, draw."""
    from llmcore_hf.systems import mixed_precision_figures as figures

    args = config.part(Args)
    shape = ModelShape("qwen3", VOCAB_SIZE, args.hidden_size, 3 * args.hidden_size, args.num_hidden_layers, 4)
    training = Training(
        args.max_steps, args.batch_size, args.max_length, 1, args.learning_rate, args.adam_epsilon, args.seed
    )
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = find_out(shape, training, Scaling(args.init_scale, args.growth_interval))
    finally:
        torch.set_num_threads(before)
    for index in range(args.max_steps):
        run_dir.log({"step": index + 1, "loss": found.reference.losses[index]} | _row(found, index))
    n_parameters = sum(w.numel() for w in found.start)
    run_dir.summary["model"] = {
        "name_or_path": f"qwen3, {args.num_hidden_layers} layers of {args.hidden_size}, random weights",
        "n_params": n_parameters,
        "n_trainable": n_parameters,
        "peft": None,
        "pad_token": None,
        "eos_token": None,
        "pad_is_eos": None,
    }
    run_dir.checks += [ran_check(found), limits_check(found), rounding_check(found), sums_check(found)]
    run_dir.checks += [window_check(found), rule_check(found, args), memory_check(found, n_parameters)]
    run_dir.checks += [*learning_checks(found), speed_check(found)]
    run_dir.write("results.json", json.dumps(finite(results(found)), indent=1) + "\n")
    run_dir.write("training_curves.png", lesson.png(figures.draw(found, n_parameters)))


def find_out(shape: ModelShape, training: Training, scaling: Scaling) -> Findings:
    """All the measuring, on the GPU when there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batches = packed_batches(training.max_steps, training.batch_size, training.seq_length, training.seed)

    def train(regime: Regime, left_out: Collection[int] = ()) -> Trajectory:
        found = precision.train(regime, shape, training, scaling, batches, device, left_out)
        print(f"{regime.name}: loss {found.losses[-1]:.4f}, {1000 * found.seconds:.0f} ms a step", flush=True)
        return found

    reference = train(REFERENCE)
    require_finite(reference.losses, training.learning_rate)
    trajectories = [train(regime) for regime in REGIMES]
    [left_out] = [t.left_out for t in trajectories if t.regime.scaled]
    start = precision.make_model(shape, training).parameters()
    n = 4096 if device.type == "cuda" else 256
    sums = {precision.name_of(dtype): precision.add_up(UPDATE, N_UPDATES, dtype) for dtype in FORMATS}
    sums["bfloat16 + master"] = precision.add_up(UPDATE, N_UPDATES, torch.bfloat16, master=True)
    return Findings(
        device,
        reference,
        train(REFERENCE, left_out) if left_out else reference,
        trajectories,
        [p.detach().double() for p in start],
        precision.scale_sweep(shape, training, batches[0], device, SWEEP),
        {precision.name_of(dtype): precision.limits(dtype, device) for dtype in FORMATS},
        sums,
        {precision.name_of(dtype): precision.matmul_seconds(n, dtype, device) for dtype in FORMATS},
    )


def _row(found: Findings, index: int) -> dict[str, Any]:
    row: dict[str, Any] = {f"loss/{t.regime.name}": t.losses[index] for t in found.trajectories}
    return row | {"loss_scale": found.of("fp16 + scaling").steps[index].loss_scale}


# ---------------------------------------------------------------------------------------------------------------------
# What must hold
# ---------------------------------------------------------------------------------------------------------------------


def ran_check(found: Findings) -> Check:
    """Did the formats asked for come into use? Autocast can be off without a word."""
    wrong, used = [], {}
    for trajectory in (found.reference, *found.trajectories):
        regime, name = trajectory.regime, precision.name_of
        wanted = {"weights": name(regime.weights), "products": name(regime.products), "stored": name(regime.stored)}
        used[regime.name] = ", ".join(f"{what} {dtype}" for what, dtype in trajectory.dtypes.items())
        if trajectory.dtypes != wanted:
            wrong.append(regime.name)
    return Check(
        "mixed_precision.the_formats_asked_for_ran",
        "invariant",
        not wrong,
        {"device": found.device.type, **used},
        "weights, products of matrices, and what the optimizer updates have the format of the regime",
        "autocast 没有生效时一切照样“正常”，只是什么也没证明。",
        "With autocast off all would look well, and nothing would be shown.",
    )


def limits_check(found: Findings) -> Check:
    measured = {name: (v["eps"], v["largest"] * (2 - v["eps"]), v["smallest"]) for name, v in found.limits.items()}
    documented = {}
    for dtype in FORMATS:
        info = torch.finfo(dtype)
        documented[precision.name_of(dtype)] = (info.eps, info.max, info.smallest_normal * info.eps)
    return Check(
        "mixed_precision.limits_are_those_of_the_formats",
        "invariant",
        measured == documented,
        {name: "eps {:.3g}, at most {:.5g}, at least {:.3g}".format(*values) for name, values in measured.items()},
        "eps, largest and smallest number, found by computing, equal torch.finfo",
        "bfloat16 的范围与 float32 相同，精度只有 8 位；float16 精度 11 位，但超过 65504 就溢出，小于 6e-8 就成 0。",
        "bfloat16 has float32's range and 8 significant bits; float16 has 11, but overflows above 65504 and is 0 below 6e-8.",
    )


def rounding_check(found: Findings) -> Check:
    """Of gradients that neither under- nor overflow: everything but float16 without scaling."""
    worst = {}
    for trajectory in found.trajectories:
        if trajectory.regime.name != "fp16 autocast":
            errors = [s.gradient_error for s in trajectory.steps if s.gradient_error is not None]
            worst[trajectory.regime] = max(errors, default=float("inf")) / torch.finfo(trajectory.regime.products).eps
    return Check(
        "mixed_precision.gradients_are_wrong_by_a_few_roundings",
        "invariant",
        all(value <= ROUNDINGS for value in worst.values()),
        {f"{regime.name}, in eps": value for regime, value in worst.items()},
        f"relative error of the gradient, at the same weights and batch, at most {ROUNDINGS} eps of the products' format",
        "矩阵乘法的误差只是几次舍入：bfloat16 约 0.5%，float16 约 0.07%，与梯度的噪声相比很小。",
        "Products of matrices are wrong by a few roundings: about 0.5 % in bfloat16, 0.07 % in float16, little beside the noise "
        "of a gradient.",
    )


def sums_check(found: Findings) -> Check:
    sums, exact = found.sums, 1 + UPDATE * N_UPDATES
    return Check(
        "mixed_precision.bfloat16_weights_lose_small_updates",
        "invariant",
        sums["bfloat16"] == 1 and abs(sums["float32"] - exact) < 1e-3 and sums["bfloat16 + master"] == exact,
        sums,
        f"1 plus {N_UPDATES} times {UPDATE:g} is still 1 in bfloat16, {exact:g} in float32 and with a float32 copy",
        "bfloat16 里 1 的下一个数是 1.0078：小于一半间隔的更新全部舍掉。所以累加要用 float32 的副本。",
        "In bfloat16 the next number after 1 is 1.0078: an update below half of that gap is rounded away. So updates are added "
        "to a float32 copy.",
    )


def window_check(found: Findings) -> Check:
    first, last = found.sweep[0], found.sweep[-1]
    best = min((row for row in found.sweep if row["error"] is not None), key=lambda row: row["error"], default=None)
    eps = torch.finfo(torch.float16).eps
    return Check(
        "mixed_precision.a_loss_scale_can_be_too_small_and_too_large",
        "invariant",
        best is not None and best["error"] <= ROUNDINGS * eps and first["underflow"] > 0.1 and last["error"] is None,
        {
            "smallest scale": first["scale"],
            "share that vanished": first["underflow"],
            "best scale": best and best["scale"],
            "its error": best and best["error"],
            "largest scale": last["scale"],
            "overflowed": last["error"] is None,
        },
        f"more than 10 % of the gradient vanish at {first['scale']:g}, {last['scale']:g} overflows, and between them the error is "
        f"at most {ROUNDINGS} eps",
        "float16 只有 5 位指数：损失缩放太小，梯度成 0；太大，梯度成无穷。中间有一个很宽的窗口。",
        "float16 has 5 bits of exponent: with a small loss scale gradients become 0, with a large one infinite. Between them is a "
        "wide window.",
    )


def rule_check(found: Findings, args: Args) -> Check:
    """The trace of the scale against the documented rule, and that an overflow, and nothing else, leaves a step out."""
    steps = found.of("fp16 + scaling").steps
    overflows = [step.overflow for step in steps]
    rule = precision.scale_rule(Scaling(args.init_scale, args.growth_interval), overflows)[:-1]
    trace = [step.loss_scale for step in steps]
    return Check(
        "mixed_precision.the_loss_scale_follows_its_rule",
        "invariant",
        trace == rule and all(step.moved != step.overflow for step in steps),
        {
            "steps": len(steps),
            "overflows, left out": sum(overflows),
            "doubled": sum(b > a for a, b in itertools.pairwise(trace)),
            "first": trace[0],
            "last": trace[-1],
        },
        f"halved after an overflow, doubled after {args.growth_interval} steps without one; a step with an overflow changes no weight",
        "动态缩放：溢出就跳过这一步并减半，连续若干步没有溢出就加倍，所以偶尔跳过一步是正常的。",
        "Dynamic scaling: after an overflow the step is left out and the scale halved; after some steps without one it is doubled. "
        "So a step left out now and then is as it should be.",
    )


def memory_check(found: Findings, n_parameters: int) -> Check:
    wrong = [
        f"{t.regime.name}, {kind}: {n} bytes"
        for t in found.trajectories
        for kind, n in t.n_bytes.items()
        if n != n_parameters * t.regime.bytes_per_parameter()[kind]
    ]
    return Check(
        "mixed_precision.memory_matches_the_formulas",
        "invariant",
        not wrong,
        {
            **{t.regime.name: sum(t.n_bytes.values()) / n_parameters for t in found.trajectories},
            "activations, bf16 autocast / fp32": found.of("bf16 autocast").activation_bytes
            / found.of("fp32").activation_bytes,
            "differences": "; ".join(wrong) or "none",
        },
        "bytes of parameters, gradients, float32 copy and moments: exactly the formula",
        "混合精度并不省权重和优化器的内存：autocast 与带 float32 副本的 bfloat16 每个参数都是 16 字节。省的是激活和时间。",
        "Mixed precision saves no memory of weights and optimizer: autocast and bfloat16 with a float32 copy take 16 bytes per "
        "parameter as float32 does. It saves activations and time.",
    )


def learning_checks(found: Findings) -> list[Check]:
    first, last = found.reference.losses[0], found.reference.losses[-1]
    apart = {t.regime.name: found.losses_apart(t)[-1] for t in found.trajectories}
    names = ("bf16 + master", "bf16 weights")
    copy, none = (found.weights_apart(found.of(name))[-1] or 0.0 for name in names)
    return [
        Check(
            "mixed_precision.loss_fell_alike",
            "learning",
            last < 0.9 * first and all(apart[name] <= CLOSE for name in SAME_LOSS),
            {"fp64, first": first, "fp64, last": last, **{f"{name}, apart": value for name, value in apart.items()}},
            f"the last loss of float64 is below 0.9 of the first, and those of {', '.join(SAME_LOSS)} within {CLOSE} of it (where "
            "steps were left out, of float64 without them)",
            "做对了的混合精度与 float64 学得一样好。",
            "Mixed precision done right learns as well as float64.",
        ),
        Check(
            "mixed_precision.master_weights_stay_closer",
            "learning",
            copy < none,
            {
                "with a float32 copy": copy,
                "bfloat16 alone": none,
                **{f"updates lost in the last step, {name}": found.of(name).steps[-1].lost_updates for name in names},
            },
            "with a float32 copy the final weights are closer to those of float64",
            "矩阵乘法同样是 bfloat16，只差更新加在哪里：没有 float32 副本，被舍掉的更新越积越多。",
            "The products are bfloat16 in both; where updates are added makes the difference: without a float32 copy what is "
            "rounded away piles up.",
        ),
    ]


def speed_check(found: Findings) -> Check:
    """A matter of the device: told, and on a CPU not judged."""
    on_gpu = found.device.type == "cuda"
    times = {name: found.matmul[name] / found.matmul["float32"] for name in ("bfloat16", "float16")}
    fp32 = found.of("fp32").seconds
    observed: dict[str, Any] = {f"product in {name} / float32": value for name, value in times.items()}
    observed |= {
        f"step, {t.regime.name} / fp32": t.seconds / fp32 for t in found.trajectories if t.regime.name != "fp32"
    }
    if on_gpu:
        observed = {"ran on": torch.cuda.get_device_name(), **observed}
    else:
        observed = {
            "ran instead of CUDA": f"PyTorch's CPU kernels ({torch.backends.cpu.get_cpu_capability()}), one thread",
            "did not run": "tensor cores, TF32, FP8",
            **observed,
        }
    return Check(
        "mixed_precision.short_products_are_faster_on_a_gpu",
        "invariant",
        times["bfloat16"] < 1 and times["float16"] < 1 if on_gpu else None,
        observed,
        "on a GPU the product of two large matrices takes less time in bfloat16 and float16 than in float32",
        "速度取决于硬件：GPU 有张量核；CPU 没有 float16 乘法指令时靠软件完成，比 float32 还慢，所以在 CPU 上只报告，不判断。",
        "Speed is a matter of hardware: GPUs have tensor cores. A CPU without instructions for float16 multiplies in software, "
        "slower than float32; so on a CPU it is told and not judged.",
    )


def results(found: Findings) -> dict[str, Any]:
    """All numbers of the run, for `results.json`."""
    table = {}
    for trajectory in (found.reference, *found.trajectories):
        table[trajectory.regime.name] = {
            "losses": trajectory.losses,
            "losses_apart": found.losses_apart(trajectory),
            "weights_apart": found.weights_apart(trajectory),
            "gradient_error": [step.gradient_error for step in trajectory.steps],
            "underflow": [step.underflow for step in trajectory.steps],
            "lost_updates": [step.lost_updates for step in trajectory.steps],
            "overflow": [step.overflow for step in trajectory.steps],
            "loss_scale": [step.loss_scale for step in trajectory.steps],
            "seconds": trajectory.seconds,
            "bytes": trajectory.n_bytes,
            "activation_bytes": trajectory.activation_bytes,
        }
    return {
        "device": found.device.type,
        "limits": found.limits,
        "sums": found.sums,
        "matmul_seconds": found.matmul,
        "loss_scale_sweep": found.sweep,
        "regimes": table,
    }
