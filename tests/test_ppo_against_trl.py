"""On the same tensors, what TRL 1.12's PPOTrainer computed; where it means something else, exactly how far it is off.

`trl_ppo_1_12.json` was recorded by `benchmarks/record_trl_ppo.py`, which runs TRL's own statements.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ppo_toys import config, policy, tokenizer
from torch import Tensor

from llmcore_hf.ppo import PPOTrainer, advantages, losses

FIXTURE = json.loads(Path(__file__).with_name("trl_ppo_1_12.json").read_text(encoding="utf-8"))
FULL = [name for name in FIXTURE["cases"] if name.startswith("full")]
PADDED = [name for name in FIXTURE["cases"] if name.startswith("padded")]
PROMPT = 2  # tokens of each prompt in the recorded logits


class Case:
    """Tensors of one recorded case: `inputs`, what TRL `found`, and the masks that TRL and this project use.

    Attributes:
        mask: (B, T) 1 on the tokens of a completion.
        mask_p1: the same and one more, where TRL puts the score and still trains the critic.
    """

    def __init__(self, name: str) -> None:
        case = FIXTURE["cases"][name]
        self.settings: dict[str, Any] = case["settings"]
        self.inputs, self.found = (
            {key: torch.tensor(value, dtype=torch.float64) for key, value in case[part].items()}
            for part in ("inputs", "found")
        )
        lengths, t = self.inputs["lengths"].unsqueeze(1), self.inputs["logprobs"].shape[1]
        self.mask = (torch.arange(t) < lengths).double()
        self.mask_p1 = (torch.arange(t) <= lengths).double()

    def now(self) -> Tensor:
        """(B, T) log-probabilities of the policy that is updated, written down from the definition."""
        logits = self.inputs["logits"][:, PROMPT - 1 : -1] / (self.settings["temperature"] + 1e-7)  # TRL adds the 1e-7
        return logits.log_softmax(-1).gather(-1, self.inputs["responses"].long().unsqueeze(-1)).squeeze(-1)

    def rewards(self, mask: Tensor) -> Tensor:
        """Rewards as this project makes them, with the score on the last token under `mask`."""
        kl = advantages.kl_k1(self.inputs["logprobs"], self.inputs["ref_logprobs"]) * self.mask
        return advantages.token_rewards(self.found["scores"], kl, self.settings["kl_coef"], mask)

    def gae(self, rewards: Tensor, mask: Tensor) -> Tensor:
        none = torch.zeros(len(mask), dtype=mask.dtype)
        gamma, lam = self.settings["gamma"], self.settings["lam"]
        return advantages.gae(rewards, self.inputs["values"] * mask, mask, none, gamma, lam)


def same(found: Any, expected: Any) -> bool:
    """All in float64, but for TRL's clip fractions, which are float32 inside."""
    return torch.allclose(torch.as_tensor(found), torch.as_tensor(expected), rtol=0, atol=1e-7)


def test_the_record_says_where_it_comes_from() -> None:
    source = FIXTURE["source"]
    assert source["package"] == "trl 1.12.0" and source["file"].endswith("ppo_trainer.py")
    assert set(source["lines"]) == {"rollout", "loss", "metrics", "objective"} and len(source["sha256"]) == 64


# ---------------------------------------------------------------- from log-probabilities to advantages


@pytest.mark.parametrize("name", ["full", "full, rewards whitened"])
def test_rewards_gae_returns_and_whitening_are_trls_when_nothing_is_padded(name: str) -> None:
    case = Case(name)
    rewards = case.rewards(case.mask)
    if case.settings["whiten_rewards"]:
        rewards = advantages.whiten(rewards, case.mask, shift_mean=False)
    raw = case.gae(rewards, case.mask)
    assert same(rewards, case.found["rewards"])
    assert same(raw + case.inputs["values"], case.found["returns"])
    assert same(advantages.whiten(raw, case.mask), case.found["advantages"])


@pytest.mark.parametrize("name", PADDED)
def test_with_the_score_one_token_later_padded_rows_are_trls_too(name: str) -> None:
    """TRL rewards the position after the end token and values the text up to there; its whitening is over the tokens."""
    case = Case(name)
    rewards = case.rewards(case.mask_p1)
    raw = case.gae(rewards, case.mask_p1)
    assert same(rewards, case.found["rewards"])
    assert same((raw + case.inputs["values"]) * case.mask_p1, case.found["returns"] * case.mask_p1)
    assert same(advantages.whiten(raw, case.mask), case.found["advantages"])


def test_the_score_one_token_later_shifts_advantages_by_the_critics_value_after_the_end() -> None:
    """Last token, ours: r + S - V. TRL's: r + g V' - V + g l (S - V'). The same for g = l = 1, whatever V' is."""
    case = Case("padded")
    gamma, lam = case.settings["gamma"], case.settings["lam"]
    ours = case.gae(case.rewards(case.mask), case.mask)
    theirs = case.found["returns"] - case.inputs["values"]
    for row, n in enumerate(case.inputs["lengths"].long().tolist()):
        if n < case.mask.shape[1]:
            score, after = case.found["scores"][row], case.inputs["values"][row, n]
            shift = gamma * after + gamma * lam * (score - after) - score
            assert same(theirs[row, n - 1] - ours[row, n - 1], shift) and abs(shift) > 1e-3
        else:
            assert same(theirs[row], ours[row])
    case = Case("padded, lambda 1")
    ours = case.gae(case.rewards(case.mask), case.mask)
    assert same(ours, (case.found["returns"] - case.inputs["values"]) * case.mask)
    assert same(advantages.whiten(ours, case.mask), case.found["advantages"])


