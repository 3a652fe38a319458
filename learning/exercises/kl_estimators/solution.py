"""Reference solution of `kl_estimators`."""

import torch
from torch import Tensor


def kl_estimators(logprobs: Tensor, ref_logprobs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    log_ratio = ref_logprobs - logprobs
    k1 = -log_ratio
    k2 = 0.5 * log_ratio**2
    k3 = torch.expm1(log_ratio) - log_ratio
    return k1, k2, k3
