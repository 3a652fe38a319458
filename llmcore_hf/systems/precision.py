"""One small language model trained in several number formats, every step held against float64.

A `Regime` says in which format weights are stored, in which format matrices are multiplied, whether the optimizer has a float32 copy
of the weights, and whether the loss is scaled. `train` runs one and compares, step by step: its gradient with the exact one at the
same weights and batch (rounding alone), its loss and weights with a float64 training (what the rounding did in the end).

Sources: float32 copies of the weights and loss scaling, Micikevicius et al. 2018 (arXiv:1710.03740, section 3); bfloat16, Kalamkar et
al. 2019 (arXiv:1905.12322); the rule of the loss scale, `torch.amp.GradScaler`.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmcore_hf.run_dir import Diverged
from llmcore_hf.systems.devices import now
from llmcore_hf.systems.parallel import ModelShape, Training, loss_of, make_model, make_optimizer
from llmcore_hf.systems.tracing import Activations, n_bytes

GROWTH, BACKOFF = 2.0, 0.5  # GradScaler's own


@dataclass(frozen=True)
class Regime:
    """One way of spending bits.

    Attributes:
        weights: format in which the model stores its weights, and so of their gradients.
        autocast: format in which matrices are multiplied, where it is another one (`torch.autocast`).
        master: the optimizer updates a float32 copy of the weights, from which the model's are rounded anew in each step.
        scaled: the loss is scaled before the backward pass, gradients are scaled back before the optimizer's step.
    """

    name: str
    weights: torch.dtype
    autocast: torch.dtype | None = None
    master: bool = False
    scaled: bool = False

    @property
    def products(self) -> torch.dtype:
        return self.autocast or self.weights

    @property
    def stored(self) -> torch.dtype:
        """Format of the weights that the optimizer adds its updates to."""
        return torch.float32 if self.master else self.weights

    def bytes_per_parameter(self) -> dict[str, int]:
        """What is held between backward pass and step; Adam's two moments have the format of what they update."""
        return {
            "parameters": self.weights.itemsize,
            "gradients": self.weights.itemsize,
            "master": 4 * self.master,
            "optimizer": 2 * self.stored.itemsize,
        }


REFERENCE = Regime("fp64", torch.float64)
REGIMES = (
    Regime("fp32", torch.float32),
    Regime("bf16 autocast", torch.float32, torch.bfloat16),
    Regime("bf16 + master", torch.bfloat16, master=True),
    Regime("bf16 weights", torch.bfloat16),
    Regime("fp16 autocast", torch.float32, torch.float16),
    Regime("fp16 + scaling", torch.float32, torch.float16, scaled=True),
)


@dataclass(frozen=True)
class Scaling:
    """Where the loss scale starts, and after how many steps without an overflow it doubles."""

    init_scale: float
    growth_interval: int


@dataclass
class Step:
    """What one optimizer step of a regime was like. None: not to be had, because a gradient was not finite, or 0."""

    loss: float
    gradient_error: float | None  # |g - g64| / |g64|, at the same weights and batch
    underflow: float  # share of the elements of g64 that are not 0, and whose gradient became 0
    lost_updates: float | None  # share of the weights with a gradient that the step left as they were, bit by bit
    overflow: bool
    moved: bool  # whether any weight changed
    loss_scale: float  # that the step was made with
    seconds: float


