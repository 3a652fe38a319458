"""From log-probabilities, scores and values to advantages: pure functions on right-padded completions.

Shapes: B completions, T tokens of the longest. `mask` (B, T) is 1 on the tokens of a completion, its end token included,
and 0 on padding; a completion has at least one token. What stands on padding never reaches a result.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]  # sums a tensor over all processes


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log pi(a) - log pi_ref(a): the unbiased estimator of KL(pi || pi_ref) for a ~ pi; single values may be negative.

    Source: Schulman, "Approximating KL Divergence" (2020), k1.
    """
    return logprobs - ref_logprobs


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """r - 1 - log r with r = pi_ref(a) / pi(a): unbiased as well, never negative, and of lower variance.

    Source: Schulman, "Approximating KL Divergence" (2020), k3.
    """
    log_ratio = ref_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio


def token_rewards(scores: Tensor, kl: Tensor, kl_coef: float, mask: Tensor) -> Tensor:
    """(B, T) reward of each token: minus the KL penalty everywhere, plus the completion's score on its last token.

    Args:
        scores: (B,) score of each completion.
        kl: (B, T) KL estimate of each token.

    Source: Ziegler et al., "Fine-Tuning Language Models from Human Preferences" (2019), eq. 2.
    """
    rewards = -kl_coef * kl * mask
    last = mask.sum(1, keepdim=True).long() - 1  # (B, 1)
    return rewards.scatter_add(1, last, scores.unsqueeze(1).to(rewards.dtype))


def gae(rewards: Tensor, values: Tensor, mask: Tensor, bootstrap: Tensor, gamma: float, lam: float) -> Tensor:
    """(B, T) generalized advantage estimates; 0 on padding.

        delta_t = r_t + gamma V(s_{t+1}) - V(s_t),    A_t = delta_t + gamma lambda A_{t+1}

    Args:
        rewards: (B, T).
        values: (B, T) V(s_t), of the text before token t.
        bootstrap: (B,) V of the text after the last token: 0 where the completion ended by itself, the critic's value
            where it was cut off and is treated as unfinished.

    Source: Schulman et al., "High-Dimensional Continuous Control Using Generalized Advantage Estimation" (2016), eq. 16.
    """
    advantages = torch.zeros_like(values)
    running, next_value = torch.zeros_like(bootstrap), bootstrap
    for t in reversed(range(values.shape[1])):
        valid = mask[:, t] > 0
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        running = torch.where(valid, delta + gamma * lam * running, running)
        next_value = torch.where(valid, values[:, t], next_value)
        advantages[:, t] = running * valid
    return advantages


def implied_reward(
    advantages: Tensor, values: Tensor, mask: Tensor, bootstrap: Tensor, gamma: float, lam: float
) -> Tensor:
    """(B,) sum of the token rewards of which `gae` makes these advantages: its inverse, to check a rollout by.

        r_t = A_t - gamma lambda A_{t+1} + V(s_t) - gamma V(s_{t+1})

    Args: as for `gae`; advantages and values are 0 on padding.
    """
    following_advantages, following_values = (torch.nn.functional.pad(x, (0, 1))[:, 1:] for x in (advantages, values))
    last = mask.sum(1, keepdim=True).long() - 1  # (B, 1)
    following_values = following_values.scatter(1, last, bootstrap.unsqueeze(1).to(values.dtype))
    rewards = advantages - gamma * lam * following_advantages + values - gamma * following_values
    return torch.where(mask > 0, rewards, 0.0).sum(1)


def masked_mean(values: Tensor, mask: Tensor, reduce: Reduce | None = None) -> Tensor:
    """Mean over the tokens under the mask; with `reduce`, over those of all processes.

    `where` instead of a product, because NaN * 0 is NaN.
    """
    sums = torch.stack([torch.where(mask > 0, values, 0.0).sum(), mask.sum().to(values.dtype)])
    total, count = reduce(sums) if reduce else sums
    return total / count.clamp(min=1)


def whiten(values: Tensor, mask: Tensor, shift_mean: bool = True, reduce: Reduce | None = None) -> Tensor:
    """Scale to variance 1 and, with `shift_mean`, shift to mean 0, over the tokens under the mask; 0 elsewhere.

    The variance is the unbiased one, as in TRL. A single token has none and is left unscaled.
    """
    mean = masked_mean(values, mask, reduce)
    count = reduce(mask.sum()) if reduce else mask.sum()
    variance = masked_mean((values - mean) ** 2, mask, reduce) * count / (count - 1).clamp(min=1)
    scale = torch.where(count > 1, torch.rsqrt(variance + 1e-8), 1.0)
    whitened = (values - mean) * scale + (0.0 if shift_mean else mean)
    return torch.where(mask > 0, whitened, 0.0)


class FixedKLController:
    """A KL coefficient that stays."""

    def __init__(self, value: float) -> None:
        self.value = value

    def update(self, kl: float, n_completions: int) -> None:
        pass


class AdaptiveKLController(FixedKLController):
    """A KL coefficient that goes up while the KL is above its target and down while it is below.

        e = clip(KL / target - 1, -0.2, 0.2),    coefficient *= 1 + e n / horizon

    Args:
        target: wanted KL of a completion against the reference, in nats.
        horizon: completions over which the coefficient may change by about a fifth.

    Source: Ziegler et al. (2019), section 2.2.
    """

    def __init__(self, value: float, target: float, horizon: int) -> None:
        super().__init__(value)
        self.target, self.horizon = target, horizon

    def update(self, kl: float, n_completions: int) -> None:
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.value *= 1 + error * n_completions / self.horizon
