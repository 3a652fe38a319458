"""TD(0) policy evaluation. Fill in the function; then: python scripts/exercise.py check td"""

from torch import Tensor


def td0(transitions: list[tuple[int, float, int, bool]], n_states: int, alpha: float, gamma: float) -> Tensor:
    """Values (S,) after one update per transition, in their order, from values of 0.

    Args:
        transitions: (state, reward, next state, whether the episode terminated there).
        n_states: S.
        alpha: step size.
        gamma: discount.
    """
    raise NotImplementedError("td0")
