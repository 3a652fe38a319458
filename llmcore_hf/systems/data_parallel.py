"""Data-parallel engines side by side: DDP, ZeroRedundancyOptimizer, FSDP2 and DeepSpeed's ZeRO 0 to 3.

Each trains the same model on the same batches in the processes of one group, and reports what a rank holds and sends. DeepSpeed
is an optional dependency and is imported in the workers alone. None of its operators is compiled: the one that it would build for
a CPU is used by its inference only, and the optimizer is PyTorch's.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from llmcore_hf.distributed import forbid_deepspeed_to_compile
from llmcore_hf.systems import devices
from llmcore_hf.systems.parallel import MEASURED_STEP, ModelShape, Training, loss_of, make_model, make_optimizer, whole
from llmcore_hf.systems.tracing import Collectives, n_bytes

# Where DeepSpeed's optimizers keep gradients between the backward pass and the step.
GRADIENT_STORES = ("averaged_gradients", "all_grad_tensors", "grad_partitions_flat_buffer")
UNIVERSAL = {
    "universal_checkpoint_info": {"universal_checkpoint_version": 0.2}
}  # what a convertible checkpoint carries


@dataclass(frozen=True)
class Engine:
    """One way of training with several replicas.

    Attributes:
        kind: "ddp", "zero_redundancy", "fsdp2" or "deepspeed".
        stage: of DeepSpeed's ZeRO.
        reshard: FSDP2 frees the gathered parameters of a layer after its forward pass, and gathers them again.
        bf16: DeepSpeed trains in bfloat16, with a float32 copy of the weights for the optimizer.
    """

    name: str
    kind: str
    stage: int = 0
    reshard: bool = False
    bf16: bool = False


class Replica:
    """One process's replica of the model in some engine.

    Attributes:
        model: what is called.
        optimizer: what steps.
        parameters: the trained parameters by their name in the whole model.
    """

    model: Any
    optimizer: Any
    parameters: dict[str, nn.Parameter]

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        raise NotImplementedError

    def held(self) -> dict[str, int]:
        """Bytes of this rank: `parameters`, `master` (float32 copies for the optimizer), `optimizer` (Adam's moments)."""
        raise NotImplementedError

    def gradient_bytes(self) -> int:
        """Bytes of all gradients that this rank holds at this moment."""
        return n_bytes(p.grad for p in self.parameters.values())

    def weights(self) -> dict[str, Tensor]:
        """The whole model; every process must ask at once."""
        return {name: whole(p.detach()) for name, p in self.parameters.items()}


class TorchReplica(Replica):
    """DDP, ZeroRedundancyOptimizer and FSDP2: what comes with PyTorch."""

    def __init__(self, engine: Engine, model: nn.Module, training: Training) -> None:
        if engine.kind == "fsdp2":
            # without a mesh, FSDP2 would take the GPU of a machine that has one
            mesh = init_device_mesh(training.device, (dist.get_world_size(),))
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh, reshard_after_forward=engine.reshard)
            fully_shard(model, mesh=mesh, reshard_after_forward=engine.reshard)
            self.model = model
        else:
            self.model = DistributedDataParallel(model, forward_sync_buffers=False)
        self.parameters = dict(model.named_parameters())
        if engine.kind == "zero_redundancy":
            adam = functools.partial(torch.optim.AdamW, eps=training.adam_epsilon, weight_decay=0.0)
            self.optimizer = ZeroRedundancyOptimizer(
                self.parameters.values(), optimizer_class=adam, lr=training.learning_rate
            )
        else:
            self.optimizer = make_optimizer(self.parameters.values(), training)

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def held(self) -> dict[str, int]:
        adam = getattr(self.optimizer, "optim", self.optimizer)  # ZeRO's holds the optimizer of this rank's share
        return {"parameters": n_bytes(self.parameters.values()), "master": 0, "optimizer": moments(adam)}


