"""Supervised fine-tuning: maximise the likelihood of the reference answer, token by token.

    L(theta) = - sum over completion tokens t of log pi_theta(y_t | x, y_<t)

The loss is the cross-entropy of the next token (MLE); prompt tokens are context and carry no loss. The last trained
token is the end of the turn: a model that never sees it in the labels never learns to stop. Trainer: TRL's SFTTrainer.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcore_hf.alignment import evaluation, training
from llmcore_hf.alignment.evaluation import GenerationArguments
from llmcore_hf.alignment.training import Job, ModelArguments
from llmcore_hf.checks import Check
from llmcore_hf.config import HOUSE, Config, RunArguments
from llmcore_hf.curves import HELD_OUT, TRAIN, Line, Panel, draw
from llmcore_hf.data.loading import DataArguments, Splits
from llmcore_hf.errors import UserError
from llmcore_hf.run_dir import RunDirectory

if TYPE_CHECKING:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

house_defaults = training.house_defaults
IGNORED = -100  # label of tokens without loss
N_CHECKED = 16  # training rows whose labels are looked at


def argument_classes() -> tuple[type, ...]:
    from trl import SFTConfig

    return (RunArguments, DataArguments, GenerationArguments, ModelArguments, SFTConfig)


def check(config: Config) -> list[str]:
    """Impossible combinations of options, one sentence each."""
    values, problems = config.values, training.check_options(config)
    if values["padding_free"] and not values["packing"] and values["max_length"]:
        problems.append("--padding_free without --packing needs --max_length none: TRL does not cut rows there")
    if values["completion_only_loss"] and values["assistant_only_loss"]:
        problems.append("--completion_only_loss and --assistant_only_loss exclude each other: choose one")
    return problems


def run(config: Config, run_dir: RunDirectory) -> None:
    """Load, evaluate, train, evaluate again on the same held-out rows, check, and write the evidence."""
    args: SFTConfig = config.part(argument_classes()[-1])
    job = training.prepare(config, config.part(ModelArguments), args)
    splits = training.load_splits(config, args, "sft", run_dir, prompt_limit(config, job, args))
    if not args.chat_template_path:
        training.require_chat_template(job.tokenizer, splits)
    if "messages" in splits.train.column_names and not config.is_set("assistant_only_loss"):
        args.assistant_only_loss = True  # the other turns are context
        config.values["assistant_only_loss"], config.sources["assistant_only_loss"] = True, HOUSE
        run_dir.write("resolved_config.yaml", config.to_yaml())  # so that a repeated run does the same

    with training.explaining(job, splits):
        trainer = make_trainer(config, job, splits, args)
    job.tokenizer = trainer.processing_class  # with the template of --chat_template_path, when there is one
    training.attach(trainer, run_dir)
    held_out = HeldOut.of(splits, job, args, config.part(GenerationArguments), trainer)
    run_dir.summary["data"] = training.describe_data(splits, trainer, held_out.shares, len(held_out.rows))
    run_dir.summary["model"] = training.describe_model(trainer, job)
    run_dir.checks += label_checks(trainer, splits, job, loss_on_prompt(config))

    before = held_out.measure(trainer, job)
    training.train(trainer, run_dir)
    training.record_stream(run_dir, splits)
    after = held_out.measure(trainer, job)

    run_dir.summary["eval"] = block = evaluation.compare(before.metrics, after.metrics)
    run_dir.checks += learning_checks(block)
    run_dir.summary["samples"] = training.samples(held_out.questions, "exact_match", before.answers, after.answers)
    training.write_model_card(run_dir, trainer, job, splits)
    run_dir.write("training_curves.png", draw_curves(run_dir, job, splits))


def loss_on_prompt(config: Config) -> bool:
    """Whether the user asked for it."""
    options = ("completion_only_loss", "assistant_only_loss")
    return any(config.is_set(name) and config.values[name] is False for name in options)


def prompt_limit(config: Config, job: Job, args: SFTConfig) -> training.PromptLimit | None:
    """None where a long prompt does no harm, or is not known yet because another chat template comes first."""
    if args.packing or args.chat_template_path or loss_on_prompt(config):
        return None
    return prompt_limit_of(job, args.max_length)


def prompt_limit_of(job: Job, max_length: int | None) -> training.PromptLimit | None:
    longest = max_length or job.context
    return training.PromptLimit(job.tokenizer, lambda row: _up_to_first_answer(row, job), longest) if longest else None


def as_trained(job: Job, rows: Dataset, max_length: int) -> list[list[training.SeenRow]]:
    """What TRL's trainer makes of each row."""
    from trl import SFTConfig, SFTTrainer

    messages = "messages" in rows.column_names
    options = {"max_length": None, "assistant_only_loss": messages}  # uncut, so that no row is left out
    with training.stand_in(job, SFTConfig, **options) as parts:
        trainer = SFTTrainer(train_dataset=rows, **parts)
        prepared = list(trainer.train_dataset)
        labels = [trainer.data_collator([row])["labels"][0].tolist() for row in prepared]
    return [
        [
            training.SeenRow(
                "Row",
                row["input_ids"][:max_length],
                [label != IGNORED for label in found[:max_length]],
                next((i for i, label in enumerate(found) if label != IGNORED), len(found)),
                len(row["input_ids"]),
            )
        ]
        for row, found in zip(prepared, labels, strict=True)
    ]


