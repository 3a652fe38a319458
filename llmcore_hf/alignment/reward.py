"""Reward modelling: a score for every answer, learned from pairs of answers.

    L(theta) = - log sigmoid( r(x, y_w) - r(x, y_l) ) + c * ( r(x, y_w) + r(x, y_l) )^2

(Bradley & Terry 1952; Ouyang et al. 2022, arXiv:2203.02155, equation 1.) `r` is the language model with a linear head in
place of its vocabulary, read at the last token; sigmoid of the difference is the probability that the first answer is
preferred. Only differences matter to the first term, so scores may drift; the second, with `--center_rewards_coefficient`
c, keeps them around 0 (Eisenstein et al. 2023, arXiv:2312.09244, equation 2). Where the pairs agree with each other, the
loss has no minimum: margins grow as long as the training goes on. Trainer: TRL's RewardTrainer.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcore_hf import distributed
from llmcore_hf.alignment import evaluation, training
from llmcore_hf.alignment.evaluation import Encoded
from llmcore_hf.alignment.training import Job, ModelArguments
from llmcore_hf.checks import Check
from llmcore_hf.config import Config, RunArguments
from llmcore_hf.curves import HELD_OUT, REJECTED, TRAIN, Line, Panel, draw
from llmcore_hf.data.loading import DataArguments, Splits
from llmcore_hf.data.preparing import ROW_BYTES, ROW_TURNS
from llmcore_hf.errors import UserError
from llmcore_hf.run_dir import RunDirectory
from llmcore_hf.stats import paired_interval, share_interval

if TYPE_CHECKING:
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

TASK_TYPE = "SEQ_CLS"
HEADS = ("score", "classifier")  # its name, as PEFT knows it
N_READ = 16  # held-out rows on which the place where the score is read is looked at
MAX_SCORE = 50.0  # sigmoid is 1 in any precision long before
TOO_LONG = "one of their answers is, with the prompt, longer than --max_length {}"
USAGE = """\
from transformers import AutoModelForSequenceClassification, AutoTokenizer

