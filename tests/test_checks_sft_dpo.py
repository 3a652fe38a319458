"""The checks a run makes on itself: they pass on correct training and notice each way of getting it wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from llmcore_hf.alignment import dpo, evaluation, sft, training
from llmcore_hf.alignment.evaluation import GenerationArguments
from llmcore_hf.alignment.training import Job, ModelArguments
from llmcore_hf.checks import Check
from llmcore_hf.data import toy
from llmcore_hf.data.loading import Splits
from llmcore_hf.data.problems import Report
from llmcore_hf.errors import UserError
from llmcore_hf.models import tiny

OFF = {"report_to": "none", "use_cpu": True, "bf16": False, "activation_checkpointing": False, "disable_tqdm": True}
N = 20


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def job() -> Job:
    path = str(tiny.ensure("tiny-qwen-base"))
    return Job("tiny-qwen-base", path, AutoTokenizer.from_pretrained(path), context=None)


def splits_of(rows: list[dict[str, Any]], on_bad_rows: str = "stop") -> Splits:
    from datasets import Dataset

    data = Dataset.from_list(rows)
    facts = {"source": "rows.jsonl", "format": "by hand", "fingerprint": "0"}
    return Splits(train=data, validation=data, test=data, **facts, report=Report(), on_bad_rows=on_bad_rows)


toy_data = cache(lambda name: toy.TOY_DATASETS[name]()["test"])


def sft_rows(n: int = N) -> list[dict[str, Any]]:
    return toy_data("toy-sort").select(range(n)).to_list()


def dpo_rows(n: int = N) -> list[dict[str, Any]]:
    return toy_data("toy-sort-preference").select(range(n)).to_list()


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def config_of(**options: Any) -> Any:
    model_args = ModelArguments(**options)
    return SimpleNamespace(part=lambda cls: model_args)


@pytest.fixture
def sft_trainer(job: Job, tmp_path: Path) -> Callable[..., Any]:
    from trl import SFTConfig

    def make(splits: Splits, **options: Any) -> Any:
        args = SFTConfig(output_dir=str(tmp_path), **{"max_length": 64, **OFF, **options})
        return sft.make_trainer(config_of(), job, splits, args)

    return make


@pytest.fixture
def dpo_trainer(job: Job, tmp_path: Path) -> Callable[..., Any]:
    from trl import DPOConfig

    def make(splits: Splits, model: dict[str, Any] | None = None, **options: Any) -> Any:
        args = DPOConfig(output_dir=str(tmp_path), **{"max_length": 64, **OFF, **options})
        return dpo.make_trainer(config_of(**(model or {})), job, splits, args)

    return make


def statuses(checks: list[Check], toy: bool = False) -> dict[str, str]:
    return {check.id.partition(".")[2]: check.status(toy) for check in checks}


# --- what a failed check means ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "passed", "on_toy", "on_user_data"),
    [
        ("invariant", True, "pass", "pass"),
        ("invariant", False, "fail", "fail"),
        ("invariant", None, "skip", "skip"),
        ("learning", True, "pass", "pass"),
        ("learning", False, "fail", "warn"),
        ("learning", None, "skip", "skip"),
    ],
)
def test_a_learning_check_only_warns_on_a_users_own_data(
    kind: Any, passed: bool | None, on_toy: str, on_user_data: str
) -> None:
    check = Check("x", kind, passed, None, "", "", "")
    assert (check.status(toy=True), check.status(toy=False)) == (on_toy, on_user_data)
    assert check.as_dict(toy=True)["status"] == on_toy


# --- SFT: which tokens are trained --------------------------------------------------------------------------------


class Tampered:
    """A collator whose labels are changed after the fact."""

    def __init__(self, collator: Any, change: Callable[[torch.Tensor, torch.Tensor], None]) -> None:
        self.collator, self.change = collator, change

    def __call__(self, examples: list) -> dict[str, torch.Tensor]:
        batch = self.collator(examples)
        self.change(batch["labels"], batch["input_ids"])
        return batch


def test_labels_of_a_good_trainer_pass(sft_trainer: Any, job: Job) -> None:
    splits = splits_of(sft_rows())
    checks = sft.label_checks(sft_trainer(splits), splits, job)
    assert statuses(checks) == {"end_of_turn_is_trained": "pass", "prompt_carries_no_loss": "pass"}
    assert [check.observed["rows"] for check in checks] == [16, 16]
    assert all(check.kind == "invariant" for check in checks)


def train_everything(labels: torch.Tensor, ids: torch.Tensor) -> None:
    labels.copy_(ids)


def train_one_prompt_token(labels: torch.Tensor, ids: torch.Tensor) -> None:
    first = int((labels[0] != -100).nonzero()[0])
    labels[0, first - 1] = ids[0, first - 1]


def train_the_first_token(labels: torch.Tensor, ids: torch.Tensor) -> None:
    labels[0, 0] = ids[0, 0]


def shift_by_one(labels: torch.Tensor, ids: torch.Tensor) -> None:
    labels.copy_(labels.roll(-1, dims=1))


@pytest.mark.parametrize("change", [train_everything, train_one_prompt_token, train_the_first_token, shift_by_one])
def test_a_trained_prompt_is_noticed(sft_trainer: Any, job: Job, change: Any) -> None:
    splits = splits_of(sft_rows())
    trainer = sft_trainer(splits)
    trainer.data_collator = Tampered(trainer.data_collator, change)
    assert statuses(sft.label_checks(trainer, splits, job))["prompt_carries_no_loss"] == "fail"


def test_a_masked_end_of_turn_is_noticed(sft_trainer: Any, job: Job) -> None:
    splits = splits_of(sft_rows())
    trainer = sft_trainer(splits)

    def mask(labels: torch.Tensor, ids: torch.Tensor) -> None:
        labels[ids == job.tokenizer.eos_token_id] = -100

    trainer.data_collator = Tampered(trainer.data_collator, mask)
    checks = sft.label_checks(trainer, splits, job)
    assert statuses(checks) == {"end_of_turn_is_trained": "fail", "prompt_carries_no_loss": "pass"}
    assert checks[0].observed == {"rows": 16, "with_end_of_turn": 0}


def test_one_row_without_its_end_is_noticed(sft_trainer: Any, job: Job) -> None:
    splits = splits_of(sft_rows())
    trainer = sft_trainer(splits)
    answer = splits.train[3]["completion"][0]["content"]

    def mask(labels: torch.Tensor, ids: torch.Tensor) -> None:
        if answer in job.tokenizer.decode(labels[labels != -100]):
            labels[ids == job.tokenizer.eos_token_id] = -100

    trainer.data_collator = Tampered(trainer.data_collator, mask)
    assert statuses(sft.label_checks(trainer, splits, job))["end_of_turn_is_trained"] == "fail"


def test_a_template_without_an_end_of_turn_is_noticed(sft_trainer: Any, job: Job) -> None:
    job.tokenizer.chat_template = tiny.CHAT_TEMPLATE.replace("{{- '<|im_end|>' }}{%- endg", "{%- endg")
    assert job.tokenizer.chat_template != tiny.CHAT_TEMPLATE
    splits = splits_of(sft_rows())
    checks = sft.label_checks(sft_trainer(splits), splits, job)
    assert statuses(checks)["end_of_turn_is_trained"] == "fail"


CHATS = [
    {"messages": [user(f"Sort: {i}1"), assistant(f"1{i}"), user("排序：20"), assistant("02")]} for i in range(2, 10)
]


def test_conversations_train_the_assistant_only(sft_trainer: Any, job: Job) -> None:
    splits = splits_of(CHATS)
    good = sft.label_checks(sft_trainer(splits, assistant_only_loss=True), splits, job)
    assert set(statuses(good).values()) == {"pass"}
    bad = sft.label_checks(sft_trainer(splits, assistant_only_loss=False), splits, job)
    assert statuses(bad) == {"end_of_turn_is_trained": "pass", "prompt_carries_no_loss": "fail"}


def test_an_answer_that_is_cut_off_need_not_end(sft_trainer: Any, job: Job) -> None:
    splits = splits_of([{"prompt": [user("Say 5")], "completion": [assistant("5 " * 100)]}] * 4)
    assert set(statuses(sft.label_checks(sft_trainer(splits), splits, job)).values()) == {"pass"}


def test_plain_text_pairs_pass(sft_trainer: Any, job: Job) -> None:
    splits = splits_of([{"prompt": f"{i} + 1 =", "completion": f" {i + 1}"} for i in range(5)])
    assert set(statuses(sft.label_checks(sft_trainer(splits), splits, job)).values()) == {"pass"}


def test_rows_that_trl_leaves_out_do_not_shift_the_others(sft_trainer: Any, job: Job) -> None:
    """TRL drops a row whose prompt fills max_length; the labels of row i+1 must not be held against row i."""
    rows = sft_rows(6)
    splits = splits_of([{**rows[0], "prompt": [user("Sort: 31 " * 40)]}, *rows])
    trainer = sft_trainer(splits)
    assert len(trainer.train_dataset) == 6
    assert set(statuses(sft.label_checks(trainer, splits, job)).values()) == {"pass"}


def test_a_leak_is_noticed_beside_rows_that_trl_leaves_out(sft_trainer: Any, job: Job) -> None:
    rows = sft_rows(6)
    splits = splits_of([{**rows[0], "prompt": [user("Sort: 31 " * 40)]}, *rows])
    trainer = sft_trainer(splits)
    trainer.data_collator = Tampered(trainer.data_collator, train_one_prompt_token)
    assert statuses(sft.label_checks(trainer, splits, job))["prompt_carries_no_loss"] == "fail"


def test_shuffled_training_rows_pass(sft_trainer: Any, job: Job) -> None:
    rows = [{"prompt": [user("x" * i)], "completion": [assistant(str(i))]} for i in range(1, 20)]
    splits = splits_of(rows)
    trainer = sft_trainer(splits, shuffle_dataset=True)
    assert set(statuses(sft.label_checks(trainer, splits, job)).values()) == {"pass"}


def test_plain_text_has_an_end_but_no_prompt_to_check(sft_trainer: Any, job: Job) -> None:
    splits = splits_of([{"text": "Sort: 31"}] * 4)
    checks = statuses(sft.label_checks(sft_trainer(splits), splits, job))
    assert checks == {"end_of_turn_is_trained": "pass", "prompt_carries_no_loss": "skip"}


@pytest.mark.parametrize("on_bad_rows", ["stop", "drop"])
def test_rows_that_trl_leaves_out_stop_the_run_or_are_counted(
    sft_trainer: Any, job: Job, capsys: pytest.CaptureFixture[str], on_bad_rows: str
) -> None:
    rows = sft_rows(6)
    splits = splits_of([{**rows[0], "prompt": [user("Sort: 31 " * 40)]}, *rows], on_bad_rows)
    trainer = sft_trainer(splits)
    held_out = sft.HeldOut.of(splits, job, trainer.args, GenerationArguments(max_new_tokens=8), trainer)
    if on_bad_rows == "stop":
        with pytest.raises(UserError, match=r"2 rows of rows.jsonl .* --on_bad_rows drop"):
            training.describe_data(splits, trainer, held_out.shares, len(held_out.rows))
        return
    block = training.describe_data(splits, trainer, held_out.shares, len(held_out.rows))
    assert (block["n_train"], block["n_eval"], block["n_dropped"]) == (6, 6, 2)
    assert (block["source"], block["format"]) == ("rows.jsonl", "by hand")
    assert (block["problems"], block["on_bad_rows"]) == ({"too_long": 2}, "drop")
    assert "2 rows of rows.jsonl" in capsys.readouterr().err


def test_token_shares_by_hand() -> None:
    rows = [evaluation.Encoded(list(range(10)), 6), evaluation.Encoded(list(range(4)), 1)]
    assert training.token_shares(rows, None) == {"truncated_fraction": 0.0, "trained_token_fraction": 7 / 14}
    assert training.token_shares(rows, 8) == {"truncated_fraction": 0.5, "trained_token_fraction": 5 / 12}


# --- SFT: was anything learned ------------------------------------------------------------------------------------


def sft_block(before: tuple[float, int], after: tuple[float, int]) -> dict[str, Any]:
    """(perplexity, right answers of 100) before and after."""
    values = [
        {"perplexity": (ppl, 100), "exact_match": [1.0] * right + [0.0] * (100 - right)}
        for ppl, right in (before, after)
    ]
    return evaluation.compare(*values)


@pytest.mark.parametrize(
    ("before", "after", "perplexity", "exact_match"),
    [
        ((300.0, 0), (1.2, 90), "pass", "pass"),
        ((300.0, 0), (200.0, 0), "pass", "fail"),  # nothing answered
        ((300.0, 50), (200.0, 52), "pass", "fail"),  # within chance
        ((2.0, 50), (3.0, 20), "fail", "fail"),  # worse
        ((2.0, 10), (2.0, 10), "fail", "fail"),  # nothing happened
    ],
)
def test_sft_learning_checks(before: Any, after: Any, perplexity: str, exact_match: str) -> None:
    found = statuses(sft.learning_checks(sft_block(before, after)), toy=True)
    assert found == {"held_out_perplexity_fell": perplexity, "held_out_exact_match_rose": exact_match}


def test_without_generated_answers_exact_match_is_not_judged() -> None:
    block = evaluation.compare({"perplexity": (3.0, 9)}, {"perplexity": (2.0, 9)})
    found = statuses(sft.learning_checks(block))
    assert found == {"held_out_perplexity_fell": "pass", "held_out_exact_match_rose": "skip"}


def test_sft_measures_the_answers_the_model_gives(sft_trainer: Any, job: Job) -> None:
    splits = splits_of(sft_rows())
    trainer = sft_trainer(splits)
    held_out = sft.HeldOut.of(splits, job, trainer.args, GenerationArguments(max_new_tokens=8), trainer)
    found = held_out.measure(trainer, job)
    assert found.answers is not None
    wanted = [row["completion"][0]["content"] for row in splits.test]
    right = [float(text == want) for text, want in zip(found.answers.texts, wanted, strict=True)]
    assert found.metrics["exact_match"] == right
    assert 0 < sum(right) < N
    assert found.metrics["perplexity"][1] == N


# --- DPO: the start -----------------------------------------------------------------------------------------------


def held_out_pairs(splits: Splits, job: Job, trainer: Any, n_answers: int = 0) -> dpo.HeldOut:
    return dpo.HeldOut.of(
        splits, job, trainer.args, GenerationArguments(max_generation_samples=n_answers, max_new_tokens=8), trainer
    )


def perturb(model: Any, only: str = "") -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if only in name:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))


def test_the_loss_starts_at_ln_2(dpo_trainer: Any, job: Job) -> None:
    splits = splits_of(dpo_rows())
    trainer = dpo_trainer(splits)
    held_out = held_out_pairs(splits, job, trainer)
    before = held_out.measure(trainer, job, held_out.reference_likelihoods(trainer, job), 0.1)
    assert before.loss == pytest.approx(math.log(2), abs=1e-5)
    assert statuses(dpo.start_checks(before, True, splits)) == {
        "step0_loss_is_ln2": "pass",
        "chosen_differs_from_rejected": "pass",
    }


def test_a_reference_that_is_no_copy_is_noticed(dpo_trainer: Any, job: Job) -> None:
    splits = splits_of(dpo_rows())
    trainer = dpo_trainer(splits)
    perturb(trainer.ref_model)
    held_out = held_out_pairs(splits, job, trainer)
    before = held_out.measure(trainer, job, held_out.reference_likelihoods(trainer, job), 0.1)
    (check,) = [c for c in dpo.start_checks(before, True, splits) if c.id == "dpo.step0_loss_is_ln2"]
    assert check.status(toy=False) == "fail" and check.kind == "invariant"


def test_pairs_without_a_preference_fail_the_run(dpo_trainer: Any, job: Job) -> None:
    rows = dpo_rows()
    splits = splits_of(rows)
    held_out = held_out_pairs(splits, job, trainer := dpo_trainer(splits))
    before = held_out.measure(trainer, job, None, 0.1)
    rows[7]["rejected"] = rows[7]["chosen"]
    checks = statuses(dpo.start_checks(before, False, splits_of(rows)))
    assert checks == {"step0_loss_is_ln2": "skip", "chosen_differs_from_rejected": "fail"}


def by_hand(model: Any, job: Job, row: dict[str, Any], side: str) -> float:
    template = {"return_dict": True, "return_tensors": "pt"}
    ids = job.tokenizer.apply_chat_template(row["prompt"] + row[side], **template)["input_ids"]
    prompt = job.tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, **template)["input_ids"]
    with torch.no_grad():
        logp = model(input_ids=ids).logits[0].double().log_softmax(-1)
    return sum(float(logp[t - 1, ids[0, t]]) for t in range(prompt.shape[1], ids.shape[1]))


def test_dpo_measures_what_the_definition_says(dpo_trainer: Any, job: Job) -> None:
    """Implicit reward beta * (log pi - log pi_ref), margin chosen - rejected, accuracy of the policy itself."""
    splits = splits_of(dpo_rows())
    trainer = dpo_trainer(splits)
    held_out = held_out_pairs(splits, job, trainer, n_answers=5)
    reference = held_out.reference_likelihoods(trainer, job)
    perturb(trainer.model)
    found = held_out.measure(trainer, job, reference, 0.3)

    sides = ("chosen", "rejected")
    policy = {side: [by_hand(trainer.model, job, row, side) for row in splits.test] for side in sides}
    start = {side: [by_hand(trainer.ref_model, job, row, side) for row in splits.test] for side in sides}
    rewards = {side: [0.3 * (p - s) for p, s in zip(policy[side], start[side], strict=True)] for side in sides}
    margins = [c - r for c, r in zip(rewards["chosen"], rewards["rejected"], strict=True)]
    wins = [float(c > r) for c, r in zip(policy["chosen"], policy["rejected"], strict=True)]
    close = {"rel": 1e-3, "abs": 1e-3}
    assert found.metrics["logps/chosen"] == pytest.approx(policy["chosen"], **close)
    assert found.metrics["logps/rejected"] == pytest.approx(policy["rejected"], **close)
    assert found.metrics["rewards/margins"] == pytest.approx(margins, **close)
    assert found.metrics["preference_accuracy"] == wins
    assert found.loss == pytest.approx(sum(math.log1p(math.exp(-m)) for m in margins) / N, rel=1e-3)
    assert max(map(abs, margins)) > 0.01 and 0 < sum(wins) < N  # or the comparison would say nothing

    assert found.answers is not None and len(found.answers.texts) == 5
    for side in sides:
        wanted = [row[side][0]["content"] for row in splits.test.select(range(5))]
        match = [float(text == want) for text, want in zip(found.answers.texts, wanted, strict=True)]
        assert found.metrics[f"completions/match_{side}"] == match


def test_swapped_columns_mirror_the_accuracy(dpo_trainer: Any, job: Job) -> None:
    rows = dpo_rows()
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    accuracies = []
    for splits in (splits_of(rows), splits_of(swapped)):
        trainer = dpo_trainer(splits)
        found = held_out_pairs(splits, job, trainer).measure(trainer, job, None, 0.1)
        accuracies.append(sum(found.metrics["preference_accuracy"]) / N)
    assert accuracies[0] + accuracies[1] == pytest.approx(1.0)
    assert accuracies[0] != 0.5


# --- DPO: the reference -------------------------------------------------------------------------------------------


def test_training_moves_the_policy_and_not_the_reference(dpo_trainer: Any, job: Job) -> None:
    splits = splits_of(dpo_rows())
    trainer = dpo_trainer(splits, max_steps=6, per_device_train_batch_size=N, learning_rate=1e-3, save_strategy="no")
    held_out = held_out_pairs(splits, job, trainer)
    reference = held_out.reference_likelihoods(trainer, job)
    before = held_out.measure(trainer, job, reference, 0.1)
    trainer.train()
    after = held_out.measure(trainer, job, reference, 0.1)
    check = dpo.reference_check(reference, held_out.reference_likelihoods(trainer, job), trainer.args)
    assert (check.status(toy=False), check.kind) == ("pass", "invariant")
    assert after.loss < before.loss - 0.01
    assert sum(after.metrics["preference_accuracy"]) > sum(before.metrics["preference_accuracy"])


@pytest.mark.parametrize("is_the_policy", [True, False])
def test_a_reference_that_moved_is_noticed(dpo_trainer: Any, job: Job, is_the_policy: bool) -> None:
    splits = splits_of(dpo_rows())
    trainer = dpo_trainer(splits)
    if is_the_policy:
        trainer.ref_model = trainer.model
    held_out = held_out_pairs(splits, job, trainer)
    reference = held_out.reference_likelihoods(trainer, job)
    perturb(trainer.model if is_the_policy else trainer.ref_model, only="layers.1.mlp")
    check = dpo.reference_check(reference, held_out.reference_likelihoods(trainer, job), trainer.args)
    assert check.status(toy=False) == "fail"
    assert check.observed["largest_change_in_log_likelihood"] > 0


ARGS: Any = SimpleNamespace(sync_ref_model=False)


def test_the_reference_check_by_hand() -> None:
    assert dpo.reference_check([-1.0, -2.0], [-1.0, -2.0], ARGS).passed is True
    moved = dpo.reference_check([-1.0, -2.0], [-1.0, -2.5], ARGS)
    assert (moved.passed, moved.observed) == (False, {"largest_change_in_log_likelihood": 0.5})
    assert dpo.reference_check(None, None, ARGS).passed is None
    assert dpo.reference_check([-1.0], [-2.0], SimpleNamespace(sync_ref_model=True)).passed is None  # type: ignore


@pytest.mark.parametrize("place", [0, 1])
def test_a_reference_that_became_nan_has_moved(place: int) -> None:
    after = [-1.0, -2.0]
    after[place] = math.nan
    assert dpo.reference_check([-1.0, -2.0], after, ARGS).passed is False


def test_with_lora_the_reference_is_the_model_without_adapter(dpo_trainer: Any, job: Job) -> None:
    splits = splits_of(dpo_rows())
    trainer = dpo_trainer(splits, model={"use_peft": True, "lora_target_modules": ["q_proj", "v_proj"]})
    assert trainer.ref_model is None
    held_out = held_out_pairs(splits, job, trainer)
    reference = held_out.reference_likelihoods(trainer, job)
    before = held_out.measure(trainer, job, reference, 0.1)
    assert statuses(dpo.start_checks(before, True, splits))["step0_loss_is_ln2"] == "pass"

    perturb(trainer.model, only="lora_B")
    after = held_out.measure(trainer, job, reference, 0.1)
    again = held_out.reference_likelihoods(trainer, job)
    assert dpo.reference_check(reference, again, trainer.args).passed is True
    assert after.metrics["logps/chosen"] != before.metrics["logps/chosen"]

    perturb(trainer.model, only="base_layer")
    moved = held_out.reference_likelihoods(trainer, job)
    assert dpo.reference_check(reference, moved, trainer.args).passed is False


def run_dpo(tmp_path: Path, *options: str) -> Any:
    """The toy recipe for a few steps on a few pairs, in this process."""
    from llmcore_hf import registry
    from llmcore_hf.config import Request, resolve
    from llmcore_hf.run_dir import RunDirectory

    brief = "--max_steps 4 --max_eval_samples 20 --max_train_samples 64 --max_generation_samples 0 --use_cpu true"
    module = registry.get("dpo")
    config = resolve(
        module, Request("dpo", toy=True, options=[*brief.split(), "--output_dir", str(tmp_path), *options])
    )
    run = RunDirectory(tmp_path, module, config, [])
    dpo.run(config, run)
    return run


@pytest.mark.slow
def test_precomputed_reference_likelihoods_give_the_same_margins(tmp_path: Path) -> None:
    """TRL then keeps no reference in memory; the policy before training is the reference all the same."""
    blocks = []
    for name, options in (("plain", []), ("precomputed", ["--precompute_ref_log_probs", "true"])):
        (tmp_path / name).mkdir()
        blocks.append(run_dpo(tmp_path / name, *options).summary["eval"])
    assert blocks[0]["after"]["rewards/margins"] > 0
    assert blocks[1]["after"]["rewards/margins"] == pytest.approx(blocks[0]["after"]["rewards/margins"], rel=0.02)


# --- DPO: was anything learned, and did it reach the answers ------------------------------------------------------


def dpo_block(
    wins: tuple[int, int], logps: tuple[float, float] = (-1.0, -1.0), matches: tuple[int, int] | None = (40, 60)
) -> dict[str, Any]:
    """Held-out pairs won, mean likelihood of chosen, answers equal to chosen: (before, after), of 100 rows."""
    sides: list[dict[str, Any]] = []
    for i in (0, 1):
        noise = [0.1 * (-1) ** k for k in range(100)]
        side: dict[str, Any] = {
            "preference_accuracy": [1.0] * wins[i] + [0.0] * (100 - wins[i]),
            "logps/chosen": [logps[i] + (-1) ** i * n for n in noise],
        }
        if matches is not None:
            side["completions/match_chosen"] = [1.0] * matches[i] + [0.0] * (100 - matches[i])
        sides.append(side)
    return evaluation.compare(*sides)


@pytest.mark.parametrize(
    ("block", "rose", "displacement"),
    [
        (dpo_block((50, 95), (-1.0, -0.2), (45, 90)), "pass", "pass"),
        (dpo_block((50, 95), (-1.0, -1.0), (45, 45)), "pass", "pass"),  # no change is no fall
        (dpo_block((50, 95), (-1.0, -6.0), (45, 90)), "pass", "fail"),  # chosen less likely
        (dpo_block((50, 95), (-1.0, -0.5), (45, 10)), "pass", "fail"),  # fewer right answers
        (dpo_block((50, 95), (-1.0, -0.5), None), "pass", "pass"),
        (dpo_block((50, 95), (-1.0, -6.0), None), "pass", "fail"),
        (dpo_block((50, 52), (-1.0, -6.0), (45, 10)), "fail", "skip"),  # nothing rose, so nothing was displaced
        (dpo_block((95, 50), (-1.0, -0.5), (45, 45)), "fail", "skip"),  # as with swapped columns
    ],
)
def test_dpo_learning_checks(block: dict[str, Any], rose: str, displacement: str) -> None:
    checks = dpo.learning_checks(block)
    assert all(check.kind == "learning" for check in checks)
    assert statuses(checks, toy=True) == {
        "held_out_preference_accuracy_rose": rose,
        "no_likelihood_displacement": displacement,
    }


# --- what reaches TRL ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("module", "trainer"), [(sft, "SFTTrainer"), (dpo, "DPOTrainer")])
def test_lora_and_quantization_reach_the_trainer(
    module: Any, trainer: str, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    def record(**kwargs: Any) -> Any:
        given.update(kwargs)
        return SimpleNamespace(train_dataset=[1])

    monkeypatch.setattr(f"trl.{trainer}", record)
    monkeypatch.setattr("trl.get_quantization_config", lambda args: {"4bit": args.load_in_4bit})
    splits = splits_of(sft_rows(4))
    module.make_trainer(config_of(use_peft=True, lora_r=3, load_in_4bit=True), job, splits, None)
    assert given["peft_config"].r == 3
    assert given["quantization_config"] == {"4bit": True}
    assert given["model"] == job.path and given["processing_class"] is job.tokenizer
    assert given["train_dataset"] is splits.train and given["eval_dataset"] is splits.validation


def test_questions_and_likelihoods_come_from_the_test_split(sft_trainer: Any, dpo_trainer: Any, job: Job) -> None:
    from dataclasses import replace

    from datasets import Dataset

    for rows, module, make in ((sft_rows(), sft, sft_trainer), (dpo_rows(), dpo, dpo_trainer)):
        splits = splits_of(rows)
        answer = "completion" if module is sft else "chosen"
        test_row = {**rows[0], "prompt": [user("only in test")], answer: [assistant("7")]}
        splits = replace(splits, test=Dataset.from_list([test_row]))
        trainer = make(splits)
        held_out = module.HeldOut.of(splits, job, trainer.args, GenerationArguments(max_new_tokens=4), trainer)
        assert [prompt[0]["content"] for prompt in held_out.questions.prompts] == ["only in test"]
        assert all("only in test" in job.tokenizer.decode(row.ids) for row in held_out.rows)
