"""RoPE. Fill in the function; then: python scripts/exercise.py check rope"""

from torch import Tensor


def rope(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """x rotated by its positions, (B, H, T, D).

    Args:
        x: (B, H, T, D), queries or keys; D is even.
        positions: (T,), integers.
        theta: base of the frequencies.
    """
    raise NotImplementedError("rope")
