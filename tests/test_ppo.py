"""The PPO trainer: its parts against independent references, exact resume, LoRA on one backbone."""

from __future__ import annotations

import asyncio
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from ppo_toys import V, config, lora, policy, small_trainer, tokenizer
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
)

from llmcore_hf.models import tiny
from llmcore_hf.ppo import PPOConfig, PPOTrainer, advantages, losses, model, rewards, rollout
from llmcore_hf.ppo import trainer as trainer_module
from llmcore_hf.ppo.sampler import RolloutSampler

slow = pytest.mark.slow
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::FutureWarning")]

# ---------------------------------------------------------------- pure functions


def batch(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([1, 4, 6, 3])
    mask = (torch.arange(6) < lengths.unsqueeze(1)).double()
    names = ("rewards", "values", "logprobs", "old", "ref", "advantages", "returns")
    return {n: torch.randn(4, 6, dtype=torch.float64, generator=generator) for n in names} | {"mask": mask}


def test_gae_equals_the_loop_and_padding_never_leaks() -> None:
    b, gamma, lam = batch(), 0.9, 0.8
    bootstrap = torch.tensor([0.0, 0.7, 0.0, -0.3], dtype=torch.float64)
    found = advantages.gae(b["rewards"], b["values"], b["mask"], bootstrap, gamma, lam)
    for i in range(4):
        n, running, following = int(b["mask"][i].sum()), 0.0, float(bootstrap[i])
        for t in reversed(range(n)):
            delta = float(b["rewards"][i, t]) + gamma * following - float(b["values"][i, t])
            running, following = delta + gamma * lam * running, float(b["values"][i, t])
            assert float(found[i, t]) == pytest.approx(running, abs=1e-12)
    noise = torch.where(b["mask"] > 0, 0.0, torch.nan)
    again = advantages.gae(b["rewards"] + noise, b["values"] + noise, b["mask"], bootstrap, gamma, lam)
    assert torch.equal(again.nan_to_num(99) * b["mask"], found)


def test_lambda_1_is_monte_carlo_minus_the_value() -> None:
    b = batch()
    found = advantages.gae(b["rewards"], b["values"], b["mask"], torch.zeros(4).double(), 1.0, 1.0)
    to_go = (b["rewards"] * b["mask"]).flip(1).cumsum(1).flip(1)
    assert torch.allclose(found, (to_go - b["values"]) * b["mask"])


def test_the_score_stands_on_the_last_token() -> None:
    b = batch()
    kl = b["logprobs"] - b["ref"]
    found = advantages.token_rewards(torch.tensor([1.0, 2.0, 3.0, 4.0]).double(), kl, 0.1, b["mask"])
    expected = -0.1 * kl * b["mask"]
    for i, n in enumerate(b["mask"].sum(1).long().tolist()):
        expected[i, n - 1] += i + 1
    assert torch.allclose(found, expected)


def test_kl_estimators_have_the_right_mean() -> None:
    """Over all tokens of a small vocabulary, both average to the exact KL."""
    p, q = (torch.randn(9, dtype=torch.float64).log_softmax(0) for _ in range(2))
    exact = (p.exp() * (p - q)).sum()
    for estimator in (advantages.kl_k1, advantages.kl_k3):
        assert (p.exp() * estimator(p, q)).sum() == pytest.approx(float(exact))
    assert (advantages.kl_k3(p, q) >= 0).all()


def test_whitening_is_over_the_mask() -> None:
    b = batch()
    white = advantages.whiten(b["values"], b["mask"])[b["mask"] > 0]
    assert float(white.mean()) == pytest.approx(0, abs=1e-9) and float(white.std()) == pytest.approx(1, abs=1e-6)
    kept = advantages.whiten(b["values"], b["mask"], shift_mean=False)[b["mask"] > 0]
    assert float(kept.mean()) == pytest.approx(float(b["values"][b["mask"] > 0].mean()))
    one = torch.tensor([[1.0, 0.0]])
    assert advantages.whiten(torch.tensor([[3.0, 9.0]]), one).tolist() == [[0.0, 0.0]]


def test_losses_have_the_gradient_of_their_formula() -> None:
    b, eps = batch(), 0.2
    for sign in (-1.0, 1.0):
        a = sign * b["advantages"].abs()
        logprobs = b["logprobs"].clone().requires_grad_()
        loss, clipped = losses.policy_loss(logprobs, b["old"], a, eps)
        (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
        ratio = (b["logprobs"] - b["old"]).exp()
        outside = (ratio > 1 + eps) if sign > 0 else (ratio < 1 - eps)
        assert torch.equal(clipped, outside)
        assert torch.allclose(gradient, torch.where(outside, 0.0, -a * ratio))
    values = b["values"].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: losses.value_loss(v, b["old"], b["returns"], eps)[0].sum(), values)
    far, _ = losses.value_loss(torch.tensor(5.0), torch.tensor(0.0), torch.tensor(0.0), 0.2)
    assert float(far) == 12.5  # the larger of both errors


def test_explained_variance() -> None:
    b = batch()
    assert float(losses.explained_variance(b["returns"], b["returns"], b["mask"])) == 1
    constant = torch.full_like(b["returns"], 7.0)
    assert float(losses.explained_variance(constant, b["returns"], b["mask"])) == pytest.approx(0, abs=1e-9)


def test_the_kl_coefficient_follows_its_target() -> None:
    controller = advantages.AdaptiveKLController(0.1, target=2.0, horizon=100)
    controller.update(10.0, 50)
    assert controller.value == pytest.approx(0.1 * 1.1)
    controller.update(1.9, 100)
    assert controller.value == pytest.approx(0.1 * 1.1 * 0.95)
    controller.update(0.0, 50)  # however far below, at most a fifth per horizon
    assert controller.value == pytest.approx(0.1 * 1.1 * 0.95 * 0.9)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.9, 0.0)])
