"""Held-out evaluation, the same before and after training: log-likelihoods, scores and generated answers.

It tokenizes on its own, through the same chat template as TRL, so that it also checks what TRL trains on. Rows are
shared out over the processes and gathered again, also where these hold a model's weights in shards; greedy decoding
draws no random numbers, and sampling puts the generators back, so that evaluating changes nothing in the training that
follows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy

from llmcore_hf.models.loading import stop_ids
from llmcore_hf.stats import paired_interval

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Text = str | list[dict[str, Any]]


@dataclass
class GenerationArguments:
    """Answers to held-out prompts, before and after training."""

    max_generation_samples: int = field(
        default=64, metadata={"help": "Answer the first N held-out prompts, before and after training."}
    )
    max_new_tokens: int = field(default=128, metadata={"help": "Length limit of those answers, in tokens."})


@dataclass(frozen=True)
class Encoded:
    """Token ids of prompt and completion together; the first `n_prompt` of them are the prompt."""

    ids: list[int]
    n_prompt: int

    @property
    def n_completion(self) -> int:
        return len(self.ids) - self.n_prompt

    def truncate(self, max_length: int | None) -> Encoded:
        return self if max_length is None else Encoded(self.ids[:max_length], min(self.n_prompt, max_length))


@dataclass(frozen=True)
class Likelihoods:
    """Per row: the sum of the log-probabilities of the completion tokens, in nats, and their number."""

    logprobs: list[float]
    n_tokens: list[int]


@dataclass(frozen=True)
class Answers:
    """Per row: the generated text, its tokens with the one that ended it, and whether the model ended it by itself."""

    texts: list[str]
    ids: list[list[int]]
    terminated: list[bool]

    @property
    def n_tokens(self) -> list[int]:
        return [len(ids) for ids in self.ids]


def encode(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Text,
    completion: Text,
    tools: Any = None,
    chat_template: str | None = None,
) -> Encoded:
    """Tokenize a row as the trainers do; `chat_template` replaces the tokenizer's own.

    The completion begins where the ids of the prompt alone and of the whole row part. An end-of-sequence token is
    added to plain text; a chat template brings its own.
    """
    if isinstance(completion, str):
        assert isinstance(prompt, str)
        eos = str(tokenizer.eos_token)
        text = prompt + completion + ("" if completion.endswith(eos) else eos)
        prompt_ids, ids = tokenizer(prompt)["input_ids"], tokenizer(text)["input_ids"]
    else:
        assert isinstance(prompt, list)
        template = {"tools": tools, "chat_template": chat_template, "tokenize": True, "return_dict": True}
        prompt_ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **template)["input_ids"]
        ids = tokenizer.apply_chat_template(prompt + completion, **template)["input_ids"]
    shared = next((i for i, (a, b) in enumerate(zip(prompt_ids, ids, strict=False)) if a != b), len(prompt_ids))
    return Encoded(list(ids), min(shared, len(ids)))


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """No gradients, no dropout; afterwards the model is in the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), _weights(model):
            yield
    finally:
        model.train(was_training)


def _weights(model: torch.nn.Module) -> AbstractContextManager[None]:
    """Gather weights that nobody else gathers.

    ZeRO-3 spreads them over the processes when a model is loaded. Its engine gathers them layer by layer, but there is none
    before the training begins.
    """
    if not any(hasattr(p, "ds_id") for p in model.parameters()):
        return nullcontext()
    hooks = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    if any(hook.__module__.startswith("deepspeed") for hook in hooks):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(model.parameters()))


def likelihoods(
    model: PreTrainedModel,
    rows: Sequence[Encoded],
    pad_token_id: int,
    batch_size: int,
    accelerator: Accelerator,
) -> Likelihoods:
    """Log-likelihood of the completion of each row under `model`, in float32."""
    logprobs = _by_batch(model, rows, pad_token_id, batch_size, accelerator, _batch_logprobs)
    return Likelihoods(logprobs, [_n_predicted(row) for row in rows])


