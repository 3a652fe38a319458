"""Causal attention. Fill in the function; then: python scripts/exercise.py check causal_attention"""

from torch import Tensor


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Output (B, H, Tq, D) of attention in which no query sees a later key.

    Args:
        query: (B, H, Tq, D), the last Tq of Tk positions.
        key, value: (B, H, Tk, D).
    """
    raise NotImplementedError("causal_attention")