path = "path/to/this/folder"
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1)
chat = [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]
print(model(**tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)).logits)
"""


def argument_classes() -> tuple[type, ...]:
    from trl import RewardConfig

    return (RunArguments, DataArguments, ModelArguments, RewardConfig)


def house_defaults(explicit: dict[str, Any]) -> dict[str, Any]:
    """With LoRA, PEFT shall train the head whole and save it: `modules_to_save` of this task type holds it.

    TRL's default task type leaves the head as it was drawn, and out of the adapter.
    """
    return training.house_defaults(explicit) | {"lora_task_type": TASK_TYPE}


def check(config: Config) -> list[str]:
    """Impossible combinations of options, one sentence each."""
    values, problems = config.values, training.check_options(config)
    if values["use_peft"] and values["lora_task_type"] != TASK_TYPE:
        problems.append(
            f"--lora_task_type {values['lora_task_type']} is not for reward models, whose head must be trained and saved "
            f"with the adapter: leave it at {TASK_TYPE}"
        )
    coefficient = values["center_rewards_coefficient"]
    if coefficient is not None and not 0 <= coefficient < math.inf:
        problems.append(f"--center_rewards_coefficient must not be negative, not {coefficient}")
    return problems


def run(config: Config, run_dir: RunDirectory) -> None:
    """Load, evaluate, train, evaluate again on the same held-out pairs, check, and write the evidence."""
    args: RewardConfig = config.part(argument_classes()[-1])
    job = training.prepare(config, config.part(ModelArguments), args)
    limit = None if args.chat_template_path else prompt_limit_of(job, args.max_length)
    splits = training.load_splits(config, args, "preference", run_dir, limit)
    if not args.chat_template_path:
        training.require_chat_template(job.tokenizer, splits)

    with training.explaining(job, splits):
        trainer = make_trainer(config, job, splits, args)
    job.tokenizer = trainer.processing_class  # with the template of --chat_template_path, when there is one
    training.attach(trainer, run_dir)
    held_out = HeldOut.of(splits, job, args)
    shares = {"truncated_fraction": 0.0, "trained_token_fraction": None}  # nothing is cut; one number carries the loss
    run_dir.summary["data"] = training.describe_data(splits, trainer, shares, len(held_out.test) // 2, TOO_LONG)
    run_dir.summary["model"] = training.describe_model(trainer, job)
    run_dir.checks.append(training.pair_check("reward", splits))

    before = held_out.measure(trainer, job)
    training.train(trainer, run_dir)
    training.record_stream(run_dir, splits)
    after = held_out.measure(trainer, job)

    run_dir.summary["eval"] = block = evaluation.compare(before.test.metrics(), after.test.metrics())
    run_dir.checks.append(agreement_check(run_dir.history, before.validation, after.validation, args))
    run_dir.checks += reading_checks(trainer, job, held_out.test)
    run_dir.checks.append(head_check(run_dir.path, bool(run_dir.summary["model"]["peft"])))
    run_dir.checks += learning_checks(block, after.test, args.center_rewards_coefficient)
    run_dir.summary["samples"] = samples(splits, before.test, after.test)
    training.write_model_card(run_dir, trainer, job, splits, USAGE)
    run_dir.write("training_curves.png", draw_curves(run_dir, job, splits, before.test, after.test))


class RowLimit(training.PromptLimit):
    """Finds pairs that TRL leaves out because an answer, with its prompt, is longer than the limit: it cuts none off."""

    measured = ROW_BYTES, ROW_TURNS

    def _problem_of(self, row: Encoded) -> str | None:
        text = f"has {len(row.ids)} tokens with its longer answer, and --max_length is {self.max_length}"
        return text if len(row.ids) > self.max_length else None


def prompt_limit_of(job: Job, max_length: int | None) -> RowLimit | None:
    longest = max_length or job.context
    if not longest:
        return None
    return RowLimit(job.tokenizer, lambda row: max(_encode(row, job), key=lambda answer: len(answer.ids)), longest)


def as_trained(job: Job, rows: Dataset, max_length: int) -> list[list[training.SeenRow]]:
    """What TRL's trainer makes of each row: with its chosen and with its rejected answer, scored at the last token."""
    from trl import RewardConfig, RewardTrainer

    with training.stand_in(job, RewardConfig, max_length=None) as parts:
        prepared = list(RewardTrainer(train_dataset=rows, **parts).train_dataset)
    return [
        [
            _seen(f"With {side}", row[f"{side}_ids"], encoded.n_prompt)
            for side, encoded in zip(("chosen", "rejected"), _encode(row, job), strict=True)
        ]
        for row in prepared
    ]


def _seen(title: str, ids: list[int], n_prompt: int) -> training.SeenRow:
    return training.SeenRow(title, ids, [False] * (len(ids) - 1) + [True], n_prompt, len(ids))


def make_trainer(config: Config, job: Job, splits: Splits, args: RewardConfig) -> RewardTrainer:
    """TRL's trainer, given the path so that its own loading code makes the model and its new head.

    Raises:
        UserError: no pair is left to train on, or rows end with the pad token.
    """
    from trl import RewardTrainer, get_peft_config, get_quantization_config

    model_args = config.part(ModelArguments)
    trainer = RewardTrainer(
        model=job.path,
        args=args,
        train_dataset=splits.train,
        eval_dataset=splits.validation,
        processing_class=job.tokenizer,
        peft_config=get_peft_config(model_args),
        quantization_config=get_quantization_config(model_args),
    )
    first = next(iter(trainer.train_dataset), None)
    if first is None:
        raise UserError(f"every pair of {splits.source} is longer than --max_length {args.max_length}")
    tokenizer = trainer.processing_class
    if tokenizer.pad_token_id in (first["chosen_ids"][-1], first["rejected_ids"][-1]):
        raise UserError(
            f"the rows of {splits.source} end with `{tokenizer.pad_token}`, which is also the pad token of {job.name}: the "
            "score would be read before it, and an answer that is cut off would score like one that ends. Name another "
            "token with --pad_token, one that ends no row"
        )
    return trainer


