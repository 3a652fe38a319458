"""Direct preference optimization: learn from pairs of answers, without a reward model and without sampling.

    L(theta) = - log sigmoid( beta * [ log pi(y_w|x) - log pi_ref(y_w|x) ] - beta * [ log pi(y_l|x) - log pi_ref(y_l|x) ] )

(Rafailov et al. 2023, arXiv:2305.18290, equation 7.) The difference in brackets, times beta, is the implicit reward.
Before the first step policy and reference agree, every implicit reward is 0 and the loss is ln 2 = 0.693.
The loss only sees the *difference* between chosen and rejected: both may become less likely while it falls (likelihood
displacement). `--loss_type sigmoid sft` adds the likelihood of the chosen answer. Trainer: TRL's DPOTrainer.
"""

from __future__ import annotations

import difflib
import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcore_hf.alignment import evaluation, training
from llmcore_hf.alignment.evaluation import GenerationArguments
from llmcore_hf.alignment.training import Job, ModelArguments
from llmcore_hf.checks import Check
from llmcore_hf.config import Config, RunArguments
from llmcore_hf.curves import HELD_OUT, REJECTED, TRAIN, Line, Panel, draw
from llmcore_hf.data.loading import DataArguments, Splits
from llmcore_hf.errors import UserError
from llmcore_hf.run_dir import RunDirectory

if TYPE_CHECKING:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

house_defaults = training.house_defaults
LOSS_TYPES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
# Policy and reference are evaluated by the same code on the same rows; what differs is the order of float additions.
TOLERANCE = 1e-4


def argument_classes() -> tuple[type, ...]:
    from trl import DPOConfig

    return (RunArguments, DataArguments, GenerationArguments, ModelArguments, DPOConfig)


def check(config: Config) -> list[str]:
    """Impossible combinations of options, one sentence each."""
    values, problems = config.values, training.check_options(config)
    unknown = [name for name in values["loss_type"] if name not in LOSS_TYPES]
    if unknown:
        near = difflib.get_close_matches(unknown[0], LOSS_TYPES, n=1)
        hint = f" (did you mean `{near[0]}`?)" if near else ""
        problems.append(f"--loss_type {' '.join(unknown)} is not one of {', '.join(LOSS_TYPES)}{hint}")
    if values["f_divergence_type"] not in DIVERGENCES:
        problems.append(f"--f_divergence_type {values['f_divergence_type']} is not one of {', '.join(DIVERGENCES)}")
    if not 0 < values["beta"] < math.inf:
        problems.append(f"--beta must be greater than 0, not {values['beta']}")
    if not 0 <= values["label_smoothing"] < 0.5:
        problems.append(f"--label_smoothing must lie between 0 and 0.5, not {values['label_smoothing']}")
    if values["precompute_ref_log_probs"] and values["dataset_streaming"]:
        problems.append("--precompute_ref_log_probs goes over all rows first, which --dataset_streaming cannot do")
    if values["padding_free"]:
        problems.append("--padding_free is not available in TRL's DPOTrainer at present: leave it off")
    if values["sync_ref_model"] and values["use_peft"]:
        problems.append("--sync_ref_model needs a reference model of its own; with --use_peft there is none")
    if values["sync_ref_model"] and values["precompute_ref_log_probs"]:
        problems.append("--sync_ref_model moves the reference, so --precompute_ref_log_probs would be out of date")
    if "exo_pair" in values["loss_type"] and values["label_smoothing"] == 0:
        problems.append("--loss_type exo_pair needs --label_smoothing above 0 (its paper uses 1e-3)")
    if values["use_peft"] and "lm_head" in (values["lora_target_modules"] or []):
        problems.append("--lora_target_modules lm_head is not trained by TRL's DPOTrainer: leave it out")
    return problems


