"""What PPO and GRPO share: rewards by name, held-out prompts, checks that notice what is wrong."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import ppo_toys
import pytest
import torch
from datasets import Dataset

from llmcore_hf import cli
from llmcore_hf.alignment import grpo, online, ppo, reward, rewards, training
from llmcore_hf.alignment.evaluation import Answers, Encoded
from llmcore_hf.alignment.online import Measured
from llmcore_hf.checks import Check
from llmcore_hf.data import toy
from llmcore_hf.errors import UserError
from llmcore_hf.models import tiny
from llmcore_hf.ppo import PPOConfig, PPOTrainer
from llmcore_hf.ppo.rewards import RewardError, load_reward_model, make_scorers

MINE = """
def short(completions, **kwargs):
    return [-float(len(c)) for c in completions]

def needs(completions, solution, limit=3, **kwargs):
    return [0.0] * len(completions)

number = 3
"""


@pytest.fixture(autouse=True)
def own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


# ---------------------------------------------------------------- rewards by name


@pytest.mark.parametrize(
    ("completion", "exact", "same"), [("0466", 1, 1), (" 0466\n", 1, 1), ("6640", 0, 1), ("046", 0, 0), ("", 0, 0)]
)
def test_built_in_rewards_compare_with_the_column_answer(completion: str, exact: int, same: int) -> None:
    turns = [{"role": "assistant", "content": completion}]
    for given in (completion, turns):
        assert rewards.exact_match([given], ["0466"]) == [exact]
        assert rewards.same_characters([given], ["0466"]) == [same]


def test_a_function_is_found_in_a_file_and_in_a_module() -> None:
    Path("mine.py").write_text(MINE)
    for name in ("mine.py:short", "mine.short", str(Path("mine.py").resolve()) + ":short"):
        assert rewards.load(name, 8)(completions=["abc"]) == [-3.0]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("exact_mach", "there is no such function. Built in: exact_match"),
        ("mine.py", "name the function in the file, as in mine.py:my_reward"),
        ("other.py:short", "there is no file other.py"),
        ("mine.py:long", "mine has no function `long`, only: short, needs"),
        ("mine.py:number", "has no function `number`"),
        ("broken.py:f", "cannot be loaded: SyntaxError"),
        ("no_such_package.f", "cannot be loaded: ModuleNotFoundError"),
        ("script.py:f", "cannot be loaded: SystemExit: 0"),  # or the run would end here, as if all were well
        ("accuracy_reward", "pip install math-verify"),
    ],
)
def test_a_name_that_leads_nowhere_is_told(name: str, words: str) -> None:
    Path("mine.py").write_text(MINE)
    Path("broken.py").write_text("def f(:\n")
    Path("script.py").write_text("import sys\n\nsys.exit(0)\n")
    with pytest.raises(UserError) as caught:
        rewards.load(name, 8)
    assert words in str(caught.value)


def test_the_overlong_punishment_is_that_of_the_length_limit() -> None:
    function = rewards.load("get_soft_overlong_punishment", 10)  # the last fifth: from 8 tokens on
    found = function(completion_ids=[[1] * n for n in (8, 9, 10, 11)])
    assert found == [0.0, -0.5, -1.0, -1.0]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "what shall be rewarded?"),
        ({"reward_funcs": ["exact_match", "exact_match"]}, "`exact_match` is given twice"),
        ({"reward_funcs": ["exact_match"], "reward_weights": [1.0, 2.0]}, "2 weights for 1 rewards"),
        ({"reward_model_name_or_path": "m", "reward_weights": []}, "0 weights for 1 rewards"),
        ({"reward_funcs": ["nothing"]}, "there is no such function"),
    ],
)
def test_wrong_reward_options_are_told(values: dict[str, Any], words: str) -> None:
    none = {"reward_funcs": None, "reward_model_name_or_path": None, "reward_weights": None}
    assert words in " ".join(rewards.check({**none, "max_completion_length": 8, **values}))


def test_a_column_that_a_function_needs_must_be_there() -> None:
    Path("mine.py").write_text(MINE)
    function = rewards.load("mine.py:needs", 8)
    rewards.check_columns([function, rewards.exact_match], ["prompt", "solution", "answer"], "data")
    with pytest.raises(UserError, match=r"`needs` needs a column `solution`; data has: prompt, answer\. Map one with"):
        rewards.check_columns([function], ["prompt", "answer"], "data")


# ---------------------------------------------------------------- reward models


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = tmp_path_factory.mktemp("classifier")
    base = str(tiny.ensure("tiny-qwen"))
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model.config.pad_token_id = 0
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def test_a_language_model_is_no_reward_model() -> None:
    """transformers would give it a random head, and the policy would be trained on noise."""
    with pytest.raises(UserError, match=r"is no reward model: it has no weights for score\.weight"):
        load_reward_model(str(tiny.ensure("tiny-qwen")))


def test_a_reward_model_comes_back_as_it_was_saved(classifier: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    ids = torch.tensor([[5, 6, 7]])
    expected = AutoModelForSequenceClassification.from_pretrained(classifier)(ids).logits
    assert load_reward_model(str(classifier))(ids).logits.equal(expected)


def test_an_adapter_is_merged_into_its_base(classifier: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    base = AutoModelForSequenceClassification.from_pretrained(classifier)
    config = LoraConfig(
        task_type="SEQ_CLS", target_modules=["q_proj"], modules_to_save=["score"], init_lora_weights=False
    )
    adapted = get_peft_model(base, config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[5, 6, 7]])
    found = load_reward_model(str(tmp_path / "adapter"))
    assert not hasattr(found, "peft_config") and found.config.name_or_path.endswith("adapter")
    assert found(ids).logits.item() == pytest.approx(adapted(ids).logits.item(), abs=1e-6)


def test_the_reward_model_comes_first_as_its_weight_does(classifier: Path) -> None:
    Path("mine.py").write_text(MINE)
    given = rewards.RewardArguments(str(classifier), ["mine.py:short", "exact_match"])
    config: Any = SimpleNamespace(part=lambda cls: given, values={"max_completion_length": 8})
    splits: Any = SimpleNamespace(train=SimpleNamespace(column_names=["prompt", "answer"]), source="data")
    functions, tokenizers = online.reward_functions(config, splits)
    scorers = make_scorers(functions, [2.0, 0.5, 0.25], tokenizers)
    assert isinstance(scorers[0].func, torch.nn.Module) and scorers[0].tokenizer is not None
    assert [(scorer.name, scorer.weight) for scorer in scorers[1:]] == [("short", 0.5), ("exact_match", 0.25)]
    assert scorers[0].weight == 2.0


# ---------------------------------------------------------------- held-out prompts


def n_tokens(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [float(len(ids)) for ids in completion_ids]


def first_token(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [float(ids[0]) for ids in completion_ids]


@pytest.fixture
def answered(tmp_path: Path) -> Any:
    """Prompts, and a small policy whose reference is another model."""
    prompts = Dataset.from_dict({"prompt": ["t1 t2", "t3", "t4 t5 t6", "t7", "t8", "t9 t1", "t2", "t3 t3"]})
    args = ppo_toys.config(tmp_path, max_completion_length=5, reward_weights=[2.0, -0.5])
    trainer = PPOTrainer(
        ppo_toys.policy(0),
        [n_tokens, first_token],
        args,
        prompts,
        processing_class=ppo_toys.tokenizer(),
        ref_model=ppo_toys.policy(1),
    )
    job = training.Job("toy", "toy", trainer.processing_class, context=64)
    torch.manual_seed(0)
    return online.HeldOut(prompts, job, trainer.scorers, trainer)


def loglikelihoods(model: Any, rows: list[Encoded]) -> list[float]:
    """Row by row, without padding."""
    found = []
    for row in rows:
        with torch.no_grad():
            logprobs = model(torch.tensor([row.ids])).logits[0, :-1].log_softmax(-1)
        chosen = logprobs.gather(1, torch.tensor(row.ids[1:]).unsqueeze(1)).squeeze(1)
        found.append(float(chosen[row.n_prompt - 1 :].sum()))
    return found


def test_the_held_out_kl_is_that_of_the_policy_to_the_reference(answered: Any) -> None:
    found = answered.measure()
    policy, reference = (
        loglikelihoods(model, found.sampled) for model in (answered.policy, answered.trainer.ref_model)
    )
    assert found.reference == pytest.approx(reference, abs=1e-4)
    assert found.metrics["objective/kl"] == pytest.approx(
        [p - r for p, r in zip(policy, reference, strict=True)], abs=1e-4
    )
    assert max(map(abs, found.metrics["objective/kl"])) > 0.1


def test_held_out_rewards_are_weighted_and_shown_by_themselves(answered: Any) -> None:
    metrics = answered.measure().metrics
    pairs = zip(metrics["rewards/n_tokens"], metrics["rewards/first_token"], strict=True)
    assert metrics["reward"] == pytest.approx([2 * length - token / 2 for length, token in pairs])
    assert metrics["rewards/n_tokens"] == metrics["completions/mean_length"]


def test_held_out_prompts_are_answered_greedily_and_by_sampling(answered: Any) -> None:
    found = answered.measure()
    best = [
        int(answered.policy(torch.tensor([row.ids[: row.n_prompt]])).logits[0, -1].argmax()) for row in found.sampled
    ]
    assert [ids[0] for ids in found.greedy.ids] == best
    sampled = [row.ids[row.n_prompt :] for row in found.sampled]
    assert sum(ids[0] != token for ids, token in zip(sampled, best, strict=True)) >= 2
    for name, answers in (("reward", found.greedy.ids), ("sampled_reward", sampled)):
        assert found.metrics[name] == pytest.approx([2.0 * len(ids) - ids[0] / 2 for ids in answers])


def test_a_prompt_may_be_as_long_as_leaves_room_for_the_answer(answered: Any) -> None:
    limit = online._room(answered.job, 60)  # of 64 tokens
    assert limit is not None and limit.problem({"prompt": "t1 t2 t3 t4"}) is None
    assert limit.problem({"prompt": "t1 t2 t3 t4 t5"}) == (
        "its prompt of 5 tokens leaves no room for --max_completion_length 60 in the 64 tokens of the context"
    )
    assert limit.may_be_too_long(np.array([14]), np.array([0]))[0]
    answered.job.context = None
    assert online._room(answered.job, 60) is None


TOY_PROMPTS = {"ppo": "toy_sort_prompt", "grpo": "toy_sort_prompt", "reward": "toy_sort_preference"}


@pytest.mark.parametrize("module", TOY_PROMPTS)
def test_no_row_is_evaluated_that_was_trained_on(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def measure(held_out: Any, *args: Any) -> Any:
        return seen.setdefault("held_out", held_out)

    def train(trainer: Any, run: Any) -> None:
        seen["trainer"] = trainer
        raise UserError("far enough")

    owner = reward if module == "reward" else online
    monkeypatch.setattr(owner.HeldOut, "measure", measure)
    monkeypatch.setattr(training, "train", train)
    few = ["--max_train_samples", "64", "--max_eval_samples", "8"]
    assert cli.main(["--module", module, "--toy", *few, "--output_dir", "run"]) == 1
    data = getattr(toy, TOY_PROMPTS[module])()
    test, validation, trained = (data[name].select(range(8)) for name in ("test", "validation", "train"))
    trainer, held_out = seen["trainer"], seen["held_out"]
    assert trainer.eval_dataset["prompt"][:] == validation["prompt"][:]
    assert all(prompt in data["train"]["prompt"][:64] for prompt in trainer.train_dataset["prompt"])
    if module == "reward":
        job = training.load_job("tiny-qwen")
        assert held_out.test == reward._encode_pairs(test, job, 64)
        assert held_out.validation == reward._encode_pairs(validation, job, 64)
    else:
        assert [row["prompt"] for row in held_out.rows] == test["prompt"][:]
    assert not {str(prompt) for prompt in trained["prompt"]} & {str(prompt) for prompt in test["prompt"]}


# ---------------------------------------------------------------- checks notice what is wrong


def measured(reward: list[float], kl: list[float] | None = None, reference: list[float] | None = None) -> Measured:
    n = len(reward)
    metrics: dict[str, Any] = {"reward": reward, "completions/terminated": [1.0] * n}
    if kl is not None:
        metrics["objective/kl"] = kl
    return Measured(metrics, Answers(["a"] * n, [[1]] * n, [True] * n), [], reference)


def held_out(now: list[float] | None) -> Any:
    return SimpleNamespace(reference_likelihoods=lambda rows: now)


def status_of(checks: list[Check]) -> dict[str, str]:
    return {check.id.split(".")[1]: check.status(toy=True) for check in checks}


@pytest.mark.parametrize(
    ("before", "after", "now", "failed"),
    [
        (measured([0.0] * 9, [0.0] * 9, [-1.0] * 9), measured([1.0] * 9), [-1.0] * 9, set()),
        (measured([0.0] * 9, [0.0] * 9, [-1.0] * 9), measured([1.0] * 9), [-1.1] * 9, {"reference_did_not_move"}),
        (measured([0.0] * 9, [0.1] * 9, [-1.0] * 9), measured([1.0] * 9), [-1.0] * 9, {"kl_is_zero_at_the_start"}),
        (measured([0.0] * 9, [0.0] * 9, [-1.0] * 9), measured([0.0] * 9), [-1.0] * 9, {"held_out_reward_rose"}),
        (measured([1.0] * 9, [0.0] * 9, [-1.0] * 9), measured([0.0] * 9), [-1.0] * 9, {"held_out_reward_rose"}),
    ],
)
def test_the_shared_checks_fail_for_one_reason_each(before, after, now, failed: set[str]) -> None:
    before.metrics.setdefault("objective/kl", [0.0] * 9)
    after.metrics["objective/kl"] = [1.0] * 9
    found = status_of(online.checks("ppo", held_out(now), before, after, online.compare(before, after)))
    assert {name for name, status in found.items() if status != "pass"} == failed


def test_answers_that_no_longer_end_are_noticed() -> None:
    before, after = measured([0.0] * 40), measured([1.0] * 40)
    after.metrics["completions/terminated"] = [0.0] * 20 + [1.0] * 20
    found = status_of(online.checks("ppo", held_out(None), before, after, online.compare(before, after)))
    assert found["answers_still_end"] == "fail"
    assert found["reference_did_not_move"] == found["kl_is_zero_at_the_start"] == "skip"


def test_rows_a_function_says_nothing_about_do_not_count() -> None:
    before, after = measured([0.0, 0.0]), measured([1.0, 1.0])
    before.metrics |= {"rewards/a": [math.nan, 0.5], "rewards/b": [math.nan, math.nan]}
    after.metrics |= {"rewards/a": [1.0, 1.0], "rewards/b": [math.nan, math.nan]}
    block = online.compare(before, after)
    assert (block["before"]["rewards/a"], block["after"]["rewards/a"], block["n"]["rewards/a"]) == (0.5, 1.0, 1)
    assert "rewards/b" not in block["after"]


def test_a_completion_that_no_function_scores_has_no_reward_and_not_0() -> None:
    assert online._weighted_sum([2.0, 3.0], (1.0, math.nan)) == 2.0
    assert math.isnan(online._weighted_sum([2.0, 3.0], (math.nan, math.nan)))


ROW = {
    **{"val/ratio": 1.0, "val/first_ratio_off": 0.0, "val/explained_variance": 0.1, "policy/clipfrac_avg": 0.1},
    **{"objective/kl": 0.8, "completions/mean_length": 8.0, "val/reward_off": 1e-7},
}


@pytest.mark.parametrize(
    ("change", "failed"),
    [
        ({}, None),
        ({"val/first_ratio_off": 0.01}, "first_ratio_is_one"),
        ({"val/explained_variance": -1.0}, "critic_is_no_worse_than_a_constant"),
        ({"policy/clipfrac_avg": 0.6}, "most_tokens_are_not_clipped"),
        ({"val/reward_off": 0.1}, "advantages_add_up_to_the_reward"),
    ],
)
def test_the_checks_of_ppo_read_the_log(change: dict[str, float], failed: str | None, tmp_path: Path) -> None:
    args = PPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    between_rollouts = {"val/ratio": 1.0, "policy/clipfrac_avg": 0.0, "val/explained_variance": None}
    found = status_of(ppo.training_checks([ROW, {**ROW, **change}, between_rollouts, {"eval_reward": 1.0}], args))
    assert {name for name, status in found.items() if status != "pass"} == ({failed} if failed else set())
    assert set(status_of(ppo.training_checks([], args)).values()) == {"skip"}


@pytest.mark.parametrize(
    ("kls", "options", "status"),
    [
        ([0.0, 0.4, 0.9, 1.2, 1.1], {}, "pass"),
        ([0.0, -0.4, -0.9, -1.2, -1.1], {}, "fail"),
        ([0.0, 0.02, -0.03, 0.01, -0.01], {}, "pass"),  # estimates of a KL that is nearly 0
        ([0.0, -0.4, -0.9, -1.2, -1.1], {"top_p": 0.9}, "skip"),  # not the policy's own samples
        ([0.0, -0.4, -0.9, -1.2, -1.1], {"top_k": 5}, "skip"),
        ([0.0], {}, "skip"),
    ],
)
def test_a_kl_below_0_is_noticed(kls: list[float], options: dict[str, Any], status: str, tmp_path: Path) -> None:
    args = PPOConfig(str(tmp_path), use_cpu=True, bf16=False, **options)
    rows = [ROW | {"objective/kl": kl} for kl in kls for _ in range(3)]
    found = status_of(ppo.training_checks(rows[: 1 if len(kls) == 1 else None], args))
    assert found["kl_is_not_negative"] == status


def test_the_checks_of_grpo_read_advantages_and_groups() -> None:
    rows = [{"frac_reward_zero_std": share, "advantages/largest_mean": 1e-7} for share in (0.1, 0.95)]
    assert set(status_of(grpo.group_checks(rows)).values()) == {"pass"}
    assert status_of(grpo.group_checks([*rows, {"advantages/largest_mean": 0.01}]))["advantages_sum_to_zero"] == "fail"
    assert status_of(grpo.group_checks(rows[::-1]))["groups_differ_at_the_start"] == "fail"
    assert set(status_of(grpo.group_checks([])).values()) == {"skip"}


def test_advantages_are_averaged_over_whole_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here a group is spread over two micro-batches, each of which has a mean of its own."""
    import trl

    logged: list[dict[str, float]] = []
    monkeypatch.setattr(trl.GRPOTrainer, "compute_loss", lambda self, model, inputs: 0.0)
    monkeypatch.setattr(trl.GRPOTrainer, "log", lambda self, logs, start_time: logged.append(logs))
    kind = grpo.trainer_class()
    trainer: Any = kind.__new__(kind)
    trainer._advantages, trainer._means = [], []
    trainer.args = SimpleNamespace(steps_per_generation=2)
    trainer.accelerator = SimpleNamespace(gather=lambda tensor: tensor)

    def step(*advantages: float, training: bool = True) -> None:
        trainer.compute_loss(SimpleNamespace(training=training), {"advantages": torch.tensor(advantages)})

    for half in ((1.0, 0.5), (-0.5, -1.0), (1.0, 0.5), (-0.5, -1.02)):
        step(*half)
        step(9.0, training=False)  # of an evaluation
    trainer.log({"loss": 0.0})
    assert logged == [{"loss": 0.0, "advantages/largest_mean": pytest.approx(0.005, abs=1e-6)}]
    trainer.log({"loss": 0.0})
    assert logged[1] == {"loss": 0.0}


