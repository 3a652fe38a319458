"""The DPO loss. Fill in the function; then: python scripts/exercise.py check dpo_loss"""

from torch import Tensor


def dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float,
) -> Tensor:
    """Mean loss (scalar) of B pairs.

    Args:
        chosen_logps, rejected_logps: (B,) log-probabilities of whole answers under the policy.
        ref_chosen_logps, ref_rejected_logps: (B,) the same under the reference.
        beta: strength of the KL constraint.
    """
    raise NotImplementedError("dpo_loss")