class DeepSpeedReplica(Replica):
    """DeepSpeed's engine around PyTorch's AdamW."""

    def __init__(self, engine: Engine, model: nn.Module, training: Training, **settings: Any) -> None:
        deepspeed = import_deepspeed(training.device)
        optimizer = make_optimizer(model.parameters(), training)
        config = {**deepspeed_config(engine, training, dist.get_world_size()), **settings}
        self.stage, self.device = engine.stage, training.device
        self.model, self.optimizer, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config, dist_init_required=False
        )
        self.parameters = dict(model.named_parameters())

    def backward(self, loss: Tensor) -> None:
        self.model.backward(loss)

    def step(self) -> None:
        self.model.step()

    def held(self) -> dict[str, int]:
        adam = getattr(self.optimizer, "optimizer", self.optimizer)
        own = [getattr(p, "ds_tensor", p) for p in self.parameters.values()]  # stage 3: the share that stays here
        places = {p.data_ptr() for p in own}
        if self.stage == 3:
            copies = self.optimizer.fp32_partitioned_groups_flat
        else:
            copies = [p for group in adam.param_groups for p in group["params"]]
        master = [p for p in copies if p.data_ptr() not in places]
        return {"parameters": n_bytes(own), "master": n_bytes(master), "optimizer": moments(adam)}

    def gradient_bytes(self) -> int:
        kept = [getattr(self.optimizer, name, None) for name in GRADIENT_STORES]
        held = storages([*(p.grad for p in self.parameters.values()), *kept])
        # A bucket of fixed size is a buffer of the communication: gradients pass through it, and it stays.
        buckets = getattr(self.optimizer, "ipg_buckets", {})
        return sum(held.values()) - sum(
            held.get(place, 0) for place in storages([getattr(b, "buffer", None) for b in buckets.values()])
        )

    def weights(self) -> dict[str, Tensor]:
        deepspeed = import_deepspeed(self.device)
        with deepspeed.zero.GatheredParameters(list(self.parameters.values()), enabled=self.stage == 3):
            return {name: whole(p.detach().float()) for name, p in self.parameters.items()}


def make_replica(engine: Engine, shape: ModelShape, training: Training, **settings: Any) -> Replica:
    model = make_model(shape, training)
    if engine.kind == "deepspeed":
        return DeepSpeedReplica(engine, model, training, **settings)
    return TorchReplica(engine, model, training)