def test_advantages_and_values_give_the_reward_back(gamma: float, lam: float) -> None:
    b, bootstrap = batch(), torch.tensor([0.0, 0.7, 0.0, -0.3], dtype=torch.float64)
    values = b["values"] * b["mask"]
    made = advantages.gae(b["rewards"], values, b["mask"], bootstrap, gamma, lam)
    found = advantages.implied_reward(made, values, b["mask"], bootstrap, gamma, lam)
    assert torch.allclose(found, (b["rewards"] * b["mask"]).sum(1))
    shifted = advantages.gae(b["rewards"], values.roll(1, 1), b["mask"], bootstrap, gamma, lam)
    off = advantages.implied_reward(shifted, values, b["mask"], bootstrap, gamma, lam)
    assert ((off - (b["rewards"] * b["mask"]).sum(1)).abs() > 0.01).all()


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_prompt_comes_once_per_epoch(world_size: int) -> None:
    samplers = [RolloutSampler(10, 3, 4, seed=1, rank=r, world_size=world_size) for r in range(world_size)]
    batches = [list(sampler) for sampler in samplers]
    assert all(len(found) == len(sampler) for found, sampler in zip(batches, samplers, strict=True))
    rows = [row for found in zip(*batches, strict=True) for part in found for row in part]
    assert set(rows) == set(range(10)) and len(rows) == 12 and max(map(rows.count, rows)) == 2
    assert sorted(rows) != rows
    assert [len(part) for part in batches[0][:5]] == [3, 0, 0, 0, 3]
    samplers[0].epoch = 1
    assert list(samplers[0]) != batches[0]


# ---------------------------------------------------------------- rewards


def some_batch() -> rewards.Batch:
    return rewards.Batch(["p0", "p1"], ["c0", "c1"], [[1], [2]], {"answer": ["a", "b"]}, "the rollout before step 1")


def test_reward_functions_get_what_trls_get() -> None:
    seen: dict[str, Any] = {}

    def func(prompts, completions, completion_ids, trainer_state, answer, **kwargs):
        seen.update(prompts=prompts, completions=completions, ids=completion_ids, state=trainer_state, answer=answer)
        return [1, None]

    (scorer,) = rewards.make_scorers(func, [2.0])
    found = scorer(some_batch(), 8, trainer_state="state")
    assert found[0] == 1 and found[1].isnan()
    assert seen == {
        "prompts": ["p0", "p1"],
        "completions": ["c0", "c1"],
        "ids": [[1], [2]],
        "state": "state",
        "answer": ["a", "b"],
    }


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ([1.0], "returned 1 values for the 2 completions"),
        ([1.0, math.nan], "returned nan for sample 1"),
        ([1.0, math.inf], "returned inf for sample 1"),
        (["good", 1.0], "returned 'good' for sample 0"),
        ([1.0, 1e39], r"returned 1e+39 for sample 1"),  # infinite in float32
        ([10**400, 1.0], "for sample 0"),
        ([b"1", 1.0], "returned b'1' for sample 0"),
        (3.0, "returned float"),
        (torch.tensor(3.0), "returned Tensor"),
        ({0: 1.0, 1: 2.0}, "returned dict"),
    ],
)
def test_a_wrong_reward_names_function_batch_and_sample(returned: Any, words: str) -> None:
    def my_reward(**kwargs):
        return returned

    (scorer,) = rewards.make_scorers(my_reward, None)
    with pytest.raises(rewards.RewardError, match="my_reward") as caught:
        scorer(some_batch(), 8, trainer_state=None)
    assert words in str(caught.value) and "the rollout before step 1" in str(caught.value)


def test_what_one_function_does_to_its_lists_the_next_does_not_see() -> None:
    def first(prompts, completions, completion_ids, answer, **kwargs):
        found = [1.0] * len(completions)
        for values in (prompts, completions, completion_ids[0], answer):
            values.clear()
        return found

    batch = rewards.Batch(["a", "b"], ["x", "y"], [[1, 2], [3]], {"answer": [5, 6]}, "the batch")
    for scorer in rewards.make_scorers([first, one], None):
        assert scorer(batch, 2).tolist() == [1.0, 1.0]
    assert batch == rewards.Batch(["a", "b"], ["x", "y"], [[1, 2], [3]], {"answer": [5, 6]}, "the batch")