def make_trainer(config: Config, job: Job, splits: Splits, args: SFTConfig) -> SFTTrainer:
    """TRL's trainer, given the path so that its own loading code makes the model."""
    from trl import SFTTrainer, get_peft_config, get_quantization_config

    model_args = config.part(ModelArguments)
    return SFTTrainer(
        model=job.path,
        args=args,
        train_dataset=splits.train,
        eval_dataset=splits.validation,
        processing_class=job.tokenizer,
        peft_config=get_peft_config(model_args),
        quantization_config=get_quantization_config(model_args),
    )


def as_pair(row: dict[str, Any]) -> tuple[evaluation.Text, evaluation.Text]:
    """(prompt, completion) of a row in any SFT format; the last turn of a conversation is its completion."""
    if "messages" in row:
        return row["messages"][:-1], row["messages"][-1:]
    return ("", row["text"]) if "text" in row else (row["prompt"], row["completion"])


@dataclass
class Measured:
    metrics: dict[str, Any]
    answers: evaluation.Answers | None


@dataclass
class HeldOut:
    """The rows that are evaluated before and after, tokenized once."""

    rows: list[evaluation.Encoded]
    questions: evaluation.Questions
    shares: dict[str, float | None]

    @classmethod
    def of(
        cls, splits: Splits, job: Job, args: SFTConfig, generation: GenerationArguments, trainer: SFTTrainer
    ) -> HeldOut:
        rows = [_encode(row, job) for row in splits.test]
        kept = [row.truncate(args.max_length) for row in rows]
        if not any(row.n_completion for row in kept):
            raise UserError(f"--max_length {args.max_length} leaves no answer in any held-out row of {splits.source}")
        limit = training.prompt_limit(trainer, args.max_length, generation.max_new_tokens)
        askable = [i for i, row in enumerate(rows) if 0 < row.n_prompt <= limit][: generation.max_generation_samples]
        asked = [splits.test[i] for i in askable]
        first_rows = itertools.islice(splits.train, training.N_MEASURED)
        return cls(
            rows=[row for row in kept if row.n_completion],
            questions=evaluation.Questions(
                prompts=[as_pair(row)[0] for row in asked],
                tools=[row.get("tools") for row in asked],
                references={"exact_match": [training.show_text(as_pair(row)[1]) for row in asked]},
                max_new_tokens=generation.max_new_tokens,
                batch_size=args.per_device_eval_batch_size,
            ),
            shares=training.token_shares([_encode(row, job) for row in first_rows], args.max_length),
        )

    def measure(self, trainer: SFTTrainer, job: Job) -> Measured:
        from llmcore_hf.metrics import Perplexity

        model, accelerator = trainer.model, trainer.accelerator
        pad, batch_size = job.tokenizer.pad_token_id, self.questions.batch_size
        found = evaluation.likelihoods(model, self.rows, pad, batch_size, accelerator)
        text = Perplexity().compute(predictions=found.logprobs, references=found.n_tokens)
        answers, metrics = self.questions.ask(model, job.tokenizer, accelerator)
        return Measured({"perplexity": (text["perplexity"], len(self.rows)), **metrics}, answers)


def _encode(row: dict[str, Any], job: Job, chat_template: str | None = None) -> evaluation.Encoded:
    return evaluation.encode(job.tokenizer, *as_pair(row), tools=row.get("tools"), chat_template=chat_template)


def label_checks(trainer: SFTTrainer, splits: Splits, job: Job, loss_on_prompt: bool = False) -> list[Check]:
    """Look at the labels that the trainer's own collator makes, against a tokenization of our own.

    `loss_on_prompt`: the user asked for it, so it is no fault.
    """
    seen = _look_at_labels(trainer, splits, job)
    found = seen.rows > 0
    may_miss = trainer.args.packing or trainer.args.shuffle_dataset  # none of the rows that we tokenized
    no_prompt = "text" in splits.train.column_names
    return [
        Check(
            "sft.end_of_turn_is_trained",
            "invariant",
            None if may_miss and not found else found and seen.rows == seen.with_end,
            {"rows": seen.rows, "with_end_of_turn": seen.with_end},
            "the end-of-turn token is in the labels of every row that is not cut off",
            "标签里没有结束符，模型就学不会停下来，会一直生成到长度上限。",
            "Without the end-of-turn token in the labels the model never learns to stop.",
        ),
        Check(
            "sft.prompt_carries_no_loss",
            "invariant",
            None if no_prompt or loss_on_prompt or (may_miss and not found) else found and seen.prompt_tokens == 0,
            {"rows": seen.rows, "prompt_tokens_with_loss": seen.prompt_tokens},
            "0 prompt tokens in the labels",
            "提示词是条件而不是目标：对它计算损失会让模型学着复述问题。",
            "The prompt is context, not target: loss on it teaches the model to repeat questions.",
        ),
    ]