def test_a_reward_function_under_grpo_says_which_sample_is_wrong() -> None:
    def nan(completions, **kwargs):
        return [0.0, math.nan]

    (scorer,) = make_scorers(nan, None)
    function = grpo.checked(scorer)
    assert function.__name__ == "nan"  # TRL names the metric after it
    state = SimpleNamespace(global_step=7)
    with pytest.raises(RewardError, match="`nan` returned nan for sample 1 of the prompts after step 7"):
        function(prompts=["p", "q"], completions=["a", "b"], completion_ids=[[1], [2]], trainer_state=state)


def test_a_reward_function_under_grpo_gets_and_gives_what_trls_do() -> None:
    def some(completions, answer, trainer_state, log_metric, **kwargs):
        log_metric("seen", float(trainer_state.global_step))
        return [1.0 if a == c else None for a, c in zip(answer, completions, strict=True)]

    logged: dict[str, float] = {}
    state = SimpleNamespace(global_step=7)
    given = {"trainer_state": state, "log_metric": logged.__setitem__, "log_extra": None, "answer": ["a", "c"]}
    function = grpo.checked(make_scorers(some, None)[0])
    assert function(prompts=["p", "q"], completions=["a", "b"], completion_ids=[[1], [2]], **given) == [1.0, None]
    assert logged == {"seen": 7.0}