def test_a_reward_that_raises_is_named() -> None:
    def broken(**kwargs):
        raise KeyError("answer")

    def lazily(**kwargs):
        yield broken()

    for func in (broken, lazily):
        message = rf"`{func.__name__}` failed on the rollout before step 1: KeyError: 'answer'"
        with pytest.raises(rewards.RewardError, match=message):
            rewards.make_scorers(func, None)[0](some_batch(), 8)


def test_a_reward_may_be_a_coroutine_and_log_on_its_own() -> None:
    logged = {}

    async def judge(completions, log_metric, log_extra, **kwargs):
        log_metric("judge/calls", float(len(completions)))
        log_extra("verdict", ["good"] * len(completions))
        return [0.5] * len(completions)

    (scorer,) = rewards.make_scorers(judge, None)
    found = scorer(some_batch(), 8, log_metric=logged.__setitem__, log_extra=logged.__setitem__)
    assert found.tolist() == [0.5, 0.5]
    assert logged == {"judge/calls": 2.0, "verdict": ["good", "good"]}


def test_a_coroutine_may_be_asked_while_another_loop_runs() -> None:
    async def judge(completions, **kwargs):
        return [0.5] * len(completions)

    async def notebook():
        return rewards.make_scorers(judge, None)[0](some_batch(), 8)

    assert asyncio.run(notebook()).tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("logs", "words"),
    [
        (lambda log_metric, log_extra: log_metric("length", "long"), "could not convert string to float"),
        (lambda log_metric, log_extra: log_extra("verdict", ["good"]), r"log_extra\('verdict'\) got 1 values for"),
    ],
)
def test_what_a_function_logs_in_vain_is_named(tmp_path: Path, logs: Any, words: str) -> None:
    def judge(completions, log_metric, log_extra, **kwargs):
        logs(log_metric, log_extra)
        return [0.5] * len(completions)

    trainer = small_trainer(tmp_path)
    trainer.scorers = rewards.make_scorers(judge, None)
    with pytest.raises(rewards.RewardError, match=f"`judge` failed on the rollout before step 1: .*{words}"):
        trainer.train()


def test_a_missing_dataset_is_told(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path)
    trainer.train_dataset = trainer.eval_dataset = None
    with pytest.raises(ValueError, match="training needs a train_dataset"):
        trainer.train()
    with pytest.raises(ValueError, match="evaluation needs an eval_dataset"):
        trainer.evaluate()


def test_no_function_has_anything_to_say() -> None:
    with pytest.raises(rewards.RewardError, match="every reward function returned None for sample 1"):
        rewards.total(torch.tensor([[1.0, math.nan], [math.nan, math.nan]]), torch.ones(2), some_batch())


def test_a_weighted_sum_beyond_float32_is_refused() -> None:
    with pytest.raises(rewards.RewardError, match=r"weighted sum of the rewards of sample 1 of .* is inf"):
        rewards.total(torch.tensor([[1.0], [1e30]]), torch.tensor([1e30]), some_batch())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_ppo_epochs": 0}, "num_ppo_epochs must be at least 1"),
        ({"temperature": 0.0}, "temperature must be greater than 0"),
        ({"gamma": 1.1}, "gamma must lie in"),
        ({"save_steps": 6, "save_strategy": "steps"}, r"save_steps 6: .* multiple of num_ppo_epochs .* such as 4 or 8"),
        ({"save_steps": 0.5, "save_strategy": "steps"}, "save_steps 0.5: .* such as 4"),
        (
            {"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 5, "metric_for_best_model": "reward"},
            "eval_steps 5: .* such as 4 or 8",
        ),
        ({"kl_target": 1.0, "kl_coef": 0.0}, "kl_target needs"),
        ({"total_episodes": 10, "max_steps": 5}, "exclude each other"),
        ({"truncated_completions": "cut"}, "must be one of"),
        ({"top_k": None}, "top_k must not be negative, not None"),
    ],
)
def test_impossible_options_are_named(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", **options)


def test_an_epoch_ends_with_a_whole_rollout(tmp_path: Path) -> None:
    for strategy in ("epoch", "no"):
        assert config(tmp_path, save_strategy=strategy, save_steps=6).save_strategy == strategy
    best = {"save_strategy": "best", "eval_strategy": "epoch", "metric_for_best_model": "reward"}
    assert config(tmp_path, **best, eval_steps=5).save_strategy == "best"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("trl-lib/Qwen2-0.5B-Reward", "Qwen2-0.5B-Reward"),
        ("output/reward/latest", "reward-latest"),
        ("runs/helpful/checkpoint-100", "helpful-checkpoint-100"),
        ("runs/helpful/checkpoint-100/", "helpful-checkpoint-100"),
        ("output/reward/20261126-184439-ab12", "reward-20261126-184439-ab12"),
        ("runs/sft/merged", "sft-merged"),
        ("run/reward", "reward"),
        ("latest", "latest"),
        ("", ""),
    ],
)
def test_a_reward_model_is_named_after_what_says_whose_it_is(path: str, name: str) -> None:
    assert rewards.name_of_model(path) == name