@dataclass
class LabelsSeen:
    """What the labels of some training rows hold."""

    rows: int = 0
    with_end: int = 0  # rows whose labels hold the end of the last turn, or that are cut off before it
    prompt_tokens: int = 0  # with loss


def _look_at_labels(trainer: SFTTrainer, splits: Splits, job: Job) -> LabelsSeen:
    """Compare rows of the trainer's dataset with our own tokenization of the same rows.

    TRL leaves out rows whose prompt fills `max_length` and may shuffle, so rows are matched by their token ids.
    """
    seen, end = LabelsSeen(), job.tokenizer.eos_token_id
    if trainer.args.packing:
        return seen
    n_rows = training.N_MEASURED if trainer.args.shuffle_dataset else 4 * N_CHECKED
    ours = {}
    for row in itertools.islice(splits.train, n_rows):
        encoded = _encode(row, job, trainer.chat_template)
        ours[tuple(encoded.truncate(trainer.args.max_length).ids)] = encoded, row
    for theirs in itertools.islice(trainer.train_dataset, n_rows):
        if tuple(theirs["input_ids"]) in ours and seen.rows < N_CHECKED:
            encoded, row = ours[tuple(theirs["input_ids"])]
            labels = trainer.data_collator([theirs])["labels"][0].tolist()
            start = _up_to_first_answer(row, job, trainer.chat_template).n_prompt
            seen.rows += 1
            seen.with_end += len(labels) < len(encoded.ids) or end in labels[encoded.n_prompt :]
            seen.prompt_tokens += sum(label != IGNORED for label in labels[:start])
    return seen


def _up_to_first_answer(row: dict[str, Any], job: Job, chat_template: str | None = None) -> evaluation.Encoded:
    """A row without what follows the first answer, in a conversation of several turns."""
    if "messages" not in row:
        return _encode(row, job, chat_template)
    turns = row["messages"]
    first = next(i for i, turn in enumerate(turns) if turn["role"] == "assistant")
    start = {"prompt": turns[:first], "completion": turns[first : first + 1], "tools": row.get("tools")}
    return _encode(start, job, chat_template)


def learning_checks(block: dict[str, Any]) -> list[Check]:
    """Has anything been learned that shows on rows the training never saw?"""
    name = "exact_match" if "exact_match" in block["ci95"] else None
    interval = block["ci95"].get(name)
    return [
        Check(
            "sft.held_out_perplexity_fell",
            "learning",
            block["delta"]["perplexity"] < 0,
            {"before": block["before"]["perplexity"], "after": block["after"]["perplexity"]},
            "lower perplexity on held-out rows than before training",
            "留出集困惑度没有下降，说明没有学到可泛化的东西，可能是学习率或步数不合适。",
            "Held-out perplexity that does not fall means nothing general was learned: look at learning rate and steps.",
        ),
        Check(
            "sft.held_out_exact_match_rose",
            "learning",
            None if interval is None else interval[0] > 0,
            None if interval is None else {"change": block["delta"][name], "from": interval[0], "to": interval[1]},
            "95 % interval of the change in exact match lies above 0",
            "留出题的完全匹配率没有显著上升：训练集上的损失下降不等于学会了任务。",
            "Exact match on held-out prompts did not clearly rise: a falling training loss alone is no proof.",
        ),
    ]


def draw_curves(run_dir: RunDirectory, job: Job, splits: Splits) -> bytes:
    block = run_dir.summary["eval"]
    shares = {"exact_match": "exact match", "completions/terminated": "ended by itself"}
    return draw(
        f"SFT: {Path(job.name).name} on {Path(splits.source).name}",
        run_dir.history,
        [
            Panel(
                "Loss (cross-entropy of completion tokens)",
                (Line("loss", "training", TRAIN), Line("eval_loss", "held-out (validation)", HELD_OUT, "o")),
            ),
            Panel(
                "Share of next tokens predicted right",
                (
                    Line("mean_token_accuracy", "training", TRAIN),
                    Line("eval_mean_token_accuracy", "held-out (validation)", HELD_OUT, "o"),
                ),
            ),
            Panel(
                "Entropy of the predictions (nats)",
                (Line("entropy", "training", TRAIN), Line("eval_entropy", "held-out (validation)", HELD_OUT, "o")),
            ),
        ],
        {shares[n]: (block["before"][n], block["after"][n]) for n in shares if n in block["after"]},
    )
