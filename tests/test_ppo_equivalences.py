"""What PPO reduces to, what it must not compute, and two ways to the same training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from ppo_toys import V, config, lora, policy, tokenizer
from torch import Tensor
from transformers import TrainerCallback

from llmcore_hf.ppo import PPOTrainer

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::FutureWarning")]

END = V - 1
ROWS = 48
WORDS = [[i % 14, 3 * i % 14, 5 * i % 14][: 1 + i % 3] for i in range(ROWS)]  # prompts of one to three words
PROMPTS = Dataset.from_dict({"prompt": [" ".join(f"t{word}" for word in words) for words in WORDS]})


def few_threes(completion_ids, **kwargs):
    return [len(ids) / 6 - sum(token == 3 for token in ids) for ids in completion_ids]


def make_trainer(folder: Path, peft: Any = None, **options: Any) -> PPOTrainer:
    sizes = {"per_device_train_batch_size": ROWS, "max_completion_length": 6, "num_ppo_epochs": 1, "max_steps": 1}
    args = config(folder, **{**sizes, "logging_steps": 1, "learning_rate": 1e-2, **options})
    return PPOTrainer(policy(0, layers=2), few_threes, args, PROMPTS, processing_class=tokenizer(), peft_config=peft)


class Gradients(TrainerCallback):
    """The gradients of the last optimizer step, before the optimizer sees them."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def keep_rollouts(trainer: PPOTrainer) -> list[Any]:
    """The rollouts of a training, as they are made."""
    kept, make = [], trainer.make_rollout

    def keep(rows: Any) -> Any:
        kept.append(make(rows))
        return kept[-1]

    trainer.make_rollout = keep
    return kept


# ---------------------------------------------------------------- REINFORCE


@pytest.mark.parametrize("kl_coef", [0.0, 0.2])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_without_critic_and_lambda_ppo_is_reinforce(tmp_path: Path, kl_coef: float, micro_batches: int) -> None:
    """Gradient of -1/N sum_t log pi(a_t) R_t over all N completion tokens of the rollout (not a mean per completion),
    R_t the rewards from token t on: here the score, less kl_coef times the rest of log pi - log pi_ref.
    """
    trainer = make_trainer(
        tmp_path, lam=1.0, gamma=1.0, vf_coef=0.0, whiten_advantages=False, kl_coef=kl_coef, max_grad_norm=0.0,
        truncated_completions="score", per_device_train_batch_size=ROWS // micro_batches,
        gradient_accumulation_steps=micro_batches, temperature=0.7,
    )  # fmt: skip
    if kl_coef:
        with torch.no_grad():
            trainer.ref_model.lm_head.weight.mul_(0.5)  # or the first KL would be 0
    gradients = Gradients()
    trainer.add_callback(gradients)
    model = policy(0, layers=2)  # before the update
    rollouts = keep_rollouts(trainer)
    trainer.train()

    sequences = rollouts[0].sequences
    mask, ids = sequences.mask, sequences.input_ids
    positions = (sequences.attention_mask.cumsum(1) - 1).clamp(min=0)

    def logprobs(model: Any) -> Tensor:
        logits = model(ids, attention_mask=sequences.attention_mask, position_ids=positions).logits
        start = ids.shape[1] - mask.shape[1]
        return (logits[:, start - 1 : -1] / 0.7).log_softmax(-1).gather(-1, ids[:, start:].unsqueeze(-1)).squeeze(-1)

    own = logprobs(model)
    completions = [row[keep > 0].tolist() for row, keep in zip(ids[:, -mask.shape[1] :], mask, strict=True)]
    scores = torch.tensor(few_threes(completions))
    rest = torch.zeros_like(own)
    if kl_coef:
        kl = (own - logprobs(trainer.ref_model)).detach() * mask
        rest = kl.flip(1).cumsum(1).flip(1)
    objective = ((scores.unsqueeze(1) - kl_coef * rest) * own * mask).sum() / mask.sum()
    (-objective).backward()
    assert rollouts[0].values.abs().max() == 0 and len({len(c) for c in completions}) > 2
    for name, parameter in model.named_parameters():
        found = gradients.found["policy." + name]
        assert torch.allclose(found, parameter.grad, rtol=1e-4, atol=1e-6), name
    assert all(not g.any() for name, g in gradients.found.items() if name.startswith("value_model."))


# ---------------------------------------------------------------- no reference without a KL penalty


