"""Data-parallel engines: formulas of the ZeRO paper, PyTorch's engines for real, DeepSpeed where it is installed."""

from __future__ import annotations

import copy
import importlib.util
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


# ---------------------------------------------------------------- the engines of PyTorch, and the checks on them


@pytest.fixture(scope="module")
def trained() -> tuple[list[Outcome], dict[str, Any]]:
    batches = packed_batches(TRAINING.max_steps, TRAINING.batch_size, TRAINING.seq_length, 0)
    ranks = workers.launch(data_parallel.train_all, 2, TORCH, SHAPE, TRAINING, batches)
    outcomes = [Outcome(engine, [rank[i] for rank in ranks]) for i, engine in enumerate(TORCH)]
    return outcomes, parallel.train_alone(SHAPE, TRAINING, batches)


def sizes_of(alone: dict[str, Any]) -> list[int]:
    return [weight.numel() for weight in alone["weights"].values()]


@pytest.mark.slow
def test_pytorchs_engines_equal_one_process_and_the_formulas(trained: tuple[list[Outcome], dict[str, Any]]) -> None:
    outcomes, alone = trained
    n_parameters = sum(sizes_of(alone))
    equal = deepspeed.equality_checks(outcomes, alone, 1e-5)
    assert all(check.passed for check in equal[:2]), equal
    assert deepspeed.engine_check(outcomes).passed
    assert deepspeed.traffic_check(outcomes, n_parameters).passed
    for outcome in outcomes:
        expected = formulas.zero_bytes(outcome.engine, n_parameters, 2)
        assert all(outcome.held(rank) == pytest.approx(expected) for rank in outcome.ranks)


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
    traffic = deepspeed.traffic_check(broken, sum(sizes_of(alone)))
    assert not traffic.passed and "ddp, rank 1: backward/all_reduce" in traffic.observed["differences"]


def pretend(stage: int, trace: list[int], at_rest: int) -> Outcome:
    held = formulas.zero_bytes(Engine("", "deepspeed", stage), 1000, 2)
    n_bytes = {kind: int(n) for kind, n in held.items() if kind != "gradients"}
    rank = {"bytes": n_bytes, "gradient_trace": trace, "gradients_at_rest": at_rest}
    return Outcome(Engine(f"zero {stage}", "deepspeed", stage), [rank, rank])


def test_the_peak_of_gradients_tells_the_stages_apart() -> None:
    right = [
        pretend(0, [2000, 4000], 4000),
        pretend(1, [2000, 4000], 2000),
        pretend(2, [900, 2400], 2000),
        pretend(3, [2200, 2100], 2000),
    ]
    memory, peak = deepspeed.memory_checks(right, 1000, 100)
    assert memory.passed and peak.passed
    lazy = [*right[:2], pretend(2, [2000, 4000], 2000), right[3]]  # a stage 2 that frees nothing on the way
    memory, peak = deepspeed.memory_checks(lazy, 1000, 100)
    assert memory.passed and not peak.passed
    large = [*right[:3], pretend(3, [2200, 2100], 2200)]  # 10 % too much
    assert not deepspeed.memory_checks(large, 1000, 100)[0].passed


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
        ({"hidden_size": 100}, "multiple of 8"),
        ({"max_steps": 2}, "at least 3"),
        ({"learning_rate": -1.0}, "positive"),
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
    config = data_parallel.import_deepspeed().DeepSpeedConfig(deepspeed_config(engine, TRAINING, 1))
    assert config.zero_optimization_stage == engine.stage and config.gradient_clipping == 0
    assert not config.zero_config.use_multi_rank_bucket_allreduce
    assert bool(config.bfloat16_config.enabled) is engine.bf16


@pytest.mark.slow
def test_no_operator_of_deepspeed_would_be_compiled() -> None:
    pytest.importorskip("deepspeed")
    library = data_parallel.import_deepspeed()
    assert library.ops.__compatible_ops__ and not any(library.ops.__compatible_ops__.values())
    from deepspeed.comm.torch import build_shm_op

    assert build_shm_op() is None


def test_storages_that_share_memory_count_once() -> None:
    whole = torch.zeros(10)
    assert list(data_parallel.storages([whole[:5], {"a": whole[5:]}, None, (torch.zeros(2),)]).values()) == [40, 8]
