"""Scoring completions: reward functions with TRL's signature, reward models, and what is wrong with what they return."""

from __future__ import annotations

import asyncio
import inspect
import math
import os
import re
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import is_conversational

from llmcore_hf.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Text = str | list[dict[str, Any]]  # plain text, or the turns of a conversation
RewardFunc = Callable[..., Sequence[float | None]]
# Columns of these names would collide with what every function gets, or pass for it.
GIVEN = ("trainer_state", "log_metric", "log_extra")  # what TRL gives to functions besides texts and columns
# Names that any run may have: of its folder, of a checkpoint or a part in it.
SAYS_NOTHING = re.compile(r"latest|last|best|final|merged|model|output|checkpoint[-_]?\d*|\d{8}-\d{6}.*", re.IGNORECASE)
OWN_ARGUMENTS = ("prompts", "completion", "completions", "completion_ids", *GIVEN)
LARGEST = torch.finfo(torch.float32).max


class RewardError(UserError):
    """A reward function failed or returned something that is no reward; says which function, batch and sample."""


@dataclass
class Batch:
    """What reward functions see of a rollout of B completions.

    Attributes:
        prompts, completions: B texts each, conversational or plain as in the dataset.
        completion_ids: B lists of token ids.
        columns: the other columns of the dataset, B values each.
        name: of the batch, for messages.
    """

    prompts: list[Text]
    completions: list[Text]
    completion_ids: list[list[int]]
    columns: dict[str, list[Any]]
    name: str


@dataclass
class Scorer:
    """One reward function or reward model, with its weight and, for a model, its tokenizer."""

    name: str
    func: RewardFunc | nn.Module
    weight: float
    tokenizer: PreTrainedTokenizerBase | None = None

    def __call__(self, batch: Batch, batch_size: int, **given: Any) -> Tensor:
        """(B,) rewards in float32; NaN where a function returned None because it has nothing to say.

        Args:
            batch_size: completions that a reward model looks at together.
            given: values for `GIVEN`.

        Raises:
            RewardError: the function raised, or returned the wrong number or kind of values.
        """
        if isinstance(self.func, nn.Module):
            return self._ask_model(batch, batch_size)
        try:
            # lists of its own: what one function does to them, the next one does not see
            columns = {name: list(values) for name, values in batch.columns.items()}
            values = self.func(
                prompts=list(batch.prompts),
                completions=list(batch.completions),
                completion_ids=[list(ids) for ids in batch.completion_ids],
                **given,
                **columns,
            )
            if inspect.iscoroutine(values):
                values = _result_of(values)
            if isinstance(values, Iterator):
                values = list(values)  # a generator fails here, not in the call
        except (Exception, SystemExit) as error:
            what = f"{type(error).__name__}: {error}"
            raise RewardError(f"reward function `{self.name}` failed on {batch.name}: {what}") from error
        return self._checked(values, batch)

    def _checked(self, values: Any, batch: Batch) -> Tensor:
        n = len(batch.prompts)
        try:
            if isinstance(values, str | bytes | dict | set | frozenset):  # of these a list would be made, too
                raise TypeError
            values = list(values.tolist() if isinstance(values, Tensor) else values)
        except TypeError:
            raise RewardError(
                f"reward function `{self.name}` returned {type(values).__name__} for {batch.name}: it must return a list of "
                f"{n} numbers, one per completion"
            ) from None
        if len(values) != n:
            raise RewardError(
                f"reward function `{self.name}` returned {len(values)} values for the {n} completions of {batch.name}: it "
                "must return one number per completion"
            )
        for i, value in enumerate(values):
            if value is not None and not _is_finite_number(value):
                raise RewardError(
                    f"reward function `{self.name}` returned {value!r} for sample {i} of {batch.name}: a reward is a finite "
                    f"number, or None where the function does not apply. {shown(batch, i)}"
                )
        return torch.tensor([math.nan if value is None else float(value) for value in values], dtype=torch.float32)

    @torch.no_grad()
    def _ask_model(self, batch: Batch, batch_size: int) -> Tensor:
        """First logit of the model for each prompt and completion."""
        assert isinstance(self.func, nn.Module) and self.tokenizer is not None
        ids = encode(batch.prompts, batch.completions, self.tokenizer)
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # rows of similar length, so little padding
        device = next(self.func.parameters()).device
        scores = torch.empty(len(ids))
        for start in range(0, len(ids), batch_size):
            rows = order[start : start + batch_size]
            inputs = self.tokenizer.pad(
                {"input_ids": [ids[i] for i in rows]}, padding_side="right", return_tensors="pt"
            ).to(device)
            scores[rows] = self.func(**inputs).logits[:, 0].float().cpu()
        if not scores.isfinite().all():
            i = int((~scores.isfinite()).nonzero()[0])
            raise RewardError(
                f"reward model `{self.name}` gave {scores[i]} to sample {i} of {batch.name}. {shown(batch, i)}"
            )
        return scores