def moments(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of Adam's two moments on this rank."""
    return n_bytes(value for state in optimizer.state.values() for value in state.values() if value.dim())


def storages(value: Any) -> dict[int, int]:
    """Address -> bytes of every storage below `value`."""
    found = [tensor.untyped_storage() for tensor in tensors_in(value)]
    return {storage.data_ptr(): storage.nbytes() for storage in found}


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


# ---------------------------------------------------------------------------------------------------------------------
# DeepSpeed
# ---------------------------------------------------------------------------------------------------------------------


def import_deepspeed(device: str) -> Any:
    """DeepSpeed, quiet, on the CPU or the GPU, and with no operator of its own to compile."""
    os.environ.setdefault("DS_ACCELERATOR", device)
    warnings.filterwarnings("ignore", category=FutureWarning)  # it calls collectives by their former names
    import deepspeed

    forbid_deepspeed_to_compile()
    deepspeed.utils.logger.setLevel("ERROR")
    return deepspeed


def deepspeed_config(engine: Engine, training: Training, world_size: int) -> dict[str, Any]:
    """The JSON configuration. Buckets are as small as the model, so that memory shows parameters and not buffers.

    `use_multi_rank_bucket_allreduce` off: a gradient is reduced to the rank that owns it, as in the paper, instead of to all.
    `gradient_clipping` 0: left out, it would be 1.
    """
    zero = {
        "stage": engine.stage,
        "reduce_bucket_size": 20_000,
        "allgather_bucket_size": 50_000,
        "contiguous_gradients": engine.stage in (1, 2),
        "overlap_comm": False,
        "use_multi_rank_bucket_allreduce": False,
        "stage3_param_persistence_threshold": 0,
        "stage3_prefetch_bucket_size": 0,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
    }
    return {
        "train_micro_batch_size_per_gpu": training.batch_size // world_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": engine.bf16},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def train_all(engines: list[Engine], shape: ModelShape, training: Training, batches: Tensor) -> list[dict[str, Any]]:
    """Train with one engine after the other; to be called in every process of the group. See `train_with`."""
    return [train_with(engine, shape, training, batches) for engine in engines]


def train_with(engine: Engine, shape: ModelShape, training: Training, batches: Tensor) -> dict[str, Any]:
    """Train in this process as one rank.

    Returns:
        `losses` (means over ranks), final `weights`, `bytes` held, `gradient_trace` (bytes of gradients whenever one has come in
        during one backward pass), `gradients_at_rest` (after it), `collectives`, `classes` of engine and optimizer, `seconds` and
        `cpu_seconds` per step.
    """
    replica = make_replica(engine, shape, training)
    collectives, trace = Collectives(), GradientTrace(replica)
    losses, seconds, cpu_seconds, at_rest = [], [], [], 0
    device = devices.own(training.device)
    for index, rows in enumerate(batches.to(device)):
        measured = index == MEASURED_STEP
        wall, cpu = devices.now(device), time.process_time()
        with collectives if measured else contextlib.nullcontext():
            collectives.phase = "forward"
            loss = forward(replica, rows)
            collectives.phase = "backward"
            with trace.recording() if measured else contextlib.nullcontext():
                replica.backward(loss)
            if measured:
                at_rest = replica.gradient_bytes()
            collectives.phase = "step"
            replica.step()
        seconds.append(devices.now(device) - wall)
        cpu_seconds.append(time.process_time() - cpu)
        losses.append(mean_over_ranks(loss))
    return {
        "losses": losses,
        "weights": replica.weights(),
        "bytes": replica.held(),
        "gradient_trace": trace.n_bytes,
        "gradients_at_rest": at_rest,
        "collectives": collectives.as_dict(),
        "classes": [type(replica.model).__name__, type(replica.optimizer).__name__],
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
    }


def forward(replica: Replica, rows: Tensor) -> Tensor:
    """The loss of this rank's share of a batch (B, T + 1)."""
    mine = rows.chunk(dist.get_world_size())[dist.get_rank()]
    return loss_of(replica.model(input_ids=mine[:, :-1]).logits.float(), mine[:, 1:])


def mean_over_ranks(loss: Tensor) -> float:
    total = loss.detach().clone()
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


class GradientTrace:
    """Bytes of gradients during a backward pass, looked at whenever the gradient of a parameter has come in."""

    def __init__(self, replica: Replica) -> None:
        self.n_bytes: list[int] = []
        self._replica, self._recording = replica, False
        # Registered after the engine's own hooks, so that it sees what these leave.
        for parameter in replica.parameters.values():
            parameter.register_post_accumulate_grad_hook(self._look)

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        self._recording = True
        yield
        self._recording = False

    def _look(self, _: nn.Parameter) -> None:
        if self._recording:
            self.n_bytes.append(self._replica.gradient_bytes())


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints that outlive their number of processes
# ---------------------------------------------------------------------------------------------------------------------


def train_and_save(engine: Engine, shape: ModelShape, training: Training, batches: Tensor, folder: str) -> list[float]:
    """Train, save DeepSpeed's checkpoint (a file per rank), and make the universal one of it."""
    replica = make_replica(engine, shape, training)
    losses = _train(replica, batches.to(devices.own(training.device)))
    replica.model.save_checkpoint(folder, tag="saved", client_state=UNIVERSAL)
    if dist.get_rank() == 0:
        _make_universal(Path(folder))
    dist.barrier()
    return losses


def _make_universal(folder: Path) -> None:
    """One file per parameter and moment, whole: `python -m deepspeed.checkpoint.ds_to_universal`, in this process."""
    from argparse import Namespace

    from deepspeed.checkpoint.ds_to_universal import main

    options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        main(
            Namespace(
                input_folder=str(folder / "saved"),
                output_folder=str(folder / "universal"),
                inject_missing_state=False,
                **options,
            )
        )


def load_and_train(engine: Engine, shape: ModelShape, training: Training, batches: Tensor, folder: str) -> list[float]:
    """Go on from the universal checkpoint in `folder`, in however many processes there are now."""
    replica = make_replica(engine, shape, training, checkpoint={"load_universal": True})
    replica.model.load_checkpoint(folder, tag="universal")
    return _train(replica, batches.to(devices.own(training.device)))


def _train(replica: Replica, batches: Tensor) -> list[float]:
    losses = []
    for rows in batches:
        loss = forward(replica, rows)
        replica.backward(loss)
        replica.step()
        losses.append(mean_over_ranks(loss))
    return losses
