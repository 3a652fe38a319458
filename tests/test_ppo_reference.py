"""A whole rollout and the whole loss, against float64 references that share no code with the package and pad nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ppo_toys import V, config, lora, tokenizer
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from llmcore_hf.ppo import PPOTrainer, advantages, losses
from llmcore_hf.ppo.rewards import Batch

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::FutureWarning")]

END = V - 1
PROMPTS = ["t1 t2 t3", "t4", "t5 t6", "t7 t8 t9 t10"]
COMPLETIONS = [[3, END], [1, 2, 9, 4, 7], [END], [5, 5, 6, 0, END]]  # the second one was cut off
SCORES = [1.5, -0.5, 2.0, 0.25]


def reward(completions, **kwargs):
    return SCORES


def make_trainer(folder: Path, peft: Any = None, **options: Any) -> PPOTrainer:
    """A trainer in float64 whose policy has moved away from the reference, and whose critic has opinions.

    On GPT-2, because other architectures normalize in float32 whatever their weights are.
    """
    torch.manual_seed(0)
    ends = {"pad_token_id": V - 2, "eos_token_id": END, "bos_token_id": END}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=V, n_positions=16, n_embd=16, n_layer=2, n_head=2, **ends)).double()
    defaults = {"max_completion_length": 5, "temperature": 0.8, "gamma": 0.97, "lam": 0.9, "kl_coef": 0.3}
    args = config(folder, **{**defaults, "local_rollout_forward_batch_size": 3, **options})
    trainer = PPOTrainer(model, reward, args, processing_class=tokenizer(), peft_config=peft)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return trainer


def replay(trainer: PPOTrainer) -> None:
    """Let the policy's answers be the ones above."""
    trainer.complete = lambda rows, config, name: (
        Batch([row["prompt"] for row in rows], [""] * 4, COMPLETIONS, {}, name),
        trainer.processing_class([row["prompt"] for row in rows])["input_ids"],
    )


ROWS = [{"prompt": prompt} for prompt in PROMPTS]


def plain_logprobs(model: Any, prompt: list[int], completion: list[int], temperature: float) -> list[float]:
    """One row, no padding, log-softmax by hand."""
    logits = model(torch.tensor([prompt + completion])).logits[0].detach().numpy() / temperature
    found = []
    for t, token in enumerate(completion):
        row = logits[len(prompt) + t - 1]
        found.append(float(row[token] - row.max() - math.log(np.exp(row - row.max()).sum())))
    return found


def plain_entropies(model: Any, prompt: list[int], completion: list[int], temperature: float) -> list[float]:
    """-sum p log p of the distribution that each token was drawn from."""
    logits = model(torch.tensor([prompt + completion])).logits[0].detach().double() / temperature
    p = logits[len(prompt) - 1 : -1].softmax(-1).numpy()
    return [float(x) for x in -(p * np.log(p)).sum(-1)]


def plain_values(trainer: PPOTrainer, prompt: list[int], completion: list[int]) -> list[float]:
    """V of the text before each token, and of the whole."""
    values = trainer.model.value_model(torch.tensor([prompt + completion])).logits[0, :, 0].detach()
    return values[len(prompt) - 1 :].tolist()


def reference_rollout(trainer: PPOTrainer) -> dict[str, list[list[float]]]:
    """Everything about each completion, by sums written down from the papers."""
    args = trainer.args
    rows: dict[str, list[list[float]]] = {
        name: [] for name in ("logprobs", "ref_logprobs", "entropies", "values", "rewards", "advantages")
    }
    for prompt, completion, score in zip(PROMPTS, COMPLETIONS, SCORES, strict=True):
        ids = trainer.processing_class(prompt)["input_ids"]
        own = plain_logprobs(trainer.model.policy, ids, completion, args.temperature)
        ref = plain_logprobs(trainer.ref_model, ids, completion, args.temperature)
        rows["logprobs"].append(own)
        rows["ref_logprobs"].append(ref)
        rows["entropies"].append(plain_entropies(trainer.model.policy, ids, completion, args.temperature))
        rows["values"].append(plain_values(trainer, ids, completion))
        penalized = [-args.kl_coef * (a - b) for a, b in zip(own, ref, strict=True)]
        if completion[-1] == END or args.truncated_completions == "score":
            penalized[-1] += score
        elif args.truncated_completions == "penalty":
            penalized[-1] += score - args.missing_eos_penalty
        rows["rewards"].append(penalized)
    if args.whiten_rewards:
        every = np.concatenate(rows["rewards"])
        scale = np.sqrt(every.var(ddof=1) + 1e-8)
        rows["rewards"] = [[(r - every.mean()) / scale + every.mean() for r in row] for row in rows["rewards"]]
    for i, completion in enumerate(COMPLETIONS):
        r, values, n = rows["rewards"][i], rows["values"][i], len(completion)
        if not (completion[-1] != END and args.truncated_completions == "bootstrap"):
            values = [*values[:n], 0.0]
        delta = [r[t] + args.gamma * values[t + 1] - values[t] for t in range(n)]
        decay = args.gamma * args.lam
        rows["advantages"].append([sum(decay ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)])
    return rows


