"""Generalized advantage estimation. Fill in the function; then: python scripts/exercise.py check gae"""

from torch import Tensor


def gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    done: Tensor,
    gamma: float,
    lam: float,
) -> Tensor:
    """Advantages (T,) of T steps in a row, which may belong to several episodes.

    Args:
        rewards: (T,).
        values: (T,) V(s_t).
        next_values: (T,) V(s_{t+1}); at the end of an episode that of its last observation.
        terminated: (T,) bool, the episode ended there by itself: nothing follows.
        done: (T,) bool, the episode ended there, by itself or at a time limit.
        gamma: discount.
        lam: lambda.
    """
    raise NotImplementedError("gae")