def test_a_folder_without_a_name_of_its_own_is_named_after_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "helpful" / "latest").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "helpful" / "latest")
    assert rewards.name_of_model(".") == "helpful-latest"


# ---------------------------------------------------------------- the trainer


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ({"question": ["a"]}, "train_dataset has no column `prompt`; it has: question"),
        ({"prompt": []}, "train_dataset has no rows"),
        ({"prompt": ["t1"], "completions": ["x"]}, "rename column completions"),
    ],
)
def test_a_dataset_that_cannot_be_used_is_refused(tmp_path: Path, rows: dict[str, list[str]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PPOTrainer(
            policy(0), lambda **kwargs: [], config(tmp_path), Dataset.from_dict(rows), processing_class=tokenizer()
        )


@pytest.mark.parametrize("prompts", [["t1", "", "t2"], ["t1", " \n", "t2"]])
def test_a_prompt_without_tokens_is_refused(tmp_path: Path, prompts: list[str]) -> None:
    with pytest.raises(ValueError, match="train_dataset, row 1: the prompt is empty"):
        PPOTrainer(
            policy(0), one, config(tmp_path), Dataset.from_dict({"prompt": prompts}), processing_class=tokenizer()
        )
    conversations = Dataset.from_dict({"prompt": [[{"role": "user", "content": "t1"}], []]})
    with pytest.raises(ValueError, match="eval_dataset, row 1: the prompt is empty"):
        PPOTrainer(policy(0), one, config(tmp_path), eval_dataset=conversations, processing_class=tokenizer())


@pytest.mark.parametrize("prompt", [3, 2.5, True])
def test_a_prompt_that_is_no_text_is_refused_with_its_row(tmp_path: Path, prompt: Any) -> None:
    rows = [{"prompt": "t1"}, {"prompt": prompt}]
    with pytest.raises(ValueError, match=f"train_dataset, row 1: the prompt is {type(prompt).__name__}: it must be"):
        PPOTrainer(policy(0), one, config(tmp_path), rows, processing_class=tokenizer())  # type: ignore[arg-type]


def test_a_prompt_that_leaves_no_room_for_an_answer_is_refused(tmp_path: Path) -> None:
    sizes = {"per_device_train_batch_size": 2, "max_completion_length": 60, "num_ppo_epochs": 1, "max_steps": 1}
    room = policy(0).config.max_position_embeddings - 60
    prompts = Dataset.from_dict({"prompt": [" ".join(["t1"] * room), " ".join(["t2"] * (room + 1))]})
    trainer = PPOTrainer(policy(0), one, config(tmp_path, **sizes), prompts, processing_class=tokenizer())
    with pytest.raises(ValueError, match=f"has {room + 1} tokens, .* leaves room for {room} .* begins: 't2 t2"):
        trainer.train()
    assert trainer.complete([prompts[0]], trainer.sampling, "the rollout")[1] == [[1] * room]


def one(completions, **kwargs):
    return [1.0] * len(completions)


def heads(kind: Any, labels: int = 1) -> Any:
    torch.manual_seed(0)
    settings = policy(0).config
    settings.num_labels = labels
    return kind.from_config(settings)


def test_a_critic_is_a_token_classifier_with_one_label(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    needed = "a value_model is a token classifier with one label"
    for wrong, words in (
        (policy(1), "not a Qwen3ForCausalLM"),
        (heads(AutoModelForSequenceClassification), "not a Qwen3ForSequenceClassification"),
        (heads(AutoModelForTokenClassification, 2), "has 2 labels"),
        (str(tiny.ensure("tiny-qwen")), "has no weights for score.weight"),
    ):
        with pytest.raises(ValueError, match=f"{needed}.*{words}"):
            PPOTrainer(policy(0), one, config(tmp_path), processing_class=tokenizer(), value_model=wrong)
    reward_model = heads(AutoModelForSequenceClassification)
    reward_model.save_pretrained(tmp_path / "reward")
    for right in (heads(AutoModelForTokenClassification), str(tmp_path / "reward")):
        trainer = PPOTrainer(policy(0), one, config(tmp_path), processing_class=tokenizer(), value_model=right)
    assert torch.equal(trainer.model.value_model.score.weight, reward_model.score.weight)
    assert not trainer.model.value_model.score.bias.any()


def test_a_model_that_has_adapters_already_is_refused(tmp_path: Path) -> None:
    from peft import get_peft_model

    with pytest.raises(ValueError, match="the model has adapters already"):
        PPOTrainer(
            get_peft_model(policy(0), lora()), lambda **kwargs: [], config(tmp_path), processing_class=tokenizer()
        )


@pytest.mark.parametrize(
    "kind", ["qwen2", "qwen3", "llama", "gpt2", "gpt_neox", "bloom", "falcon", "gemma2", "mistral"]
)
def test_the_head_of_a_token_classifier_is_known_by_name(kind: str) -> None:
    config = AutoConfig.for_model(kind)
    with torch.device("meta"):
        classifier = AutoModelForTokenClassification.from_config(config)
    head = getattr(classifier, model.name_of_head(config))
    assert isinstance(head, torch.nn.Linear) and head.out_features == config.num_labels


def test_an_architecture_without_token_classifier_is_refused() -> None:
    with pytest.raises(ValueError, match="no token classifier for OPTConfig"):
        model.name_of_head(AutoConfig.for_model("opt"))


@pytest.mark.parametrize(("options", "name"), [({}, "ref_model"), ({"kl_coef": 0.0}, "value_model")])
def test_a_model_in_memory_is_not_copied_when_its_weights_are_sharded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], name: str
) -> None:
    monkeypatch.setattr(trainer_module, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match=f"give the model by its id or path, or give a {name}"):
        PPOTrainer(policy(0), lambda **kwargs: [], config(tmp_path, **options), processing_class=tokenizer())


@pytest.mark.parametrize("processes", [1, 2])
def test_one_of_several_processes_does_not_spread_the_model_over_all_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    """TRL loads with device_map "auto" where none is given; that is for a process that has all devices to itself."""
    given: list[dict[str, Any]] = []

    def load(path: str, **kwargs: Any) -> None:
        given.append(kwargs)
        raise InterruptedError

    args = config(tmp_path)
    monkeypatch.setattr(trainer_module, "create_model_from_path", load)
    monkeypatch.setattr(PPOConfig, "world_size", processes)
    with pytest.raises(InterruptedError):
        PPOTrainer("some/model", lambda **kwargs: [], args, processing_class=tokenizer())
    assert given[0].get("device_map", "not given") == (None if processes > 1 else "not given")


def test_an_episode_is_a_completion_and_eps_counts_those_of_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a checkpoint of 64 episodes the count goes on, and the speed is of what came after it."""
    small_trainer(tmp_path, max_steps=4, logging_steps=4, save_steps=4).train()
    resumed = small_trainer(tmp_path, max_steps=8, logging_steps=4, save_steps=4)
    clock = itertools.count(100.0, 2.0)  # the trainer looks at it when it begins, and at each log row
    monkeypatch.setattr(trainer_module.time, "perf_counter", lambda: next(clock))
    resumed.train(resume_from_checkpoint=True)
    rows = [row for row in resumed.state.log_history if "eps" in row]
    assert [row["episode"] for row in rows] == [64, 128]
    assert rows[-1]["eps"] == 64 / 2.0


def test_the_data_seed_orders_the_prompts_and_the_seed_draws_the_answers(tmp_path: Path) -> None:
    def order(**options: Any) -> list[int]:
        trainer = small_trainer(tmp_path, **options)
        trainer.get_train_dataloader()
        assert trainer._sampler is not None
        return [row for batch in trainer._sampler for row in batch]

    plain = order(seed=1)
    assert order(seed=1, data_seed=1) == plain == order(seed=2, data_seed=1)
    assert order(seed=1, data_seed=2) != plain and order(seed=1, data_seed=2) == order(seed=2)


@pytest.mark.parametrize("disable", [True, False])
def test_dropout_is_off_unless_it_is_wanted(tmp_path: Path, disable: bool) -> None:
    base = GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=16, n_layer=1, n_head=1, pad_token_id=V - 2))
    args = config(tmp_path, disable_dropout=disable)
    trainer = PPOTrainer(base, one, args, Dataset.from_dict({"prompt": ["t1"]}), processing_class=tokenizer())
    rates = {m.p for m in trainer.model.modules() if isinstance(m, torch.nn.Dropout)}
    assert rates == ({0.0} if disable else {0.1})


def test_the_table_shows_the_advantage_of_each_completion(tmp_path: Path) -> None:
    """Whitened ones: the better completion has a positive mean advantage, the worse one a negative one."""

    def good_and_bad(prompts, completions, **kwargs):
        return [10.0 if prompt == "t1" else -10.0 for prompt in prompts]

    prompts = Dataset.from_dict({"prompt": ["t1", "t2"]})
    args = config(tmp_path, log_completions=True, per_device_train_batch_size=2, max_completion_length=3)
    trainer = PPOTrainer(policy(0), good_and_bad, args, prompts, processing_class=tokenizer())
    trainer.make_rollout(list(prompts))
    assert trainer._table is not None
    better, worse = trainer._table[2]
    assert better > 0 > worse


def test_completions_are_shown_when_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def length(completion_ids, **kwargs):
        return [float(len(ids)) for ids in completion_ids]

    prompts = Dataset.from_dict({"prompt": ["t1", "t2", "t3", "t4"]})
    sizes = {"per_device_train_batch_size": 4, "max_completion_length": 3, "num_ppo_epochs": 1, "max_steps": 1}
    args = config(tmp_path, log_completions=True, num_completions_to_print=2, logging_steps=1, **sizes)
    PPOTrainer(policy(0), length, args, prompts, processing_class=tokenizer()).train()
    out = capsys.readouterr().out
    assert "length" in out and "Advantage" in out


@slow
@pytest.mark.parametrize("how", ["full", "lora on one backbone", "lora on two"])
def test_a_resumed_run_ends_like_the_uninterrupted_one(tmp_path: Path, how: str) -> None:
    def trainer(folder: str, **options: Any) -> PPOTrainer:
        peft = None if how == "full" else lora()
        return small_trainer(tmp_path / folder, peft, share_backbone=how != "lora on two", **options)

    whole = trainer("whole")
    whole.train()
    trainer("parts", max_steps=4).train()
    second = trainer("parts")
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-4"))
    expected, found = whole.model.state_dict(), second.model.state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert whole.kl_controller.value == second.kl_controller.value != 0.05
    losses_of = lambda trainer: [row["loss"] for row in trainer.state.log_history if "loss" in row]  # noqa: E731
    assert losses_of(whole) == losses_of(second)


def quick(folder: Path, reward: Any, **options: Any) -> PPOTrainer:
    """Rollouts of 4 answers of at most 3 tokens, and 4 optimizer steps on each."""
    prompts = Dataset.from_dict({"prompt": [f"t{i}" for i in range(8)]})
    sizes = {"per_device_train_batch_size": 4, "max_completion_length": 3, "learning_rate": 1e-2}
    args = config(folder, **{**sizes, "max_steps": 8, "save_strategy": "steps", "save_steps": 4, **options})
    return PPOTrainer(policy(0), reward, args, prompts, prompts, processing_class=tokenizer())


def length(completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]


def test_the_best_critic_comes_back_with_the_best_policy(tmp_path: Path) -> None:
    def worse_and_worse(completions, trainer_state, **kwargs):
        return [-float(trainer_state.global_step + i) for i in range(len(completions))]

    best = {
        "eval_strategy": "steps",
        "eval_steps": 4,
        "load_best_model_at_end": True,
        "metric_for_best_model": "reward",
    }
    trainer = quick(tmp_path, worse_and_worse, **best, greater_is_better=True)
    trainer.train()
    assert str(trainer.state.best_model_checkpoint).endswith("checkpoint-4")
    for name, module, kind in (
        ("", trainer.model.policy, AutoModelForCausalLM),
        ("value_model", trainer.model.value_model, AutoModelForTokenClassification),
    ):
        first, last = (kind.from_pretrained(tmp_path / f"checkpoint-{step}" / name).state_dict() for step in (4, 8))
        assert all(torch.equal(first[key], value) for key, value in module.state_dict().items())
        assert any(not torch.equal(first[key], last[key]) for key in first)


def test_a_resumed_critic_is_the_one_that_was_saved(tmp_path: Path) -> None:
    trainer = quick(tmp_path, length, max_steps=4)
    trainer.train()
    other = quick(tmp_path, length)
    assert not torch.equal(other.model.value_model.score.weight, trainer.model.value_model.score.weight)
    other.model.load_critic(tmp_path / "checkpoint-4")
    critic = other.model.value_model.state_dict()
    assert all(torch.equal(critic[name], value) for name, value in trainer.model.value_model.state_dict().items())


def first_token(completion_ids, **kwargs):
    return [float(ids[0]) for ids in completion_ids]


def test_an_evaluation_answers_greedily_and_by_sampling_and_draws_nothing_from_the_training(tmp_path: Path) -> None:
    trainer = quick(tmp_path, first_token)
    rows = list(trainer.eval_dataset)
    inputs = [tokenizer()(row["prompt"], return_tensors="pt") for row in rows]
    best = [int(trainer.model.policy(**ids).logits[0, -1].argmax()) for ids in inputs]
    before = torch.get_rng_state()
    found = trainer.evaluate()
    assert torch.equal(torch.get_rng_state(), before)
    assert found["eval_reward"] == pytest.approx(sum(best) / len(best))
    assert found["eval_sampled_reward"] != pytest.approx(found["eval_reward"])
    torch.manual_seed(123)
    again = trainer.evaluate()
    assert {name: value for name, value in again.items() if "runtime" not in name} == {
        name: value for name, value in found.items() if "runtime" not in name
    }


def test_each_epoch_has_an_order_of_its_own(tmp_path: Path) -> None:
    asked: list[str] = []

    def note(prompts, **kwargs):
        asked.extend(prompts)
        return [0.0] * len(prompts)

    quick(tmp_path, note, num_ppo_epochs=1, max_steps=6, save_strategy="no").train()
    epochs = [asked[i : i + 8] for i in (0, 8, 16)]
    assert [sorted(epoch) for epoch in epochs] == [sorted(epochs[0])] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_a_checkpoint_within_a_rollout_is_not_gone_on_from(tmp_path: Path) -> None:
    quick(tmp_path, length, max_steps=6).train()
    for options, step, words in (
        ({}, 6, r"checkpoint-6 was written after 6 optimizer steps, .* = 4 \* 1"),
        ({"num_ppo_epochs": 3, "save_steps": 3}, 4, r"checkpoint-4 was written after 4 optimizer steps, .* = 3 \* 1"),
    ):
        with pytest.raises(trainer_module.ResumeError, match=words):
            quick(tmp_path, length, **options).train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    again = quick(tmp_path, length, num_ppo_epochs=2)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert again.state.global_step == 8


@slow
def test_it_learns_and_what_it_saves_can_be_loaded(tmp_path: Path) -> None:
    """Seen: held-out reward .52 -> .92 after 120 steps; the first ratios are exactly 1."""
    trainer = small_trainer(
        tmp_path, max_steps=80, per_device_train_batch_size=64, gradient_accumulation_steps=1, num_mini_batches=1,
        num_ppo_epochs=4, kl_target=None, kl_coef=0.02, save_strategy="no",
    )  # fmt: skip
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_sampled_reward"] > before["eval_sampled_reward"] + 0.15
    rows = [row for row in trainer.state.log_history if "val/first_ratio_off" in row]
    assert rows and max(row["val/first_ratio_off"] for row in rows) < 1e-4
    assert rows[0]["objective/kl"] == 0 and rows[-1]["objective/kl"] > 0
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in trainer.model.policy.state_dict().items())
    critic = AutoModelForTokenClassification.from_pretrained(tmp_path / "saved" / "value_model").state_dict()
    assert all(torch.equal(critic[k], v) for k, v in trainer.model.value_model.state_dict().items())


@slow
def test_lora_shares_one_backbone_and_its_base_is_the_reference(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path, lora(), max_steps=8, save_strategy="no")
    base = {n: p.clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    trained = {n: p.clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert trainer.ref_model is None and any("value" in n for n in trained) and any("default" in n for n in trained)
    trainer.train()
    now = dict(trainer.model.named_parameters())
    assert all(torch.equal(now[n], p) for n, p in base.items())
    for adapter in ("default", "value"):
        assert any(not torch.equal(now[n], p) for n, p in trained.items() if f"lora_B.{adapter}" in n)
    assert not torch.equal(now["value_head.weight"], trained["value_head.weight"])


@slow
@pytest.mark.parametrize("base", ["tiny-qwen-base", "tiny-gpt2"])
@pytest.mark.parametrize("share", [True, False], ids=["one backbone", "two"])
def test_adapters_of_policy_and_critic_load_with_peft(tmp_path: Path, share: bool, base: str) -> None:
    """What is saved gives, on the base model, the log-probabilities and values that the trainer's own modules give."""
    from peft import AutoPeftModelForCausalLM, AutoPeftModelForTokenClassification

    trainer = small_trainer(tmp_path, lora(), base, max_steps=4, save_strategy="no", share_backbone=share)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    model = trainer.model.eval()
    inputs = {"input_ids": torch.arange(3, 15).view(1, 12), "attention_mask": torch.ones(1, 12, dtype=torch.long)}
    policy = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    critic = AutoPeftModelForTokenClassification.from_pretrained(
        tmp_path / "saved" / "value_model", num_labels=1
    ).eval()
    with torch.no_grad():
        values = model.values(**inputs, n_completion=11)
        assert values.abs().max() > 0
        assert torch.allclose(critic(**inputs).logits[:, :, 0], values, atol=1e-5)
        assert torch.allclose(policy(**inputs).logits, model.policy(**inputs).logits, atol=1e-5)


def test_what_cannot_be_known_is_not_logged(tmp_path: Path) -> None:
    """A function that has nothing to say about a whole rollout; a critic where no return differs; a single ratio."""

    def silent(completions, **kwargs):
        return [None] * len(completions)

    def same(completions, log_metric, **kwargs):
        log_metric("mine", len(completions) / 2)
        return [2.0] * len(completions)

    prompts = Dataset.from_dict({"prompt": ["t1", "t2", "t3", "t4"]})
    sizes = {"per_device_train_batch_size": 4, "max_completion_length": 1, "num_ppo_epochs": 2, "max_steps": 4}
    args = config(tmp_path, logging_steps=1, truncated_completions="score", kl_coef=0.0, **sizes)
    trainer = PPOTrainer(policy(0), [silent, same], args, prompts, processing_class=tokenizer())
    trainer.train()
    rows = [row for row in trainer.state.log_history if "objective/scores" in row]
    assert len(rows) == 2
    for row in rows:
        assert row["rewards/same/mean"] == row["mine"] == 2.0
        assert not {"rewards/silent/mean", "val/explained_variance", "val/ratio_var"} & row.keys()
    assert not any(math.isnan(value) for row in trainer.state.log_history for value in row.values())


def test_the_variance_of_the_ratio_is_between_optimizer_steps(tmp_path: Path) -> None:
    """TRL's `val/ratio_var`, here of the mean ratio of each mini-batch, its micro-batches put together."""

    def length(completion_ids, **kwargs):
        return [float(len(ids)) for ids in completion_ids]

    prompts = Dataset.from_dict({"prompt": [f"t{i}" for i in range(8)]})
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_mini_batches": 2, "max_steps": 8}
    found = []
    for logging_steps in (1, 8):
        args = config(
            tmp_path,
            logging_steps=logging_steps,
            max_completion_length=3,
            num_ppo_epochs=4,
            learning_rate=1e-2,
            **sizes,
        )
        trainer = PPOTrainer(policy(0), length, args, prompts, processing_class=tokenizer())
        torch.manual_seed(0)
        trainer.train()
        found.append([row for row in trainer.state.log_history if "val/ratio" in row])
    ratios = torch.tensor([row["val/ratio"] for row in found[0]])
    assert len(ratios) == 8 and len(found[1]) == 1 and ratios.var() > 0
    assert found[1][0]["val/ratio"] == pytest.approx(float(ratios.mean()), rel=1e-5)
    assert found[1][0]["val/ratio_var"] == pytest.approx(float(ratios.var()), rel=1e-4)


@slow
def test_a_target_kl_stops_the_updates_of_a_rollout(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path, kl_target=None, target_kl=1e-9, max_steps=4, save_strategy="no", logging_steps=1)
    trainer.train()
    norms = [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]
    assert norms[0] > 0 and norms[-1] == 0, "no step after the first one that moved the policy"


def test_generation_in_stretches_is_that_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model = policy(3, layers=2)
    prompts = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10], [0], [11, 3]]
    greedy = GenerationConfig(max_new_tokens=24, pad_token_id=V - 2, eos_token_id=[V - 1, 3, 8], do_sample=False)
    monkeypatch.setattr(rollout, "STRETCH", 100)
    whole = rollout.generate(model, prompts, greedy, 4, "cpu")
    monkeypatch.setattr(rollout, "STRETCH", 3)
    assert rollout.generate(model, prompts, greedy, 4, "cpu") == whole
    assert len({len(tokens) for tokens in whole}) > 1, "completions of different lengths"
    assert model.generation_config is not greedy