def _result_of(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """What a coroutine returns; in a notebook, whose loop runs already, from a loop in a thread of its own."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, coroutine).result()


def encode(prompts: list[Text], completions: list[Text], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of each prompt with its completion, as TRL's RewardTrainer makes them.

    The score is read at the last token, so an end token closes plain text, as it did in training; a chat template
    brings its own. Both close a completion that was cut off, too.
    """
    pairs: Any = zip(prompts, completions, strict=True)
    rows = [prompt + completion for prompt, completion in pairs]  # texts, or the turns of one conversation
    if is_conversational({"prompt": prompts[0]}):
        return tokenizer.apply_chat_template(rows, return_dict=True)["input_ids"]
    end = tokenizer.eos_token or ""
    return tokenizer([row if row.endswith(end) else row + end for row in rows])["input_ids"]


def _is_finite_number(value: Any) -> bool:
    """Finite in float32, too."""
    try:
        return abs(float(value)) <= LARGEST and not isinstance(value, str | bytes)
    except (TypeError, ValueError, OverflowError):
        return False


def shown(batch: Batch, i: int) -> str:
    """Prompt and completion of sample i, for a message."""
    prompt, completion = (
        text if isinstance(text, str) else text[-1].get("content") for text in (batch.prompts[i], batch.completions[i])
    )
    return f"Prompt: {prompt!r:.300}, completion: {completion!r:.300}"


def make_scorers(
    reward_funcs: Any, weights: list[float] | None, tokenizers: list[PreTrainedTokenizerBase | None] | None = None
) -> list[Scorer]:
    """Scorers of one reward function or several: callables, sequence classifiers, or ids and paths of such.

    Raises:
        ValueError: there is none, the number of weights or tokenizers is another, or a model has not one label.
        RewardError: two have the same name.
    """
    funcs = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    weights = weights if weights is not None else [1.0] * len(funcs)
    tokenizers = tokenizers or [None] * len(funcs)
    if not funcs or not len(funcs) == len(weights) == len(tokenizers):
        raise ValueError(
            f"{len(funcs)} reward functions, {len(weights)} reward_weights, {len(tokenizers)} reward_processing_classes: "
            "there must be one of each, and at least one function"
        )
    scorers = [_make_scorer(*parts) for parts in zip(funcs, weights, tokenizers, strict=True)]
    names = [scorer.name for scorer in scorers]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise RewardError(
            f"two rewards are called `{twice[0]}`, and both would be logged under that name: rename one of them"
        )
    return scorers


def _make_scorer(func: Any, weight: float, tokenizer: PreTrainedTokenizerBase | None) -> Scorer:
    if isinstance(func, str):
        func = load_reward_model(func)
    if not isinstance(func, nn.Module):
        if not callable(func):
            raise ValueError(f"a reward function is a callable, a sequence classifier or its path, not {func!r}")
        return Scorer(getattr(func, "__name__", type(func).__name__), func, weight)
    path = func.config.name_or_path
    if func.config.num_labels != 1:
        raise ValueError(
            f"the reward model {path} has {func.config.num_labels} labels: it must be a classifier with one"
        )
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(path)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    func.config.pad_token_id = tokenizer.pad_token_id  # the classifier finds the last token with it
    func.eval().requires_grad_(False)
    return Scorer(name_of_model(path) or type(func).__name__, func, weight, tokenizer)


def name_of_model(path: str) -> str:
    """What a reward model is called in logs: the last part of its id or path, and those before it until one says whose it is.

    `runs/helpful/checkpoint-100` is `helpful-checkpoint-100`, and the run `output/reward/latest` is `reward-latest`.
    """
    if path and Path(path).expanduser().is_dir():
        path = os.path.abspath(Path(path).expanduser())  # `.` has no name, and the target of a link another one
    parts = [part for part in path.split("/") if part]
    told = next((i for i in reversed(range(len(parts))) if not SAYS_NOTHING.fullmatch(parts[i])), 0)
    return "-".join(parts[told:])


def load_reward_model(path: str, **options: Any) -> PreTrainedModel:
    """The sequence classifier at an id or path, an adapter merged into its base; `options` go to `from_pretrained`.

    Raises:
        UserError: weights are missing in it, as in a language model that was never trained to give rewards.
    """
    if Path(
        path, "adapter_config.json"
    ).is_file():  # also one with a config.json beside it, as other trainers save them
        from peft import AutoPeftModelForSequenceClassification

        adapted = AutoPeftModelForSequenceClassification.from_pretrained(path, num_labels=1, **options)
        merged: Any = adapted.merge_and_unload()
        merged.config.name_or_path = path
        return merged
    model, found = AutoModelForSequenceClassification.from_pretrained(
        path, num_labels=1, output_loading_info=True, **options
    )
    if missing := sorted(found["missing_keys"]):
        raise UserError(
            f"{path} is no reward model: it has no weights for {', '.join(missing)}. Train one with --module reward"
        )
    return model


def total(rewards: Tensor, weights: Tensor, batch: Batch) -> Tensor:
    """(B,) weighted sum over the functions, (B, F) -> (B,); functions that returned None do not count.

    Raises:
        RewardError: no function had anything to say about a completion, or the sum is no finite number.
    """
    silent = rewards.isnan().all(1)
    if silent.any():
        i = int(silent.nonzero()[0])
        raise RewardError(f"every reward function returned None for sample {i} of {batch.name}. {shown(batch, i)}")
    summed = (rewards * weights).nansum(1)
    if not summed.isfinite().all():
        i = int((~summed.isfinite()).nonzero()[0])
        raise RewardError(
            f"the weighted sum of the rewards of sample {i} of {batch.name} is {summed[i]}: lower reward_weights, or scale the "
            f"rewards. {shown(batch, i)}"
        )
    return summed
