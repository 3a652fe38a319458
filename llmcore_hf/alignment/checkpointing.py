"""Checkpoints of a Hugging Face Trainer that a run can go on from exactly, and the stop that makes one."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy, rotate_checkpoints

from llmcore_hf import distributed, resume
from llmcore_hf.durability import checkpoints, incompleteness, mark_complete, read_marker
from llmcore_hf.errors import UserError
from llmcore_hf.run_dir import RunDirectory

if TYPE_CHECKING:
    from transformers import Trainer


def save_period(values: Mapping[str, Any]) -> int:
    """Optimizer steps from one place where a checkpoint can be resumed exactly to the next; 1 without buffers.

    TRL's GRPO generates every `steps_per_generation * num_iterations` micro-steps and keeps the answers in a buffer that
    no checkpoint holds. An optimizer step is `gradient_accumulation_steps` micro-steps, so only where a multiple of both
    is reached the buffer is about to be renewed anyway. PPO keeps each rollout for all its epochs.
    """
    if "num_ppo_epochs" in values:
        return values["num_ppo_epochs"] * values["num_mini_batches"]
    if "num_iterations" not in values:
        return 1
    accumulation = values["gradient_accumulation_steps"]
    per_generation = values.get("steps_per_generation")
    if per_generation is None and values.get("generation_batch_size"):
        batch = values["per_device_train_batch_size"] * distributed.world_size()
        per_generation = max(values["generation_batch_size"] // batch, 1)
    generate_every = (per_generation or accumulation) * values["num_iterations"]
    return generate_every // math.gcd(generate_every, accumulation)


def check_save_steps(values: Mapping[str, Any]) -> list[str]:
    """Checkpoints in the middle of GRPO's generation buffer, as one sentence; a resumed run would differ from there on.

    `PPOConfig` refuses those in the middle of a rollout by itself.
    """
    if "num_iterations" not in values:
        return []
    period, strategy = save_period(values), str(resume.plain(values["save_strategy"]))
    if period == 1 or strategy == "no":
        return []
    why = (
        "completions are generated every steps_per_generation * num_iterations micro-steps, and a checkpoint between two "
        "generations cannot be resumed exactly"
    )
    if strategy != "steps":
        return [f"--save_strategy {strategy}: {why}: use --save_strategy steps --save_steps {period}, or a multiple"]
    steps = values["save_steps"]
    if 0 < steps < 1 and values["max_steps"] > 0:
        steps = math.ceil(values["max_steps"] * steps)  # a share of the run, as in TrainingArguments
    if steps % period == 0:
        return []
    nearest = sorted({max(int(steps // period), 1) * period, int(steps // period + 1) * period})
    fitting = " or ".join(map(str, nearest))
    return [f"--save_steps {values['save_steps']}: {why}: use a multiple of {period}, such as {fitting}"]


class NothingLeft(Exception):
    """The checkpoint is that of the last step: the run stopped before it was evaluated and saved."""


class CheckpointCallback(TrainerCallback):
    """Mark each checkpoint once it is whole, delete old ones only then, and stop with a checkpoint when asked to.

    Attributes:
        stopped: the run was asked to stop, and the checkpoint is saved.
    """

    def __init__(self, run: RunDirectory, trainer: Trainer) -> None:
        self.run = run
        self.trainer = trainer
        self.period = save_period(vars(trainer.args))
        self.stop_agreed = self.stopped = False
        # The Trainer rotates before the new checkpoint is marked: with a limit of 1, a kill between the two would leave
        # nothing to go on from. So it gets no limit, and `on_save` does it.
        self.save_total_limit, trainer.args.save_total_limit = trainer.args.save_total_limit, None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps > 0:
            raise NothingLeft

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stop_if_asked(args, state, control)
        best = args.save_strategy == SaveStrategy.BEST and control.should_evaluate
        if control.should_save or best:
            # What is averaged between two log rows is in no checkpoint: let a checkpoint end a row. The row is written
            # first, and fails in a directory that was deleted, which the checkpoint would bring back.
            control.should_log = True

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # An evaluation may take long, and behind that of the last step there is no step that would look.
        # `save_strategy: best` decides only afterwards whether to save.
        if self.trainer.is_in_train and state.global_step and args.save_strategy != SaveStrategy.BEST:
            self._stop_if_asked(args, state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stopped:
            control.should_save = control.should_evaluate = False  # it has just been saved
        if control.should_save:
            control.should_log = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.accelerator.wait_for_everyone()  # each process writes its random state
        if args.should_save:
            mark_complete(
                self.folder(state.global_step),
                state.global_step,
                weights_only=args.save_only_model,
                world_size=distributed.world_size(),
                data_fingerprint=(self.run.summary.get("data") or {}).get("fingerprint"),
            )
            rotate_checkpoints(args.output_dir, self.save_total_limit, state.best_model_checkpoint)

    def _stop_if_asked(self, args: Any, state: Any, control: Any) -> None:
        if not self.stopped and self._stop_is_agreed() and state.global_step % self.period == 0:
            self.stopped = control.should_save = control.should_training_stop = True
            args.save_only_model = False  # this checkpoint is there to be resumed

    def folder(self, step: int) -> Path:
        return Path(self.trainer.args.output_dir) / f"checkpoint-{step}"

    def _stop_is_agreed(self) -> bool:
        """Whether any process was asked to stop: all must leave after the same step, or they wait for each other."""
        if distributed.world_size() == 1:
            return self.run.stop.requested
        accelerator = self.trainer.accelerator
        if self.run.stop.requested:
            accelerator.set_trigger()
        self.stop_agreed = accelerator.check_trigger() or self.stop_agreed
        return self.stop_agreed


@contextmanager
def dropping_half_written(callback: CheckpointCallback) -> Iterator[None]:
    """Remove the checkpoint that was being written when an error ended the training."""
    try:
        yield
    except BaseException:
        folder = callback.folder(callback.trainer.state.global_step)
        if distributed.is_main_process() and folder.is_dir() and incompleteness(folder):
            shutil.rmtree(folder, ignore_errors=True)
        raise


def take_up(run: RunDirectory, checkpoint: Path) -> None:
    """Make the run directory what it was when `checkpoint` was written, and tell what differs from that run.

    Raises:
        UserError: the data are not those of the checkpoint.
    """
    marker = read_marker(checkpoint) or {}
    former, now = marker.get("data_fingerprint"), (run.summary.get("data") or {}).get("fingerprint")
    if former and now and former != now:
        raise UserError(
            f"{checkpoint} was trained on other data than --dataset_name {run.config.values.get('dataset_name')} (and the "
            f"options that choose its rows) gives now: fingerprint {former} then, {now} now. Restore the data, or begin a "
            f"new run with --model_name_or_path {checkpoint}"
        )
    run.rewind(resume.last_step(checkpoint), checkpoint.absolute().parent)
    if distributed.is_main_process():
        _tell_changes(run, marker.get("world_size"))
        _remove_later(run.path, resume.last_step(checkpoint))


def _tell_changes(run: RunDirectory, former_world_size: int | None) -> None:
    changed = resume.changes(run.former_options, run.config)
    if former_world_size not in (None, distributed.world_size()):
        changed.append(f"number of processes {former_world_size} -> {distributed.world_size()}")
    if changed:
        text = "\n  ".join(["resumed with other options, so the result is not that of an uninterrupted run:", *changed])
        print(text, file=sys.stderr)


def _remove_later(run_dir: Path, step: int) -> None:
    """What came after the step is trained again: writing over an old folder could pass for complete halfway."""
    for folder in checkpoints(run_dir):
        if int(folder.name.removeprefix("checkpoint-")) > step:
            print(f"{folder} is removed: the run goes on from step {step}", file=sys.stderr)
            shutil.rmtree(folder)
