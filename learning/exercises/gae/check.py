"""Properties of `gae`. References: the sum of the definition, episode by episode, and its limits."""

import torch

from llmcore_hf.learning.grading import equal

GAMMA = 0.9


def _case(terminated=(), truncated=(), n=6, seed=0, **more):
    generator = torch.Generator().manual_seed(seed)
    case = {name: torch.randn(n, generator=generator) for name in ("rewards", "values", "next_values")}
    ends = {"terminated": set(terminated), "done": set(terminated) | set(truncated)}
    for t in range(n - 1):  # within an episode the next value is the value of the next state
        if t not in ends["done"]:
            case["next_values"][t] = case["values"][t + 1]
    flags = {name: torch.tensor([t in at for t in range(n)]) for name, at in ends.items()}
    return {**case, **flags, "gamma": GAMMA, "lam": 0.8, **more}


def _last_of_episode(done, t):
    return next((k for k in range(t, len(done)) if done[k]), len(done) - 1)


def _delta(case, t):
    after = 0.0 if case["terminated"][t] else case["next_values"][t].item()
    return case["rewards"][t].item() + case["gamma"] * after - case["values"][t].item()


def _by_definition(case):
    found = []
    for t in range(len(case["rewards"])):
        steps = range(t, _last_of_episode(case["done"], t) + 1)
        found.append(sum((case["gamma"] * case["lam"]) ** (k - t) * _delta(case, k) for k in steps))
    return torch.tensor(found)


def sum_of_discounted_residuals(task):
    for case in (_case(), _case(terminated=[5]), _case(terminated=[2], truncated=[4], seed=1)):
        equal(task.gae(**case), _by_definition(case), **case)


def lambda_0_is_the_td_residual(task):
    case = _case(terminated=[2], truncated=[5], lam=0.0)
    equal(task.gae(**case), torch.tensor([_delta(case, t) for t in range(6)]), **case)


def lambda_1_is_the_return_minus_v(task):
    case = _case(terminated=[5], lam=1.0, seed=2)
    returns = [sum(GAMMA ** (k - t) * case["rewards"][k].item() for k in range(t, 6)) for t in range(6)]
    equal(task.gae(**case), torch.tensor(returns) - case["values"], **case)


def termination_has_no_next_value(task):
    case = _case(terminated=[3], n=4)
    case["next_values"][3] = 100.0  # of an observation that is never acted upon
    equal(task.gae(**case)[3], (case["rewards"][3] - case["values"][3]).item(), **case)


def truncation_bootstraps(task):
    case = _case(truncated=[3], n=4)
    case["next_values"][3] = 100.0
    equal(task.gae(**case)[3], (case["rewards"][3] + GAMMA * 100.0 - case["values"][3]).item(), **case)


def nothing_crosses_an_episode(task):
    for ends in ({"terminated": [2]}, {"truncated": [2]}):
        case, other = _case(**ends), _case(**ends)
        other["rewards"][3:] += 1000.0  # the next episode is another one
        equal(task.gae(**other)[:3], task.gae(**case)[:3], **other)