def test_a_batch_that_no_function_scores_ends_grpo() -> None:
    """TRL would train on with advantages of 0. Single completions without a reward are left to it."""

    def even(completions, **kwargs):
        return [1.0 if len(c) == 2 else None for c in completions]

    def empty(completions, **kwargs):
        return [0.0 if c == "" else None for c in completions]

    functions = grpo.refusing_silence([grpo.checked(scorer) for scorer in make_scorers([even, empty], None)])
    assert [function.__name__ for function in functions] == ["even", "empty"]  # TRL names the metrics after them

    def ask(*completions: str) -> list[list[float | None]]:
        given = {"prompts": ["p"] * len(completions), "completions": list(completions)}
        state = SimpleNamespace(global_step=7)
        return [f(**given, completion_ids=[[1]] * len(completions), trainer_state=state) for f in functions]

    assert ask("ab", "abc") == [[1.0, None], [None, None]]
    assert ask("abc", "") == [[None, None], [None, 0.0]]
    with pytest.raises(RewardError, match="returned None for all 2 completions of the prompts after step 7") as caught:
        ask("abc", "abcd")
    assert "Prompt: 'p', completion: 'abc'" in str(caught.value)


# ---------------------------------------------------------------- bad input, through the command line


FEW = ("--max_train_samples", "64", "--max_eval_samples", "8", "--max_steps", "4")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--reward_funcs", "nothing"), "`nothing`: there is no such function"),
        (("--reward_weights", "1", "2"), "--reward_weights has 2 weights for 1 rewards"),
        (("--dataset_streaming",), "--dataset_streaming is not for online RL"),
        (("--reward_model_name_or_path", "./nowhere"), "there is no such folder"),
        (
            ("--save_strategy", "steps", "--save_steps", "6"),
            "1 problem in the options of `ppo`:\n  - save_steps 6: a checkpoint can be resumed exactly only between two "
            "rollouts: use a multiple of num_ppo_epochs * num_mini_batches = 4, such as 4 or 8\n",
        ),
        (
            ("--save_strategy", "best", "--eval_steps", "3", "--metric_for_best_model", "reward"),
            "eval_steps 3: a check",
        ),
        (
            ("--model_name_or_path", "adapter"),
            "adapter holds a LoRA adapter and no whole model. Merge it into its base",
        ),
        (
            ("--reward_funcs", "two.py:nothing"),
            "every reward function returned None for all 8 completions of the held-out",
        ),
        (("--max_completion_length", "100000"), "is more than the"),
        (("--max_completion_length", "0"), "max_completion_length"),
        (("--reward_model_name_or_path", "tiny-qwen"), "is no reward model"),
        (("--reward_funcs", "one.py:same", "two.py:same"), "two rewards are called `same`"),
        (("--dataset_name", "toy-sort"), "`exact_match` needs a column `answer`; toy-sort has: prompt"),
    ],
)
def test_wrong_options_of_ppo_end_in_one_message(capsys, options: tuple[str, ...], words: str) -> None:
    for name in ("one.py", "two.py"):
        Path(name).write_text("def same(completions, **kwargs):\n    return [0.0] * len(completions)\n")
    with open("two.py", "a") as file:
        file.write("def nothing(completions, **kwargs):\n    return [None] * len(completions)\n")
    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").write_text("{}")
    code = cli.main(["--module", "ppo", "--toy", *FEW, "--output_dir", "run", *options])
    told = capsys.readouterr()
    assert code != 0 and words in told.err + told.out, told.err + told.out
    assert "Traceback" not in told.err + told.out


