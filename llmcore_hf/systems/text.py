"""Text to train on in the systems lessons: packed sequences of the toy task, no padding, nothing fetched."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmcore_hf.data import toy
from llmcore_hf.models.tiny import VOCAB_SIZE, make_tokenizer

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["VOCAB_SIZE", "packed_batches"]


def packed_batches(n_steps: int, batch_size: int, max_length: int, seed: int) -> Tensor:
    """Token ids, (steps, B, T + 1): the first T are what a model reads, the last T what it is to predict.

    Questions and answers are strung together, and windows are cut out at random places.
    """
    import torch

    tokenizer = make_tokenizer()
    text = "".join(f"{prompt} {answer}\n" for prompt, answer in toy.undecided_corpus(2000))
    ids = torch.tensor(tokenizer(text)["input_ids"])
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(ids) - max_length, (n_steps * batch_size,), generator=generator)
    windows = ids.unfold(0, max_length + 1, 1)[starts]  # (steps * B, T + 1)
    return windows.view(n_steps, batch_size, max_length + 1)
