"""A column-parallel linear layer. Fill in the functions; then: python scripts/exercise.py check column_parallel"""

from torch import Tensor


def column_parallel_forward(x: Tensor, weight: Tensor, bias: Tensor, world_size: int) -> list[Tensor]:
    """Output (B, out / world_size) of each rank, in the order of ranks.

    Args:
        x: (B, in), the same on every rank.
        weight: (out, in), bias: (out,): of the whole layer; a rank uses its block of them.
        world_size: number of ranks.

    Raises:
        ValueError: out is not a multiple of world_size.
    """
    raise NotImplementedError("column_parallel_forward")


def column_parallel_input_grad(grad_outputs: list[Tensor], weight: Tensor) -> Tensor:
    """Gradient (B, in) of the input.

    Args:
        grad_outputs: gradient (B, out / world_size) of each rank's output, in the order of ranks.
        weight: (out, in) of the whole layer.
    """
    raise NotImplementedError("column_parallel_input_grad")