def test_a_missing_end_token_costs_the_same() -> None:
    case = Case("padded")
    ended = case.inputs["lengths"] < case.mask.shape[1]
    penalty = case.settings["missing_eos_penalty"]
    assert same(torch.where(ended, case.inputs["scores"], case.inputs["scores"] - penalty), case.found["scores"])


@pytest.mark.parametrize(("name", "estimator"), [("padded", advantages.kl_k1), ("full, k3", advantages.kl_k3)])
def test_kl_estimates_are_trls(name: str, estimator: Any) -> None:
    case = Case(name)
    kl = estimator(case.inputs["logprobs"], case.inputs["ref_logprobs"]) * case.mask
    assert same(kl, case.found["kl"])
    penalty = -case.settings["kl_coef"] * kl.sum(1).mean()
    assert same(kl.sum(1).mean(), case.found["mean_kl"]) and same(penalty, case.found["mean_non_score_reward"])
    assert same(penalty + case.found["scores"].mean(), case.found["rlhf_reward"])
    assert same((-case.inputs["logprobs"] * case.mask).sum(1).mean(), case.found["mean_entropy"])


# ---------------------------------------------------------------- the losses


def trainer_on(case: Case, folder: Path) -> PPOTrainer:
    options = {name: case.settings[name] for name in ("cliprange", "cliprange_value", "vf_coef")}
    made = PPOTrainer(policy(0), lambda **kwargs: [], config(folder, **options), processing_class=tokenizer())
    made.model.train()
    return made


@pytest.mark.parametrize("name", FULL)
def test_the_trainers_loss_is_trls_when_nothing_is_padded(name: str, tmp_path: Path) -> None:
    """Loss, its parts, clip fractions, approximate KL, ratio, and the gradients that reach policy and critic."""
    case = Case(name)
    logits = case.inputs["logits"].clone().requires_grad_()
    vpred = case.inputs["vpred"].clone().requires_grad_()
    scaled = logits[:, PROMPT - 1 : -1] / (case.settings["temperature"] + 1e-7)
    now = scaled.log_softmax(-1).gather(-1, case.inputs["responses"].long().unsqueeze(-1)).squeeze(-1)
    inputs = {
        **{"input_ids": None, "attention_mask": None, "n_completion": case.mask.shape[1], "first": False},
        **{"mask": case.mask, "n_tokens": case.mask.sum()},
        **{"old_logprobs": case.inputs["logprobs"], "old_values": case.inputs["values"]},
        **{"advantages": case.found["advantages"], "returns": case.found["returns"]},
    }
    trainer = trainer_on(case, tmp_path)
    loss = trainer.compute_loss(lambda *a, **k: (now, None, vpred[:, PROMPT - 1 : -1, 0]), inputs)
    assert same(loss.detach(), case.found["loss"])
    for ours, theirs in {
        "loss/policy_avg": "pg_loss",
        "loss/value_avg": "vf_loss",
        "policy/clipfrac_avg": "pg_clipfrac",
        "val/clipfrac_avg": "vf_clipfrac",
        "policy/approxkl_avg": "approxkl",
    }.items():
        assert same(trainer._step_parts[ours][0], case.found[theirs]), ours
    assert same(trainer._step_parts["val/ratio"][0], case.found["ratio"].mean())
    assert 0 < case.found["pg_clipfrac"] < 1 and 0 < case.found["vf_clipfrac"] < 1, "the clips were at work"
    gradients = torch.autograd.grad(loss, (logits, vpred))
    assert same(gradients[0], case.found["gradient_logits"]) and same(gradients[1], case.found["gradient_vpred"])


def test_means_over_padded_rows_leave_out_what_trls_count() -> None:
    """TRL takes policy loss and clip fraction over the tokens, as here; approximate KL, ratio and entropy over padding,
    too; and the value loss over one position more."""
    case = Case("padded")
    old, mask = case.inputs["logprobs"], case.mask
    loss, clipped = losses.policy_loss(case.now(), old, case.found["advantages"], case.settings["cliprange"])
    assert same(advantages.masked_mean(loss, mask), case.found["pg_loss"])
    assert same(advantages.masked_mean(clipped.double(), mask), case.found["pg_clipfrac"])
    vpred = case.inputs["vpred"][:, PROMPT - 1 : -1, 0]
    loss, clipped = losses.value_loss(
        vpred, case.inputs["values"], case.found["returns"], case.settings["cliprange_value"]
    )
    assert same(advantages.masked_mean(loss, case.mask_p1), case.found["vf_loss"])
    assert same(advantages.masked_mean(clipped.double(), case.mask_p1), case.found["vf_clipfrac"])
    share = mask.sum() / mask.numel()
    kl = advantages.masked_mean(losses.approx_kl(case.now(), old), mask)
    assert same(kl * share, case.found["approxkl"]) and share < 0.7
    ratio = advantages.masked_mean((case.now() - old).exp(), mask)
    assert same(ratio * share + (1 - share), case.found["ratio"].mean())


@pytest.mark.parametrize("name", FULL)
def test_the_entropy_of_the_distribution_is_trls(name: str) -> None:
    from trl.trainer.utils import selective_log_softmax_and_entropy

    case = Case(name)
    logits = case.inputs["logits"][:, PROMPT - 1 : -1]
    temperature = case.settings["temperature"] + 1e-7
    _, entropy = selective_log_softmax_and_entropy(logits, case.inputs["responses"].long(), temperature=temperature)
    assert same(entropy, case.found["entropy"])
