"""What PPO and GRPO share: prompts, rewards, and held-out prompts answered before and after training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoTokenizer

from llmcore_hf.alignment import evaluation, rewards, training
from llmcore_hf.alignment.rewards import RewardArguments
from llmcore_hf.alignment.training import Job
from llmcore_hf.checks import Check
from llmcore_hf.config import Config
from llmcore_hf.curves import HELD_OUT, REJECTED, TRAIN, Line, Panel
from llmcore_hf.data.loading import Splits
from llmcore_hf.errors import UserError
from llmcore_hf.models import loading
from llmcore_hf.ppo.rewards import Batch, RewardError, Scorer, load_reward_model, shown
from llmcore_hf.run_dir import RunDirectory

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import Trainer

TASK = "prompt"
SEVERAL = (TRAIN, HELD_OUT, REJECTED, "#9467bd", "#8c564b")  # colours of several rewards
TOLERANCE = 1e-3  # nats per completion: policy and reference agree at the start, up to the order of float additions


# ------------------------------------------------------------ options and data


def check(config: Config) -> list[str]:
    """What is wrong with the options that PPO and GRPO have in common, one sentence each."""
    values, problems = config.values, training.check_options(config)
    problems += rewards.check(values)
    if values["dataset_streaming"]:
        problems.append("--dataset_streaming is not for online RL: generating takes far longer than reading prompts")
    model = values["reward_model_name_or_path"]
    if model and "/" in model and model.startswith((".", "/", "~")) and not Path(model).expanduser().is_dir():
        problems.append(f"--reward_model_name_or_path {model}: there is no such folder")
    return problems


def load_prompts(config: Config, job: Job, run_dir: RunDirectory) -> Splits:
    """The prompts; those that leave no room for an answer are problems of the dataset."""
    args = config.parts[-1]  # PPOConfig or GRPOConfig
    splits = training.load_splits(config, args, TASK, run_dir, _room(job, args.max_completion_length))
    training.require_chat_template(job.tokenizer, splits)
    return splits


def _room(job: Job, n_completion: int) -> training.PromptLimit | None:
    if not job.context:
        return None
    fills = f"leaves no room for --max_completion_length {n_completion} in the {job.context} tokens of the context"
    remedy = "lower --max_completion_length, or shorten it"
    longest = job.context - n_completion + 1
    return training.PromptLimit(job.tokenizer, lambda row: encode(job, row), longest, fills, remedy)


def prompt_limit_of(job: Job, max_length: int | None) -> training.PromptLimit | None:
    longest = max_length or job.context
    return training.PromptLimit(job.tokenizer, lambda row: encode(job, row), longest) if longest else None


def encode(job: Job, row: dict[str, Any]) -> evaluation.Encoded:
    """A prompt as the policy gets it; nothing of it carries loss."""
    prompt, tokenizer = row["prompt"], job.tokenizer
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
    else:
        template = {"add_generation_prompt": True, "return_dict": True}
        ids = tokenizer.apply_chat_template(prompt, tools=row.get("tools"), **template)["input_ids"]
    return evaluation.Encoded(list(ids), len(ids))


def as_trained(job: Job, rows: Dataset, max_length: int) -> list[list[training.SeenRow]]:
    """The prompt of each row; the policy writes what carries loss."""
    found = []
    for row in rows:
        ids = encode(job, row).ids
        kept = ids[:max_length]
        found.append([training.SeenRow("The prompt", kept, [False] * len(kept), len(ids), len(ids))])
    return found


def reward_functions(config: Config, splits: Splits) -> tuple[list[Any], list[Any]]:
    """Reward model and functions in the order of `--reward_weights`, and the tokenizer of each (None for functions).

    Raises:
        UserError: a function needs a column that the dataset has not, or the model is no reward model.
    """
    args = config.part(RewardArguments)
    length = config.values["max_completion_length"]
    functions = [rewards.load(name, length) for name in args.reward_funcs or []]
    rewards.check_columns(functions, splits.train.column_names, splits.source)
    if not args.reward_model_name_or_path:
        return functions, [None] * len(functions)
    path = loading.resolve_name(args.reward_model_name_or_path)
    try:
        model, tokenizer = load_reward_model(path), AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, RuntimeError) as error:  # the last: it has another number of labels
        reason = " ".join(str(error).split())
        raise UserError(f"--reward_model_name_or_path {path} cannot be loaded: {reason}") from error
    return [model, *functions], [tokenizer, *([None] * len(functions))]


# ------------------------------------------------------------ held-out prompts


@dataclass
class Measured:
    """Held-out prompts answered by one state of the policy."""

    metrics: dict[str, Any]
    greedy: evaluation.Answers
    sampled: list[evaluation.Encoded]  # prompts with sampled answers
    reference: list[float] | None  # their log-likelihood under the reference


class HeldOut:
    """Prompts that are answered before and after training, greedily and by sampling, and scored by every reward."""

    def __init__(self, rows: Dataset, job: Job, scorers: list[Scorer], trainer: Trainer) -> None:
        args: Any = trainer.args
        self.rows, self.job, self.scorers, self.trainer = list(rows), job, scorers, trainer
        self.batch_size = args.per_device_eval_batch_size
        self.n_tokens = args.max_completion_length
        self.sampling = {"temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k}
        self.temperature = args.temperature

    @property
    def policy(self) -> Any:
        model: Any = self.trainer.model
        return getattr(model, "policy", model)

    def answer(self, sampling: dict[str, Any] | None = None) -> evaluation.Answers:
        return evaluation.generate(
            self.policy,
            self.job.tokenizer,
            [row["prompt"] for row in self.rows],
            self.n_tokens,
            self.batch_size,
            self.trainer.accelerator,
            [row.get("tools") for row in self.rows],
            sampling,
        )

    def measure(self) -> Measured:
        """Rewards per prompt (NaN where a function has nothing to say), lengths, and KL to the reference.

        The KL is log pi(y|x) - log pi_ref(y|x) of one sampled answer per prompt, in nats, at temperature 1.
        """
        greedy, sampled = self.answer(), self.answer(self.sampling)
        pairs = [
            evaluation.Encoded([*(prompt := encode(self.job, row).ids), *ids], len(prompt))
            for row, ids in zip(self.rows, sampled.ids, strict=True)
        ]
        metrics: dict[str, Any] = {
            **self._rewards(greedy),
            "sampled_reward": self._rewards(sampled)["reward"],
            "completions/terminated": [float(ended) for ended in greedy.terminated],
            "completions/mean_length": [float(n) for n in greedy.n_tokens],
        }
        reference = self.reference_likelihoods(pairs)
        if reference is not None:
            policy = self._likelihoods(self.policy, pairs)
            metrics["objective/kl"] = [p - r for p, r in zip(policy, reference, strict=True)]
        return Measured(metrics, greedy, pairs, reference)

    def _rewards(self, answers: evaluation.Answers) -> dict[str, list[float]]:
        prompts = [row["prompt"] for row in self.rows]
        conversational = not isinstance(prompts[0], str)
        completions: list[Any] = list(answers.texts)
        if conversational:
            completions = [[{"role": "assistant", "content": text}] for text in answers.texts]
        columns = {name: [row[name] for row in self.rows] for name in self.rows[0] if name != "prompt"}
        batch = Batch(prompts, completions, answers.ids, columns, "the held-out prompts")
        given = {"trainer_state": self.trainer.state, "log_metric": _ignore, "log_extra": _ignore}
        found = {f"rewards/{s.name}": s(batch, self.batch_size, **given).tolist() for s in self.scorers}
        weights = [scorer.weight for scorer in self.scorers]
        total = [_weighted_sum(weights, row) for row in zip(*found.values(), strict=True)]
        if all(map(math.isnan, total)):
            raise RewardError(
                f"every reward function returned None for all {len(total)} completions of {batch.name}, for example: "
                f"{shown(batch, 0)}"
            )
        return {"reward": total, **(found if len(found) > 1 else {})}

    def reference_likelihoods(self, rows: list[evaluation.Encoded]) -> list[float] | None:
        """Log-likelihood of answers under the reference; None when the trainer keeps none in memory."""
        reference, context = _reference_of(self.trainer, self.policy)
        if reference is None:
            return None
        with context:
            return self._likelihoods(reference, rows)

    def _likelihoods(self, model: Any, rows: list[evaluation.Encoded]) -> list[float]:
        pad = self.job.tokenizer.pad_token_id
        return evaluation.likelihoods(model, rows, pad, self.batch_size, self.trainer.accelerator).logprobs


def _reference_of(trainer: Any, policy: Any) -> tuple[Any, AbstractContextManager[Any]]:
    if trainer.ref_model is not None:
        return trainer.accelerator.unwrap_model(trainer.ref_model), nullcontext()
    if hasattr(policy, "disable_adapter"):
        return policy, policy.disable_adapter()
    return None, nullcontext()


def _weighted_sum(weights: list[float], values: Sequence[float]) -> float:
    """Over the functions that had something to say; NaN when none had."""
    known = [w * v for w, v in zip(weights, values, strict=True) if not math.isnan(v)]
    return math.fsum(known) if known else math.nan


def _ignore(name: str, value: Any) -> None:
    """What a reward function logs during an evaluation is not of the training."""


def compare(before: Measured, after: Measured) -> dict[str, Any]:
    """The `eval` block of a summary. Rows for which a reward function had nothing to say do not count for it."""
    first, last = dict(before.metrics), dict(after.metrics)
    for name in [name for name in last if isinstance(last[name], list)]:
        known = [
            i for i, pair in enumerate(zip(first[name], last[name], strict=True)) if not any(map(math.isnan, pair))
        ]
        if not known:
            del first[name], last[name]
            continue
        first[name], last[name] = ([values[name][i] for i in known] for values in (first, last))
    return evaluation.compare(first, last)


def samples(held_out: HeldOut, before: Measured, after: Measured) -> list[dict[str, Any]]:
    """The first few held-out prompts with their greedy answers; the reference is the column `answer` where there is one."""
    rows = zip(held_out.rows, before.greedy.texts, after.greedy.texts, strict=True)
    return [
        {
            "prompt": training.show_text(row["prompt"]),
            "reference": None if row.get("answer") is None else str(row["answer"]),
            "before": first,
            "after": last,
        }
        for row, first, last in list(rows)[: training.N_SAMPLES]
    ]


# ------------------------------------------------------------ checks and pictures


def checks(name: str, held_out: HeldOut, before: Measured, after: Measured, block: dict[str, Any]) -> list[Check]:
    """What must hold for any online method. Called after training."""
    return [
        _reference_check(name, held_out, before),
        _start_check(name, before),
        _reward_check(name, block),
        _ending_check(name, block),
    ]


def _reference_check(name: str, held_out: HeldOut, before: Measured) -> Check:
    moved = None
    now = None if before.reference is None else held_out.reference_likelihoods(before.sampled)
    if now is not None and before.reference is not None:
        moved = max(abs(a - b) for a, b in zip(before.reference, now, strict=True))
    return Check(
        f"{name}.reference_did_not_move",
        "invariant",
        None if moved is None else moved == 0,
        {"largest_change_in_log_likelihood": moved},
        "0: the reference is frozen",
        "参考模型必须冻结：它一动，KL 惩罚就失去了意义。",
        "The reference must stay frozen: if it moves, the KL penalty loses its meaning.",
    )


def _start_check(name: str, before: Measured) -> Check:
    kl = before.metrics.get("objective/kl")
    largest = max(map(abs, kl)) if kl else None
    return Check(
        f"{name}.kl_is_zero_at_the_start",
        "invariant",
        None if largest is None else largest < TOLERANCE,
        {"largest_kl": largest},
        f"within {TOLERANCE} nats of 0 for every completion",
        "训练前策略就是参考模型，KL 必须为 0；不为 0 说明两者的权重、dropout 或填充不一致。",
        "Before training the policy is the reference, so the KL is 0; if not, weights, dropout or padding differ.",
    )


def _reward_check(name: str, block: dict[str, Any]) -> Check:
    low, high = block["ci95"]["reward"]
    return Check(
        f"{name}.held_out_reward_rose",
        "learning",
        low > 0,
        {"change": block["delta"]["reward"], "from": low, "to": high},
        "95 % interval of the change lies above 0",
        "留出集奖励没有显著上升：看奖励是否几乎全为 0 或全相同、学习率与 KL 系数。",
        "Held-out reward did not clearly rise: are rewards nearly all equal? Look at learning rate and KL coefficient.",
    )


def _ending_check(name: str, block: dict[str, Any]) -> Check:
    high = block["ci95"]["completions/terminated"][1]
    return Check(
        f"{name}.answers_still_end",
        "learning",
        high >= 0,
        {"before": block["before"]["completions/terminated"], "after": block["after"]["completions/terminated"]},
        "the share of answers that end by themselves did not clearly fall",
        "自己结束的回答变少了：奖励可能在鼓励变长，或者截断没有受到惩罚。",
        "Fewer answers end by themselves: the reward may favour length, or truncation is not punished.",
    )


def reward_panels(train_key: str, scorers: list[Scorer], *held_out: Line) -> list[Panel]:
    """The total, and each reward by itself when there are several."""
    panels = [Panel("Reward", (Line(train_key, "training, sampled", TRAIN), *held_out))]
    if len(scorers) > 1:
        each = zip(scorers, SEVERAL, strict=False)
        lines = tuple(Line(f"rewards/{scorer.name}/mean", scorer.name, color) for scorer, color in each)
        panels.append(Panel("Each reward, training", lines))
    return panels


def kl_panel(key: str, title: str) -> Panel:
    return Panel(title, (Line(key, "training", TRAIN),), level=0.0, level_label="reference model")


def shares(block: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Metrics that are shares, before and after, for the bars of the picture."""
    names = {
        "reward": "reward, greedy",
        "sampled_reward": "reward, sampled",
        "completions/terminated": "answers that end",
    }
    names |= {
        name: f"{name.removeprefix('rewards/')}, greedy" for name in block["after"] if name.startswith("rewards/")
    }
    pairs = {label: (block["before"][n], block["after"][n]) for n, label in names.items() if n in block["after"]}
    return {label: pair for label, pair in pairs.items() if all(0 <= value <= 1 for value in pair)}
