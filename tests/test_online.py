"""What PPO, GRPO and the RLHF pipeline share: rewards by name, held-out prompts, checks that notice what is wrong."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmcore_hf import cli
from llmcore_hf.alignment import grpo, online, ppo, rewards, rlhf
from llmcore_hf.alignment.evaluation import Answers
from llmcore_hf.alignment.online import Measured
from llmcore_hf.checks import Check
from llmcore_hf.config import Config
from llmcore_hf.errors import UserError
from llmcore_hf.models import tiny
from llmcore_hf.ppo import PPOConfig
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
        ("accuracy_reward", "pip install math-verify"),
    ],
)
def test_a_name_that_leads_nowhere_is_told(name: str, words: str) -> None:
    Path("mine.py").write_text(MINE)
    Path("broken.py").write_text("def f(:\n")
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


ROW = {"val/ratio": 1.0, "val/first_ratio_off": 0.0, "val/explained_variance": 0.1, "policy/clipfrac_avg": 0.1}


@pytest.mark.parametrize(
    ("change", "failed"),
    [
        ({}, None),
        ({"val/first_ratio_off": 0.01}, "first_ratio_is_one"),
        ({"val/explained_variance": -1.0}, "critic_is_no_worse_than_a_constant"),
        ({"policy/clipfrac_avg": 0.6}, "most_tokens_are_not_clipped"),
    ],
)
def test_the_checks_of_ppo_read_the_log(change: dict[str, float], failed: str | None, tmp_path: Path) -> None:
    args = PPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    between_rollouts = {"val/ratio": 1.0, "policy/clipfrac_avg": 0.0, "val/explained_variance": None}
    found = status_of(ppo.training_checks([ROW, {**ROW, **change}, between_rollouts, {"eval_reward": 1.0}], args))
    assert {name for name, status in found.items() if status != "pass"} == ({failed} if failed else set())
    assert set(status_of(ppo.training_checks([], args)).values()) == {"skip"}


def test_the_checks_of_grpo_read_advantages_and_groups() -> None:
    rows = [{"frac_reward_zero_std": share, "advantages/largest_mean": 1e-7} for share in (0.1, 0.95)]
    assert set(status_of(grpo.group_checks(rows)).values()) == {"pass"}
    assert status_of(grpo.group_checks([*rows, {"advantages/largest_mean": 0.01}]))["advantages_sum_to_zero"] == "fail"
    assert status_of(grpo.group_checks(rows[::-1]))["groups_differ_at_the_start"] == "fail"
    assert set(status_of(grpo.group_checks([])).values()) == {"skip"}


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


# ---------------------------------------------------------------- bad input, through the command line


FEW = ("--max_train_samples", "64", "--max_eval_samples", "8", "--max_steps", "4")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--reward_funcs", "nothing"), "`nothing`: there is no such function"),
        (("--reward_weights", "1", "2"), "--reward_weights has 2 weights for 1 rewards"),
        (("--dataset_streaming",), "--dataset_streaming is not for online RL"),
        (("--reward_model_name_or_path", "./nowhere"), "there is no such folder"),
        (("--save_strategy", "steps", "--save_steps", "3"), "use a multiple of"),
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


# ---------------------------------------------------------------- the pipeline


def rlhf_config(**values: Any) -> Config:
    defaults = {"model_name_or_path": "tiny-qwen", "seed": 42, "sft": {}, "reward": {}, "ppo": {}}
    return Config("rlhf", False, {**defaults, **values}, {}, parts=())


def test_all_problems_of_all_stages_are_told_before_the_first_begins() -> None:
    options = {
        "sft": {"dataset_name": "toy-sort", "max_step": 3},
        "reward": {"dataset_name": "toy-sort-preference", "model_name_or_path": "x"},
        "ppo": {"dataset_name": "toy-sort-prompt", "reward_funcs": ["nothing"]},
    }
    problems = " ".join(rlhf.check(rlhf_config(**options)))
    assert "stage sft: unknown key `max_step` (did you mean `max_steps`?)" in problems
    assert "stage reward: `model_name_or_path` is set by the stages themselves" in problems
    assert "`nothing`: there is no such function" in problems
    assert "--model_name_or_path is missing" in " ".join(rlhf.check(rlhf_config(model_name_or_path=None)))


def test_the_gold_reward_is_the_function_of_weight_0() -> None:
    options = {"reward_funcs": ["a", "mine.py:b"], "reward_weights": [1.0, 0.5, 0.0]}
    assert rlhf.gold_reward(rlhf_config(ppo=options)) == "b"
    assert rlhf.gold_reward(rlhf_config(ppo={"reward_funcs": ["a"], "reward_weights": [0.0, 1.0]})) is None
    assert rlhf.gold_reward(rlhf_config()) is None


@pytest.mark.parametrize(("curve", "status"), [([0.4, 0.9, 0.88], "pass"), ([0.4, 0.9, 0.6], "fail")])
def test_over_optimization_is_a_gold_reward_that_falls_back(curve: list[float], status: str) -> None:
    rows = [{"step": i, "ppo/eval_rewards/gold": value} for i, value in enumerate(curve)]
    block = {"ci95": {"rewards/gold": [0.1, 0.2]}, "delta": {"rewards/gold": 0.15}}
    assert status_of(rlhf.gold_checks(block, rows, "gold")) == {
        "gold_reward_rose": "pass",
        "no_over_optimization": status,
    }
    assert set(status_of(rlhf.gold_checks({"ci95": {}, "delta": {}}, [], None)).values()) == {"skip"}
    block["ci95"]["rewards/gold"] = [-0.1, 0.2]
    assert status_of(rlhf.gold_checks(block, rows, "gold"))["gold_reward_rose"] == "fail"


def test_steps_of_the_stages_follow_one_another(tmp_path: Path) -> None:
    for stage, steps in {"sft": [0, 5], "reward": [0, 2], "ppo": [4]}.items():
        (tmp_path / stage).mkdir()
        rows = "".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in steps)
        (tmp_path / stage / "log_history.jsonl").write_text(rows)
    rows = rlhf.merged_history(tmp_path)
    assert [row["step"] for row in rows] == [0, 5, 5, 7, 11]
    assert [next(name for name in row if name != "step") for row in rows] == [
        *["sft/loss"] * 2,
        *["reward/loss"] * 2,
        "ppo/loss",
    ]


def test_an_adapter_of_the_first_stage_is_merged_for_the_next(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = str(tiny.ensure("tiny-qwen"))
    model = AutoModelForCausalLM.from_pretrained(base)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    adapted.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path)
    merged = rlhf.whole_model(tmp_path)
    ids = torch.tensor([[5, 6, 7]])
    found = AutoModelForCausalLM.from_pretrained(merged).eval()(ids).logits
    assert found.tolist()[0][0] == pytest.approx(adapted(ids).logits.tolist()[0][0], abs=1e-5)
    assert rlhf.whole_model(merged) == merged