@dataclass
class Trajectory:
    """The whole training of a regime."""

    regime: Regime
    steps: list[Step] = field(default_factory=list)
    weights: list[list[Tensor]] = field(default_factory=list)  # after each step, float64
    n_bytes: dict[str, int] = field(default_factory=dict)
    activation_bytes: int = 0
    dtypes: dict[str, str] = field(default_factory=dict)

    @property
    def losses(self) -> list[float]:
        return [step.loss for step in self.steps]

    @property
    def left_out(self) -> frozenset[int]:
        """Steps that changed no weight, from 0."""
        return frozenset(index for index, step in enumerate(self.steps) if not step.moved)

    @property
    def seconds(self) -> float:
        """Median of a step; the first ones warm up."""
        return statistics.median(step.seconds for step in self.steps[len(self.steps) // 4 :])


def exact_model(shape: ModelShape, training: Training) -> nn.Module:
    """The model in float64 throughout.

    The norms of `transformers` go through float32 whatever they are given: PyTorch's, which is the same function, replaces them.
    """
    model = make_model(shape, training).double()
    for name, norm in [(n, m) for n, m in model.named_modules() if hasattr(m, "variance_epsilon")]:
        exact = nn.RMSNorm(norm.weight.shape, eps=norm.variance_epsilon, dtype=torch.float64)
        exact.weight = norm.weight
        model.set_submodule(name, exact)
    return model


class Trainee:
    """A model, its optimizer and its loss scale in one regime."""

    def __init__(
        self, regime: Regime, shape: ModelShape, training: Training, scaling: Scaling, device: torch.device
    ) -> None:
        self.regime, self.training, self.device = regime, training, device
        model = exact_model(shape, training) if regime is REFERENCE else make_model(shape, training)
        # Copied before they are rounded: the float32 copy starts from what float32 starts from.
        whole = [p.detach().to(device, regime.stored, copy=True) for p in model.parameters()]
        self.model = model.to(device, regime.weights)
        self.parameters = list(self.model.parameters())
        self.stored = [nn.Parameter(w) for w in whole] if regime.master else self.parameters
        self.optimizer = make_optimizer(self.stored, training)
        self.scaler = torch.amp.GradScaler(
            device.type, init_scale=scaling.init_scale, growth_interval=scaling.growth_interval, enabled=regime.scaled
        )
        self.activations = Activations(self.parameters)

    def loss(self, rows: Tensor) -> Tensor:
        """The mean cross entropy of token ids (B, T + 1), in float32 or float64."""
        with torch.autocast(self.device.type, self.regime.autocast, enabled=self.regime.autocast is not None):
            logits = self.model(input_ids=rows[:, :-1]).logits
        return loss_of(logits.double() if self.regime is REFERENCE else logits.float(), rows[:, 1:])

    def backward(self, rows: Tensor) -> float:
        """Gradients of a batch, scaled back where they were scaled. Returns the loss."""
        for parameter in self.parameters:
            parameter.grad = None
        loss = self.loss(rows)
        self.scaler.scale(loss).backward()
        for copy, parameter in zip(self.stored, self.parameters, strict=True):
            if copy is not parameter:
                assert parameter.grad is not None
                copy.grad = parameter.grad.float()
        self.scaler.unscale_(self.optimizer)
        return float(loss.detach())

    def step(self, index: int) -> None:
        """One step of the optimizer, unless a scaled gradient overflowed; the learning rate falls linearly."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.training.learning_rate * (1 - index / self.training.max_steps)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        with torch.no_grad():
            for copy, parameter in zip(self.stored, self.parameters, strict=True):
                if copy is not parameter:
                    parameter.copy_(copy)  # rounds
                    copy.grad = None

    def held(self) -> dict[str, int]:
        """Bytes by kind, to be asked between backward pass and step."""
        state = [t for entry in self.optimizer.state.values() for t in entry.values() if t.dim()]
        return {
            "parameters": n_bytes(self.parameters),
            "gradients": n_bytes(p.grad for p in self.parameters),
            "master": n_bytes(self.stored) if self.regime.master else 0,
            "optimizer": n_bytes(state),
        }


def train(
    regime: Regime,
    shape: ModelShape,
    training: Training,
    scaling: Scaling,
    batches: Tensor,
    device: torch.device,
    left_out: Collection[int] = (),
) -> Trajectory:
    """Train in one regime, one step per batch; `batches` are token ids, (steps, B, T + 1).

    The weights are not stepped in the steps `left_out`, counted from 0: what loss scaling does to another training after an
    overflow.

    Raises:
        Diverged: the float64 gradient vanished, so that there is nothing to compare.
    """
    trainee = Trainee(regime, shape, training, scaling, device)
    oracle = Trainee(REFERENCE, shape, training, scaling, device)
    found = Trajectory(regime, dtypes=dtypes_of(trainee, batches[0].to(device)))
    for index, rows in enumerate(batches.to(device)):
        exact = exact_gradient(oracle, trainee, rows)
        if norm(exact) == 0:
            raise Diverged(
                f"{regime.name}: all gradients are 0 in step {index + 1}, because the weights have become too large: lower "
                f"--learning_rate ({training.learning_rate:g})"
            )
        before = [w.detach().clone() for w in trainee.stored]
        scale = trainee.scaler.get_scale()
        start = now(device)
        loss = trainee.backward(rows)
        halfway = now(device)
        gradient = [_gradient(p) for p in trainee.parameters]
        found.n_bytes = trainee.held()  # of the last step: Adam has its state once a step was not left out
        resumed = now(device)
        if index not in left_out:
            trainee.step(index)
        seconds = now(device) - resumed + halfway - start
        found.steps.append(_measure(trainee, before, gradient, exact, loss, scale, seconds))
        found.weights.append([w.detach().to("cpu", torch.float64, copy=True) for w in trainee.stored])
    with trainee.activations.recording():
        trainee.loss(batches[0].to(device)).backward()
    found.activation_bytes = trainee.activations.peak
    return found


def scale_sweep(
    shape: ModelShape, training: Training, rows: Tensor, device: torch.device, exponents: Iterable[int]
) -> list[dict[str, Any]]:
    """The first gradient in float16, with the loss scaled by 2**e: which scales lose it at either end of the format?

    Returns, per exponent: `scale`, `error` (relative; None when it overflowed), `underflow`.
    """
    rows = rows.to(device)
    oracle = Trainee(REFERENCE, shape, training, Scaling(1.0, 1), device)
    oracle.backward(rows)
    exact = [_gradient(p) for p in oracle.parameters]
    found = []
    for exponent in exponents:
        trainee = Trainee(REGIMES[-1], shape, training, Scaling(2.0**exponent, 1), device)
        trainee.backward(rows)
        gradient = [_gradient(p) for p in trainee.parameters]
        finite = all(bool(g.isfinite().all()) for g in gradient)
        error = distance(gradient, exact) / norm(exact) if finite else None
        found.append({"scale": 2.0**exponent, "error": error, "underflow": vanished(gradient, exact)})
    return found


def vanished(gradient: list[Tensor], exact: list[Tensor]) -> float:
    """Share of the elements that are 0 in `gradient` and are not in `exact`."""
    lost = sum(int(((e != 0) & (g == 0)).sum()) for e, g in zip(exact, gradient, strict=True))
    return lost / sum(int((e != 0).sum()) for e in exact)


def exact_gradient(oracle: Trainee, trainee: Trainee, rows: Tensor) -> list[Tensor]:
    """The gradient in float64 at the weights that the trainee computes with."""
    with torch.no_grad():
        for exact, parameter in zip(oracle.parameters, trainee.parameters, strict=True):
            exact.copy_(parameter)
    oracle.backward(rows)
    return [_gradient(p) for p in oracle.parameters]


def _measure(
    trainee: Trainee,
    before: list[Tensor],
    gradient: list[Tensor],
    exact: list[Tensor],
    loss: float,
    scale: float,
    seconds: float,
) -> Step:
    overflow = not all(bool(g.isfinite().all()) for g in gradient)
    unmoved = [(b == w.detach()) for b, w in zip(before, trainee.stored, strict=True)]
    pushed = sum(int((g != 0).sum()) for g in gradient)
    lost = sum(int((u & (g != 0)).sum()) for u, g in zip(unmoved, gradient, strict=True))
    return Step(
        loss=loss,
        gradient_error=None if overflow else distance(gradient, exact) / norm(exact),
        underflow=vanished(gradient, exact),
        lost_updates=None if overflow or not pushed else lost / pushed,
        overflow=overflow,
        moved=not all(bool(u.all()) for u in unmoved),
        loss_scale=scale,
        seconds=seconds,
    )


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad.detach().double()


def norm(tensors: Iterable[Tensor]) -> float:
    """Euclidean norm of all elements together."""
    return float(torch.stack([t.double().square().sum() for t in tensors]).sum().sqrt())


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    return norm(a.double() - b.double() for a, b in zip(found, expected, strict=True))


def dtypes_of(trainee: Trainee, rows: Tensor) -> dict[str, str]:
    """Formats that are really in use: of the weights, of a layer's matrix product, of what the optimizer updates."""
    seen: list[Tensor] = []
    model: Any = trainee.model
    hook = model.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        trainee.loss(rows)
    hook.remove()
    used = {"weights": trainee.parameters[0], "products": seen[0], "stored": trainee.stored[0]}
    return {what: name_of(tensor.dtype) for what, tensor in used.items()}


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---------------------------------------------------------------------------------------------------------------------
# The formats themselves
# ---------------------------------------------------------------------------------------------------------------------


def limits(dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """What a format can hold, found by computing in it.

    Returns:
        `eps`: the smallest power of two whose sum with 1 is exact. `largest`: the greatest power of two that is finite.
        `smallest`: the least that is not 0.
    """

    def number(exponent: int) -> Tensor:
        return torch.tensor(2.0**exponent, dtype=torch.float64, device=device).to(dtype)

    exponents = range(-1074, 1024)  # of float64, the widest
    return {
        "eps": 2.0 ** min(e for e in exponents if float(number(0) + number(e)) - 1 == 2.0**e),
        "largest": 2.0 ** max(e for e in exponents if bool(number(e).isfinite())),
        "smallest": 2.0 ** min(e for e in exponents if bool(number(e) != 0)),
    }


def add_up(update: float, n_updates: int, dtype: torch.dtype, master: bool = False) -> float:
    """1 plus `n_updates` times `update`, one at a time, in a format; with `master` summed in float32 and then rounded."""
    total = torch.ones((), dtype=torch.float32 if master else dtype)
    for _ in range(n_updates):
        total = total + torch.tensor(update, dtype=total.dtype)
    return float(total.to(dtype))


def scale_rule(scaling: Scaling, overflows: Iterable[bool]) -> list[float]:
    """The scale each step is made with, and the one after the last: GradScaler's rule, in plain Python.

    An overflow halves it; `growth_interval` steps in a row without one double it. Both start the count anew.
    """
    scale, good, trace = scaling.init_scale, 0, [scaling.init_scale]
    for overflow in overflows:
        good = 0 if overflow else good + 1
        if overflow:
            scale *= BACKOFF
        elif good == scaling.growth_interval:
            scale, good = scale * GROWTH, 0
        trace.append(scale)
    return trace


def matmul_seconds(n: int, dtype: torch.dtype, device: torch.device, repeats: int = 5) -> float:
    """Median time of the product of two (n, n) matrices."""
    matrix = torch.randn(n, n, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    times = []
    for _ in range(repeats + 1):
        start = now(device)
        matrix @ matrix
        times.append(now(device) - start)
    return statistics.median(times[1:])