@dataclass
class Scores:
    """Scores of N pairs.

    Attributes:
        chosen, rejected: N each.
    """

    chosen: list[float]
    rejected: list[float]

    @property
    def margins(self) -> list[float]:
        return [won - lost for won, lost in zip(self.chosen, self.rejected, strict=True)]

    def log_losses(self) -> list[float]:
        """-log sigmoid(margin) of each pair, in nats."""
        import torch
        from torch.nn.functional import logsigmoid

        return (-logsigmoid(torch.tensor(self.margins, dtype=torch.float64))).tolist()

    def objective(self, center_rewards_coefficient: float | None) -> float:
        """What the training minimises, over these pairs."""
        means = [(won + lost) ** 2 for won, lost in zip(self.chosen, self.rejected, strict=True)]
        losses, c = self.log_losses(), center_rewards_coefficient or 0.0
        return math.fsum(losses) / len(losses) + c * math.fsum(means) / len(means)

    def calibration(self) -> dict[str, Any]:
        """`metrics.Calibration` of the probability of the answer that the model prefers.

        The label of a pair is always "chosen", so the share of "chosen is better" is 1 whatever the probability, and a
        plain reliability diagram would say nothing. An annotator saw two answers in no particular order: the question is
        whether the answer that the model prefers with probability p was the annotator's choice in a share p of the pairs.
        This is what a random order of each pair gives on average, without the random draws.
        """
        from llmcore_hf.metrics import Calibration, Preference

        right = Preference().compute(predictions=self.chosen, references=self.rejected)["scores"]
        return Calibration().compute(predictions=[_sigmoid(abs(m)) for m in self.margins], references=right)

    def metrics(self) -> dict[str, Any]:
        """For `evaluation.compare`; names are TRL's where it has one."""
        from llmcore_hf.metrics import Preference

        return {
            "accuracy": Preference().compute(predictions=self.chosen, references=self.rejected)["scores"],
            "margin": self.margins,
            "mean_reward": [(won + lost) / 2 for won, lost in zip(self.chosen, self.rejected, strict=True)],
            "log_loss": self.log_losses(),
            "calibration_error": (self.calibration()["expected_calibration_error"], len(self.chosen)),
        }


def _sigmoid(x: float) -> float:
    """For x >= 0."""
    return 1 / (1 + math.exp(-x))


@dataclass
class Measured:
    test: Scores
    validation: Scores


@dataclass
class HeldOut:
    """The pairs that are evaluated before and after, tokenized once: N chosen rows, then N rejected rows of each split."""

    test: list[Encoded]
    validation: list[Encoded]

    @classmethod
    def of(cls, splits: Splits, job: Job, args: RewardConfig) -> HeldOut:
        test, validation = (_encode_pairs(rows, job, args.max_length) for rows in (splits.test, splits.validation))
        if not test or not validation:
            raise UserError(f"--max_length {args.max_length} is too short for every held-out pair of {splits.source}")
        return cls(test, validation)

    def measure(self, trainer: RewardTrainer, job: Job) -> Measured:
        test = score(trainer, job, self.test)
        return Measured(test, test if self.validation == self.test else score(trainer, job, self.validation))


