"""The two losses of PPO per token, and what is logged about them. Shapes as in `advantages`: (B, T)."""

from __future__ import annotations

import torch
from torch import Tensor

from llmcore_hf.ppo.advantages import Reduce, masked_mean


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, cliprange: float) -> tuple[Tensor, Tensor]:
    """Clipped surrogate objective, negated, and where the clipped term is the one that counts.

        ratio = pi(a|s) / pi_old(a|s),    loss = -min(ratio A, clip(ratio, 1 - eps, 1 + eps) A)

    Returns:
        Loss (B, T) and clipped (B, T), bool: tokens that give no gradient because their ratio has left the range.

    Source: Schulman et al., "Proximal Policy Optimization Algorithms" (2017), eq. 7.
    """
    ratio = torch.exp(logprobs - old_logprobs)
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    return torch.maximum(unclipped, clipped), clipped > unclipped


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, cliprange_value: float) -> tuple[Tensor, Tensor]:
    """Half the squared error of the critic, its move away from the old value clipped, and where the clip counts.

        loss = 1/2 max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2)

    Source: the value loss of OpenAI Baselines' `ppo2`, item 9 in Huang et al., "The 37 Implementation Details of PPO"
    (2022); kept by TRL.
    """
    near = torch.clamp(values, old_values - cliprange_value, old_values + cliprange_value)
    unclipped, clipped = (values - returns) ** 2, (near - returns) ** 2
    return 0.5 * torch.maximum(unclipped, clipped), clipped > unclipped


def approx_kl(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """(B, T) half the squared log-ratio: how far the policy has moved from the one that generated.

    Source: Schulman, "Approximating KL Divergence" (2020), k2; TRL logs the same as `policy/approxkl_avg`.
    """
    return 0.5 * (logprobs - old_logprobs) ** 2


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor, reduce: Reduce | None = None) -> Tensor:
    """1 - Var(R - V) / Var(R) over the tokens under the mask: 1 a perfect critic, 0 one no better than the mean.

    With `reduce`, over the tokens of all processes. NaN when the returns do not vary.
    """
    left, total = (_variance(x, mask, reduce) for x in (returns - values, returns))
    return torch.where(total > 0, 1 - left / total, torch.nan)


def _variance(values: Tensor, mask: Tensor, reduce: Reduce | None) -> Tensor:
    return masked_mean((values - masked_mean(values, mask, reduce)) ** 2, mask, reduce)
