"""Group-relative advantages. Fill in the function; then: python scripts/exercise.py check group_advantage"""

from torch import Tensor


def group_advantages(rewards: Tensor, num_generations: int) -> Tensor:
    """Advantages (N * G,) of G answers to each of N prompts.

    Args:
        rewards: (N * G,), the G answers to a prompt in a row.
        num_generations: G, at least 2.
    """
    raise NotImplementedError("group_advantages")
