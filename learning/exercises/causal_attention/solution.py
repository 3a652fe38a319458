"""Reference solution of `causal_attention`."""

import math

import torch
from torch import Tensor


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    n_queries, n_keys = query.shape[-2], key.shape[-2]
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])  # (B, H, Tq, Tk)
    later = torch.ones(n_queries, n_keys, dtype=torch.bool).triu(n_keys - n_queries + 1)
    return scores.masked_fill(later, -math.inf).softmax(-1) @ value
