"""Layouts: what they hold and send by formula, what the tracing measures, and equality with one process."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from llmcore_hf.errors import ConfigError
from llmcore_hf.run_dir import Diverged
from llmcore_hf.systems import megatron, parallel, workers
from llmcore_hf.systems.formulas import (
    Part,
    differences,
    expected_bytes,
    expected_collectives,
    expected_parameters,
    gradient_buckets,
    gradient_order,
)
from llmcore_hf.systems.megatron import LAYOUTS, PLAIN_PLAN, Args, Outcome
from llmcore_hf.systems.parallel import Layout, ModelShape, Training, make_model, name_in_model
from llmcore_hf.systems.text import packed_batches
from llmcore_hf.systems.tracing import Activations, Collectives

TRAINING = Training(3, 16, 32, 4, 4e-3, 1e-5, seed=0)
ARCHITECTURES = ("qwen3", "qwen2", "llama")
BY_NAME = {layout.name: layout for layout in LAYOUTS}


# ---------------------------------------------------------------- formulas


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_formula_of_parameters_counts_what_transformers_makes(architecture: str) -> None:
    shape = ModelShape(architecture, hidden_size=96, intermediate_size=160, num_hidden_layers=3, num_attention_heads=6)
    model = make_model(shape, TRAINING)
    assert expected_parameters(Layout("alone"), shape, 0) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_pipeline_ranks_together_hold_one_model(architecture: str) -> None:
    shape = ModelShape(architecture)
    whole = expected_parameters(Layout("alone"), shape, 0)
    for layout in (BY_NAME["1f1b"], BY_NAME["interleaved"], Layout("pp4", pp=4)):
        assert sum(expected_parameters(layout, shape, rank) for rank in range(layout.pp)) == whole


def test_interleaved_ranks_hold_every_other_chunk() -> None:
    part = Part.of(BY_NAME["interleaved"], ModelShape(), pp_rank=1)
    assert part.stages == (1, 3) and part.n_layers == 2 and part.predicts and not part.embeds


def test_megatrons_count_of_collectives() -> None:
    """4 layers: two all-reduces each, and one for the embedding (forward) or the head (backward)."""
    sent = expected_collectives(BY_NAME["tp"], ModelShape("llama"), TRAINING, 0)
    hidden = 16 * 32 * 64 * 4
    assert sent["forward"] == sent["backward"] == {"all_reduce": {"calls": 9, "bytes": 9 * hidden}}
    assert sent["loss"]["all_reduce"]["calls"] == 3 and "gradients" not in sent
    sp = expected_collectives(BY_NAME["tp+sp"], ModelShape("llama"), TRAINING, 0)
    assert sp["forward"] == {kind: {"calls": 9, "bytes": 9 * hidden} for kind in ("all_gather", "reduce_scatter")}


def test_messages_of_a_pipeline_are_counted_once_per_border_and_direction() -> None:
    shape = ModelShape()
    for layout, borders in ((BY_NAME["1f1b"], 1), (BY_NAME["interleaved"], 3)):
        ranks = [expected_collectives(layout, shape, TRAINING, rank)["between stages"] for rank in range(2)]
        assert sum(rank["send"]["calls"] for rank in ranks) == 2 * borders * TRAINING.n_microbatches
        assert sum(rank["send"]["bytes"] for rank in ranks) == sum(rank["recv"]["bytes"] for rank in ranks)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_order_of_the_gradients_is_that_of_the_backward_pass(architecture: str) -> None:
    shape = ModelShape(architecture, hidden_size=32, intermediate_size=80, num_hidden_layers=2, vocab_size=90)
    model, came_in = make_model(shape, TRAINING), []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: came_in.append(p.numel()))
    ids = torch.randint(90, (2, 8))
    parallel.loss_of(model(input_ids=ids).logits, ids).backward()
    assert gradient_order(shape) == came_in


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("hidden", "layers", "dtype"), [(64, 4, "float32"), (64, 4, "float64"), (128, 8, "float32")])
def test_buckets_are_those_of_ddp(architecture: str, hidden: int, layers: int, dtype: str) -> None:
    """Against the function with which DDP itself makes them; the toy, README's float64, and the full recipe."""
    shape = ModelShape(architecture, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers)
    gradients = [torch.empty(n, dtype=getattr(torch, dtype)) for n in gradient_order(shape)]
    limits = [dist._DEFAULT_FIRST_BUCKET_BYTES, 25 * 2**20]
    theirs, _ = dist._compute_bucket_assignment_by_size(gradients, limits)
    ours = gradient_buckets([g.nbytes for g in gradients])
    assert ours == [sum(gradients[i].nbytes for i in bucket) for bucket in theirs]
    training = dataclasses.replace(TRAINING, dtype=dtype)
    sent = expected_collectives(BY_NAME["dp"], shape, training, 0)["backward"]["all_reduce"]
    assert sent == {"calls": len(theirs), "bytes": sum(ours)}
    assert len(theirs) == (1 if (hidden, dtype) == (64, "float32") else 2)


