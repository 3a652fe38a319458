"""Reference solution of `ppo_clip_loss`."""

import torch
from torch import Tensor


def ppo_clip_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, cliprange: float) -> Tensor:
    advantages = advantages.detach()
    ratio = torch.exp(logprobs - old_logprobs.detach())
    clipped = ratio.clamp(1 - cliprange, 1 + cliprange)
    objective = torch.minimum(ratio * advantages, clipped * advantages)
    return -torch.where(mask > 0, objective, 0.0).sum() / mask.sum()