@pytest.mark.parametrize("module", ["ppo", "grpo"])
def test_a_prompt_that_leaves_no_room_is_a_problem_of_the_dataset(capsys, module: str) -> None:
    rows = [{"prompt": f"Sort: {i}", "answer": str(i)} for i in range(20)]
    rows[3]["prompt"] = "9" * 5000
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["--module", module, "--toy", *FEW, "--output_dir", "run", "--dataset_name", "rows.jsonl"]
    assert cli.main(command) != 0
    message = capsys.readouterr().err
    assert "line 4: its prompt of" in message and "leaves no room for --max_completion_length 12" in message
    assert "lower --max_completion_length, or shorten it" in message and "--max_length" not in message
    options = ["--on_bad_rows", "drop", "--overwrite_output_dir", "--per_device_train_batch_size", "8"]
    eight = [*options, "--per_device_eval_batch_size", "8"]
    cli.main([*command, *eight])
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["data"]["n_dropped"] == 1 and summary["data"]["problems"] == {"too_long": 1}
    assert summary["error"] is None or summary["error"].startswith("checks failed")


def test_rewards_that_never_differ_are_told_by_the_check_and_not_by_a_crash() -> None:
    Path("zero.py").write_text("def zero(completions, **kwargs):\n    return [0.0] * len(completions)\n")
    sizes = ("--per_device_train_batch_size", "8", "--reward_funcs", "zero.py:zero", "--kl_coef", "0")
    assert cli.main(["--module", "ppo", "--toy", *FEW, *sizes, "--output_dir", "run"]) == 1
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["error"] == "checks failed: ppo.held_out_reward_rose"


