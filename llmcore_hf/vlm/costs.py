"""What a vision-language model costs: parameters, visual tokens, operations, memory, images per second.

Everything but the speed is counted, not timed, and is the same on every machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from llmcore_hf.alignment.evaluation import evaluating
from llmcore_hf.vlm.evaluation import PromptProcessor, Row, encode_prompts, padded
from llmcore_hf.vlm.training import eager_attention

TOWER, CONNECTOR, LANGUAGE_MODEL = "vision tower", "connector", "language model"
ADAM_BYTES = 12  # for each parameter that learns: gradient and two moments, float32


@dataclass(frozen=True)
class Parts:
    """Names of the modules that make up a model; what is in neither list is its language model."""

    tower: tuple[str, ...]
    connector: tuple[str, ...]

    def of(self, name: str) -> str:
        """The part that a parameter or module belongs to."""
        steps = name.split(".")
        if any(step in self.connector for step in steps):
            return CONNECTOR
        return TOWER if any(step in self.tower for step in steps) else LANGUAGE_MODEL


@dataclass(frozen=True)
class Counted:
    """What can be counted of a model.

    Attributes:
        parameters, trained: by part; trained are those that differ from the checkpoint the run began with.
        flops: of a forward pass over one image and its question, by part; a multiplication and an addition are two.
        visual_tokens: vectors that the language model gets of one image.
        prompt_tokens: positions of the language model that one image and its question take.
        cache_bytes: keys and values it keeps for them.
        activation_bytes: kept for the backward pass, of one image in a training batch.
    """

    parameters: dict[str, int]
    trained: dict[str, int]
    flops: dict[str, int]
    visual_tokens: int
    prompt_tokens: int
    weight_bytes: int
    cache_bytes: int
    activation_bytes: float

    @property
    def training_bytes(self) -> int:
        """Weights, and what AdamW adds to those that learn."""
        return self.weight_bytes + ADAM_BYTES * sum(self.trained.values())


def count(model: Any, start: Any, processor: Any, rows: Sequence[Row], parts: Parts) -> Counted:
    """Count everything of `model`, which was trained from `start`; `rows` are a batch of questions about an image each."""
    moved = changed(model, start)
    one = encode_prompts(processor, rows[:1]).to(model.device)
    parameters: dict[str, int] = dict.fromkeys((TOWER, CONNECTOR, LANGUAGE_MODEL), 0)
    trained = dict(parameters)
    for name, parameter in model.named_parameters():
        parameters[parts.of(name)] += parameter.numel()
        trained[parts.of(name)] += parameter.numel() if name in moved else 0
    return Counted(
        parameters,
        trained,
        flops_of(model, one, parts),
        visual_tokens(model, one["input_ids"][0]),
        one["input_ids"].shape[1],
        sum(p.numel() * p.element_size() for p in model.parameters()),
        cache_bytes(model, one["input_ids"].shape[1]),
        activation_bytes(model, training_batch(processor, rows).to(model.device), moved) / len(rows),
    )


def changed(model: Any, start: Any) -> set[str]:
    """Names of the parameters that have another value than in `start`, which may have more."""
    before = dict(start.named_parameters())
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


def visual_tokens(model: Any, input_ids: torch.Tensor) -> int:
    """Places of the image among the tokens, (T,); for a model that looks from the side, the latents it looks at."""
    if hasattr(model.config, "num_latents"):
        return int(model.config.num_latents)
    return int((input_ids == model.config.image_token_index).sum())


def flops_of(model: Any, inputs: Any, parts: Parts) -> dict[str, int]:
    """Floating-point operations of a forward pass, by part."""
    counter = FlopCounterMode(display=False)
    with eager_attention(model), counter:  # fused attention is not counted everywhere; without gradients BLIP-2 fails
        model.eval()(**inputs)
    found = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    wanted = {TOWER: parts.tower, CONNECTOR: parts.connector}
    by_part = {part: sum(found[name] for name in _outermost(found, names)) for part, names in wanted.items()}
    return {**by_part, LANGUAGE_MODEL: found["Global"] - sum(by_part.values())}


def _outermost(found: dict[str, int], names: tuple[str, ...]) -> list[str]:
    """The modules called by one of those names, or an item of a list with such a name, without what lies within them."""

    def is_one(name: str) -> bool:
        steps = name.split(".")
        return (steps[-2] if steps[-1].isdigit() else steps[-1]) in names

    def within(name: str) -> bool:
        steps = name.split(".")
        return any((outer := ".".join(steps[:i])) in found and is_one(outer) for i in range(2, len(steps)))

    return [name for name in found if "." in name and is_one(name) and not within(name)]


def cache_bytes(model: Any, n_tokens: int) -> int:
    """Keys and values that the language model keeps of so many tokens."""
    text = model.config.get_text_config()
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return int(2 * text.num_hidden_layers * heads * head_size * n_tokens * model.dtype.itemsize)


def training_batch(processor: Any, rows: Sequence[Row]) -> Any:
    """The rows as the trainers see them."""
    from transformers import BatchEncoding
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    collator = DataCollatorForVisionLanguageModeling(PromptProcessor(processor), None, completion_only_loss=True)
    return BatchEncoding(padded(collator([dict(row) for row in rows]), "right"))


def activation_bytes(model: Any, batch: Any, moved: set[str]) -> int:
    """Tensors that a forward pass keeps for the backward pass when the parameters `moved` learn; weights are not counted."""
    let_learn(model, moved)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # holding them keeps their addresses from being used again

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.train()(**batch)
    return sum(storage.nbytes() for storage in kept.values())


def let_learn(model: Any, names: set[str]) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
        parameter.grad = None


def images_per_second(works: dict[str, Callable[[], Any]], n_images: int, repeats: int = 3) -> dict[str, float]:
    """Name -> images per second, of the fastest of several calls, made in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats + 1):  # the first is for warming up
        for name, work in works.items():
            start = time.perf_counter()
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: n_images / min(found[1:]) for name, found in seconds.items()}


def training_step(model: Any, batch: Any) -> Callable[[], None]:
    """Forward and backward over a batch, with those parameters that learn."""

    def step() -> None:
        model.train()(**batch).loss.backward()
        model.zero_grad()

    return step


def answering(model: Any, inputs: Any, pad_token_id: int, n_tokens: int) -> Callable[[], None]:
    """Greedy answers of exactly `n_tokens` each, so that every model does the same work."""

    def answer() -> None:
        with evaluating(model):
            model.generate(
                **inputs,
                do_sample=False,
                use_cache=True,
                min_new_tokens=n_tokens,
                max_new_tokens=n_tokens,
                pad_token_id=pad_token_id,
            )

    return answer
