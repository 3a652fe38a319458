"""Properties of `kl_estimators`. Reference: `torch.distributions.kl_divergence`, by summing over a small vocabulary."""

import torch
from torch.distributions import Categorical, kl_divergence

from llmcore_hf.learning.grading import equal, true


def _models():
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        policy, reference = torch.randn(2, 6, generator=generator).log_softmax(-1)
        yield policy, reference


def _average(estimates, policy):
    return (policy.exp() * estimates).sum()  # exact: every token, with its probability under the policy


def _unbiased(task, index):
    for policy, reference in _models():
        case = {"logprobs": policy, "ref_logprobs": reference}
        kl = kl_divergence(Categorical(logits=policy), Categorical(logits=reference)).item()
        equal(_average(task.kl_estimators(**case)[index], policy), kl, **case)


def zero_when_they_agree(task):
    case = {"logprobs": torch.tensor([[-0.5, -3.0]]), "ref_logprobs": torch.tensor([[-0.5, -3.0]])}
    equal(task.kl_estimators(**case), [torch.zeros(1, 2)] * 3, **case)


def k1_averages_to_the_kl(task):
    _unbiased(task, 0)


def k3_averages_to_the_kl(task):
    _unbiased(task, 2)


def k3_is_never_negative(task):
    case = {"logprobs": torch.tensor([-1.0, -1.0, -0.1, -4.0]), "ref_logprobs": torch.tensor([-3.0, -0.2, -0.1, -1.0])}
    k1, _, k3 = task.kl_estimators(**case)
    true(bool((k3 >= 0).all()), "no k3 below 0", k3, **case)
    true(bool((k1 < 0).any()), "some k1 below 0, where the reference likes the token more", k1, **case)


def k2_is_half_the_square(task):
    case = {"logprobs": torch.tensor([-1.0, -1.0]), "ref_logprobs": torch.tensor([-3.0, 0.0])}
    equal(task.kl_estimators(**case)[1], torch.tensor([2.0, 0.5]), **case)