def test_a_bucket_is_full_when_it_holds_its_limit() -> None:
    mib = 2**20
    assert gradient_buckets([mib - 4, 4]) == [mib] and gradient_buckets([mib, 4]) == [mib, 4]
    assert gradient_buckets([mib, 24 * mib, mib, 3]) == [mib, 25 * mib, 3]


def test_differences_name_the_place() -> None:
    assert differences({"a": {"b": 1}}, {"a": {"b": 1}}) == []
    assert differences({"a": {"b": 1}}, {"a": {"b": 2, "c": 3}}) == ["a/b: 1 instead of 2", "a/c: None instead of 3"]


# ---------------------------------------------------------------- the model in stages


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("n_stages", [1, 3])
def test_stages_in_a_row_are_the_model(architecture: str, n_stages: int) -> None:
    model = make_model(ModelShape(architecture, num_hidden_layers=5), TRAINING)
    x = torch.randint(320, (2, TRAINING.seq_length))
    with torch.no_grad():
        expected = model(input_ids=x).logits
        stages = [parallel.Stage(model, i, n_stages, TRAINING.seq_length) for i in range(n_stages)]
        for stage in stages:
            x = stage(x)
    assert torch.equal(x, expected)
    names = [name_in_model(name) for stage in stages for name, _ in stage.named_parameters()]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())


def test_batches_are_windows_of_text_that_depend_on_the_seed() -> None:
    batches = packed_batches(3, 4, 16, seed=1)
    assert batches.shape == (3, 4, 17) and torch.equal(batches, packed_batches(3, 4, 16, seed=1))
    assert not torch.equal(batches, packed_batches(3, 4, 16, seed=2))


# ---------------------------------------------------------------- tracing


def test_activations_are_counted_until_the_backward_pass_has_used_them() -> None:
    linear, x = nn.Linear(8, 4, bias=False), torch.randn(16, 8)
    activations = Activations(linear.parameters())
    with activations.recording():
        y = linear(x).relu().sum()
    # relu keeps its result (16 x 4), the linear layer its input (16 x 8); weights are not counted
    assert activations.now == activations.peak == (16 * 4 + 16 * 8) * 4
    y.backward()
    assert activations.now == 0 and activations.peak == 768


def test_a_storage_that_is_kept_twice_counts_once() -> None:
    x = torch.randn(10, requires_grad=True)
    activations = Activations([])
    with activations.recording():
        y = (x * x).sum()
    assert activations.peak == 40
    del y
    assert activations.now == 0


def trace(layout: Layout, shape: ModelShape) -> dict[str, Any]:
    """One forward and backward pass of a tensor-parallel model, counted by this project and by PyTorch."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.debug import CommDebugMode
    from torch.distributed.tensor.parallel import loss_parallel

    stage = parallel.Stage(make_model(shape, TRAINING), 0, 1, TRAINING.seq_length)
    parallel.parallelize(stage, init_device_mesh("cpu", (layout.tp,)), layout)
    batch = packed_batches(1, 4, TRAINING.seq_length, 0)[0]
    with CommDebugMode() as theirs, Collectives() as ours, loss_parallel():
        parallel.loss_of(stage(batch[:, :-1]), batch[:, 1:]).backward()
    return {
        "theirs": {str(op).rpartition(".")[2].removesuffix("_tensor"): n for op, n in theirs.get_comm_counts().items()},
        "ours": {kind: n for (_, kind), n in ours.calls.items()},
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tp", "tp+sp"])
def test_collectives_are_counted_as_pytorch_counts_them(name: str) -> None:
    for found in workers.launch(trace, 2, BY_NAME[name], ModelShape(num_hidden_layers=2)):
        theirs = {kind.removesuffix("')>").removesuffix("_into"): n for kind, n in found["theirs"].items()}
        assert theirs == found["ours"] and theirs


# ---------------------------------------------------------------- equality


def outcome(layout: Layout, shape: ModelShape, training: Training) -> tuple[Outcome, dict[str, Any]]:
    batches = packed_batches(training.max_steps, training.batch_size, training.seq_length, 0)
    ranks = workers.launch(parallel.train, layout.world_size, layout, shape, training, batches)
    return Outcome.of(layout, ranks), parallel.train_alone(shape, training, batches)


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "name"), [("qwen2", "tp"), ("llama", "tp+sp"), ("llama", "interleaved")])
def test_other_architectures_are_split_as_rightly(architecture: str, name: str, one_thread: None) -> None:
    shape, layout = ModelShape(architecture), BY_NAME[name]
    found, alone = outcome(layout, shape, TRAINING)
    assert max(found.apart(alone).values()) < 1e-5
    for rank in found.ranks:
        pp_rank = rank["coordinates"]["pp"]
        assert not differences(rank["collectives"], expected_collectives(layout, shape, TRAINING, pp_rank))
        assert not differences(rank["bytes"], expected_bytes(layout, shape, TRAINING, pp_rank))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_ddp_sends_the_buckets_of_the_formula(architecture: str, one_thread: None) -> None:
    """In float64 the model is larger than the first bucket, as the full recipe's is."""
    training, shape = dataclasses.replace(TRAINING, dtype="float64"), ModelShape(architecture)
    found, alone = outcome(BY_NAME["dp"], shape, training)
    assert max(found.apart(alone).values()) < 1e-9
    for rank in found.ranks:
        assert rank["collectives"]["backward"]["all_reduce"]["calls"] == 2
        assert not differences(rank["collectives"], expected_collectives(BY_NAME["dp"], shape, training, 0))


