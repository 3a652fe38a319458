"""A rollout: prompts, the policy's answers, and all that is known about each token before the policy is updated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

STRETCH = 32  # tokens generated before rows that have ended are left out
WORTH_A_PASS = 512  # tokens of padding; computing fewer is faster than one more forward pass


@dataclass
class Sequences:
    """B prompts and completions as tensors: prompts padded on the left to P tokens, completions on the right to T.

    Attributes:
        input_ids: (B, P + T).
        attention_mask: (B, P + T), 1 on real tokens.
        mask: (B, T), 1 on completion tokens, the end token included.
    """

    input_ids: Tensor
    attention_mask: Tensor
    mask: Tensor

    @classmethod
    def of(cls, prompts: list[list[int]], completions: list[list[int]], pad: int, device: Any) -> Sequences:
        p, t = max(map(len, prompts)), max(map(len, completions))
        ids = torch.full((len(prompts), p + t), pad)
        attention = torch.zeros_like(ids)
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            row = slice(p - len(prompt), p + len(completion))
            ids[i, row] = torch.tensor(prompt + completion)
            attention[i, row] = 1
        ids, attention = ids.to(device), attention.to(device)
        return cls(ids, attention, attention[:, p:])

    @property
    def n_completion(self) -> int:
        return self.mask.shape[1]

    def select(self, rows: Tensor) -> tuple[dict[str, Any], int]:
        """Inputs of the model for some rows without the padding that none of them needs, and their T."""
        attention = self.attention_mask[rows]
        used = attention.any(0).nonzero()
        first, last = int(used[0]), int(used[-1]) + 1
        cut = self.attention_mask.shape[1] - last
        t = self.n_completion - cut
        attention = attention[:, first:last]
        inputs = {
            "input_ids": self.input_ids[rows, first:last],
            # without padding before a prompt there is nothing to hide: what stands after a token it never sees
            "attention_mask": None if attention[:, 0].all() else attention,
            "n_completion": t,
        }
        return inputs, t

    def by_length(self, rows: Tensor, size: int) -> Iterator[Tensor]:
        """The rows in groups of at most `size`, similar lengths together."""
        lengths = self.attention_mask[rows].sum(1)
        yield from rows[lengths.argsort(descending=True, stable=True)].split(size)

    def by_similar_length(self, size: int) -> Iterator[Tensor]:
        """All rows in groups of at most `size`; a group ends early where that saves `WORTH_A_PASS` tokens of padding."""
        lengths = self.attention_mask.sum(1)
        order = lengths.argsort(descending=True, stable=True)
        sorted_lengths, n, start = lengths[order].tolist(), len(order), 0
        for row in range(1, n):
            left = min(start + size, n) - row  # rows that the group could still take
            if left == 0 or left * (sorted_lengths[start] - sorted_lengths[row]) >= WORTH_A_PASS:
                yield order[start:row]
                start = row
        yield order[start:]


@dataclass
class Rollout:
    """What the update needs. All (B, T), and 0 where `sequences.mask` is."""

    sequences: Sequences
    logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor

    def select(self, rows: Tensor) -> dict[str, Any]:
        """Inputs of the model and targets of the losses for some rows, trimmed."""
        inputs, t = self.sequences.select(rows)
        targets = {
            "mask": self.sequences.mask[rows, :t],
            "old_logprobs": self.logprobs[rows, :t],
            "old_values": self.values[rows, :t],
            "advantages": self.advantages[rows, :t],
            "returns": self.returns[rows, :t],
        }
        return {**inputs, **targets}


def generate(
    policy: Any, prompts: list[list[int]], config: GenerationConfig, batch_size: int, device: Any
) -> list[list[int]]:
    """Completions of the prompts, each up to and including its end token; batches of prompts of similar length.

    `config` takes the place of the model's own generation config, whose `top_k` or `repetition_penalty` would otherwise
    change the distribution that is sampled from.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    completions: list[list[int]] = [[] for _ in prompts]
    own, policy.generation_config = policy.generation_config, config
    try:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            found = _generate_batch(policy, [prompts[i] for i in rows], config, device)
            for i, tokens in zip(rows, found, strict=True):
                completions[i] = tokens
    finally:
        policy.generation_config = own
    return completions


def _generate_batch(policy: Any, prompts: list[list[int]], config: GenerationConfig, device: Any) -> list[list[int]]:
    """Generate in stretches of `STRETCH` tokens, and after each go on with the rows alone that have not ended.

    One call of `generate` computes all rows until the longest has ended.
    """
    completions: list[list[int]] = [[] for _ in prompts]
    batch = Sequences.of(prompts, completions, config.pad_token_id, device)
    ids, attention, cache = batch.input_ids, batch.attention_mask, None
    rows, left = torch.arange(len(prompts), device=device), config.max_new_tokens
    while left and len(rows):
        n = min(left, STRETCH)
        output = policy.generate(
            input_ids=ids,
            attention_mask=attention,
            past_key_values=cache,
            max_new_tokens=n,
            return_dict_in_generate=True,
        )
        new = output.sequences[:, ids.shape[1] :]
        for i, tokens in zip(rows.tolist(), new.tolist(), strict=True):
            completions[i] += up_to_end(tokens, config.eos_token_id)
        going_on = (~torch.isin(new, torch.tensor(config.eos_token_id, device=device)).any(1)).nonzero().squeeze(1)
        left -= n
        if left and len(going_on):
            rows, ids, cache = rows[going_on], output.sequences[going_on], output.past_key_values
            attention = torch.nn.functional.pad(attention[going_on], (0, n), value=1)
            cache.batch_select_indices(going_on)
        else:
            break
    return completions


def up_to_end(tokens: list[int], ends: list[int]) -> list[int]:
    """The tokens up to the first end token, which is kept; all of them when there is none."""
    first = next((i for i, token in enumerate(tokens) if token in ends), len(tokens) - 1)
    return tokens[: first + 1]