def run(config: Config, run_dir: RunDirectory) -> None:
    """Load, evaluate, train, evaluate again on the same held-out pairs, check, and write the evidence."""
    args: DPOConfig = config.part(argument_classes()[-1])
    job = training.prepare(config, config.part(ModelArguments), args)
    splits = training.load_splits(config, args, "preference", run_dir, prompt_limit_of(job, args.max_length))
    training.require_chat_template(job.tokenizer, splits)

    with training.explaining(job, splits):
        trainer = make_trainer(config, job, splits, args)
    training.attach(trainer, run_dir)
    held_out = HeldOut.of(splits, job, args, config.part(GenerationArguments), trainer)
    run_dir.summary["data"] = training.describe_data(splits, trainer, held_out.shares, len(held_out.rows) // 2)
    run_dir.summary["model"] = training.describe_model(trainer, job)

    reference = held_out.reference_likelihoods(trainer, job)
    before = held_out.measure(trainer, job, reference, args.beta)
    run_dir.checks += start_checks(before, reference is not None, splits)
    training.train(trainer, run_dir)
    training.record_stream(run_dir, splits)
    # with --precompute_ref_log_probs no reference stays in memory: it is what the policy was
    after = held_out.measure(trainer, job, reference or before.policy, args.beta)

    run_dir.summary["eval"] = block = evaluation.compare(before.metrics, after.metrics)
    run_dir.checks.append(reference_check(reference, held_out.reference_likelihoods(trainer, job), args))
    run_dir.checks += learning_checks(block)
    shown = "completions/match_chosen"
    run_dir.summary["samples"] = training.samples(held_out.questions, shown, before.answers, after.answers)
    training.write_model_card(run_dir, trainer, job, splits)
    run_dir.write("training_curves.png", draw_curves(run_dir, job, splits))


def prompt_limit_of(job: Job, max_length: int | None) -> training.PromptLimit | None:
    longest = max_length or job.context
    return training.PromptLimit(job.tokenizer, lambda row: _encode(row, job)[0], longest) if longest else None


def as_trained(job: Job, rows: Dataset, max_length: int) -> list[list[training.SeenRow]]:
    """What TRL's trainer makes of each row: with its chosen and with its rejected answer."""
    from trl import DPOConfig, DPOTrainer

    with training.stand_in(job, DPOConfig, max_length=None) as parts:
        trainer = DPOTrainer(train_dataset=rows, **parts)
        batches = [(row, trainer.data_collator([row])) for row in trainer.train_dataset]
    return [
        [
            _seen(f"With {side}", batch, i, len(row["prompt_ids"]), max_length)
            for i, side in enumerate(("chosen", "rejected"))
        ]
        for row, batch in batches
    ]


def _seen(title: str, batch: dict[str, Any], i: int, n_prompt: int, max_length: int) -> training.SeenRow:
    n = int(batch["attention_mask"][i].sum())
    ids, mask = (batch[name][i, : min(n, max_length)].tolist() for name in ("input_ids", "completion_mask"))
    return training.SeenRow(title, ids, [bool(bit) for bit in mask], n_prompt, n)


def make_trainer(config: Config, job: Job, splits: Splits, args: DPOConfig) -> DPOTrainer:
    """TRL's trainer, given the path so that its own loading code makes policy and reference."""
    from trl import DPOTrainer, get_peft_config, get_quantization_config

    model_args = config.part(ModelArguments)
    trainer = DPOTrainer(
        model=job.path,
        args=args,
        train_dataset=splits.train,
        eval_dataset=splits.validation,
        processing_class=job.tokenizer,
        peft_config=get_peft_config(model_args),
        quantization_config=get_quantization_config(model_args),
    )
    if next(iter(trainer.train_dataset), None) is None:
        raise UserError(
            f"every prompt of {splits.source} fills --max_length {args.max_length}: nothing is left to train"
        )
    return trainer


@dataclass
class Measured:
    metrics: dict[str, Any]
    answers: evaluation.Answers | None
    loss: float  # of the sigmoid form, over the held-out pairs
    policy: list[float]  # log-likelihoods of the rows


@dataclass
class HeldOut:
    """The pairs that are evaluated before and after, tokenized once: N chosen rows, then N rejected rows."""

    rows: list[evaluation.Encoded]
    questions: evaluation.Questions
    shares: dict[str, float | None]

    @classmethod
    def of(
        cls, splits: Splits, job: Job, args: DPOConfig, generation: GenerationArguments, trainer: DPOTrainer
    ) -> HeldOut:
        pairs = [_encode(row, job) for row in splits.test]
        limit = args.max_length or math.inf
        usable = [i for i, (chosen, _) in enumerate(pairs) if chosen.n_prompt < limit]  # as TRL does in training
        if not usable:
            raise UserError(f"--max_length {args.max_length} leaves no answer in any held-out pair of {splits.source}")
        sides = [[pairs[i][side].truncate(args.max_length) for i in usable] for side in (0, 1)]
        longest = training.prompt_limit(trainer, args.max_length, generation.max_new_tokens)
        askable = [i for i in usable if pairs[i][0].n_prompt <= longest][: generation.max_generation_samples]
        asked = [splits.test[i] for i in askable]
        first_rows = itertools.islice(splits.train, training.N_MEASURED)
        measured = [encoded for row in first_rows for encoded in _encode(row, job)]
        return cls(
            rows=sides[0] + sides[1],
            questions=evaluation.Questions(
                prompts=[row["prompt"] for row in asked],
                tools=[row.get("tools") for row in asked],
                references={
                    f"completions/match_{side}": [training.show_text(row[side]) for row in asked]
                    for side in ("chosen", "rejected")
                },
                max_new_tokens=generation.max_new_tokens,
                batch_size=args.per_device_eval_batch_size,
            ),
            shares=training.token_shares(measured, args.max_length),
        )

    def reference_likelihoods(self, trainer: DPOTrainer, job: Job) -> list[float] | None:
        """Log-likelihood of all rows under the reference; None when the trainer keeps no reference in memory."""
        if trainer.ref_model is not None:
            return self._logprobs(trainer.accelerator.unwrap_model(trainer.ref_model), trainer, job)
        if not hasattr(trainer.model, "disable_adapter"):
            return None
        with trainer.model.disable_adapter():
            return self._logprobs(trainer.model, trainer, job)

    def _logprobs(self, model: Any, trainer: DPOTrainer, job: Job) -> list[float]:
        pad, batch_size = job.tokenizer.pad_token_id, self.questions.batch_size
        return evaluation.likelihoods(model, self.rows, pad, batch_size, trainer.accelerator).logprobs

    def measure(self, trainer: DPOTrainer, job: Job, reference: list[float] | None, beta: float) -> Measured:
        """Preference metrics of the policy, and what it answers.

        `reference` holds the log-likelihoods under the reference model; None stands for the policy itself.
        """
        from llmcore_hf.metrics import Preference

        policy = self._logprobs(trainer.model, trainer, job)
        start = policy if reference is None else reference
        n = len(policy) // 2
        chosen, rejected = policy[:n], policy[n:]
        rewards = [beta * (p - r) for p, r in zip(policy, start, strict=True)]  # (2N,), implicit
        margins = [won - lost for won, lost in zip(rewards[:n], rewards[n:], strict=True)]
        metrics: dict[str, Any] = {
            "preference_accuracy": Preference().compute(predictions=chosen, references=rejected)["scores"],
            "rewards/margins": margins,
            "logps/chosen": chosen,
            "logps/rejected": rejected,
        }
        loss = math.fsum(math.log1p(math.exp(-m)) if m > -30 else -m for m in margins) / n
        answers, answer_metrics = self.questions.ask(trainer.model, job.tokenizer, trainer.accelerator)
        return Measured({**metrics, **answer_metrics}, answers, loss, policy)


def _encode(row: dict[str, Any], job: Job) -> tuple[evaluation.Encoded, evaluation.Encoded]:
    chosen, rejected = (
        evaluation.encode(job.tokenizer, row["prompt"], row[side], tools=row.get("tools"))
        for side in ("chosen", "rejected")
    )
    n_prompt = min(chosen.n_prompt, rejected.n_prompt)  # one prompt for both, as in TRL
    return evaluation.Encoded(chosen.ids, n_prompt), evaluation.Encoded(rejected.ids, n_prompt)


def start_checks(before: Measured, has_reference: bool, splits: Splits) -> list[Check]:
    """What must hold before the first step."""
    return [
        Check(
            "dpo.step0_loss_is_ln2",
            "invariant",
            abs(before.loss - math.log(2)) < TOLERANCE if has_reference else None,
            before.loss if has_reference else None,
            f"ln 2 = {math.log(2):.6f} within {TOLERANCE}",
            "训练前策略与参考模型相同，隐式奖励差为 0，-log sigmoid(0) = ln 2；不等说明参考模型不是策略的副本。",
            "Before training policy and reference agree, so the loss is -log sigmoid(0); if not, the reference is not "
            "a copy of the policy.",
        ),
        training.pair_check("dpo", splits),
    ]


def reference_check(before: list[float] | None, after: list[float] | None, args: DPOConfig) -> Check:
    """The reference must give every held-out row exactly the likelihood it gave before training."""
    passed = moved = None
    if before is not None and after is not None and not args.sync_ref_model:
        passed = all(a == b for a, b in zip(before, after, strict=True))
        moved = max(abs(a - b) for a, b in zip(before, after, strict=True))
    return Check(
        "dpo.reference_did_not_move",
        "invariant",
        passed,
        {"largest_change_in_log_likelihood": moved},
        "0: the reference is frozen",
        "参考模型必须冻结：它一动，KL 约束和隐式奖励就失去了意义。",
        "The reference must stay frozen: if it moves, implicit rewards and the KL constraint lose their meaning.",
    )


def learning_checks(block: dict[str, Any]) -> list[Check]:
    """Has a preference been learned, and did it reach what the model says?"""
    low, high = block["ci95"]["preference_accuracy"]
    rose = low > 0
    return [
        Check(
            "dpo.held_out_preference_accuracy_rose",
            "learning",
            rose,
            {"change": block["delta"]["preference_accuracy"], "from": low, "to": high},
            "95 % interval of the change lies above 0",
            "留出集偏好准确率没有显著上升：检查 chosen/rejected 是否写反、beta 与学习率。",
            "Held-out preference accuracy did not clearly rise: are chosen and rejected swapped? Look at beta and "
            "learning rate.",
        ),
        _displacement_check(block, rose),
    ]


def _displacement_check(block: dict[str, Any], rose: bool) -> Check:
    """Likelihood displacement: the accuracy rises while the chosen answers become less likely."""
    interval = block["ci95"].get("completions/match_chosen")
    answers_fell = interval is not None and interval[1] < 0
    chosen_fell = block["ci95"]["logps/chosen"][1] < 0
    observed = {
        "change_of_logps_chosen": block["delta"]["logps/chosen"],
        "change_of_match_chosen": block["delta"].get("completions/match_chosen"),
    }
    return Check(
        "dpo.no_likelihood_displacement",
        "learning",
        not (answers_fell or chosen_fell) if rose else None,
        observed,
        "neither the likelihood of chosen answers nor their share among generated answers fell",
        "偏好准确率上升但 chosen 的似然下降，即似然位移：损失只看差值。可加 --loss_type sigmoid sft，或增大 beta。",
        "Accuracy rose while chosen answers became less likely (likelihood displacement): the loss only sees the "
        "difference. Add --loss_type sigmoid sft, or raise beta.",
    )


def draw_curves(run_dir: RunDirectory, job: Job, splits: Splits) -> bytes:
    block = run_dir.summary["eval"]
    pure = run_dir.config.values["loss_type"] == ["sigmoid"]
    shares = {
        "preference_accuracy": "prefers chosen",
        "completions/match_chosen": "answers as chosen",
        "completions/match_rejected": "answers as rejected",
    }
    return draw(
        f"DPO: {Path(job.name).name} on {Path(splits.source).name}",
        run_dir.history,
        [
            Panel(
                f"Loss ({' + '.join(run_dir.config.values['loss_type'])})",
                (Line("loss", "training", TRAIN), Line("eval_loss", "held-out (validation)", HELD_OUT, "o")),
                level=math.log(2) if pure else None,
                level_label="ln 2",
            ),
            Panel(
                "Implicit reward margin, chosen - rejected",
                (
                    Line("rewards/margins", "training", TRAIN),
                    Line("eval_rewards/margins", "held-out (validation)", HELD_OUT, "o"),
                ),
                level=0.0,
                level_label="reference model",
            ),
            Panel(
                "Log-likelihood of answers, held-out (validation)",
                (
                    Line("eval_logps/chosen", "chosen", HELD_OUT, "o"),
                    Line("eval_logps/rejected", "rejected", REJECTED, "o"),
                ),
            ),
        ],
        {shares[n]: (block["before"][n], block["after"][n]) for n in shares if n in block["after"]},
    )
