"""One language model, split over processes in every way Megatron-LM does it: tensor, sequence, pipeline, data parallel.

Built from torch alone: DTensor plans (`parallelize_module`), `torch.distributed.pipelining`, DDP. The layers are those of
`transformers`, unchanged; `Stage` only says which of them a process holds.

Sources: tensor parallel, Shoeybi et al. 2019 (arXiv:1909.08053, section 3); pipelines and their bubble, Narayanan et al. 2021
(arXiv:2104.04473, section 2.2); sequence parallel, Korthikanti et al. 2022 (arXiv:2205.05198, section 4.2).
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from llmcore_hf.run_dir import Diverged
from llmcore_hf.systems import devices
from llmcore_hf.systems.pipeline import BETWEEN_STAGES, Span, TimedStage, make_schedule, take_spans
from llmcore_hf.systems.tracing import Activations, Collectives, local, n_bytes

# DTensor's hooks on modules whose inputs are token ids tell us that these need no gradient.
warnings.filterwarnings("ignore", message="Full backward hook is firing")
# In the first step stages tell each other shapes, and in the second DDP its buckets: this one is like all that follow.
MEASURED_STEP = 2


@dataclass(frozen=True)
class ModelShape:
    """A small decoder-only model of `transformers`; head size is `hidden_size / num_attention_heads`."""

    architecture: str = "qwen3"
    vocab_size: int = 320
    hidden_size: int = 64
    intermediate_size: int = 192
    num_hidden_layers: int = 4
    num_attention_heads: int = 4


@dataclass(frozen=True)
class Training:
    """What is trained, the same in every layout: `batch_size` sequences per step, however they are spread."""

    max_steps: int
    batch_size: int
    seq_length: int
    n_microbatches: int
    learning_rate: float
    adam_epsilon: float
    seed: int
    dtype: str = "float32"
    device: str = "cpu"


@dataclass(frozen=True)
class Layout:
    """How the processes share the work: `tp` x `pp` x `dp` of them.

    `n_chunks` is the number of model chunks per pipeline rank (`v` in the papers). `reduces_norm_gradients` False is
    the usual mistake with Qwen3, kept to show that the comparison finds it.
    """

    name: str
    tp: int = 1
    pp: int = 1
    dp: int = 1
    sequence_parallel: bool = False
    schedule: str = "1f1b"
    n_chunks: int = 1
    reduces_norm_gradients: bool = True

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp


# ---------------------------------------------------------------------------------------------------------------------
# The model, and the part of it that one pipeline stage holds
# ---------------------------------------------------------------------------------------------------------------------


def make_model(shape: ModelShape, training: Training) -> nn.Module:
    """The whole model on this process's device, with weights that depend on the seed alone."""
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

    config_class = {"qwen3": Qwen3Config, "qwen2": Qwen2Config, "llama": LlamaConfig}[shape.architecture]
    config = config_class(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_attention_heads,
        head_dim=shape.hidden_size // shape.num_attention_heads,
        max_position_embeddings=training.seq_length,
        tie_word_embeddings=False,  # the first and the last stage would have to keep one matrix in step
        use_cache=False,
        attn_implementation="sdpa",
    )
    torch.manual_seed(training.seed)
    return AutoModelForCausalLM.from_config(config).to(devices.own(training.device), getattr(torch, training.dtype))