def score(trainer: RewardTrainer, job: Job, rows: list[Encoded]) -> Scores:
    """Scores of N chosen rows followed by N rejected rows."""
    batch_size = trainer.args.per_device_eval_batch_size
    found = evaluation.scores(trainer.model, rows, job.tokenizer.pad_token_id, batch_size, trainer.accelerator)
    return Scores(found[: len(rows) // 2], found[len(rows) // 2 :])


def _encode(row: dict[str, Any], job: Job) -> tuple[Encoded, Encoded]:
    chosen, rejected = (
        evaluation.encode(job.tokenizer, row["prompt"], row[side], tools=row.get("tools"))
        for side in ("chosen", "rejected")
    )
    return chosen, rejected


def _encode_pairs(rows: Dataset, job: Job, max_length: int | None) -> list[Encoded]:
    longest = max_length or math.inf
    pairs = [pair for pair in (_encode(row, job) for row in rows) if max(len(answer.ids) for answer in pair) <= longest]
    return [chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs]


def agreement_check(history: list[dict[str, Any]], before: Scores, after: Scores, args: RewardConfig) -> Check:
    """The trainer's loss on the validation pairs, first and last, against ours: other code, the same definition.

    The head starts with random weights, so the first loss is only near ln 2 and no constant to compare with.
    """
    theirs = {row["step"]: row["eval_loss"] for row in history if "eval_loss" in row}
    first, last = theirs.get(0), None if args.load_best_model_at_end else theirs[max(theirs)]
    ours = [scores.objective(args.center_rewards_coefficient) for scores in (before, after)]
    compared = [(a, b) for a, b in zip((first, last), ours, strict=True) if a is not None]
    if distributed.world_size() > 1 and len(before.chosen) % (args.eval_batch_size * distributed.world_size()):
        compared = []  # the Trainer then weighs an incomplete last batch differently
    return Check(
        "reward.loss_is_that_of_the_evaluation",
        "invariant",
        all(_close(a, b, args) for a, b in compared) if compared else None,
        {"trainer_first": first, "first": ours[0], "trainer_last": last, "last": ours[1]},
        "the trainer's held-out loss, first and last, equals ours",
        "训练器在留出集上的损失与独立计算的不一致：chosen/rejected 顺序、符号、分词或中心化项有一处不同。",
        "The trainer's loss differs from an independent one on the same pairs: order of the pair, sign, tokenization or "
        "the centring term is not what it should be.",
    )


def _close(a: float, b: float, args: RewardConfig) -> bool:
    """Equal but for the order of float additions, which is coarse in half precision."""
    half = args.bf16 or args.fp16 or str((args.model_init_kwargs or {}).get("dtype")) in ("bfloat16", "float16")
    return math.isclose(a, b, rel_tol=2e-2 if half else 1e-3, abs_tol=2e-2 if half else 1e-4)


def reading_checks(trainer: RewardTrainer, job: Job, rows: list[Encoded]) -> list[Check]:
    """Is the score read at the last token of an answer, wherever padding stands?"""
    half = len(rows) // 2
    rows = rows[: N_READ // 2] + rows[half : half + N_READ // 2]
    pad, accelerator, config = job.tokenizer.pad_token_id, trainer.accelerator, trainer.model.config.get_text_config()
    alone = evaluation.scores(trainer.model, rows, pad, 1, accelerator)
    width = 2 * max(len(row.ids) for row in rows)
    padded = evaluation.scores(trainer.model, rows, pad, len(rows), accelerator, min_width=width)
    shorter = evaluation.scores(trainer.model, [Encoded(row.ids[:-1], 0) for row in rows], pad, 1, accelerator)
    n_changed = sum(not _close(a, b, trainer.args) for a, b in zip(alone, shorter, strict=True))
    return [
        Check(
            "reward.pad_token_is_known_to_the_model",
            "invariant",
            pad is not None and config.pad_token_id == pad,
            {"model": config.pad_token_id, "tokenizer": pad},
            "the pad token in the model's config is that of the tokenizer",
            "分类头靠 config.pad_token_id 找最后一个非填充位置；不一致就会在填充位置上读分数。",
            "The head finds the last token of a row through config.pad_token_id; if it differs, scores are read at padding.",
        ),
        Check(
            "reward.padding_changes_nothing",
            "invariant",
            all(_close(a, b, trainer.args) for a, b in zip(alone, padded, strict=True)),
            {
                "rows": len(rows),
                "largest_difference": max(abs(a - b) for a, b in zip(alone, padded, strict=True)),
            },
            "the same score alone and padded to twice the length",
            "分数随填充长度变化，说明读分数的位置或注意力掩码错了；PPO 里同一回答会因同批其他样本而得分不同。",
            "A score that depends on padding is read in the wrong place, or attention sees the padding: in PPO an answer "
            "would score differently beside other answers.",
        ),
        Check(
            "reward.score_is_read_at_the_end",
            "invariant",
            n_changed > len(rows) / 2,
            {"rows": len(rows), "changed_without_last_token": n_changed},
            "most scores change when the last token is taken away",
            "去掉最后一个 token 分数不变，说明分数不在结尾读取（常见原因：pad 就是 eos），没写完的回答会和写完的同分。",
            "When taking the last token away changes nothing, the score is read before it (pad = eos, say), and an answer "
            "that is cut off scores like one that ends.",
        ),
    ]


def head_check(run_dir: Path, peft: bool) -> Check:
    """The score head must be in the saved adapter; without it every load draws a new one."""
    file = run_dir / "adapter_model.safetensors"
    found = distributed.broadcast(_head_sizes(file) if peft and distributed.is_main_process() else {})
    return Check(
        "reward.score_head_is_in_the_adapter",
        "invariant",
        bool(found) and all(found.values()) if peft else None,
        found if peft else None,
        "the weights of the score head are in adapter_model.safetensors",
        "适配器里没有打分头：重新加载时会得到随机初始化的头，分数毫无意义。",
        "Without its head in the file, a reloaded reward model gets a new random one, and its scores mean nothing.",
    )


def _head_sizes(file: Path) -> dict[str, int]:
    """Name -> number of weights, of the score head in a safetensors file."""
    from safetensors import safe_open

    with safe_open(file, "pt") as weights:
        names = [name for name in weights.keys() if name.split(".")[-2] in HEADS]  # noqa: SIM118
        return {name: math.prod(weights.get_slice(name).get_shape()) for name in names}


def learning_checks(block: dict[str, Any], after: Scores, center_rewards_coefficient: float | None) -> list[Check]:
    """Has a preference been learned, are its probabilities worth something, and do the scores stay usable?"""
    accuracy, losses, ln2 = block["after"]["accuracy"], after.log_losses(), math.log(2)
    least, most = share_interval(accuracy, len(losses))
    below, above = (ln2 + end for end in paired_interval([ln2] * len(losses), losses))
    low, high = block["ci95"]["margin"]
    largest = max(map(abs, after.chosen + after.rejected))
    mean_chosen, mean_rejected = (math.fsum(side) / len(side) for side in (after.chosen, after.rejected))
    return [
        Check(
            "reward.held_out_accuracy_is_above_chance",
            "learning",
            least > 0.5,
            {"accuracy": accuracy, "from": least, "to": most},
            "95 % interval above 0.5",
            "留出集上 chosen 得分更高的比例没有显著超过一半：检查 chosen/rejected 是否写反、学习率与步数。训练前的准确率不是起点："
            "随机的打分头按任意方向排序，可能恰好全对或全错。",
            "The share of held-out pairs whose chosen answer scores higher is not clearly above one half: are chosen and "
            "rejected swapped? Look at learning rate and steps. The accuracy before is no baseline: a random head orders by "
            "a random direction, and may be right or wrong almost everywhere.",
        ),
        Check(
            "reward.held_out_margin_rose",
            "learning",
            low > 0,
            {"change": block["delta"]["margin"], "from": low, "to": high},
            "95 % interval of the change lies above 0",
            "留出集上 chosen 与 rejected 的分差没有显著变大：没有学到偏好。",
            "The margin between chosen and rejected did not clearly grow on held-out pairs: no preference was learned.",
        ),
        Check(
            "reward.held_out_log_loss_is_below_ln2",
            "learning",
            above < ln2,
            {"log_loss": block["after"]["log_loss"], "from": below, "to": above},
            f"95 % interval below ln 2 = {ln2:.4f}, the log loss of always saying one half",
            "留出集对数损失不低于 ln 2：概率还不如一律说五五开，多半是过度自信（少训几步或降低学习率）。",
            "A log loss of ln 2 or more: the probabilities are worth less than saying one half every time, mostly for "
            "overconfidence. Train less, or lower the learning rate.",
        ),
        Check(
            "reward.scores_are_centred",
            "learning",
            mean_chosen > 0 > mean_rejected and largest < MAX_SCORE if center_rewards_coefficient else None,
            {"mean_chosen": mean_chosen, "mean_rejected": mean_rejected, "largest": largest},
            f"chosen answers score above 0 on average, rejected below, none beyond {MAX_SCORE:g}",
            "损失只看差值，分数整体可以漂移；中心化项应把零点留在 chosen 与 rejected 之间。分数过大时 PPO 的 KL 惩罚会被淹没。",
            "The loss only sees differences, so all scores may drift; the centring term should keep 0 between chosen and "
            "rejected. Scores that explode drown the KL penalty of PPO.",
        ),
    ]


def samples(splits: Splits, before: Scores, after: Scores) -> list[dict[str, str]]:
    """The first few pairs with their scores before and after."""
    return [
        {
            "prompt": training.show_text(row["prompt"]),
            "reference": " > ".join(training.show_text(row[side]) for side in ("chosen", "rejected")),
            "before": f"{before.chosen[i]:+.2f} > {before.rejected[i]:+.2f}",
            "after": f"{after.chosen[i]:+.2f} > {after.rejected[i]:+.2f}",
        }
        for i, row in enumerate(itertools.islice(splits.test, training.N_SAMPLES))
    ]


def draw_curves(run_dir: RunDirectory, job: Job, splits: Splits, before: Scores, after: Scores) -> bytes:
    def lines(name: str) -> tuple[Line, Line]:
        return Line(name, "training", TRAIN), Line(f"eval_{name}", "held-out (validation)", HELD_OUT, "o")

    return draw(
        f"Reward model: {Path(job.name).name} on {Path(splits.source).name}",
        run_dir.history,
        [
            Panel("Loss (Bradley-Terry)", lines("loss"), math.log(2), "ln 2"),
            Panel("Share of pairs whose chosen answer scores higher", lines("accuracy"), 0.5, "chance"),
            Panel("Reward margin, chosen - rejected", lines("margin"), 0.0, "no preference"),
            Panel("Mean reward of all answers", lines("mean_reward"), 0.0, "centred"),
        ],
        {},
        [lambda axis: draw_reliability(axis, before, after), lambda axis: draw_scores(axis, after)],
    )


def draw_reliability(axis: Any, before: Scores, after: Scores) -> None:
    """Probability of the preferred answer against the share of pairs in which it was chosen, with 95 % intervals."""
    import numpy as np

    axis.plot([0.5, 1], [0.5, 1], color="black", linewidth=0.8, linestyle=":", label="calibrated")
    for label, color, scores in (("before", "#7f7f7f", before), ("after", "#2ca02c", after)):
        found = scores.calibration()
        x, shares = found["probabilities"], np.asarray(found["shares"])
        low, high = np.transpose([share_interval(*bin) for bin in zip(shares, found["counts"], strict=True)])
        reach = np.maximum([shares - low, high - shares], 0)  # not -1e-17
        text = f"{label}: error {found['expected_calibration_error']:.3f}"
        axis.errorbar(x, shares, reach, color=color, fmt="o", markersize=5, elinewidth=0.8, capsize=2, label=text)
    axis.set_ylim(0, 1.03)
    axis.set_xlim(0.48, 1.02)
    axis.set_xlabel("probability of the answer the model prefers")
    axis.set_ylabel("share in which it was chosen")
    axis.set_title("Calibration with 95 % intervals, held-out test pairs", fontsize=11)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=9, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncol=3)


def draw_scores(axis: Any, after: Scores) -> None:
    """Distribution of the scores of both sides."""
    import numpy as np

    bins = np.histogram_bin_edges(after.chosen + after.rejected, bins=40)
    axis.hist(after.rejected, bins, color=REJECTED, alpha=0.7, label="rejected")
    axis.hist(after.chosen, bins, color=HELD_OUT, alpha=0.7, label="chosen")
    axis.set_xlabel("reward")
    axis.set_ylabel("answers")
    axis.set_title("Rewards after training, held-out test pairs", fontsize=11)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=9, frameon=False)