@pytest.mark.parametrize("module", ["ppo", "grpo"])
def test_rewards_that_fall_silent_in_the_training_end_it(capsys, module: str) -> None:
    text = "def late(completions, trainer_state, **more):\n    return [None if trainer_state.max_steps else 0.0] * len(completions)\n"
    Path("silent.py").write_text(text)
    options = ("--reward_funcs", "silent.py:late", "--reward_weights", "1", "--output_dir", "run")
    assert cli.main(["--module", module, "--toy", *FEW, *options]) == 1
    message = capsys.readouterr().err
    assert "every reward function returned None for" in message and "Traceback" not in message
    assert "held-out" not in message  # those are asked before and after


def test_another_number_of_epochs_is_no_way_to_go_on(capsys) -> None:
    small = ("--max_train_samples", "16", "--max_eval_samples", "4", "--per_device_train_batch_size", "8")
    run = ["--module", "ppo", "--toy", *small, "--save_strategy", "steps", "--output_dir", "run"]
    cli.main([*run, "--max_steps", "4", "--save_steps", "4"])
    capsys.readouterr()
    more = ("--max_steps", "6", "--num_ppo_epochs", "3", "--save_steps", "3")
    assert cli.main([*run, *more, "--resume_from_checkpoint", "last"]) == 1
    message = capsys.readouterr().err
    assert "checkpoint-4 was written after 4 optimizer steps, which is no multiple of num_ppo_epochs" in message
    assert "Traceback" not in message and "damaged" not in message