class Stage(nn.Module):
    """Consecutive layers of a model; the first stage also embeds, the last one also predicts.

    Without a mask, PyTorch's attention is causal here: sequences are packed, none is padded.
    """

    def __init__(self, model: Any, index: int, n_stages: int, seq_length: int) -> None:
        super().__init__()
        layers = model.model.layers
        bounds = [round(i * len(layers) / n_stages) for i in (index, index + 1)]
        self.embed_tokens = model.model.embed_tokens if index == 0 else None
        self.layers = nn.ModuleDict({str(i): layers[i] for i in range(*bounds)})
        self.norm = model.model.norm if index == n_stages - 1 else None
        self.lm_head = model.lm_head if index == n_stages - 1 else None
        self.rotary_emb = model.model.rotary_emb
        position_ids = torch.arange(seq_length, device=model.device).unsqueeze(0)  # (1, T)
        self.register_buffer("position_ids", position_ids, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Token ids (B, T) or hidden states (B, T, H) -> hidden states, or logits (B, T, V) in the last stage."""
        hidden = self.embed_tokens(x) if self.embed_tokens is not None else x
        rotation = self.rotary_emb(hidden, self.position_ids)  # cos and sin, (1, T, head size) each
        for layer in self.layers.values():
            hidden = layer(hidden, attention_mask=None, position_embeddings=rotation)
        return hidden if self.norm is None or self.lm_head is None else self.lm_head(self.norm(hidden))


def name_in_model(name: str) -> str:
    """The name of a stage's parameter in the whole model."""
    name = name.removeprefix("module.")
    return name if name.startswith("lm_head") else f"model.{name}"


# ---------------------------------------------------------------------------------------------------------------------
# Tensor and sequence parallel
# ---------------------------------------------------------------------------------------------------------------------


def parallelize(stage: Stage, mesh: DeviceMesh, layout: Layout) -> None:
    """Split the matrices of a stage over `mesh`, in place.

    Column then row in attention and MLP: one all-reduce after each in the forward pass, one before each in the backward
    pass (Shoeybi et al. 2019, Figure 4). `PrepareModuleInput` makes that one: without it each of q, k, v and of gate, up
    reduces its own gradient. With `sequence_parallel` norms and residuals work on (B, T / tp, H), and each all-reduce
    becomes a reduce-scatter and an all-gather (Korthikanti et al. 2022, Figure 5).

    Embedding and head are split by vocabulary; the loss is computed on the split logits (`loss_parallel`).
    """
    whole = Shard(1) if layout.sequence_parallel else Replicate()  # between blocks
    plan: dict[str, Any] = {}
    if stage.embed_tokens is not None:
        plan["embed_tokens"] = RowwiseParallel(input_layouts=Replicate(), output_layouts=whole)
    for i, layer in stage.layers.items():
        plan |= {f"layers.{i}.{name}": style for name, style in _layer_plan(layer, layout, whole).items()}
    if stage.lm_head is not None:
        if layout.sequence_parallel:
            plan["norm"] = SequenceParallel()
        plan["lm_head"] = ColwiseParallel(input_layouts=whole, output_layouts=Shard(-1), use_local_output=False)
    parallelize_module(stage, mesh, plan)


def _layer_plan(layer: Any, layout: Layout, whole: Shard | Replicate) -> dict[str, Any]:
    enter = PrepareModuleInput(input_layouts=(whole,), desired_input_layouts=(Replicate(),))
    enter_by_name = PrepareModuleInput(
        input_kwarg_layouts={"hidden_states": whole}, desired_input_kwarg_layouts={"hidden_states": Replicate()}
    )
    columns = {name: ColwiseParallel() for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")}
    columns |= {name: ColwiseParallel() for name in ("mlp.gate_proj", "mlp.up_proj")}
    rows = {name: RowwiseParallel(output_layouts=whole) for name in ("self_attn.o_proj", "mlp.down_proj")}
    plan: dict[str, Any] = {"self_attn": enter_by_name, "mlp": enter, **columns, **rows}
    if layout.sequence_parallel:
        plan |= {"input_layernorm": SequenceParallel(), "post_attention_layernorm": SequenceParallel()}
    if hasattr(layer.self_attn, "q_norm") and layout.reduces_norm_gradients:
        # Qwen3 normalizes each head. A process sees its own heads only, so the gradient of the shared weight must be
        # summed over the processes; dimension 2 of (B, T, heads, head size) is what is split.
        plan |= {
            f"self_attn.{n}": SequenceParallel(sequence_dim=2, use_local_output=True) for n in ("q_norm", "k_norm")
        }
    return plan


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of predicting `labels` (B, T) from logits (B, T, V)."""
    return cross_entropy(logits.flatten(0, 1), labels.flatten())


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


class Worker:
    """One process of a layout: its stages, its part of the batch, and what it found out.

    Args:
        batches: token ids of all steps, (steps, B, T + 1).
    """

    def __init__(self, layout: Layout, shape: ModelShape, training: Training, batches: Tensor) -> None:
        self.layout, self.training = layout, training
        self.device = devices.own(training.device)
        self.batches = batches.to(self.device)
        sizes = (layout.pp, layout.dp, layout.tp)
        self.mesh = init_device_mesh(training.device, sizes, mesh_dim_names=("pp", "dp", "tp"))
        self.collectives = Collectives()
        model = make_model(shape, training)
        n_stages = layout.pp * layout.n_chunks
        pp_rank = self.mesh["pp"].get_local_rank()
        indices = range(pp_rank, n_stages, layout.pp)
        self.stages = [Stage(model, i, n_stages, training.seq_length) for i in indices]
        if layout.tp > 1:
            for stage in self.stages:
                parallelize(stage, self.mesh["tp"], layout)
        self.parameters: dict[str, nn.Parameter] = {
            name_in_model(n): p for stage in self.stages for n, p in stage.named_parameters()
        }
        self.activations = Activations(self.parameters.values())
        self.optimizer = make_optimizer(self.parameters.values(), training)
        if layout.pp > 1:
            self.pipeline = [
                self._timed_stage(stage, i, n_stages) for stage, i in zip(self.stages, indices, strict=True)
            ]
            self.schedule = make_schedule(layout.schedule, self.pipeline, training.n_microbatches, loss_of)
        self.ddp: DistributedDataParallel | None = None
        if layout.dp == layout.world_size > 1:
            self.ddp = DistributedDataParallel(
                self.stages[0], process_group=self.mesh["dp"].get_group(), forward_sync_buffers=False
            )

    def _timed_stage(self, stage: Stage, index: int, n_stages: int) -> TimedStage:
        group = self.mesh["pp"].get_group()
        return TimedStage(stage, index, n_stages, self.device, group=group, on_phase=self.enter)

    def enter(self, phase: str) -> None:
        self.collectives.phase = phase

    @property
    def holds_loss(self) -> bool:
        return self.stages[-1].lm_head is not None

    def forward_backward(self, ids: Tensor, labels: Tensor) -> Tensor | None:
        """Gradients of one step, before they are shared between data-parallel ranks. Returns the loss where it is known."""
        if self.layout.pp > 1:
            return self._pipelined(ids, labels)
        self.enter("forward")
        logits = (self.ddp or self.stages[0])(ids)
        self.enter("loss")
        loss = loss_of(logits, labels)
        self.enter("backward")
        loss.backward()
        return local(loss.detach())

    def _pipelined(self, ids: Tensor, labels: Tensor) -> Tensor | None:
        first = self.stages[0].embed_tokens is not None
        losses: list[Tensor] = []
        inputs = (ids,) if first else ()
        target = {"target": labels, "losses": losses} if self.holds_loss else {}
        self.enter(BETWEEN_STAGES)
        self.schedule.step(*inputs, **target, return_outputs=False)
        return torch.stack([local(loss.detach()) for loss in losses]).mean() if losses else None

    def finish_gradients(self) -> None:
        """Add up what is still spread over processes: partial sums of norm weights, and the shares of the batch."""
        self.enter("gradients")
        for parameter in self.parameters.values():
            grad = parameter.grad
            if isinstance(grad, DTensor) and grad.placements != parameter.placements:
                parameter.grad = grad.redistribute(placements=parameter.placements)
        if self.layout.dp > 1 and self.ddp is None:
            # One contiguous buffer, as in Megatron-LM.
            grads = [local(p.grad) for p in self.parameters.values()]
            buffer = torch.cat([grad.flatten() for grad in grads])
            dist.all_reduce(buffer, group=self.mesh["dp"].get_group())
            for grad, part in zip(grads, buffer.split([grad.numel() for grad in grads]), strict=True):
                grad.copy_((part / self.layout.dp).view_as(grad))

    def step(self, index: int, measure: bool) -> float | None:
        rows = self.batches[index].chunk(self.layout.dp)[self.mesh["dp"].get_local_rank()]
        self.optimizer.zero_grad()
        with loss_parallel():
            if measure:
                with self.collectives, self.activations.recording():
                    loss = self.forward_backward(rows[:, :-1], rows[:, 1:])
                    self.finish_gradients()
            else:
                loss = self.forward_backward(rows[:, :-1], rows[:, 1:])
                self.finish_gradients()
        self.optimizer.step()
        return None if loss is None else float(loss)


BETA_1 = 0.9  # AdamW's default
LARGEST_LEARNING_RATE = (1 - BETA_1) * torch.finfo(torch.float32).max


def learning_rate_problems(learning_rate: float) -> list[str]:
    """What is wrong with it for `make_optimizer`: at most one sentence."""
    if learning_rate <= LARGEST_LEARNING_RATE:
        return []
    return [
        f"--learning_rate {learning_rate:g}: at most {LARGEST_LEARNING_RATE:.1e} (AdamW's first step divides it by "
        f"{1 - BETA_1:.1f}, and the result must be a float32 number)"
    ]


def make_optimizer(parameters: Any, training: Training) -> torch.optim.AdamW:
    # one parameter at a time: on a GPU the default takes them together, and refuses DTensors beside plain ones
    return torch.optim.AdamW(
        parameters, lr=training.learning_rate, eps=training.adam_epsilon, weight_decay=0.0, foreach=False
    )


def train(layout: Layout, shape: ModelShape, training: Training, batches: Tensor) -> dict[str, Any]:
    """Train in this process as one rank of `layout`; to be called in every one of its `world_size` processes.

    One step is measured (collectives, activations), the others are timed.

    Returns:
        `losses` (None where another rank holds them), `gradients` of the first step and final `weights` by name in the
        whole model, `bytes` held, `activation_bytes`, `collectives`, `spans` of the pipeline per step, `seconds` and
        `cpu_seconds` per step.
    """
    worker = Worker(layout, shape, training, batches)
    return _train(worker, len(batches))


def _train(worker: Worker, n_steps: int) -> dict[str, Any]:
    losses, seconds, cpu_seconds = [], [], []
    spans: list[list[Span]] = []
    gradients: dict[str, Tensor] = {}
    for index in range(n_steps):
        wall, cpu = devices.now(worker.device), time.process_time()
        losses.append(worker.step(index, measure=index == MEASURED_STEP))
        seconds.append(devices.now(worker.device) - wall)
        cpu_seconds.append(time.process_time() - cpu)
        if index == 0:
            gradients = {name: whole(p.grad) for name, p in worker.parameters.items()}
        if worker.layout.pp > 1:
            spans.append(take_spans(worker.pipeline))
    parameters = worker.parameters.values()
    states = [value for state in worker.optimizer.state.values() for value in state.values() if value.dim()]
    return {
        "coordinates": dict(zip(("pp", "dp", "tp"), worker.mesh.get_coordinate() or (), strict=True)),
        "losses": losses,
        "gradients": gradients,
        "weights": {name: whole(p.detach()) for name, p in worker.parameters.items()},
        "bytes": {
            "parameters": n_bytes(parameters),
            "gradients": n_bytes(p.grad for p in parameters),
            "optimizer": n_bytes(states),
        },
        "activation_bytes": worker.activations.peak,
        "collectives": worker.collectives.as_dict(),
        "spans": spans,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "tensors": {name: list(local(p).shape) for name, p in worker.parameters.items()},
    }


def whole(tensor: Tensor) -> Tensor:
    """A copy of the tensor in full, on the CPU; every process of its mesh must ask at once."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone().cpu()


def train_alone(shape: ModelShape, training: Training, batches: Tensor) -> dict[str, Any]:
    """The same training as every layout's, in one process, with the model of `transformers` as it is.

    Raises:
        Diverged: a loss is not a finite number.
    """
    model, device = make_model(shape, training), devices.own(training.device)
    optimizer = make_optimizer(model.parameters(), training)
    activations = Activations(model.parameters())
    losses, gradients, seconds, cpu_seconds = [], {}, [], []
    for index, rows in enumerate(batches.to(device)):
        wall, cpu = devices.now(device), time.process_time()
        optimizer.zero_grad()
        with activations.recording():
            loss = loss_of(model(input_ids=rows[:, :-1]).logits, rows[:, 1:])
            loss.backward()
        if index == 0:
            gradients = {name: whole(p.grad) for name, p in model.named_parameters()}
        optimizer.step()
        losses.append(float(loss.detach()))
        seconds.append(devices.now(device) - wall)
        cpu_seconds.append(time.process_time() - cpu)
    require_finite(losses, training.learning_rate)
    states = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    return {
        "losses": losses,
        "gradients": gradients,
        "weights": {name: whole(p.detach()) for name, p in model.named_parameters()},
        "bytes": {
            "parameters": n_bytes(model.parameters()),
            "gradients": n_bytes(p.grad for p in model.parameters()),
            "optimizer": n_bytes(states),
        },
        "activation_bytes": activations.peak,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
    }


def largest_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest absolute difference of any element; nan when one of them is not finite.

    Raises:
        KeyError: a tensor is missing, or there is one too many.
    """
    if found.keys() != expected.keys():
        raise KeyError(f"tensors of one side alone: {sorted(found.keys() ^ expected.keys())}")
    # PyTorch's max keeps a nan wherever it is; Python's drops one that is not the first.
    return float(torch.stack([(found[name] - expected[name]).abs().max() for name in expected]).max())


def furthest_apart(found: Sequence[float], expected: Sequence[float]) -> float:
    """The largest absolute difference of two series of losses; nan when one of them is not finite."""
    if len(found) != len(expected):
        raise ValueError(f"{len(found)} losses beside {len(expected)}")
    differences = torch.tensor(found, dtype=torch.float64) - torch.tensor(expected, dtype=torch.float64)
    return float(differences.abs().max())


def require_finite(losses: Sequence[float], learning_rate: float) -> None:
    """Raises:
    Diverged: a loss is not a finite number, so that there is nothing to compare.
    """
    for step, loss in enumerate(losses, start=1):
        if not math.isfinite(loss):
            raise Diverged(f"the loss is {loss} in step {step}: lower --learning_rate ({learning_rate:g})")