@pytest.mark.parametrize("share", [True, False])
def test_looking_at_the_reference_before_training_freezes_nothing(tmp_path: Path, share: bool) -> None:
    """PEFT freezes the critic's adapter when it turns the policy's on again; the optimizer must get it all the same."""
    trainer = small_trainer(tmp_path, lora(), share_backbone=share)
    with trainer.model.policy.disable_adapter():
        pass
    trainer.train()
    moved = {name: bool(p.abs().sum() > 0) for name, p in trainer.model.named_parameters() if "lora_B" in name}
    critic = [value for name, value in moved.items() if ".value." in name or name.startswith("value_model")]
    assert critic and all(critic) and all(moved.values())


def test_without_a_reference_the_kl_is_unknown_and_not_0(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path, kl_coef=0.0, kl_target=None)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "objective/scores" in row]
    assert rows and not any("objective/kl" in row or "objective/kl_k3" in row for row in rows)


@settings(deadline=None)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=30), st.integers(1, 8))
def test_a_forward_pass_is_for_rows_of_similar_length(lengths: list[int], size: int) -> None:
    sequences = rollout.Sequences.of([[7]] * len(lengths), [[5] * n for n in lengths], pad=0, device="cpu")
    groups = [[1 + lengths[row] for row in group.tolist()] for group in sequences.by_similar_length(size)]
    assert sorted(itertools.chain(*groups), reverse=True) == list(itertools.chain(*groups))
    assert sorted(itertools.chain(*groups)) == sorted(1 + n for n in lengths)
    for i, group in enumerate(groups):
        rest = list(itertools.chain(*groups[i:]))[:size]  # what a group that ends only when it is full would take
        assert rest[: len(group)] == group
        saves = [(len(rest) - j) * (rest[0] - rest[j]) >= 512 for j in range(len(rest))]
        assert not any(saves[: len(group)]), "a shorter group would have saved much"
        assert len(group) == len(rest) or saves[len(group)], "and a longer one would have cost little"


