"""Data-parallel engines: formulas of the ZeRO paper, PyTorch's engines for real, DeepSpeed where it is installed."""

from __future__ import annotations

import copy
import importlib.util
import math
from typing import Any

import pytest
import torch
from conftest import Run

from llmcore_hf.errors import ConfigError, UserError
from llmcore_hf.systems import data_parallel, deepspeed, formulas, parallel, workers
from llmcore_hf.systems.data_parallel import Engine, deepspeed_config
from llmcore_hf.systems.deepspeed import BFLOAT16, FLOAT32, Args, Outcome
from llmcore_hf.systems.parallel import ModelShape, Training
from llmcore_hf.systems.text import packed_batches

TRAINING = Training(3, 8, 32, 1, 4e-3, 1e-5, seed=0)
SHAPE = ModelShape(num_hidden_layers=2)
TORCH = [engine for engine in FLOAT32 if engine.kind != "deepspeed"]
BY_NAME = {engine.name: engine for engine in (*FLOAT32, *BFLOAT16)}


# ---------------------------------------------------------------- formulas


@pytest.mark.parametrize(("stage", "gigabytes"), [(0, 120), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_the_memory_of_figure_1(stage: int, gigabytes: float) -> None:
    """Rajbhandari et al. 2020, Figure 1: 7.5 billion parameters, 64 ranks, K = 12."""
    held = formulas.zero_bytes(BY_NAME[f"zero {stage}, bf16"], 7_500_000_000, 64)
    assert sum(held.values()) / 1e9 == pytest.approx(gigabytes, abs=0.05)


@pytest.mark.parametrize(
    ("name", "times"),
    [("ddp", 2), ("zero 0", 2), ("zero 1", 2), ("zero 2", 2), ("zero 3", 3), ("fsdp2", 2), ("fsdp2, reshard", 3)],
)
def test_the_traffic_of_section_7(name: str, times: int) -> None:
    traffic = formulas.zero_traffic(BY_NAME[name], 1000)
    sent = sum((2 if kind == "all_reduce" else 1) * n for kinds in traffic.values() for kind, n in kinds.items())
    assert sent == times * 4000


@pytest.mark.parametrize("n_ranks", [1, 2, 3, 8, 64, 1000])
@pytest.mark.parametrize("stage", range(4))
def test_the_cheat_sheet_has_the_same_formulas(stage: int, n_ranks: int) -> None:
    """The course keeps them without torch, as one number; here they are taken apart by kind and phase."""
    from llmcore_hf.learning import formulas as cheat_sheet

    engine = BY_NAME[f"zero {stage}, bf16"]
    for n in (1, 1000, 254_656, 7_500_000_000):
        held = sum(formulas.zero_bytes(engine, n, n_ranks).values())
        assert held == pytest.approx(cheat_sheet.zero_bytes(n, n_ranks, stage), rel=1e-12)
        traffic = formulas.zero_traffic(engine, n).values()
        sent = sum((2 if kind == "all_reduce" else 1) * buffer for kinds in traffic for kind, buffer in kinds.items())
        assert sent == 2 * cheat_sheet.zero_traffic(n, stage)  # elements of two bytes


def test_bfloat16_halves_parameters_and_gradients_and_nothing_else() -> None:
    wide, narrow = (formulas.zero_bytes(BY_NAME[name], 1000, 2) for name in ("zero 3", "zero 3, bf16"))
    assert narrow == {**wide, "parameters": wide["parameters"] / 2, "gradients": wide["gradients"] / 2}


# Gradients where they are sharded (else the share of the optimizer), in elements, of each of three ranks, as DeepSpeed 0.19.8
# and PyTorch 2.13 hold them for the toy's model of 254 656 parameters; and the elements of the largest gather.
THREE_RANKS = {
    "zero_redundancy": ([86_016, 86_016, 82_624], 254_656),
    "fsdp2": ([86_134, 86_134, 82_388], 258_402),
    "zero 1": ([84_886, 84_886, 84_886], 254_658),
    "zero 2": ([86_176, 98_496, 86_370], 254_658),
    "zero 3": ([84_908, 84_908, 84_908], 254_724),
}


def shapes_of(shape: ModelShape) -> formulas.Shapes:
    return [tuple(p.shape) for p in parallel.make_model(shape, TRAINING).parameters()]


@pytest.mark.parametrize("name", THREE_RANKS)
def test_what_does_not_divide_evenly_is_counted_as_the_engine_divides_it(name: str) -> None:
    engine, shapes, (measured, gathered) = BY_NAME[name], shapes_of(ModelShape()), THREE_RANKS[name]
    held = [formulas.rank_bytes(engine, shapes, 3, rank) for rank in range(3)]
    kind, width = ("gradients", 4) if name in ("fsdp2", "zero 2", "zero 3") else ("optimizer", 8)
    assert [n_bytes[kind] / width for n_bytes in held] == measured
    sent = formulas.rank_traffic(engine, shapes, 3)
    assert max(n for kinds in sent.values() for n in kinds.values()) == 4 * gathered


def test_rows_are_dealt_out_as_torch_chunks_them() -> None:
    for rows in (1, 2, 5, 7, 16):
        for n_ranks in (2, 3, 8):
            chunks = [len(chunk) for chunk in torch.zeros(rows, 3).chunk(n_ranks)]
            found = formulas.shares(BY_NAME["fsdp2"], [(rows, 3)], n_ranks)
            assert found == [3 * n for n in chunks] + [0] * (n_ranks - len(chunks))


@pytest.mark.parametrize("name", BY_NAME)
def test_where_all_divides_evenly_a_rank_holds_and_sends_what_the_paper_says(name: str) -> None:
    engine, shapes = BY_NAME[name], 8 * [(8, 8)]
    for rank in range(4):
        assert formulas.rank_bytes(engine, shapes, 4, rank) == formulas.zero_bytes(engine, 512, 4)
    assert formulas.rank_traffic(engine, shapes, 4) == formulas.zero_traffic(engine, 512)


# ---------------------------------------------------------------- the engines of PyTorch, and the checks on them


@pytest.fixture(scope="module")
def trained() -> tuple[list[Outcome], dict[str, Any]]:
    batches = packed_batches(TRAINING.max_steps, TRAINING.batch_size, TRAINING.seq_length, 0)
    ranks = workers.launch(data_parallel.train_all, 2, TORCH, SHAPE, TRAINING, batches)
    outcomes = [Outcome(engine, [rank[i] for rank in ranks]) for i, engine in enumerate(TORCH)]
    return outcomes, parallel.train_alone(SHAPE, TRAINING, batches)


def trained_shapes(alone: dict[str, Any]) -> formulas.Shapes:
    return [tuple(weight.shape) for weight in alone["weights"].values()]


@pytest.mark.slow
def test_pytorchs_engines_equal_one_process_and_the_formulas(trained: tuple[list[Outcome], dict[str, Any]]) -> None:
    outcomes, alone = trained
    shapes = trained_shapes(alone)
    equal = deepspeed.equality_checks(outcomes, alone, 1e-5)
    assert all(check.passed for check in equal[:2]), equal
    assert deepspeed.engine_check(outcomes).passed
    assert deepspeed.traffic_check(outcomes, shapes).passed
    for outcome in outcomes:
        for number, rank in enumerate(outcome.ranks):
            assert outcome.held(rank) == formulas.rank_bytes(outcome.engine, shapes, 2, number)


@pytest.mark.slow
def test_what_is_not_as_it_should_be_fails_a_check(trained: tuple[list[Outcome], dict[str, Any]]) -> None:
    outcomes, alone = trained
    broken = copy.deepcopy(outcomes)
    broken[0].ranks[1]["collectives"]["backward"]["all_reduce"]["bytes"] += 4
    broken[1].ranks[0]["losses"][2] += 1e-3
    broken[2].ranks[0]["classes"][0] = "DistributedDataParallel"
    assert not deepspeed.equality_checks(broken, alone, 1e-5)[0].passed
    engines = deepspeed.engine_check(broken)
    assert not engines.passed and "fsdp2: DistributedDataParallel" in engines.observed["others"]
    traffic = deepspeed.traffic_check(broken, trained_shapes(alone))
    assert not traffic.passed and "ddp, rank 1: backward/all_reduce" in traffic.observed["differences"]


TEN = 10 * [(10, 10)]  # 1000 parameters that two ranks share evenly


def pretend(stage: int, trace: list[int], at_rest: int, bf16: bool = False) -> Outcome:
    engine = Engine(f"zero {stage}", "deepspeed", stage, bf16=bf16)
    held = formulas.zero_bytes(engine, 1000, 2)
    n_bytes = {kind: int(n) for kind, n in held.items() if kind != "gradients"}
    rank = {
        "bytes": n_bytes,
        "gradient_trace": trace,
        "gradients_at_rest": at_rest,
        "losses": [3.0, 2.0],
        "weights": {},
    }
    return Outcome(engine, [copy.deepcopy(rank), copy.deepcopy(rank)])


def pretended() -> list[Outcome]:
    return [
        pretend(0, [2000, 4000], 4000),
        pretend(1, [2000, 4000], 2000),
        pretend(2, [900, 2400], 2000),
        pretend(3, [2200, 2100], 2000),
    ]


def test_the_peak_of_gradients_tells_the_stages_apart() -> None:
    right = pretended()
    memory, peak = deepspeed.memory_checks(right, TEN)
    assert memory.passed and peak.passed
    lazy = [*right[:2], pretend(2, [2000, 4000], 2000), right[3]]  # a stage 2 that frees nothing on the way
    memory, peak = deepspeed.memory_checks(lazy, TEN)
    assert memory.passed and not peak.passed


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kind", ["parameters", "gradients", "master", "optimizer"])
def test_six_percent_too_much_on_any_rank_fails_the_memory_check(kind: str, rank: int) -> None:
    for factor, fails in ((1.04, False), (1.06, True), (0.94, True)):
        found = pretended()
        held = found[3].ranks[rank]
        if kind == "gradients":
            held["gradients_at_rest"] = int(factor * held["gradients_at_rest"])
        else:
            held["bytes"][kind] = int(factor * held["bytes"][kind])
        assert deepspeed.memory_checks(found, TEN)[0].passed is not fails


ALONE = {"losses": [3.0, 2.0], "weights": {"w": torch.ones(2), "v": torch.zeros(3)}}


def equal_run(engine: str = "ddp", **changes: Any) -> Outcome:
    rank = {"losses": [3.0, 2.0], "weights": {"w": torch.ones(2), "v": torch.zeros(3)}, **changes}
    return Outcome(BY_NAME[engine], [rank, rank])


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, [True, True, True]),
        ({"losses": [3.0, 2.0 + 1e-4]}, [False, True, True]),
        ({"losses": [3.0, float("nan")]}, [False, True, True]),
        ({"losses": [3.0, float("inf")]}, [False, True, True]),
        ({"weights": {"w": torch.ones(2), "v": torch.tensor([0.0, 1e-4, 0.0])}}, [True, False, True]),
        ({"weights": {"w": torch.ones(2), "v": torch.tensor([0.0, float("nan"), 0.0])}}, [True, False, True]),
    ],
)
def test_the_equality_checks_fail_for_what_is_apart_or_no_number(changes: Any, verdict: list[bool]) -> None:
    tolerance = Args().tolerance
    assert [c.passed for c in deepspeed.equality_checks([equal_run(**changes)], ALONE, tolerance)] == verdict


