"""Proximal policy optimization: sample answers, score them, and raise the probability of those better than expected.

    L(theta) = - E[ min( r A, clip(r, 1 - eps, 1 + eps) A ) ] + c_v * value loss,    r = pi(token) / pi_old(token)

(Schulman et al. 2017, arXiv:1707.06347, equation 7.) The reward of a token is -beta * (log pi - log pi_ref), and on the
last token the score of the answer besides (Ziegler et al. 2019, arXiv:1909.08593); a critic turns rewards into advantages A
(generalized advantage estimation). Before the first update every ratio is 1 and the KL to the reference is 0.
Trainer: `llmcore_hf.ppo.PPOTrainer`, as TRL has none any more.
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from llmcore_hf.alignment import online, training
from llmcore_hf.alignment.rewards import RewardArguments
from llmcore_hf.alignment.training import Job, ModelArguments
from llmcore_hf.checks import Check
from llmcore_hf.config import Config, RunArguments
from llmcore_hf.curves import HELD_OUT, REJECTED, TRAIN, Line, Panel, draw
from llmcore_hf.data.loading import DataArguments, Splits
from llmcore_hf.ppo import PPOConfig, PPOTrainer
from llmcore_hf.ppo.rewards import Scorer
from llmcore_hf.run_dir import RunDirectory

as_trained, prompt_limit_of = online.as_trained, online.prompt_limit_of
# Of few short answers the explained variance is a noisy estimate around 0; the toy's seeds average between 0 and 0.1.
WORSE_THAN_CONSTANT = -0.1
# The rollout and the first step compute the same ratio by the same code; DDP may cast half-precision outputs in between.
RATIO_TOLERANCE = {"float32": 1e-3, "half": 0.1}
# Nats per token that the mean KL may lie below 0, chance aside: tokens are drawn by code that rounds differently.
KL_TOLERANCE = {"float32": 1e-3, "half": 1e-2}
STANDARD_ERRORS = 4  # by which a mean must lie off before it counts as such
REWARD_TOLERANCE = 1e-2  # of the reward; float32 sums over a thousand tokens are off by at most 1e-3


def argument_classes() -> tuple[type, ...]:
    return (RunArguments, DataArguments, RewardArguments, ModelArguments, PPOConfig)


def house_defaults(explicit: dict[str, Any]) -> dict[str, Any]:
    """The machine's defaults. A shared backbone cannot compute layers again, so it gets no activation checkpointing."""
    defaults = training.house_defaults(explicit)
    if explicit.get("use_peft") and explicit.get("share_backbone", True):
        defaults |= {"activation_checkpointing": False, "gradient_checkpointing": False}
    return defaults


def check(config: Config) -> list[str]:
    """Impossible combinations of options, one sentence each."""
    values, problems = config.values, online.check(config)
    if values["use_peft"] and values["share_backbone"] and values["activation_checkpointing"]:
        problems.append(
            "--activation_checkpointing needs --no_share_backbone: layers are computed again with one adapter"
        )
    return problems


def run(config: Config, run_dir: RunDirectory) -> None:
    """Load, answer held-out prompts, train, answer them again, check, and write the evidence."""
    args = config.part(PPOConfig)
    job = training.prepare(config, config.part(ModelArguments), args)
    splits = online.load_prompts(config, job, run_dir)
    functions, tokenizers = online.reward_functions(config, splits)
    with training.explaining(job, splits):
        trainer = make_trainer(config, job, splits, functions, tokenizers)
    training.attach(trainer, run_dir)
    held_out = online.HeldOut(splits.test, job, trainer.scorers, trainer)
    run_dir.summary["data"] = training.describe_data(splits, trainer, training.token_shares([], None), len(splits.test))
    run_dir.summary["model"] = training.describe_model(trainer, job)

    before = held_out.measure()
    training.train(trainer, run_dir)
    after = held_out.measure()

    run_dir.summary["eval"] = block = online.compare(before, after)
    run_dir.checks += online.checks("ppo", held_out, before, after, block)
    run_dir.checks += training_checks(run_dir.history, args)
    run_dir.summary["samples"] = online.samples(held_out, before, after)
    training.write_model_card(run_dir, trainer, job, splits)
    run_dir.write("training_curves.png", draw_curves(run_dir, job, splits, trainer.scorers))


def make_trainer(
    config: Config, job: Job, splits: Splits, reward_funcs: list[Any], tokenizers: list[Any]
) -> PPOTrainer:
    from trl import get_peft_config, get_quantization_config

    model_args, args = config.part(ModelArguments), config.part(PPOConfig)
    quantization = get_quantization_config(model_args)
    if quantization is not None:
        assert isinstance(args.model_init_kwargs, dict)
        args.model_init_kwargs["quantization_config"] = quantization
    return PPOTrainer(
        model=job.path,
        reward_funcs=reward_funcs,
        args=args,
        train_dataset=splits.train,
        eval_dataset=splits.validation,
        processing_class=job.tokenizer,
        reward_processing_classes=tokenizers,
        peft_config=get_peft_config(model_args),
    )