@pytest.mark.parametrize("truncated", ["penalty", "score", "bootstrap"])
@pytest.mark.parametrize("whitened", [False, True], ids=["plain", "whitened"])
def test_a_rollout_is_what_the_papers_say(tmp_path: Path, truncated: str, whitened: bool) -> None:
    trainer = make_trainer(
        tmp_path, truncated_completions=truncated, whiten_rewards=whitened, whiten_advantages=whitened
    )
    replay(trainer)
    found, expected = trainer.make_rollout(ROWS), reference_rollout(trainer)
    plain = np.concatenate(expected["advantages"])
    shift, scale = (plain.mean(), plain.std(ddof=1)) if whitened else (0.0, 1.0)
    for i, completion in enumerate(COMPLETIONS):
        n = len(completion)
        values = expected["values"][i][:n]
        raw = expected["advantages"][i]
        for ours, theirs in (
            (found.logprobs, expected["logprobs"][i]),
            (found.values, values),
            (found.returns, [a + v for a, v in zip(raw, values, strict=True)]),
            (found.advantages, [(a - shift) / scale for a in raw]),
        ):
            assert ours[i, :n].tolist() == pytest.approx(theirs, abs=1e-5)
            assert not ours[i, n:].any(), "padding holds zeros"
    logged = {name: values[0] for name, values in trainer._rollout_means.items()}
    assert logged["objective/entropy"] == pytest.approx(-np.mean([sum(row) for row in expected["logprobs"]]), abs=1e-5)
    n_ended = sum(row[-1] == END for row in COMPLETIONS)
    assert logged["val/num_eos_tokens"] == pytest.approx(n_ended) and 0 < n_ended < len(COMPLETIONS)
    assert logged["completions/eos_rate"] == pytest.approx(n_ended / len(COMPLETIONS))
    assert logged["completions/mean_length"] == pytest.approx(np.mean([len(row) for row in COMPLETIONS]))
    assert logged["policy/entropy_avg"] == pytest.approx(np.mean(np.concatenate(expected["entropies"])), abs=1e-5)
    pairs = zip(expected["logprobs"], expected["ref_logprobs"], strict=True)
    kl = np.mean([sum(own) - sum(ref) for own, ref in pairs])
    assert logged["objective/kl"] == pytest.approx(kl, abs=1e-5) and abs(kl) > 0.002
    assert logged["objective/non_score_reward"] == pytest.approx(-trainer.args.kl_coef * kl, abs=1e-5)
    assert logged["objective/scores"] == pytest.approx(np.mean(SCORES))
    if not whitened:
        total = np.mean([sum(row) for row in expected["rewards"]])
        assert logged["objective/rlhf_reward"] == pytest.approx(total, abs=1e-5)


@pytest.mark.parametrize("truncated", ["penalty", "score", "bootstrap"])
def test_what_a_truncated_completion_is_worth(tmp_path: Path, truncated: str) -> None:
    """Only the row that was cut off is treated in a way of its own; bootstrapping continues it with the critic's value."""
    trainer = make_trainer(tmp_path, truncated_completions=truncated, missing_eos_penalty=3.0)
    score, ended = torch.tensor([1.0, 1.0]), torch.tensor([True, False])
    reward, following = trainer._at_the_end(score, ended, torch.tensor([0.7, 0.7]))
    expected = {"penalty": ([1, -2], [0, 0]), "score": ([1, 1], [0, 0]), "bootstrap": ([1, 0], [0, 0.7])}[truncated]
    assert reward.tolist() == expected[0] and following.tolist() == pytest.approx(expected[1])


# ---------------------------------------------------------------- losses


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_the_policy_loss_has_the_gradient_that_finite_differences_give() -> None:
    old, a = random(0, 5, 7), random(1, 5, 7)
    new = (old + 0.4 * random(2, 5, 7)).requires_grad_()
    loss, clipped = losses.policy_loss(new, old, a, 0.2)
    assert clipped.any() and not clipped.all()
    assert torch.autograd.gradcheck(lambda x: losses.policy_loss(x, old, a, 0.2)[0], new)
    for r, advantage, found in zip(
        (new - old).exp().detach().flatten(), a.flatten(), loss.detach().flatten(), strict=True
    ):
        expected = -min(float(r) * float(advantage), min(max(float(r), 0.8), 1.2) * float(advantage))
        assert float(found) == pytest.approx(expected, abs=1e-12)


