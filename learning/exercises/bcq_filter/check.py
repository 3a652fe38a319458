"""Properties of `bcq_actions`. Reference: the definition in plain numbers, action by action."""

import math

import torch

from llmcore_hf.learning.grading import equal


def _case(threshold=0.3, n_actions=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, logits = torch.randn(2, 6, n_actions, generator=generator)
    return {"q_values": q, "behaviour_logits": 2 * logits, "threshold": threshold}


def _by_definition(case):
    chosen = []
    for q, logits in zip(case["q_values"].tolist(), case["behaviour_logits"].tolist(), strict=True):
        weights = [math.exp(logit - max(logits)) for logit in logits]
        probabilities = [weight / sum(weights) for weight in weights]
        allowed = [a for a, p in enumerate(probabilities) if p / max(probabilities) >= case["threshold"]]
        chosen.append(max(allowed, key=lambda a: q[a]))
    return torch.tensor(chosen)


def best_among_the_likely(task):
    for seed, threshold in enumerate((0.1, 0.3, 0.6)):
        case = _case(threshold, seed=seed)
        equal(task.bcq_actions(**case), _by_definition(case), **case)


def threshold_is_relative(task):
    n = 20  # each action has a probability of 0.05, below the threshold; none is unlikely beside the others
    case = {"q_values": torch.arange(float(n)).unsqueeze(0), "behaviour_logits": torch.zeros(1, n), "threshold": 0.3}
    equal(task.bcq_actions(**case), torch.tensor([n - 1]), **case)


def zero_is_q_learning(task):
    case = _case(0.0)
    equal(task.bcq_actions(**case), case["q_values"].argmax(1), **case)


def one_is_cloning(task):
    case = _case(1.0)
    equal(task.bcq_actions(**case), case["behaviour_logits"].argmax(1), **case)


def forbidden_stays_forbidden(task):
    case = {"q_values": torch.tensor([[-1.0, -2.0, -5.0]]), "behaviour_logits": torch.tensor([[-9.0, 0.0, 0.0]])}
    case["threshold"] = 0.5
    equal(task.bcq_actions(**case), torch.tensor([1]), **case)


def large_logits_stay_finite(task):
    case = {"q_values": torch.tensor([[1.0, 3.0, 2.0]]), "behaviour_logits": torch.tensor([[500.0, 400.0, 500.0]])}
    case["threshold"] = 0.3
    equal(task.bcq_actions(**case), torch.tensor([2]), **case)