def training_checks(history: list[dict[str, Any]], args: PPOConfig) -> list[Check]:
    """What the log of the training says about the method."""
    rows = [row for row in history if "val/ratio" in row]
    precision = "half" if args.bf16 or args.fp16 else "float32"
    off = max((row["val/first_ratio_off"] for row in rows if "val/first_ratio_off" in row), default=None)
    tolerance = RATIO_TOLERANCE[precision]
    variances = [v for row in rows if (v := row.get("val/explained_variance")) is not None]  # None: no return differed
    explained = sum(variances) / len(variances) if variances else None
    clipped = max((row["policy/clipfrac_avg"] for row in rows), default=None)
    return [
        Check(
            "ppo.first_ratio_is_one",
            "invariant",
            None if off is None else off < tolerance,
            {"largest_difference_from_1": off},
            f"within {tolerance} of 1 in the first step on every rollout",
            "每次采样后的第一步，新旧策略相同，比率必须为 1；否则温度、dropout 或填充在采样与训练之间不一致。",
            "In the first step on a rollout the policy is still the one that sampled, so every ratio is 1; if not, "
            "temperature, dropout or padding differ between sampling and training.",
        ),
        _kl_check(rows, args, KL_TOLERANCE[precision]),
        _reward_check(rows),
        Check(
            "ppo.critic_is_no_worse_than_a_constant",
            "learning",
            None if explained is None else explained > WORSE_THAN_CONSTANT,
            {"mean_explained_variance": explained},
            f"explained variance of the returns above {WORSE_THAN_CONSTANT} on average",
            "解释方差明显为负：价值网络还不如常数预测，优势估计被它带偏。看 vf_coef、学习率与价值裁剪。",
            "A clearly negative explained variance: the critic is worse than a constant and misleads the advantages. Look at "
            "vf_coef, learning rate and value clipping.",
        ),
        Check(
            "ppo.most_tokens_are_not_clipped",
            "learning",
            None if clipped is None else clipped < 0.5,
            {"largest_clip_fraction": clipped},
            "clip fraction below 0.5 in every log row",
            "一半以上的 token 被裁剪：更新步子太大，降低学习率或减少 num_ppo_epochs。",
            "More than half of the tokens are clipped: the steps are too large. Lower learning rate or num_ppo_epochs.",
        ),
    ]


def _kl_check(rows: list[dict[str, Any]], args: PPOConfig, tolerance: float) -> Check:
    """A KL is never negative; its estimate from samples may be, but not on average, when the policy itself is sampled."""
    of_the_policy = args.top_p == 1 and args.top_k == 0
    pairs = [(row["objective/kl"], row["completions/mean_length"]) for row in rows if "objective/kl" in row]
    per_token = [kl / length for kl, length in pairs]
    high = None
    if of_the_policy and len(per_token) > 1:
        high = statistics.fmean(per_token) + STANDARD_ERRORS * statistics.stdev(per_token) / math.sqrt(len(per_token))
    return Check(
        "ppo.kl_is_not_negative",
        "invariant",
        None if high is None else high > -tolerance,
        {"mean_kl_per_token": statistics.fmean(per_token) if per_token else None, "at_most": high},
        f"the mean over the log rows, {STANDARD_ERRORS} standard errors added, is above -{tolerance} nats per token",
        "从策略自己采样时，log π − log π_ref 的期望就是 KL，不可能为负；明显为负说明两者写反了，或采样的不是这个策略，惩罚就成了奖励。",
        "For samples of the policy the mean of log pi - log pi_ref is a KL and can't be negative. If it clearly is, the two are "
        "exchanged or something else was sampled, and the penalty rewards leaving the reference.",
    )


def _reward_check(rows: list[dict[str, Any]]) -> Check:
    """What advantages and values of a completion add up to, against its score minus the KL penalty."""
    off = max((row["val/reward_off"] for row in rows if "val/reward_off" in row), default=None)
    return Check(
        "ppo.advantages_add_up_to_the_reward",
        "invariant",
        None if off is None else off < REWARD_TOLERANCE,
        {"largest_relative_difference": off},
        f"the rewards that advantages and values imply add up to score minus KL penalty, within {REWARD_TOLERANCE}",
        "由优势和价值反推的每个 token 的奖励之和，必须等于得分减去 KL 惩罚；不等说明 GAE 错位、KL 惩罚符号反了，或得分没有落在回答里。",
        "The token rewards that follow from advantages and values must add up to score minus KL penalty; if not, the advantage "
        "estimation is shifted, the penalty has the wrong sign, or the score is not inside the completion.",
    )


def draw_curves(run_dir: RunDirectory, job: Job, splits: Splits, scorers: list[Scorer]) -> bytes:
    return draw(
        f"PPO: {Path(job.name).name} on {Path(splits.source).name}",
        run_dir.history,
        [
            *online.reward_panels(
                "objective/scores",
                scorers,
                Line("eval_sampled_reward", "held-out (validation), sampled", REJECTED, "o"),
                Line("eval_reward", "held-out (validation), greedy", HELD_OUT, "o"),
            ),
            online.kl_panel("objective/kl", "KL to the reference, nats per completion"),
            Panel(
                "Critic and clipping",
                (
                    Line("val/explained_variance", "explained variance of returns", HELD_OUT),
                    Line("policy/clipfrac_avg", "share of clipped tokens", TRAIN),
                ),
                level=0.0,
                level_label="a constant critic",
            ),
        ],
        online.shares(run_dir.summary["eval"]),
    )