def test_processes_that_share_layers_make_equally_many_forward_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each pass gathers a sharded model's layers, in all processes at once: with a pass less elsewhere they would wait."""
    trainer = small_trainer(tmp_path, local_rollout_forward_batch_size=4)
    sequences = rollout.Sequences.of([[7]] * 8, [[5] * n for n in (1, 1, 2, 4, 8, 16, 32, 900)], pad=0, device="cpu")
    assert [len(rows) for rows in trainer._groups(sequences)] == [1, 4, 3]
    monkeypatch.setattr(trainer_module, "is_deepspeed_zero3_enabled", lambda: True)
    assert [len(rows) for rows in trainer._groups(sequences)] == [4, 4]


def test_rollout_and_update_compute_in_the_same_precision(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path, bf16=True, max_steps=4)
    seen: dict[bool, set[torch.dtype]] = {True: set(), False: set()}

    def look(module: Any, args: Any, output: Tensor) -> None:
        seen[module.training].add(output.dtype)  # the update trains, the rollout does not

    trainer.model.policy.lm_head.register_forward_hook(look)
    trainer.train()
    assert seen == {True: {torch.bfloat16}, False: {torch.bfloat16}}
    off = [row["val/first_ratio_off"] for row in trainer.state.log_history if "val/first_ratio_off" in row]
    assert off and max(off) < 0.1  # other batches, so other roundings of bfloat16


def test_a_reward_model_must_have_one_label() -> None:
    from transformers import AutoModelForSequenceClassification

    for labels in (2, 3):
        model = AutoModelForSequenceClassification.from_pretrained(str(tiny.ensure("tiny-qwen")), num_labels=labels)
        with pytest.raises(ValueError, match=f"has {labels} labels: it must be a classifier with one"):
            rewards.make_scorers(model, None)
