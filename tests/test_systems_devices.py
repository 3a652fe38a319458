"""Which device the processes of a systems lesson train on. What needs a GPU runs where there is one."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import Run
from torch.distributed.tensor.parallel import loss_parallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from llmcore_hf import run_dir
from llmcore_hf.errors import ConfigError
from llmcore_hf.systems import deepspeed, elastic, megatron, parallel, workers
from llmcore_hf.systems.data_parallel import Engine, make_replica
from llmcore_hf.systems.parallel import Layout, ModelShape, Training, Worker
from llmcore_hf.systems.text import packed_batches
from llmcore_hf.systems.workers import WorkerFailed

TRAINING = Training(3, 8, 16, 2, 4e-3, 1e-5, seed=0)
SHAPE = ModelShape(num_hidden_layers=2)
N_GPUS = torch.cuda.device_count()


@pytest.mark.parametrize(
    ("args", "needed"), [(megatron.Args, 8), (elastic.Args, 4), (deepspeed.Args, 2)], ids=lambda value: str(value)
)
def test_a_gpu_for_each_process_or_a_refusal(monkeypatch: pytest.MonkeyPatch, args: Any, needed: int) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: needed - 1)
    with pytest.raises(
        ConfigError, match=f"--device cuda: .*, {needed} at one time, and PyTorch sees {needed - 1} here"
    ):
        args(device="cuda")
    args()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: needed)
    assert args(device="cuda").device == "cuda"


def test_one_process_is_for_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert deepspeed.Args(device="cuda", num_processes=1).training.device == "cuda"
    with pytest.raises(ConfigError, match="with one GPU, give --num_processes 1, or leave --device out"):
        deepspeed.Args(device="cuda")
    with pytest.raises(ConfigError, match="--num_processes 1: at least 2"):
        deepspeed.Args(num_processes=1)


@pytest.mark.parametrize(
    ("device", "world_size", "joined"),
    [
        ("cpu", 4, {"backend": "gloo"}),
        ("cuda", 4, {"backend": "nccl", "device_id": torch.device("cuda", 3)}),
        ("cuda", 1, {"backend": "nccl"}),
    ],
)
def test_a_worker_on_a_gpu_talks_over_nccl_and_on_the_cpu_over_gloo(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, device: str, world_size: int, joined: dict[str, Any]
) -> None:
    """The worker itself, in this process, up to the group it enters."""
    gpus: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", gpus.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: gpus[-1])
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GLOO_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "set by the worker, and put back by this")
    monkeypatch.setattr(workers.signal, "signal", lambda *args: None)
    monkeypatch.setattr(workers, "_leave_with_parent", lambda: None)
    monkeypatch.setattr(dist, "TCPStore", lambda *args, **options: None)

    def enter(backend: str, *, store: Any, timeout: Any, rank: int, **options: Any) -> None:
        assert rank == 3 and options.pop("world_size") == world_size
        assert {"backend": backend, **options} == joined
        raise RuntimeError("NCCL error\nLast error: no room in /dev/shm")

    monkeypatch.setattr(dist, "init_process_group", enter)
    with pytest.raises(RuntimeError, match="no room"):
        workers._worker(3, print, world_size, 0, str(tmp_path), device, 9.0, ())
    assert gpus == ([3] if device == "cuda" else [])
    told = (tmp_path / "3.txt").read_text()
    assert ("Last error: no room in /dev/shm. " in told, "NCCL_DEBUG" in told, "GLOO" in told) == (
        (True, True, False) if device == "cuda" else (False, False, True)
    )


def test_the_device_reaches_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    devices_of: list[str] = []

    def launch(*args: Any, device: str, **options: Any) -> Any:
        devices_of.append(device)
        raise WorkerFailed("enough")

    monkeypatch.setattr(workers, "launch", launch)
    training, batches = dataclasses.replace(TRAINING, device="cuda"), torch.zeros(4, 8, 17, dtype=torch.long)
    job = elastic.Job(SHAPE, training, "nowhere", 1)
    for work in (
        lambda: megatron.train_layout(megatron.LAYOUTS[0], SHAPE, training, batches),
        lambda: deepspeed.train_engines(2, SHAPE, training, batches),
        lambda: deepspeed.go_on((2, 2), (1, 1), SHAPE, training, batches, []),
        lambda: elastic.supervise(job, batches, 2, max_restarts=0),
    ):
        with pytest.raises(WorkerFailed, match="enough"):
            work()
    assert devices_of == ["cuda"] * 4


@pytest.mark.parametrize(("given", "on_cpu"), [({"device": "cpu"}, True), ({"device": "cuda"}, False), ({}, False)])
def test_the_summary_names_the_device_that_was_asked_for(given: dict[str, str], on_cpu: bool) -> None:
    assert run_dir._on_cpu(given) is on_cpu and run_dir._on_cpu({**given, "use_cpu": True})


def test_a_distributed_checkpoint_is_written_without_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where there is one, torch would copy tensors ahead in a stream of it, even those of the CPU."""
    monkeypatch.setattr(elastic, "get_state_dict", lambda *args: ({"w": torch.ones(3)}, {}))
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "barrier", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *args: pytest.fail("it takes the GPU"))
    elastic.save(SimpleNamespace(model=None, optimizer=None), tmp_path / "checkpoint-1", [1.0])  # type: ignore[arg-type]
    assert list((tmp_path / "checkpoint-1").glob("*.distcp"))