@pytest.mark.slow
def test_in_float64_what_is_left_is_rounding(one_thread: None) -> None:
    training = dataclasses.replace(TRAINING, dtype="float64")
    found, alone = outcome(BY_NAME["tp+sp"], ModelShape(), training)
    assert max(found.apart(alone).values()) < 1e-9  # seen: 3e-11; norms compute in float32 whatever the dtype
    wrong, alone = outcome(PLAIN_PLAN, ModelShape(), training)
    assert wrong.apart(alone)["gradients"] > 1e-4  # no rounding


# ---------------------------------------------------------------- the module's checks and options


def fake_outcome(layout: Layout, shape: ModelShape, weights: dict[str, torch.Tensor]) -> Outcome:
    ranks = []
    for number in range(layout.world_size):
        pp_rank = number // (layout.world_size // layout.pp)
        ranks.append(
            {
                "coordinates": {"pp": pp_rank, "dp": 0, "tp": 0},
                "losses": [3.0, 2.0],
                "gradients": weights,
                "weights": weights,
                "bytes": expected_bytes(layout, shape, TRAINING, pp_rank),
                "collectives": expected_collectives(layout, shape, TRAINING, pp_rank),
                "activation_bytes": 100,
            }
        )
    return Outcome.of(layout, ranks)


def test_the_formula_checks_fail_for_one_call_or_byte_too_many() -> None:
    shape = ModelShape()
    found = fake_outcome(BY_NAME["3d"], shape, {"w": torch.ones(2)})
    assert all(check.passed for check in megatron.formula_checks([found], shape, TRAINING))
    found.ranks[5]["collectives"]["backward"]["all_reduce"]["calls"] += 1
    found.ranks[2]["bytes"]["optimizer"] += 4
    sent, held = megatron.formula_checks([found], shape, TRAINING)
    assert not sent.passed and "3d, rank 5: backward/all_reduce/calls" in sent.observed["differences"]
    assert not held.passed and "3d, rank 2: optimizer" in held.observed["differences"]


def test_the_equality_checks_fail_for_one_wrong_element() -> None:
    weights = {"w": torch.ones(2), "v": torch.zeros(3)}
    alone = {"losses": [3.0, 2.0], "gradients": weights, "weights": weights}
    right = fake_outcome(BY_NAME["tp"], ModelShape(), weights)
    wrong = fake_outcome(PLAIN_PLAN, ModelShape(), {**weights, "v": torch.tensor([0, 0, 1e-3])})
    checks = {check.id: check for check in megatron.equality_checks([right], wrong, alone, 1e-5)}
    assert all(check.passed for check in checks.values())
    checks = {check.id: check for check in megatron.equality_checks([wrong], right, alone, 1e-5)}
    passed = {name.removeprefix("megatron."): check.passed for name, check in checks.items()}
    assert passed == {
        "loss_equal_one_process": True,
        "gradients_equal_one_process": False,
        "weights_equal_one_process": False,
        "comparison_finds_the_wrong_plan": False,
    }
    skipped = megatron.equality_checks([right], None, alone, 1e-5)[-1]
    assert skipped.passed is None


@pytest.mark.parametrize("wrong", [2e-5, float("nan"), float("inf")])
@pytest.mark.parametrize("quantity", ["loss", "gradients", "weights"])
def test_what_is_a_little_apart_or_no_number_is_not_equal(quantity: str, wrong: float) -> None:
    """With the tolerance that is the default, and the wrong value in the last place, where Python's `max` drops a nan."""
    tensors = {"w": torch.ones(2), "v": torch.zeros(3)}
    alone = {"losses": [3.0, 2.0], "gradients": tensors, "weights": tensors}
    found = fake_outcome(BY_NAME["tp"], ModelShape(), tensors)
    if quantity == "loss":
        found.losses[-1] += wrong
    else:
        setattr(found, quantity, {**tensors, "v": torch.tensor([0, 0, wrong])})
    checks = megatron.equality_checks([found], None, alone, Args().tolerance)
    failed = [check.id for check in checks if check.passed is False]
    assert failed == [f"megatron.{quantity}_equal_one_process"]


