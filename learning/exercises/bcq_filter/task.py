"""The action filter of BCQ. Fill in the function; then: python scripts/exercise.py check bcq_filter"""

from torch import Tensor


def bcq_actions(q_values: Tensor, behaviour_logits: Tensor, threshold: float) -> Tensor:
    """Actions (B,), integers: the highest Q among those that the behaviour model finds likely enough.

    Args:
        q_values: (B, A).
        behaviour_logits: (B, A) logits of the behaviour model.
        threshold: tau, in [0, 1], of the ratio to the likeliest action.
    """
    raise NotImplementedError("bcq_actions")