@pytest.mark.parametrize("how", ["full", "lora on one backbone", "lora on two"])
def test_without_a_kl_penalty_no_reference_is_computed(tmp_path: Path, how: str) -> None:
    """Forward passes per group of sequences in one rollout, generation not counted: policy and critic, and nothing else."""

    def passes(kl_coef: float) -> tuple[float, PPOTrainer]:
        peft = None if how == "full" else lora()
        trainer = make_trainer(tmp_path, peft, kl_coef=kl_coef, share_backbone=how != "lora on two")
        count = 0

        def hook(module: Any, args: Any, kwargs: Any) -> None:
            nonlocal count
            count += not kwargs.get("use_cache")  # `generate` keeps a cache, scoring does not

        for model in (trainer.model, trainer.ref_model):
            for module in model.modules() if model is not None else ():
                if type(module).__name__ == "Qwen3Model":
                    module.register_forward_pre_hook(hook, with_kwargs=True)
        sequences = trainer.make_rollout(list(PROMPTS)).sequences
        groups = list(sequences.by_similar_length(trainer.args.local_rollout_forward_batch_size))
        return count / len(groups), trainer

    count, trainer = passes(0.0)
    assert count == 2 and trainer.ref_model is None
    assert passes(0.1)[0] == 3
    trainer.train()
    row = trainer.state.log_history[0]
    assert row["objective/non_score_reward"] == 0 and "objective/kl" not in row


# ---------------------------------------------------------------- one backbone or two


def share_weights(shared: PPOTrainer, separate: PPOTrainer) -> None:
    """Give the separate models the adapters of the shared backbone."""
    with torch.no_grad():
        for adapter, target in (("default", separate.model.policy), ("value", separate.model.value_model)):
            theirs = dict(target.named_parameters())
            for name, parameter in shared.model.policy.named_parameters():
                if f".{adapter}." in name:
                    theirs[name.replace(f".{adapter}.", ".default.")].copy_(parameter)


def adapters(trainer: PPOTrainer) -> dict[str, Tensor]:
    """LoRA weights and head of policy and critic, under names that both ways of holding them share."""
    found = {}
    for name, parameter in trainer.model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = "critic" if ".value." in name or name.startswith("value_") else "policy"
        if "lora_" in name:
            tail = name.split(".layers.")[1].replace(".value.", ".default.")
        else:
            tail = "head." + name.rsplit(".", 1)[1]
        found[f"{part} {tail}"] = parameter.detach()
    return found


def test_one_backbone_trains_like_two_with_the_same_weights(tmp_path: Path) -> None:
    """Log-probabilities, values, advantages and weights over three rollouts of four steps; LoRA's B not at zero."""
    options = {
        "num_ppo_epochs": 2,
        "num_mini_batches": 2,
        "max_steps": 12,
        "per_device_train_batch_size": ROWS // 2,
        "kl_coef": 0.1,
    }
    shared, separate = (
        make_trainer(tmp_path / str(share), lora(), share_backbone=share, vf_coef=0.5, **options)
        for share in (True, False)
    )
    with torch.no_grad():
        for i, (name, parameter) in enumerate(shared.model.policy.named_parameters()):
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(i))
    share_weights(shared, separate)
    start = {name: p.clone() for name, p in adapters(shared).items()}
    assert start.keys() == adapters(separate).keys() and any(n.startswith("critic head") for n in start)
    rollouts = []
    for trainer in (shared, separate):
        rollouts.append(keep_rollouts(trainer))
        torch.manual_seed(0)
        trainer.train()
    assert len(rollouts[0]) == len(rollouts[1]) == 3
    for one, two in zip(*rollouts, strict=True):
        assert torch.equal(one.sequences.input_ids, two.sequences.input_ids)
        for name in ("logprobs", "values", "advantages", "returns"):
            assert torch.allclose(getattr(one, name), getattr(two, name), atol=1e-4), name
    assert rollouts[0][-1].values.abs().max() > 0.05
    ends = adapters(separate)
    for name, one in adapters(shared).items():
        assert torch.allclose(one, ends[name], atol=1e-4), name
        assert not torch.equal(one, start[name]), f"{name} was trained"
    logs = [[row for row in t.state.log_history if "loss" in row] for t in (shared, separate)]
    for one, two in zip(*logs, strict=True):
        timing = {"eps"}
        assert {k: one[k] for k in one.keys() - timing} == pytest.approx(
            {k: two[k] for k in two.keys() - timing}, abs=1e-3
        )