def test_a_difference_is_that_of_the_worst_element() -> None:
    zero, one = torch.zeros(1000), torch.zeros(1000)
    one[500] = 1
    assert parallel.largest_difference({"a": zero, "b": one, "c": zero}, {"a": zero, "b": zero, "c": zero}) == 1
    assert parallel.furthest_apart([1.0, 2.0, 3.0], [1.0, 2.5, 3.25]) == 0.5


def test_the_loss_of_a_layout_is_the_mean_over_its_replicas() -> None:
    def rank(*losses: float | None) -> dict[str, Any]:
        return {"losses": list(losses), "gradients": {}, "weights": {}}

    found = Outcome.of(BY_NAME["3d"], [rank(None, None), rank(3.0, 2.0), rank(None, None), rank(4.0, 1.0)])
    assert found.losses == [3.5, 1.5]


def test_gradients_of_replicas_are_averaged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two replicas, the other one with the same gradients: the mean is what each of them has, the sum is twice that."""
    monkeypatch.setattr(dist, "all_reduce", lambda buffer, group: buffer.mul_(2))
    parameters = {name: nn.Parameter(torch.zeros(n)) for name, n in (("a", 2), ("b", 3))}
    for parameter in parameters.values():
        parameter.grad = torch.arange(1.0, 1 + len(parameter))
    mesh = {"dp": SimpleNamespace(get_group=lambda: None)}
    worker: Any = SimpleNamespace(
        enter=lambda phase: None, parameters=parameters, layout=BY_NAME["3d"], ddp=None, mesh=mesh
    )
    parallel.Worker.finish_gradients(worker)
    assert [p.grad.tolist() for p in parameters.values()] == [[1.0, 2.0], [1.0, 2.0, 3.0]]


@pytest.mark.parametrize("greedy", ["1f1b", "tp+sp"])
def test_activations_that_do_not_shrink_fail_their_check(greedy: str) -> None:
    kept = {"gpipe": 100, "1f1b": 60, "tp": 100, "tp+sp": 60}
    found = {name: fake_outcome(BY_NAME[name], ModelShape(), {}) for name in kept}
    for name, n_bytes in kept.items():
        found[name].ranks[0]["activation_bytes"] = n_bytes
    assert megatron.activation_check(found).passed
    found[greedy].ranks[0]["activation_bytes"] = 100
    assert not megatron.activation_check(found).passed


def test_a_training_that_diverges_ends_with_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = packed_batches(3, 4, 8, 0)
    training = dataclasses.replace(TRAINING, batch_size=4, seq_length=8, learning_rate=10.0)
    monkeypatch.setattr(parallel, "loss_of", lambda logits, labels: logits.sum() * float("nan"))
    with pytest.raises(Diverged, match=r"the loss is nan in step 1: lower --learning_rate \(10\)"):
        parallel.train_alone(ModelShape(num_hidden_layers=1), training, batches)


def test_the_largest_learning_rate_is_that_of_the_optimizer() -> None:
    for factor in (0.99, 1.01):
        weight = nn.Parameter(torch.ones(2))
        weight.grad = torch.ones(2)
        rate = factor * parallel.LARGEST_LEARNING_RATE
        optimizer = parallel.make_optimizer([weight], dataclasses.replace(TRAINING, learning_rate=rate))
        assert bool(parallel.learning_rate_problems(rate)) == (factor > 1)
        if factor > 1:
            with pytest.raises(RuntimeError, match="overflow"):
                optimizer.step()
        else:
            optimizer.step()


def test_tensors_of_one_side_alone_are_no_equality() -> None:
    with pytest.raises(KeyError, match="one side alone"):
        parallel.largest_difference({"a": torch.ones(1)}, {"a": torch.ones(1), "b": torch.ones(1)})


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"num_hidden_layers": 6}, "multiple of 4"),
        ({"batch_size": 12}, "multiple of 8"),
        ({"num_attention_heads": 3}, "multiple of 2"),
        ({"hidden_size": 100}, "multiple of 8"),
        ({"max_steps": 2}, "at least 3"),
        ({"num_microbatches": 0}, "--num_microbatches 0"),
        ({"num_attention_heads": 0}, "--num_attention_heads 0"),
        ({"tolerance": 0.0}, "positive"),
        ({"learning_rate": 1e38}, "at most 3.4e.37"),
        ({"stage_seconds": float("nan")}, "positive"),
    ],
)
def test_sizes_that_cannot_be_split_are_refused(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        Args(**options)
