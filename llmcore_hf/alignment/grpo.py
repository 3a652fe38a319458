"""Group relative policy optimization: compare several answers to one prompt with each other; no critic.

    A_i = (r_i - mean(r_1..r_G)) / std(r_1..r_G)

for G answers to one prompt (Shao et al. 2024, arXiv:2402.03300, section 4.1), the same A_i for all tokens of answer i, and
PPO's clipped loss on it. The mean of the group takes the place of the critic's value, so the advantages of a group sum to
zero, and a group whose answers all got the same reward teaches nothing. Trainer: TRL's GRPOTrainer.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llmcore_hf.alignment import online, training
from llmcore_hf.alignment.rewards import RewardArguments
from llmcore_hf.alignment.training import Job, ModelArguments
from llmcore_hf.checks import Check
from llmcore_hf.config import Config, RunArguments
from llmcore_hf.curves import HELD_OUT, REJECTED, Line, Panel, draw
from llmcore_hf.data.loading import DataArguments, Splits
from llmcore_hf.ppo.rewards import GIVEN, Batch, RewardError, Scorer, make_scorers, shown
from llmcore_hf.run_dir import RunDirectory

if TYPE_CHECKING:
    from trl import GRPOConfig, GRPOTrainer

as_trained, prompt_limit_of = online.as_trained, online.prompt_limit_of
house_defaults = training.house_defaults
# Of the mean advantage over whole groups. Nearly equal scores of a reward model are divided by a standard deviation of about
# 1e-4, which makes 1e-3 of rounding errors (measured); a mean that is not the group's is off by about 1.
TOLERANCE = 1e-2
RewardFunction = Callable[..., list[float | None]]


def argument_classes() -> tuple[type, ...]:
    from trl import GRPOConfig

    return (RunArguments, DataArguments, RewardArguments, ModelArguments, GRPOConfig)


def check(config: Config) -> list[str]:
    """Impossible combinations of options, one sentence each."""
    values, problems = config.values, online.check(config)
    if values["num_generations"] < 2:
        problems.append("--num_generations must be at least 2: answers are compared within their group")
    if values["beta"] < 0 or not math.isfinite(values["beta"]):
        problems.append(f"--beta must not be negative, not {values['beta']}")
    return problems


def run(config: Config, run_dir: RunDirectory) -> None:
    """Load, answer held-out prompts, train, answer them again, check, and write the evidence."""
    args: GRPOConfig = config.part(argument_classes()[-1])
    job = training.prepare(config, config.part(ModelArguments), args)
    splits = online.load_prompts(config, job, run_dir)
    functions, tokenizers = online.reward_functions(config, splits)
    scorers = make_scorers(functions, args.reward_weights, tokenizers)
    with training.explaining(job, splits):
        trainer = make_trainer(config, job, splits, scorers)
    training.attach(trainer, run_dir)
    held_out = online.HeldOut(splits.test, job, scorers, trainer)
    run_dir.summary["data"] = training.describe_data(splits, trainer, training.token_shares([], None), len(splits.test))
    run_dir.summary["model"] = training.describe_model(trainer, job)

    before = held_out.measure()
    training.train(trainer, run_dir)
    after = held_out.measure()

    run_dir.summary["eval"] = block = online.compare(before, after)
    run_dir.checks += online.checks("grpo", held_out, before, after, block)
    run_dir.checks += group_checks(run_dir.history)
    run_dir.summary["samples"] = online.samples(held_out, before, after)
    training.write_model_card(run_dir, trainer, job, splits)
    run_dir.write("training_curves.png", draw_curves(run_dir, job, splits, scorers))


def make_trainer(config: Config, job: Job, splits: Splits, scorers: list[Scorer]) -> Any:
    from trl import get_peft_config, get_quantization_config

    model_args = config.part(ModelArguments)
    trainer = trainer_class()(
        model=job.path,
        reward_funcs=refusing_silence([checked(scorer) for scorer in scorers]),
        args=config.part(argument_classes()[-1]),
        train_dataset=splits.train,
        eval_dataset=splits.validation,
        processing_class=job.tokenizer,
        peft_config=get_peft_config(model_args),
        quantization_config=get_quantization_config(model_args),
    )
    for scorer in scorers:
        if isinstance(scorer.func, nn.Module):
            scorer.func.to(trainer.accelerator.device)
    return trainer


def checked(scorer: Scorer) -> Callable[..., list[float | None]]:
    """A reward function that says which sample is wrong, where TRL would go on with NaN or stop with a traceback.

    Reward models become functions as well: TRL's own code gives them plain text without the end token and the special tokens
    that RewardTrainer trained them with.
    """

    def function(prompts: Any, completions: Any, completion_ids: Any, **more: Any) -> list[float | None]:
        given = {name: more.pop(name) for name in GIVEN if name in more}
        batch = Batch(
            prompts, completions, completion_ids, more, f"the prompts after step {given['trainer_state'].global_step}"
        )
        return [None if math.isnan(value) else value for value in scorer(batch, len(prompts), **given).tolist()]

    function.__name__ = scorer.name  # TRL names the metric after it
    return function


def refusing_silence(functions: list[RewardFunction]) -> list[RewardFunction]:
    """The same functions, which end the run when none of them has anything to say about a whole batch.

    As in TRL, a single completion without a reward does not count; about a batch of nothing else TRL only warns, and trains
    on with advantages of 0.
    """
    spoke: list[bool] = []  # of each function that TRL has asked about this batch so far, one after the other

    def watched(function: RewardFunction) -> RewardFunction:
        @functools.wraps(function)
        def asked(prompts: Any, completions: Any, **more: Any) -> list[float | None]:
            rewards = function(prompts=prompts, completions=completions, **more)
            spoke.append(any(reward is not None for reward in rewards))
            if len(spoke) == len(functions):
                silence = not any(spoke)
                spoke.clear()
                if silence:
                    raise RewardError(
                        f"every reward function returned None for all {len(prompts)} completions of the prompts after step "
                        f"{more['trainer_state'].global_step}: there is nothing to learn from. For example: "
                        + shown(Batch(prompts, completions, more["completion_ids"], {}, ""), 0)
                    )
            return rewards

        return asked

    return [watched(function) for function in functions]


@functools.cache
def trainer_class() -> type[GRPOTrainer]:
    """TRL's trainer, watched: that the advantages of whole groups sum to zero."""
    import trl

    class GRPOTrainer(trl.GRPOTrainer):
        """Logs `advantages/largest_mean`: how far the mean advantage of a batch of whole groups was from 0, at most."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._advantages: list[Any] = []  # of the micro-batches since answers were generated
            self._means: list[float] = []  # since the last log row
            super().__init__(*args, **kwargs)

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if model.training:
                self._advantages.append(inputs["advantages"].detach())
                if len(self._advantages) == self.args.steps_per_generation:  # together they hold whole groups
                    self._means.append(self.accelerator.gather(torch.cat(self._advantages)).mean().item())
                    self._advantages = []
            return super().compute_loss(model, inputs, *args, **kwargs)

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            if "loss" in logs and self._means:
                logs = {**logs, "advantages/largest_mean": max(map(abs, self._means))}
                self._means = []
            super().log(logs, start_time)

    return GRPOTrainer


def group_checks(history: list[dict[str, Any]]) -> list[Check]:
    """What must hold of the groups."""
    means = [row["advantages/largest_mean"] for row in history if "advantages/largest_mean" in row]
    mean_advantage = max(means, default=None)
    shares = [row["frac_reward_zero_std"] for row in history if "frac_reward_zero_std" in row]
    return [
        Check(
            "grpo.advantages_sum_to_zero",
            "invariant",
            None if mean_advantage is None else mean_advantage < TOLERANCE,
            {"largest_mean_advantage": mean_advantage},
            f"mean over whole groups within {TOLERANCE} of 0",
            "优势是组内相对值，一组之和必须为 0，所以第一步的损失接近 0 并不代表没有在学。",
            "Advantages are relative to their group and sum to zero in it; a loss near 0 does not mean that nothing is learned.",
        ),
        Check(
            "grpo.groups_differ_at_the_start",
            "learning",
            shares[0] < 0.9 if shares else None,
            {"share_of_groups_without_variance": {"first": shares[0], "last": shares[-1]} if shares else None},
            "less than 0.9 of the groups have equal rewards at the start",
            "组内奖励全相同则优势全为 0，没有梯度：换难度合适的题目，或用更细的奖励。",
            "A group with equal rewards has no gradient: choose prompts of fitting difficulty, or a finer reward.",
        ),
    ]


def draw_curves(run_dir: RunDirectory, job: Job, splits: Splits, scorers: list[Scorer]) -> bytes:
    beta = run_dir.config.values["beta"] > 0
    panels = online.reward_panels(
        "reward", scorers, Line("eval_reward", "held-out (validation), sampled", HELD_OUT, "o")
    )
    if beta:
        panels.append(online.kl_panel("kl", "KL to the reference, mean per token (k3)"))
    panels.append(Panel("Groups", (Line("frac_reward_zero_std", "share of groups with equal rewards", REJECTED),)))
    return draw(
        f"GRPO: {Path(job.name).name} on {Path(splits.source).name}",
        run_dir.history,
        panels,
        online.shares(run_dir.summary["eval"]),
    )