def test_the_value_loss_clips_the_move_and_keeps_the_larger_error() -> None:
    new, old, returns, eps = random(0, 60), random(1, 60), random(2, 60), 0.3
    loss, clipped = losses.value_loss(new.requires_grad_(), old, returns, eps)
    (gradient,) = torch.autograd.grad(loss.sum(), new)
    counts = 0
    for v, o, r, found, flag, slope in zip(new.detach(), old, returns, loss.detach(), clipped, gradient, strict=True):
        near = min(max(float(v), float(o) - eps), float(o) + eps)
        far, close = (float(v) - float(r)) ** 2, (near - float(r)) ** 2
        assert float(found) == pytest.approx(max(far, close) / 2, abs=1e-12) and bool(flag) == (close > far)
        assert float(slope) == pytest.approx(0.0 if close > far else float(v) - float(r), abs=1e-12)
        counts += close > far
    assert 0 < counts < 60


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_whitening_ignores_what_the_mask_leaves_out(share: float) -> None:
    values, mask = random(0, 6, 9), (random(1, 6, 9) > -share).double()
    valid = values[mask > 0].numpy()
    poisoned = torch.where(mask > 0, values, torch.nan)
    for shift in (True, False):
        found = advantages.whiten(poisoned, mask, shift_mean=shift)
        scaled = (valid - valid.mean()) / np.sqrt(valid.var(ddof=1) + 1e-8) + (0 if shift else valid.mean())
        assert np.allclose(found[mask > 0].numpy(), scaled, atol=1e-12) and not found[mask == 0].any()


def test_k3_is_exact_for_policies_that_hardly_differ() -> None:
    """r - 1 - log r, where subtracting in float32 would leave nothing of it."""
    log_ratio = torch.tensor([-2.0, -1e-3, 0.0, 1e-4, 1.0])
    found = advantages.kl_k3(torch.zeros(5), log_ratio)
    exact = [math.expm1(x) - x for x in log_ratio.double().tolist()]
    assert found.tolist() == pytest.approx(exact, rel=1e-3) and found[3] > 0


@pytest.mark.parametrize("how", ["full", "lora on one backbone", "lora on two"])
def test_the_trainers_loss_has_the_gradient_that_finite_differences_give(tmp_path: Path, how: str) -> None:
    """Policy loss, clipped value loss and entropy bonus through both models, in random directions of all weights."""
    trainer = make_trainer(
        tmp_path, None if how == "full" else lora(), share_backbone=how != "lora on two", entropy_coef=0.5, vf_coef=0.5
    )
    replay(trainer)
    rollout = trainer.make_rollout(ROWS)
    rollout.logprobs += 0.2 * random(3, *rollout.logprobs.shape).float()  # ratios on both sides of the clip
    rollout.values += 0.3 * random(4, *rollout.values.shape).float()
    inputs = {**rollout.select(torch.arange(4)), "n_tokens": rollout.sequences.mask.sum(), "first": False}
    weights = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    loss = trainer.compute_loss(trainer.model, inputs)
    gradients = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
    for part, step in (("policy", 1e-6), ("critic", 1e-3)):  # the critic's values are float32
        names = [name for name in weights if ("value" in name) == (part == "critic")]
        for seed in range(3):
            direction = {name: random(seed * 100 + i, *weights[name].shape) for i, name in enumerate(names)}
            size = math.sqrt(sum(float((d**2).sum()) for d in direction.values()))
            expected = sum(float((gradients[name] * direction[name]).sum()) for name in names) / size
            ends = []
            for move in (step / size, -2 * step / size):
                with torch.no_grad():
                    for name in names:
                        weights[name] += move * direction[name]
                    ends.append(float(trainer.compute_loss(trainer.model, inputs).detach()))
            with torch.no_grad():
                for name in names:
                    weights[name] += step / size * direction[name]
            assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(expected, rel=1e-2, abs=2e-5), (part, seed)


def test_the_entropy_bonus_is_the_mean_entropy_over_tokens(tmp_path: Path) -> None:
    losses_by_coefficient = []
    for coefficient in (0.0, 0.5):
        trainer = make_trainer(tmp_path, entropy_coef=coefficient)
        replay(trainer)
        rollout = trainer.make_rollout(ROWS)
        inputs = {**rollout.select(torch.arange(4)), "n_tokens": rollout.sequences.mask.sum(), "first": False}
        losses_by_coefficient.append(float(trainer.compute_loss(trainer.model, inputs).detach()))
    entropies = []
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        ids = trainer.processing_class(prompt)["input_ids"]
        logits = trainer.model.policy(torch.tensor([ids + completion])).logits[0].detach() / trainer.args.temperature
        for row in logits[len(ids) - 1 : -1].softmax(-1).numpy():
            entropies.append(-float((row * np.log(row)).sum()))
    assert losses_by_coefficient[0] - losses_by_coefficient[1] == pytest.approx(0.5 * np.mean(entropies), abs=1e-6)
