"""The penalty of CQL. Fill in the function; then: python scripts/exercise.py check cql_penalty"""

from torch import Tensor


def cql_penalty(q_values: Tensor, actions: Tensor) -> Tensor:
    """Mean penalty (scalar) over a batch.

    Args:
        q_values: (B, A) of every action.
        actions: (B,) integers, the actions of the data.
    """
    raise NotImplementedError("cql_penalty")
