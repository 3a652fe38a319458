"""Value iteration. Fill in the function; then: python scripts/exercise.py check value_iteration"""

from torch import Tensor


def value_iteration(transitions: Tensor, rewards: Tensor, gamma: float, tolerance: float) -> tuple[Tensor, Tensor]:
    """Optimal values and a greedy policy of a finite MDP.

    Args:
        transitions: (S, A, S) probability of the next state, given state and action.
        rewards: (S, A) expected reward.
        gamma: discount, below 1.
        tolerance: stop when no value changes by more than this.

    Returns:
        Values (S,) and actions (S,), integers.
    """
    raise NotImplementedError("value_iteration")
