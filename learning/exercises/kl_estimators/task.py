"""KL estimators. Fill in the function; then: python scripts/exercise.py check kl_estimators"""

from torch import Tensor


def kl_estimators(logprobs: Tensor, ref_logprobs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """k1, k2 and k3 of KL(pi || pi_ref) for each token, in the shape of the input.

    Args:
        logprobs: log pi of tokens that were sampled from pi.
        ref_logprobs: log pi_ref of the same tokens.
    """
    raise NotImplementedError("kl_estimators")