def scores(
    model: PreTrainedModel,
    rows: Sequence[Encoded],
    pad_token_id: int,
    batch_size: int,
    accelerator: Accelerator,
    min_width: int = 0,
) -> list[float]:
    """The output of a sequence classifier with one label for each row, in float32.

    `min_width` pads the rows further than their batch needs, in tokens.
    """

    def of_batch(model: Any, ids: torch.Tensor, mask: torch.Tensor, batch: list[Encoded]) -> list[float]:
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits  # (B, 1)
        return logits[:, 0].float().tolist()

    return _by_batch(model, rows, pad_token_id, batch_size, accelerator, of_batch, min_width)


def _by_batch(
    model: PreTrainedModel,
    rows: Sequence[Encoded],
    pad_token_id: int,
    batch_size: int,
    accelerator: Accelerator,
    of_batch: Callable[[Any, torch.Tensor, torch.Tensor, list[Encoded]], list[float]],
    min_width: int = 0,
) -> list[float]:
    """A number of each row, in their order; `of_batch` gets ids (B, T) and attention mask (B, T), padded on the right."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))  # similar lengths together: little padding
    found: list[tuple[int, float]] = []
    with evaluating(model):
        for numbers in _batches(order, batch_size, accelerator):
            batch = [rows[i] for i in numbers]
            ids, mask = _pad(batch, pad_token_id, min_width)
            with accelerator.autocast():
                values = of_batch(model, ids.to(accelerator.device), mask.to(accelerator.device), batch)
            found += zip(numbers, values, strict=True)
    return _gather_in_order(found, accelerator)


def _pad(rows: list[Encoded], pad_token_id: int, min_width: int) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(min_width, *(len(row.ids) for row in rows))
    ids = torch.full((len(rows), width), pad_token_id)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        mask[i, : len(row.ids)] = 1
    return ids, mask


def _n_predicted(row: Encoded) -> int:
    """Completion tokens that have a token before them to be predicted from."""
    return row.n_completion - (row.n_prompt == 0)


def _batch_logprobs(model: Any, ids: torch.Tensor, mask: torch.Tensor, rows: list[Encoded]) -> list[float]:
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits  # (B, T, V)
    sums = []
    for i, row in enumerate(rows):  # row by row: only the completion's logits become float32
        start, end = max(row.n_prompt, 1), len(row.ids)
        sums.append(-cross_entropy(logits[i, start - 1 : end - 1].float(), ids[i, start:end], reduction="sum").item())
    return sums


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Text],
    max_new_tokens: int,
    batch_size: int,
    accelerator: Accelerator,
    tools: Sequence[Any] | None = None,
    sampling: dict[str, Any] | None = None,
) -> Answers:
    """Answers of `model` to the prompts, in the order of the prompts; `tools` are those of each prompt.

    Greedy without `sampling`, which holds `temperature`, `top_p` and `top_k`. Samples are drawn with a fixed seed, and the
    generators are then as they were.
    """
    asked = list(zip(prompts, tools or [None] * len(prompts), strict=True))

    def encode(numbers: list[int]) -> Any:
        return _encode_prompts(tokenizer, [asked[i] for i in numbers])

    return generate_from(model, tokenizer, len(asked), encode, max_new_tokens, batch_size, accelerator, sampling)


def generate_from(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    n_rows: int,
    encode: Callable[[list[int]], Any],
    max_new_tokens: int,
    batch_size: int,
    accelerator: Accelerator,
    sampling: dict[str, Any] | None = None,
) -> Answers:
    """Answers to rows 0 to N - 1, as `generate`; `encode` makes the padded inputs of the rows of those numbers."""
    found: list[tuple[int, tuple[str, list[int], bool]]] = []
    stops = stop_ids(model, tokenizer)
    how: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if sampling:
        how = {"do_sample": True, **sampling}
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    with evaluating(model), torch.random.fork_rng(devices):
        torch.manual_seed(_share(accelerator)[0])
        for batch in _batches(list(range(n_rows)), batch_size, accelerator):
            inputs = encode(batch).to(accelerator.device)
            with accelerator.autocast():
                output = model.generate(
                    **inputs,
                    max_new_tokens=max_new_tokens,
                    use_cache=True,  # the trainers turn it off in the model's config
                    pad_token_id=tokenizer.pad_token_id,
                    **how,
                )
            # what was not generated: the prompt, or the one token that a decoder begins with
            n_given = 1 if has_encoder(model) else inputs["input_ids"].shape[1]
            for i, ids in zip(batch, output[:, n_given:].tolist(), strict=True):
                length = next((n + 1 for n, token in enumerate(ids) if token in stops), len(ids))
                ended = bool(ids[:length]) and ids[length - 1] in stops
                found.append((i, (tokenizer.decode(ids[:length], skip_special_tokens=True), ids[:length], ended)))
    texts, completion_ids, ended_flags = zip(*_gather_in_order(found, accelerator), strict=True)
    return Answers(list(texts), list(completion_ids), list(ended_flags))


def has_encoder(model: Any) -> bool:
    """Whether the text model reads prompts with an encoder of its own (T5), so that its answers do not begin with them."""
    return bool(getattr(model, "language_model", model).config.is_encoder_decoder)


@dataclass
class Questions:
    """Held-out prompts that the model is asked before and after training, and what the answers are compared with.

    `references` maps the name of a metric to one text per prompt; the metric is the share of answers equal to it.
    """

    prompts: list[Text]
    tools: list[Any]
    references: dict[str, list[str]]
    max_new_tokens: int
    batch_size: int

    def ask(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, accelerator: Accelerator
    ) -> tuple[Answers | None, dict[str, list[float]]]:
        """The answers, and per metric one value per prompt; nothing when there are no prompts."""
        from llmcore_hf.metrics import ExactMatch

        if not self.prompts:
            return None, {}
        answers = generate(
            model, tokenizer, self.prompts, self.max_new_tokens, self.batch_size, accelerator, self.tools
        )
        metrics = {
            name: ExactMatch().compute(predictions=answers.texts, references=texts)["scores"]
            for name, texts in self.references.items()
        }
        metrics["completions/terminated"] = [float(ended) for ended in answers.terminated]
        metrics["completions/mean_length"] = [float(n) for n in answers.n_tokens]
        return answers, metrics


def _encode_prompts(tokenizer: PreTrainedTokenizerBase, asked: list[tuple[Text, Any]]) -> Any:
    options = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    if isinstance(asked[0][0], str):
        return tokenizer([prompt for prompt, _ in asked], **options)
    texts = [
        tokenizer.apply_chat_template(prompt, tools=tools, add_generation_prompt=True, tokenize=False)
        for prompt, tools in asked
    ]
    return tokenizer(texts, add_special_tokens=False, **options)


def _batches(order: list[int], batch_size: int, accelerator: Accelerator) -> Iterator[list[int]]:
    """This process's share of the rows, in batches, as many as every other process has.

    Those with a row less do the first one again, because all have to take part whenever a sharded model gathers a layer.
    """
    index, n_shares = _share(accelerator)
    mine = order[index::n_shares]
    if len(mine) < math.ceil(len(order) / n_shares):
        mine = [*mine, order[0]]
    for start in range(0, len(mine), batch_size):
        yield mine[start : start + batch_size]


def _share(accelerator: Accelerator) -> tuple[int, int]:
    """Which share of the rows this process does, of how many: processes that hold slices of one model do the same rows."""
    parallelism = accelerator.parallelism_config
    together = parallelism.non_data_parallel_size if parallelism else 1
    return accelerator.process_index // together, accelerator.num_processes // together


def _gather_in_order(found: list[tuple[int, Any]], accelerator: Accelerator) -> list[Any]:
    """The results of all processes, sorted by row number, in every process; of a row done twice the first one's."""
    if accelerator.num_processes > 1:
        from accelerate.utils import gather_object

        found = gather_object(found)
    by_number: dict[int, Any] = {}
    for number, value in found:
        by_number.setdefault(number, value)
    return [value for _, value in sorted(by_number.items())]


def compare(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """The `eval` block of a summary.

    Each argument maps a metric to a list of per-row values, whose mean is the metric, or to a number with the count
    of rows, `(value, n)`. Lists get a 95 % interval of the change.
    """
    block: dict[str, Any] = {"before": {}, "after": {}, "delta": {}, "ci95": {}, "n": {}}
    for name in after:
        first, last = before[name], after[name]
        if isinstance(last, list):
            block["ci95"][name] = list(paired_interval(first, last))
            block["n"][name] = len(last)
            first, last = sum(first) / len(first), sum(last) / len(last)
        else:
            (first, _), (last, block["n"][name]) = first, last
        block["before"][name], block["after"][name], block["delta"][name] = first, last, last - first
    return block
