"""Number formats, the loss scale's rule, and that the checks of `mixed_precision` fail for what they are about."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmcore_hf.errors import ConfigError
from llmcore_hf.run_dir import Diverged
from llmcore_hf.systems import mixed_precision, precision
from llmcore_hf.systems.mixed_precision import Args, Findings
from llmcore_hf.systems.parallel import ModelShape, Training, make_model
from llmcore_hf.systems.precision import REFERENCE, REGIMES, Regime, Scaling, Step, Trainee, Trajectory
from llmcore_hf.systems.text import VOCAB_SIZE, packed_batches

CPU = torch.device("cpu")
SHAPE = ModelShape("qwen3", VOCAB_SIZE, 16, 48, 1, 4)
TRAINING = Training(4, 2, 8, 1, 4e-3, 1e-8, 0)
CALM = Scaling(256.0, 2)
BY_NAME = {regime.name: regime for regime in REGIMES}


# ---------------------------------------------------------------- the formats


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_limits_found_by_computing_are_those_of_the_format(dtype: torch.dtype) -> None:
    info, found = torch.finfo(dtype), precision.limits(dtype, CPU)
    assert found["eps"] == info.eps and found["smallest"] == info.smallest_normal * info.eps
    assert found["largest"] * (2 - info.eps) == info.max


def test_bfloat16_does_not_notice_small_updates_and_a_float32_copy_does() -> None:
    assert precision.add_up(2**-9, 100, torch.bfloat16) == 1
    assert precision.add_up(2**-7, 100, torch.bfloat16) == 1 + 100 * 2**-7  # a whole step of the format
    assert precision.add_up(2**-9, 100, torch.float32) == 1 + 100 * 2**-9
    assert precision.add_up(2**-9, 128, torch.bfloat16, master=True) == 1.25


# ---------------------------------------------------------------- the loss scale


@pytest.mark.parametrize(
    "overflows",
    [
        [False] * 7,
        [True, True, False, False, False, True, False, False, False, False],
        [False, False, True, False, False, True] * 2,
    ],
)
def test_the_rule_is_that_of_gradscaler(overflows: list[bool]) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    assert (scaler.get_growth_factor(), scaler.get_backoff_factor()) == (precision.GROWTH, precision.BACKOFF)
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    trace = [scaler.get_scale()]
    for overflow in overflows:
        before = weight.detach().clone()
        weight.grad = torch.full((1,), float("inf") if overflow else 1.0)
        scaler.scale(torch.zeros(1))  # as in a training; the scaler does not work without it
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, weight.detach()) == overflow
        trace.append(scaler.get_scale())
    assert precision.scale_rule(Scaling(1024.0, 3), overflows) == trace
    assert precision.scale_rule(Scaling(1024.0, 2), overflows) != trace


# ---------------------------------------------------------------- training


def test_the_reference_is_float64_throughout_and_the_same_function() -> None:
    exact, short = precision.exact_model(SHAPE, TRAINING), make_model(SHAPE, TRAINING)
    ids = packed_batches(1, 2, 8, 0)[0][:, :-1]
    seen: list[torch.dtype] = []
    for module in exact.modules():
        module.register_forward_hook(lambda module, inputs, output: seen.append(getattr(output, "dtype", None)))
    with torch.no_grad():
        found, expected = exact(input_ids=ids).logits, short(input_ids=ids).logits
        through_float32 = make_model(SHAPE, TRAINING).double()(input_ids=ids).logits
    assert {dtype for dtype in seen if dtype} == {torch.float64}
    assert (found - expected).abs().max() < 1e-5
    assert 1e-10 < (found - through_float32).abs().max() < 1e-5  # what the norms of transformers lose


@pytest.mark.parametrize("regime", [REFERENCE, *REGIMES], ids=lambda regime: regime.name)
def test_a_regime_uses_the_formats_it_is_made_of(regime: Regime) -> None:
    trainee = Trainee(regime, SHAPE, TRAINING, CALM, CPU)
    rows = packed_batches(2, 2, 8, 0)
    used = precision.dtypes_of(trainee, rows[0])
    wanted = {"weights": regime.weights, "products": regime.products, "stored": regime.stored}
    assert used == {what: precision.name_of(dtype) for what, dtype in wanted.items()}
    n = sum(p.numel() for p in trainee.parameters)
    for index, batch in enumerate(rows):
        trainee.backward(batch)
        held = trainee.held()
        trainee.step(index)
    assert held == {kind: n * width for kind, width in regime.bytes_per_parameter().items()}


def test_the_float32_copy_starts_unrounded_and_the_model_is_its_rounding() -> None:
    trainee = Trainee(BY_NAME["bf16 + master"], SHAPE, TRAINING, CALM, CPU)
    whole = make_model(SHAPE, TRAINING).parameters()
    assert all(torch.equal(w, p) for w, p in zip(trainee.stored, whole, strict=True))
    trainee.backward(packed_batches(1, 2, 8, 0)[0])
    trainee.step(0)
    assert all(torch.equal(w.bfloat16(), p) for w, p in zip(trainee.stored, trainee.parameters, strict=True))


def test_gradients_come_back_unscaled_and_an_overflow_leaves_the_step_out() -> None:
    batches = packed_batches(4, 2, 8, 0)
    calm, wild = (
        precision.train(BY_NAME["fp16 + scaling"], SHAPE, TRAINING, scaling, batches, CPU)
        for scaling in (CALM, Scaling(2.0**40, 2))
    )
    assert all(step.moved and not step.overflow and step.gradient_error < 0.01 for step in calm.steps)
    assert [step.loss_scale for step in calm.steps] == [256, 256, 512, 512]
    assert all(step.overflow and not step.moved and step.gradient_error is None for step in wild.steps)
    assert [step.loss_scale for step in wild.steps] == [2.0**40, 2.0**39, 2.0**38, 2.0**37]


def test_the_reference_can_leave_out_the_same_steps() -> None:
    batches = packed_batches(4, 2, 8, 0)
    whole, without = (
        precision.train(REFERENCE, SHAPE, TRAINING, CALM, batches, CPU, left_out) for left_out in ((), (0, 2))
    )
    assert (whole.left_out, without.left_out) == (frozenset(), {0, 2})
    assert without.losses[0] == whole.losses[0] and without.losses[1] != whole.losses[1]
    ways = [precision.distance(a, b) for a, b in itertools.pairwise(whole.weights)]
    assert all(ways)  # of every step its own weights are kept
    start = [p.detach().double() for p in make_model(SHAPE, TRAINING).parameters()]
    assert precision.distance(without.weights[0], start) == 0 == precision.distance(*without.weights[1:3])


def test_without_scaling_small_gradients_vanish() -> None:
    rows = packed_batches(1, 2, 8, 0)[0]
    sweep = precision.scale_sweep(SHAPE, TRAINING, rows, CPU, (-20, 8, 40))
    assert sweep[0]["underflow"] > 0.5 and sweep[0]["error"] > 0.1
    assert sweep[1]["underflow"] < 0.01 and sweep[1]["error"] < 0.01
    assert sweep[2]["error"] is None


def test_underflow_is_a_share_of_the_gradients_that_are_not_zero() -> None:
    exact = [torch.tensor([1.0, 2.0, 0.0, 0.0]), torch.tensor([0.0, 3.0, 4.0])]
    found = [torch.tensor([0.0, 2.0, 0.0, 0.0]), torch.tensor([0.0, 3.0, 4.0])]
    assert precision.vanished(found, exact) == 1 / 4


def test_lost_updates_are_a_share_of_the_weights_with_a_gradient() -> None:
    trainee: Any = SimpleNamespace(stored=[torch.tensor([1.0, 2.0, 1.0, 1.0])])
    before, gradient = [torch.ones(4)], [torch.tensor([1.0, 1.0, 1.0, 0.0])]
    step = precision._measure(trainee, before, gradient, gradient, 1.0, 1.0, 1.0)
    assert step.lost_updates == 2 / 3 and step.moved and not step.overflow


def test_weights_that_run_away_end_the_run_with_one_message() -> None:
    training = dataclasses.replace(TRAINING, learning_rate=1e37)
    with pytest.raises(Diverged, match=r"gradients are 0 in step 2.*lower --learning_rate \(1e\+37\)"):
        mixed_precision.find_out(SHAPE, training, CALM)


def test_a_float64_loss_that_is_no_number_ends_the_run_with_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    loss_of = precision.loss_of
    monkeypatch.setattr(precision, "loss_of", lambda logits, labels: loss_of(logits, labels) * float("nan"))
    with pytest.raises(Diverged, match=r"the loss is nan in step 1: lower --learning_rate"):
        mixed_precision.find_out(SHAPE, TRAINING, CALM)


def test_without_any_gradient_no_share_of_updates_is_lost() -> None:
    trainee: Any = SimpleNamespace(stored=[torch.ones(2)])
    zero, exact = [torch.zeros(2)], [torch.ones(2)]
    assert precision._measure(trainee, [torch.ones(2)], zero, exact, 1.0, 1.0, 1.0).lost_updates is None


# ---------------------------------------------------------------- the checks


@pytest.fixture(scope="module")
def found() -> Findings:
    """A training so short that all of it takes a second or two; the checks see it broken in many ways."""
    return mixed_precision.find_out(SHAPE, TRAINING, CALM)


ARGS = Args(hidden_size=16, max_steps=4, init_scale=CALM.init_scale, growth_interval=CALM.growth_interval)


def verdicts(found: Findings) -> dict[str, bool | None]:
    n = sum(w.numel() for w in found.start)
    made = [
        mixed_precision.ran_check(found),
        mixed_precision.limits_check(found),
        mixed_precision.rounding_check(found),
    ]
    made += [mixed_precision.sums_check(found), mixed_precision.window_check(found)]
    made += [mixed_precision.rule_check(found, ARGS), mixed_precision.memory_check(found, n)]
    return {check.id.removeprefix("mixed_precision."): check.passed for check in made}


def step_of(found: Findings, name: str, **changes: Any) -> None:
    trajectory: Trajectory = found.of(name)
    trajectory.steps[-1] = dataclasses.replace(trajectory.steps[-1], **changes)


BREAKAGES = {
    "the_formats_asked_for_ran": lambda f: f.of("bf16 autocast").dtypes.update(products="float32"),
    "limits_are_those_of_the_formats": lambda f: f.limits["float16"].update(largest=2.0**16),
    "gradients_are_wrong_by_a_few_roundings": lambda f: step_of(f, "fp32", gradient_error=1e-5),
    "bfloat16_weights_lose_small_updates": lambda f: f.sums.update({"bfloat16 + master": 1.0}),
    "a_loss_scale_can_be_too_small_and_too_large": lambda f: f.sweep[-1].update(error=0.5),
    "the_loss_scale_follows_its_rule": lambda f: step_of(f, "fp16 + scaling", loss_scale=256.0),
    "memory_matches_the_formulas": lambda f: f.of("bf16 weights").n_bytes.update(master=4),
}


def test_the_checks_hold_for_what_was_measured(found: Findings) -> None:
    assert verdicts(found) == dict.fromkeys(BREAKAGES, True)


@pytest.mark.parametrize("check", BREAKAGES)
def test_a_check_fails_for_what_it_is_about(found: Findings, check: str) -> None:
    broken = copy.deepcopy(found)
    BREAKAGES[check](broken)
    assert [name for name, passed in verdicts(broken).items() if not passed] == [check]


def test_a_step_that_is_left_out_without_an_overflow_is_found(found: Findings) -> None:
    broken = copy.deepcopy(found)
    step_of(broken, "fp16 + scaling", moved=False)
    assert not verdicts(broken)["the_loss_scale_follows_its_rule"]


def test_learning_is_compared_with_float64(found: Findings) -> None:
    def trajectory(name: str, loss: float, apart: float) -> Trajectory:
        regime = BY_NAME.get(name, REFERENCE)
        steps = [Step(loss, 0.0, 0.0, 0.0, False, True, 1.0, 1.0) for loss in (5.0, loss)]
        return Trajectory(regime, steps, [[torch.tensor([1.0])], [torch.tensor([2.0 + apart])]])

    def passed(loss: float = 3.0, apart: float = 0.1, scaled: float = 3.3) -> list[bool | None]:
        others = [
            trajectory(name, 3.0, 0.01) for name in BY_NAME if name not in ("bf16 weights", "fp32", "fp16 + scaling")
        ]
        others += [trajectory("bf16 weights", 3.0, apart), trajectory("fp32", loss, 0.0)]
        made = dataclasses.replace(
            found,
            reference=trajectory("fp64", 3.0, 0.0),
            with_steps_left_out=trajectory("fp64", 3.3, 0.0),
            trajectories=[*others, trajectory("fp16 + scaling", scaled, 0.01)],
            start=[torch.zeros(1)],
        )
        return [check.passed for check in mixed_precision.learning_checks(made)]

    assert passed() == [True, True]
    assert passed(loss=3.2) == [False, True]
    assert passed(apart=0.001) == [True, False]
    assert passed(scaled=3.0) == [False, True]  # it is compared with the training that leaves out the same steps


def test_on_a_cpu_speed_is_told_and_not_judged(found: Findings) -> None:
    if found.device.type == "cuda":
        pytest.skip("runs on a GPU here")
    check = mixed_precision.speed_check(found)
    assert check.passed is None and "PyTorch's CPU kernels" in check.observed["ran instead of CUDA"]
    assert "tensor cores" in check.observed["did not run"] and "step, fp16 + scaling / fp32" in check.observed


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"hidden_size": 12}, "multiple of 8"),
        ({"max_steps": 3}, "at least 4"),
        ({"init_scale": 0.0}, "positive number"),
        ({"learning_rate": 1e38}, "at most 3.4e.37"),
        ({"growth_interval": 0}, "growth_interval 0: at least 1"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        Args(**options)
