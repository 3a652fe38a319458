"""The clipped loss of PPO. Fill in the function; then: python scripts/exercise.py check ppo_clip_loss"""

from torch import Tensor


def ppo_clip_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, cliprange: float) -> Tensor:
    """Mean loss (scalar) over the tokens under the mask.

    Args:
        logprobs: (B, T) of the policy that is trained.
        old_logprobs: (B, T) of the policy that sampled; a constant.
        advantages: (B, T), a constant.
        mask: (B, T), 1 on tokens, 0 on padding.
        cliprange: epsilon.
    """
    raise NotImplementedError("ppo_clip_loss")