@pytest.fixture
def world_of_four() -> Iterator[None]:
    """Rank 0 of a process group without the others: its collectives return at once and move nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_a_step_leaves_its_device_nowhere(
    monkeypatch: pytest.MonkeyPatch, world_of_four: None, sequence_parallel: bool
) -> None:
    """On `meta`, where every tensor must be: one that was left on the CPU does not go together with the others."""
    as_cuda = SimpleNamespace(device_count=lambda: 4)  # what DTensor asks `torch.cuda` for
    monkeypatch.setattr(torch, "meta", as_cuda, raising=False)
    optimizers = sys.modules["torch.optim.optimizer"]  # which would take many parameters at once there, as on a GPU
    monkeypatch.setattr(optimizers, "_get_foreach_kernels_supported_devices", lambda: ["meta"])
    layout = Layout("2 x 2", tp=2, dp=2, sequence_parallel=sequence_parallel)
    training = dataclasses.replace(TRAINING, device="meta")
    worker = Worker(layout, SHAPE, training, torch.zeros(3, 8, 17, dtype=torch.long))
    rows = worker.batches[0].chunk(2)[0]
    with loss_parallel():
        loss = worker.forward_backward(rows[:, :-1], rows[:, 1:])
        worker.finish_gradients()
    worker.optimizer.step()
    held = [loss, *worker.parameters.values(), *worker.stages[0].buffers(), worker.batches]
    assert {tensor.device.type for tensor in held if tensor is not None} == {"meta"}
    assert worker.mesh.device_type == "meta"


def test_fsdp2_stays_on_the_cpu_of_a_machine_with_a_gpu(monkeypatch: pytest.MonkeyPatch, world_of_four: None) -> None:
    monkeypatch.setattr(torch._C, "_get_accelerator", lambda: torch.device("cuda"))
    replica = make_replica(Engine("fsdp2", "fsdp2"), SHAPE, TRAINING)
    assert {parameter.device_mesh.device_type for parameter in replica.parameters.values()} == {"cpu"}  # type: ignore[attr-defined]


@pytest.mark.slow
def test_the_one_rank_of_one_gpu_is_judged_by_what_one_rank_can_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU here: the engines equal one process, and nothing is claimed about sharding and messages."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install 'llmcore-hf[deepspeed]'")
    args = deepspeed.Args(max_steps=4, hidden_size=64, num_hidden_layers=2, max_length=32, batch_size=8)
    args.num_processes = 1
    recorded = Recorded()
    deepspeed.run(SimpleNamespace(part=lambda kind: args), recorded)  # type: ignore[arg-type]
    judged = {check.id.removeprefix("deepspeed."): check.passed for check in recorded.checks}
    unknown = {name for name, passed in judged.items() if passed is None}
    assert unknown == {"the_peak_tells_stage_1_from_stage_2", "communication_matches_the_formulas"}
    assert {judged[name] for name in judged.keys() - unknown - {"loss_fell"}} == {True}


class Recorded:
    def __init__(self) -> None:
        self.checks: list[Any] = []
        self.summary: dict[str, Any] = {}

    def log(self, row: dict[str, Any]) -> None: ...

    def write(self, name: str, content: Any) -> None: ...


# ---------------------------------------------------------------- with GPUs


@pytest.mark.slow
@pytest.mark.skipif(N_GPUS < 1, reason="there is no GPU here")
@pytest.mark.parametrize("module", ["deepspeed", "mixed_precision"])
def test_a_lesson_passes_on_one_gpu(llmcore: Run, tmp_path: Any, module: str) -> None:
    options = ["--device", "cuda", "--num_processes", "1"] if module == "deepspeed" else []
    result = llmcore("--module", module, "--toy", *options, cwd=tmp_path, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
@pytest.mark.skipif(N_GPUS < 2, reason="NCCL needs two GPUs for two processes")
@pytest.mark.parametrize("name", ["tp", "tp+sp", "dp", "gpipe", "1f1b", "interleaved"])
def test_two_gpus_compute_what_one_does(name: str) -> None:
    [layout] = [layout for layout in megatron.LAYOUTS if layout.name == name]
    training = dataclasses.replace(TRAINING, device="cuda")
    batches = packed_batches(training.max_steps, training.batch_size, training.seq_length, 0)
    shape = ModelShape(num_hidden_layers=4)
    alone = parallel.train_alone(shape, training, batches)
    ranks = workers.launch(parallel.train, 2, layout, shape, training, batches, device="cuda")
    outcome = megatron.Outcome.of(layout, ranks)
    assert max(outcome.apart(alone).values()) < 1e-5
    assert all(check.passed for check in megatron.formula_checks([outcome], shape, training))
