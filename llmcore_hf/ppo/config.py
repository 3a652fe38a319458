"""`PPOConfig`: the options of `PPOTrainer`, under the names of TRL's PPO where it had one."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy


def option(default: Any, help: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class PPOConfig(TrainingArguments):
    """Options of `PPOTrainer`.

    One *rollout* is a batch of prompts that the policy answers; it has `rollout_size` prompts per device. The trainer
    then makes `num_ppo_epochs * num_mini_batches` optimizer steps on it before the next rollout, so `max_steps`,
    `logging_steps`, `eval_steps` and `save_steps` count optimizer steps, as in every other trainer. Checkpoints are taken
    between rollouts: `save_steps` must be a multiple of `steps_per_rollout`.

    Raises:
        ValueError: an option is out of its range, or two exclude each other; the message names them.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]

    learning_rate: float = option(1e-5, "Peak learning rate of policy and critic.")
    per_device_train_batch_size: int = option(8, "Completions per forward and backward pass on each device.")
    logging_steps: float = option(10, "Log every so many optimizer steps.")
    remove_unused_columns: bool = option(
        False, "Must stay off: the other columns of the dataset go to the reward functions."
    )

    model_init_kwargs: dict | str | None = field(
        default=None,
        metadata={"help": "Further arguments of `from_pretrained`, when the model is given by its id or path."},
    )
    trust_remote_code: bool = option(
        False, "Run code that a model brings along, when the model is given by its id or path."
    )
    num_ppo_epochs: int = option(4, "Passes over each rollout.")
    num_mini_batches: int = option(1, "Optimizer steps per pass over a rollout.")
    total_episodes: int | None = option(
        None, "Completions to train on in all, over all devices; sets `max_steps`, rounded up to whole rollouts."
    )
    max_completion_length: int = option(256, "Most tokens the policy may generate per prompt.")
    temperature: float = option(1.0, "Sampling temperature; log-probabilities are those at this temperature, too.")
    top_p: float = option(1.0, "Nucleus sampling; below 1, completions are no longer samples of the policy itself.")
    top_k: int = option(0, "Sample from the k likeliest tokens; 0 keeps all. Other values: as for `top_p`.")
    local_rollout_forward_batch_size: int = option(
        64, "Completions per device that are generated and scored at a time. Lower it to save memory."
    )

    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each reward function; all 1 when not given."}
    )
    kl_coef: float = option(0.05, "Weight of the KL penalty against the reference; 0 needs no reference model.")
    kl_target: float | None = option(
        None, "Wanted KL per completion, in nats: `kl_coef` is then only the start, and adapts (Ziegler et al. 2019)."
    )
    kl_horizon: int = option(10_000, "Completions over which an adaptive `kl_coef` changes by up to a fifth.")
    truncated_completions: str = option(
        "penalty",
        "What a completion is that reached `max_completion_length` without an end token. `penalty`: finished, its score "
        "lowered by `missing_eos_penalty`; `score`: finished and scored like any other; `bootstrap`: unfinished, without "
        "score, its last token continues with the critic's value.",
        choices=["penalty", "score", "bootstrap"],
    )
    missing_eos_penalty: float = option(1.0, "Taken off the score of a truncated completion (`penalty`).")

    gamma: float = option(1.0, "Discount per token.")
    lam: float = option(0.95, "Lambda of generalized advantage estimation.")
    whiten_rewards: bool = option(False, "Scale the rewards of a rollout to variance 1.")
    whiten_advantages: bool = option(True, "Shift and scale the advantages of a rollout to mean 0 and variance 1.")
    cliprange: float = option(0.2, "The policy's ratio gives no gradient outside 1 - cliprange ... 1 + cliprange.")
    cliprange_value: float = option(0.2, "The critic's value gives no gradient farther than this from its old value.")
    vf_coef: float = option(0.1, "Weight of the value loss.")
    entropy_coef: float = option(0.0, "Weight of the entropy bonus.")
    target_kl: float | None = option(
        None,
        "Make no further optimizer steps on a rollout after one that found the policy this far from where it sampled "
        "(approximate KL per token).",
    )

    share_backbone: bool = option(
        True,
        "With LoRA: one copy of the base weights for policy, reference (adapters off) and critic (an adapter of its own).",
    )
    disable_dropout: bool = option(True, "Turn dropout off; with it the ratio is not 1 even before the first update.")
    log_completions: bool = option(False, "Print a table of completions at each logging step.")
    num_completions_to_print: int = option(4, "Rows of that table.")

    @property
    def rollout_size(self) -> int:
        """Prompts per device and rollout."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.num_mini_batches

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps on each rollout."""
        return self.num_ppo_epochs * self.num_mini_batches

    def __post_init__(self) -> None:
        super().__post_init__()
        if problems := [*self._out_of_range(), *self._impossible()]:
            raise ValueError("; ".join(problems))
        if self.total_episodes is not None:
            rollouts = math.ceil(self.total_episodes / (self.rollout_size * self.world_size))
            self.max_steps = rollouts * self.steps_per_rollout

    def _out_of_range(self) -> list[str]:
        problems = [
            f"{name} must be at least 1, not {getattr(self, name)}"
            for name in (
                "num_ppo_epochs",
                "num_mini_batches",
                "max_completion_length",
                "local_rollout_forward_batch_size",
                "kl_horizon",
                "total_episodes",
            )
            if getattr(self, name) is not None and getattr(self, name) < 1
        ]
        for name in ("temperature", "cliprange", "cliprange_value", "kl_target", "target_kl"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                problems.append(f"{name} must be greater than 0, not {value}")
        for name in ("kl_coef", "vf_coef", "entropy_coef", "missing_eos_penalty", "top_k"):
            if getattr(self, name) is None or not 0 <= getattr(self, name) < math.inf:
                problems.append(f"{name} must not be negative, not {getattr(self, name)}")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                problems.append(f"{name} must lie in [0, 1], not {getattr(self, name)}")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p must lie in (0, 1], not {self.top_p}")
        if self.reward_weights is not None and not all(math.isfinite(weight) for weight in self.reward_weights):
            problems.append(f"reward_weights must be finite numbers, not {self.reward_weights}")
        return problems

    def _impossible(self) -> list[str]:
        problems = []
        choices = ("penalty", "score", "bootstrap")
        if self.truncated_completions not in choices:
            problems.append(
                f"truncated_completions must be one of {', '.join(choices)}, not {self.truncated_completions}"
            )
        if self.kl_target is not None and self.kl_coef == 0:
            problems.append("kl_target needs a kl_coef greater than 0 to start from")
        if self.remove_unused_columns:
            problems.append(
                "remove_unused_columns must be False: reward functions get the other columns of the dataset"
            )
        if self.total_episodes is not None and self.max_steps > 0:
            problems.append("total_episodes and max_steps exclude each other: give one of them")
        if problem := self._checkpoint_within_a_rollout():
            problems.append(problem)
        return problems

    def _checkpoint_within_a_rollout(self) -> str | None:
        """An epoch of prompts ends with a whole rollout; a number of steps need not."""
        period = self.steps_per_rollout
        name = {SaveStrategy.STEPS: "save_steps", SaveStrategy.BEST: "eval_steps"}.get(SaveStrategy(self.save_strategy))
        if name is None or period < 1 or (name == "eval_steps" and self.eval_strategy != IntervalStrategy.STEPS):
            return None
        steps = getattr(self, name)
        if steps >= 1 and steps % period == 0:
            return None
        nearest = sorted({max(int(steps // period), 1) * period, int(steps // period + 1) * period})
        return (
            f"{name} {steps}: a checkpoint can be resumed exactly only between two rollouts: use a multiple of "
            f"num_ppo_epochs * num_mini_batches = {period}, such as {' or '.join(map(str, nearest))}"
        )