@pytest.mark.parametrize(("apart", "passes"), [(0.04, True), (0.06, False), (float("nan"), False)])
def test_bfloat16_may_be_a_twentieth_apart(apart: float, passes: bool) -> None:
    found = equal_run("zero 2, bf16", losses=[3.0, 2.0 + apart])
    assert deepspeed.equality_checks([found], ALONE, 1e-5)[2].passed is passes


def test_a_checkpoint_that_goes_on_elsewhere_fails_its_check() -> None:
    assert deepspeed.checkpoint_check({"a": 1e-6, "b": 0.0}, 1e-5).passed
    assert not deepspeed.checkpoint_check({"a": 0.0, "b": 2e-5}, 1e-5).passed
    assert not deepspeed.checkpoint_check({"a": 0.0, "b": float("nan")}, 1e-5).passed


def test_going_on_is_compared_with_the_run_that_was_not_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps before the checkpoint and two after it, the last of them off by a quarter."""
    halves = {data_parallel.train_and_save: [4.0, 3.0], data_parallel.load_and_train: [2.0, 1.25]}
    monkeypatch.setattr(workers, "launch", lambda work, n_ranks, *args, device: [halves[work]] * n_ranks)
    losses, batches = [4.0, 3.0, 2.0, 1.0], torch.zeros(4, 8, 9)
    assert deepspeed.go_on((2, 2), (1, 1), SHAPE, TRAINING, batches, losses) == 0.25
    losses[-1] = float("nan")
    assert math.isnan(deepspeed.go_on((2, 2), (1, 1), SHAPE, TRAINING, batches, losses))


# ---------------------------------------------------------------- the module


def test_without_deepspeed_the_run_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, llmcore: Run, tmp_path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install .*deepspeed"):
        deepspeed.run(None, None)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is not None, reason="DeepSpeed is installed")
def test_without_deepspeed_the_command_fails_with_one_message(llmcore: Run, tmp_path) -> None:
    result = llmcore("--module", "deepspeed", "--toy", cwd=tmp_path)
    assert result.returncode == 1 and "pip install" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"num_processes": 1}, "--num_processes 1: at least 2"),
        ({"num_processes": 3}, "multiple of 3"),
        ({"num_processes": 100_000}, "--num_processes 100000: at most 16"),
        ({"hidden_size": 100}, "multiple of 8"),
        ({"max_steps": 2}, "at least 3"),
        ({"learning_rate": -1.0}, "positive"),
        ({"learning_rate": 1e38}, "at most 3.4e.37"),
        ({"num_attention_heads": 0}, "--num_attention_heads 0"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        Args(**options)


# ---------------------------------------------------------------- DeepSpeed itself


@pytest.mark.slow
@pytest.mark.parametrize("engine", [e for e in BY_NAME.values() if e.kind == "deepspeed"], ids=lambda e: e.name)
def test_deepspeed_understands_its_configuration(engine: Engine) -> None:
    pytest.importorskip("deepspeed")
    config = data_parallel.import_deepspeed("cpu").DeepSpeedConfig(deepspeed_config(engine, TRAINING, 1))
    assert config.zero_optimization_stage == engine.stage and config.gradient_clipping == 0
    assert not config.zero_config.use_multi_rank_bucket_allreduce
    assert bool(config.bfloat16_config.enabled) is engine.bf16


@pytest.mark.slow
def test_three_ranks_hold_and_send_what_the_formulas_say_to_the_byte() -> None:
    """254 656 parameters do not divide by three, and those at the borders of stage 2 are kept twice."""
    pytest.importorskip("deepspeed")
    training = Training(3, 12, 16, 1, 4e-3, 1e-5, seed=0)
    outcomes = deepspeed.train_engines(3, ModelShape(), training, packed_batches(3, 12, 16, 0))
    shapes = shapes_of(ModelShape())
    for outcome in outcomes:
        for number, rank in enumerate(outcome.ranks):
            assert outcome.held(rank) == formulas.rank_bytes(outcome.engine, shapes, 3, number), outcome.engine
    checks = [*deepspeed.memory_checks(outcomes, shapes), deepspeed.traffic_check(outcomes, shapes)]
    assert all(check.passed for check in checks), checks


@pytest.mark.slow
def test_no_operator_of_deepspeed_would_be_compiled() -> None:
    pytest.importorskip("deepspeed")
    library = data_parallel.import_deepspeed("cpu")
    assert library.ops.__compatible_ops__ and not any(library.ops.__compatible_ops__.values())
    from deepspeed.comm.torch import build_shm_op

    assert build_shm_op() is None


def test_storages_that_share_memory_count_once() -> None:
    whole = torch.zeros(10)
    assert list(data_parallel.storages([whole[:5], {"a": whole[5:]}, None, (torch.zeros(2),)]).values()) == [40, 8]
