"""What all modules on TRL's trainers share: defaults for the machine, option checks, callbacks, saving."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import itertools
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jinja2 import TemplateError
from safetensors import SafetensorError
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, set_seed
from trl import ModelConfig

from llmcore_hf import distributed, registry
from llmcore_hf.alignment import evaluation
from llmcore_hf.alignment.checkpointing import (
    CheckpointCallback,
    NothingLeft,
    check_save_steps,
    dropping_half_written,
    take_up,
)
from llmcore_hf.checks import Check
from llmcore_hf.config import COMMAND_LINE, Config
from llmcore_hf.data.loading import DataArguments, Splits, column_mapping, load, looks_like_path
from llmcore_hf.data.preparing import PROMPT_BYTES, PROMPT_TURNS
from llmcore_hf.data.problems import DROP
from llmcore_hf.data.reading import IMAGE_COLUMNS
from llmcore_hf.data.toy import TOY_DATASETS
from llmcore_hf.durability import Interrupted, move_into_place, storage_trouble
from llmcore_hf.errors import UserError
from llmcore_hf.models import loading, tiny
from llmcore_hf.run_dir import Diverged, RunDirectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

N_MEASURED = 1000  # rows whose token counts are measured for the summary
N_SAMPLES = 5  # answers shown in the summary
BAD_ROWS = "bad_rows.jsonl"  # rows of the dataset with problems, in the run directory
POSITIVE = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "num_train_epochs",
    "max_length",
    "max_completion_length",
    "max_train_samples",
    "max_eval_samples",
    "max_new_tokens",
    "lora_r",
    "lora_alpha",
)
# What a chat template raises that does not know what to do with a conversation.
REFUSALS = (TemplateError, TypeError, ValueError, KeyError, AttributeError)
LORA_ONLY = ("lora_", "use_rslora", "use_dora")


@dataclasses.dataclass
class ModelArguments(ModelConfig):
    """TRL's `ModelConfig`, with the names of the tiny checkpoints in its help."""

    model_name_or_path: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "A local folder, a hub id, or a tiny checkpoint made on this machine: "
            + ", ".join(tiny.TINY_MODELS)
            + " (`-base`: warm-started)."
        },
    )


def house_defaults(explicit: dict[str, Any]) -> dict[str, Any]:
    """Defaults that differ from TRL's: half precision and activation checkpointing only where they help.

    On a CPU, bfloat16 and activation checkpointing cost time and buy nothing, and TRL's defaults do not even start.
    """
    on_gpu = (torch.cuda.is_available() or torch.backends.mps.is_available()) and not explicit.get("use_cpu")
    launched_on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1")
    on_gpu = on_gpu and not launched_on_cpu
    defaults: dict[str, Any] = {
        "use_cpu": not on_gpu,
        "activation_checkpointing": on_gpu,
        "gradient_checkpointing": on_gpu,  # the old name of the same option
        "dataloader_pin_memory": on_gpu,
        "ddp_find_unused_parameters": False,  # every parameter of a text model takes part in every step
        "disable_tqdm": True,  # the console shows its own bar
        "logging_nan_inf_filter": False,  # a NaN in the loss must be seen, not replaced
    }
    if not explicit.get("fp16"):
        defaults["bf16"] = on_gpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    if "gradient_checkpointing" in explicit:
        defaults["activation_checkpointing"] = explicit["gradient_checkpointing"]
    return defaults


def merge_into_text_model(adapter: str) -> str:
    """Python that merges a LoRA adapter into its base, for a message."""
    return (
        "from peft import AutoPeftModelForCausalLM; "
        f"AutoPeftModelForCausalLM.from_pretrained({adapter!r}).merge_and_unload().save_pretrained('merged'); "
        "save the tokenizer there, too"
    )


def check_options(
    config: Config,
    built_in: Iterable[str] = tiny.TINY_MODELS,
    needs_dataset: bool = True,
    merge: Callable[[str], str] | None = merge_into_text_model,
) -> list[str]:
    """Impossible combinations among the options every module on a TRL trainer has; one sentence each.

    Args:
        built_in: the tiny checkpoints that the module takes.
        merge: a folder with an adapter alone -> the Python that merges it; None where an adapter is as good as a model.
    """
    values, problems = config.values, []
    for name in ("model_name_or_path", "dataset_name"):
        if not values[name] and (needs_dataset or name != "dataset_name"):
            problems.append(f"--{name} is missing (or --toy for the offline recipe)")
    model, dataset = values["model_name_or_path"], values["dataset_name"]
    problems += _misspelt("model_name_or_path", model, "tiny-", built_in)
    problems += _misspelt("dataset_name", dataset, "toy-", TOY_DATASETS)
    if model and model not in built_in and looks_like_path(model) and not Path(model).expanduser().is_dir():
        problems.append(f"--model_name_or_path {model}: there is no such folder")
    if model and merge and loading.is_adapter(model):
        problems.append(
            f"--model_name_or_path {model} holds a LoRA adapter and no whole model. Merge it into its base first, in Python: "
            f"{merge(model)}; and start from `merged`"
        )
    if dataset and looks_like_path(dataset) and not Path(dataset).expanduser().exists():
        problems.append(f"--dataset_name {dataset}: there is no such file or folder")
    problems += [f"--{n} must be greater than 0, not {values[n]}" for n in POSITIVE if _not_positive(values.get(n))]
    if values["max_steps"] == 0 or values["max_steps"] < -1:
        problems.append(f"--max_steps must be greater than 0, or -1 to count epochs, not {values['max_steps']}")
    if not 0 <= values["seed"] < 2**32:
        problems.append(f"--seed must lie between 0 and 2**32 - 1, not {values['seed']}")
    if values.get("truncation_mode", "keep_start") != "keep_start":
        problems.append("--truncation_mode keep_end is on its way out of TRL and not supported here: use keep_start")
    problems += _check_data(values, registry.get(config.module).trains_on)
    if not 0 < values["test_split_size"] < 1:
        problems.append(f"--test_split_size must lie between 0 and 1, not {values['test_split_size']}")
    if values.get("max_generation_samples", 0) < 0:
        problems.append(f"--max_generation_samples must not be negative, not {values['max_generation_samples']}")
    if values["enable_jit_checkpoint"]:
        problems.append(
            "--enable_jit_checkpoint is not needed: Ctrl-C and SIGTERM always save a checkpoint here; leave it off"
        )
    problems += check_save_steps(values)
    return problems + _check_trackers(values["report_to"]) + _check_peft(config) + _check_precision(values)


def _check_data(values: dict[str, Any], task: str | None) -> list[str]:
    problems = []
    try:
        column_mapping(values["columns"], task)
    except ValueError as error:
        problems.append(f"--columns: {error}")
    if values["dataset_streaming"]:
        if values["max_steps"] <= 0:
            problems.append("--dataset_streaming needs --max_steps: how many rows there are is not known beforehand")
        if values["max_eval_samples"] is None:
            problems.append("--dataset_streaming needs --max_eval_samples: held-out rows are kept in memory")
        if values["dataloader_num_workers"]:
            problems.append(
                "--dataset_streaming checks rows in the training process: --dataloader_num_workers must be 0"
            )
    return problems


def _misspelt(option: str, name: str | None, prefix: str, built_in: Iterable[str]) -> list[str]:
    """A name that can only mean something built in, and does not."""
    if not name or not name.startswith(prefix) or name in built_in or Path(name).exists():
        return []
    near = difflib.get_close_matches(name, built_in, n=1)
    hint = f" (did you mean `{near[0]}`?)" if near else ""
    return [f"--{option} {name} is not one of {', '.join(built_in)}{hint}"]


def _check_trackers(report_to: str | list[str] | None) -> list[str]:
    wanted = set([report_to] if isinstance(report_to, str) else report_to or []) - {"none", "all"}
    if not wanted:
        return []
    from transformers.integrations import get_available_reporting_integrations

    missing = sorted(wanted - set(get_available_reporting_integrations()))
    return [f"--report_to {name}: no such tracker is installed here" for name in missing]


def _not_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not 0 < value < math.inf


def _check_peft(config: Config) -> list[str]:
    values, problems = config.values, []
    if not values["use_peft"]:
        given = [n for n, source in config.sources.items() if source == COMMAND_LINE and n.startswith(LORA_ONLY)]
        problems += [f"--{name} has no effect without --use_peft" for name in given]
        if values["load_in_4bit"] or values["load_in_8bit"]:
            problems.append("quantized weights cannot be trained themselves: add --use_peft to train LoRA on them")
    if values["load_in_4bit"] or values["load_in_8bit"]:
        if not torch.cuda.is_available():
            problems.append("--load_in_4bit and --load_in_8bit need a CUDA GPU; none is visible here")
        elif not _installed("bitsandbytes"):
            problems.append("--load_in_4bit and --load_in_8bit need the package bitsandbytes: pip install bitsandbytes")
    return problems


def _check_precision(values: dict[str, Any]) -> list[str]:
    problems = []
    if values["fp16"] and values["use_cpu"]:
        problems.append("--fp16 needs a GPU: its loss scaling does not exist on a CPU")
    if values["fp16"] and values["bf16"]:
        problems.append("--fp16 and --bf16 exclude each other")
    return problems


def _installed(package: str) -> bool:
    from importlib.util import find_spec

    return find_spec(package) is not None


@dataclasses.dataclass
class Job:
    """A checkpoint's name and tokenizer, ready for a TRL trainer."""

    name: str  # as the user wrote it
    path: str
    tokenizer: PreTrainedTokenizerBase
    context: int | None  # positions of the model, in tokens


def load_job(name: str, revision: str = "main", trust_remote_code: bool = False) -> Job:
    """Find the checkpoint and read its tokenizer.

    Raises:
        UserError: there is no such checkpoint.
    """
    path = loading.resolve_name(name)
    tokenizer = loading.load_tokenizer(path, revision, trust_remote_code)
    return Job(name, path, tokenizer, loading.context_length(path, revision, trust_remote_code))


def prepare(config: Config, model_args: ModelConfig, training_args: Any) -> Job:
    """Quieten the libraries, seed every generator, find the checkpoint and read its tokenizer.

    Seeding comes before the trainer is built, because that is where LoRA draws its initial weights.
    """
    quieten()
    set_seed(training_args.seed)
    _refuse_vision_model(config.module, str(model_args.model_name_or_path), model_args.model_revision)
    job = load_job(str(model_args.model_name_or_path), model_args.model_revision, training_args.trust_remote_code)
    for option in ("max_length", "max_completion_length"):
        n_tokens = getattr(training_args, option, None)
        if job.context and (n_tokens or 0) > job.context:
            raise UserError(f"--{option} {n_tokens} is more than the {job.context} tokens of {job.name}'s context")
    training_args.model_init_kwargs = loading.init_kwargs(model_args, training_args.model_init_kwargs)
    return job


IMAGES_ELSEWHERE = (
    "images are for --module llava, blip2 and flamingo, which learn to answer questions about them (for preferences about "
    "images, TRL's own DPOTrainer and GRPOTrainer take LLaVA)"
)


def _refuse_vision_model(module: str, name: str, revision: str) -> None:
    """Raises `UserError` for a model that reads images and is no text model beside, from its config alone."""
    from transformers import PreTrainedConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if name in tiny.TINY_MODELS:
        return
    try:
        config, _ = PreTrainedConfig.get_config_dict(loading.resolve_name(name), revision=revision)
    except (OSError, ValueError):
        return  # whatever it is, loading its tokenizer says so
    kind = config.get("model_type")
    if "vision_config" in config and kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(
            f"--model_name_or_path {name} is a vision-language model of type `{kind}`, and module `{module}` trains text "
            f"models: {IMAGES_ELSEWHERE}"
        )


def load_splits(
    config: Config, args: TrainingArguments, task: str, run_dir: RunDirectory, limit: PromptLimit | None
) -> Splits:
    """The dataset of a module that trains on text, checked; rows with problems stand in the run directory.

    Raises:
        UserError: the data cannot be used, or they hold images; all this before a model is loaded.
    """
    splits = load(
        config.part(DataArguments),
        task,
        args.seed,
        getattr(args, "dataset_num_proc", None),
        args.load_best_model_at_end,
        limit=limit,
        bad_rows_file=run_dir.path / BAD_ROWS,
    )
    if found := [name for name in IMAGE_COLUMNS if name in splits.train.column_names]:
        raise UserError(
            f"{splits.source} holds images (column `{found[0]}`), and module `{config.module}` trains on text: "
            f"{IMAGES_ELSEWHERE}; or take the column out"
        )
    return splits


def quieten() -> None:
    """Turn off warnings nobody can act on, and progress bars where nobody sees them move."""
    import warnings

    import datasets
    import transformers

    # Deprecations between the libraries (TRL, PEFT, transformers): nothing the user of a run could mend.
    warnings.filterwarnings("ignore", category=FutureWarning)
    if not (sys.stderr.isatty() and distributed.is_main_process()):
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
    if not distributed.is_main_process():
        transformers.utils.logging.set_verbosity_error()


class PromptLimit:
    """Finds prompts that leave no room for an answer. Implements `data.auditing.LengthLimit`.

    Tokenizing every row only for this would take as long as preparing the dataset, and is seldom needed: a tokenizer
    that falls back to bytes makes at most one token of a byte.

    Args:
        encode: a row -> its tokens; what stands before the first answer counts as the prompt.
        max_length: tokens of prompt and answer together.
        fills: what a prompt of so many tokens does, for the message.
        remedy: what to change, for the message.
    """

    SLACK = 2  # tokens per turn that text and template may make more together than apart
    measured = PROMPT_BYTES, PROMPT_TURNS

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        encode: Callable[[dict[str, Any]], evaluation.Encoded],
        max_length: int,
        fills: str | None = None,
        remedy: str = "raise --max_length, or shorten it",
    ) -> None:
        self.tokenizer, self.encode, self.max_length, self.remedy = tokenizer, encode, max_length, remedy
        self.fills = fills or f"fills --max_length {max_length}"

    def may_be_too_long(self, n_bytes: np.ndarray, n_turns: np.ndarray) -> np.ndarray:
        """(N,) False where texts of that many bytes and turns certainly fit."""
        first, more = self._template_tokens
        template = np.where(n_turns > 0, first + np.maximum(n_turns - 1, 0) * more, self.SLACK)
        return n_bytes + template >= self.max_length

    def problem(self, row: dict[str, Any]) -> str | None:
        """What is wrong with the length of a row; None when it fits."""
        try:
            return self._problem_of(self.encode(row))
        except REFUSALS:  # the trainer will refuse the row in the same way, and `explaining` says so
            return None

    def _problem_of(self, row: evaluation.Encoded) -> str | None:
        too_long = row.n_prompt >= self.max_length
        return f"its prompt of {row.n_prompt} tokens {self.fills}" if too_long else None

    @functools.cached_property
    def _template_tokens(self) -> tuple[float, float]:
        """Tokens that the chat template adds to the first turn, and to each further one."""
        if not self.tokenizer.chat_template:
            return -math.inf, 0.0  # `require_chat_template` refuses conversations
        turns = [
            {"role": "user", "content": "-"},
            {"role": "assistant", "content": "-"},
            {"role": "user", "content": "-"},
        ]
        try:
            one, three = (
                len(self.tokenizer.apply_chat_template(turns[:n], add_generation_prompt=True)["input_ids"])
                for n in (1, 3)
            )
        except Exception:  # a template may refuse any conversation, in its own words: then every row is tokenized
            return math.inf, 0.0
        return one + self.SLACK, (three - one) / 2 + self.SLACK


@dataclasses.dataclass
class SeenRow:
    """A row as a trainer sees it: what is left of it, and which tokens carry loss."""

    title: str
    ids: list[int]
    carries_loss: list[bool]
    n_prompt: int  # tokens before the first answer, whole
    n_full: int  # tokens of the whole row, before it was cut off

    def stretches(self) -> Iterator[tuple[bool, list[int]]]:
        """Neighbouring tokens that all carry loss, or all do not."""
        pairs = zip(self.carries_loss, self.ids, strict=True)
        for carries_loss, group in itertools.groupby(pairs, key=lambda pair: pair[0]):
            yield carries_loss, [token for _, token in group]


@contextmanager
def stand_in(job: Job, config_class: Any, **options: Any) -> Iterator[dict[str, Any]]:
    """Model, config and tokenizer for a trainer that shall only prepare a dataset: a tiny model takes the real one's place."""
    quiet = {"bf16": False, "activation_checkpointing": False, "report_to": "none", "disable_tqdm": True}
    with tempfile.TemporaryDirectory() as folder:
        tiny.make_model("qwen3", job.tokenizer, seed=0).save_pretrained(folder)
        args = config_class(output_dir=folder, use_cpu=True, **quiet, **options)
        yield {"model": folder, "args": args, "processing_class": job.tokenizer}


def require_chat_template(tokenizer: PreTrainedTokenizerBase, splits: Splits) -> None:
    """Raises `UserError` when conversations meet a tokenizer that has no chat template."""
    first = next(iter(splits.train))
    conversational = any(isinstance(first.get(c), list) for c in ("messages", "prompt", "chosen"))
    if conversational and not tokenizer.chat_template:
        raise UserError(
            f"{splits.source} holds conversations, but this checkpoint's tokenizer has no chat template. "
            "Use an instruction-tuned checkpoint, give one with --chat_template_path (sft), or use plain-text columns"
        )


class RunCallback(TrainerCallback):
    """Log rows to the run directory as they come, show progress, and stop at a loss that is not finite."""

    SHOWN = (
        "loss",
        "eval_loss",
        "learning_rate",
        "mean_token_accuracy",
        "eval_mean_token_accuracy",
        "rewards/accuracies",
        "rewards/margins",
        "eval_rewards/accuracies",
        "eval_rewards/margins",
        "accuracy",
        "margin",
        "eval_accuracy",
        "eval_margin",
        "reward",
        "objective/rlhf_reward",
        "objective/kl",
        "kl",
        "completions/mean_length",
        "eval_reward",
        "eval_sampled_reward",
        "itm_accuracy",
        "eval_vqa_accuracy",
        "eval_vqa_accuracy_blind",
    )

    def __init__(self, run: RunDirectory, trainer: Trainer) -> None:
        self.run = run
        self.trainer = trainer
        self.bar: Any = None
        self.began: float | None = None  # when the first step began, after everything was loaded
        # Most of TRL's trainers count the tokens since the process began, not those of the run. A checkpoint ends a row:
        # this is exact.
        counts = [row["num_tokens"] for row in run.history if "num_tokens" in row]
        self.tokens_before = counts[-1] if counts else 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        from tqdm import tqdm

        self.began, self.first_step = time.monotonic(), state.global_step
        if state.num_input_tokens_seen and args.include_num_input_tokens_seen in ("no", False):
            self.tokens_before = 0  # GRPO counts in the state, which the checkpoint brought back
        if distributed.is_main_process():
            interactive = sys.stderr.isatty()
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", disable=not interactive)
        if state.global_step == 0 and not args.eval_on_start:
            # The first point of the held-out curve. Not before `train()`: evaluating then leaves the model without
            # DDP, and the processes train apart. Forked, so that training draws the same random numbers.
            with torch.random.fork_rng():
                self.trainer.evaluate()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        row = {"step": state.global_step, **(logs or {})}
        row.pop("train_loss", None)  # wrong after a resume, and the rows of `loss` say more
        for name in ("num_tokens", "eval_num_tokens"):
            if name in row:
                row[name] += self.tokens_before
        self.run.log(row)
        self._show(row, state.max_steps)
        for name in ("loss", "eval_loss"):
            if name in row and not math.isfinite(row[name]):
                raise Diverged(
                    f"{name} is {row[name]} at step {state.global_step}: lower --learning_rate, add --warmup_steps, "
                    "or check the data for extreme rows"
                )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()

    def _show(self, row: dict[str, Any], max_steps: int) -> None:
        if self.bar is None or "train_runtime" in row:
            return
        shown = {n: f"{v:.4g}" for n, v in row.items() if n in self.SHOWN and isinstance(v, int | float)}
        if not self.bar.disable:
            self.bar.set_postfix(shown)
            return
        text = "  ".join(f"{name} {value}" for name, value in shown.items())
        print(f"step {row['step']}/{max_steps}  {text}{self._time_left(row['step'], max_steps)}", flush=True)

    def _time_left(self, step: int, max_steps: int) -> str:
        done = step - self.first_step
        if self.began is None or done <= 0:
            return ""
        seconds = round((time.monotonic() - self.began) / done * (max_steps - step))
        return f"  {seconds // 60}:{seconds % 60:02d} left"


@contextmanager
def explaining(job: Job, splits: Splits) -> Iterator[None]:
    """What the libraries refuse while a trainer is set up becomes one message that says what was being set up."""
    try:
        yield
    except (*REFUSALS, OSError, RuntimeError, ImportError, SafetensorError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"the training of {job.name} on {splits.source} cannot be set up: {reason}") from error


def attach(trainer: Trainer, run: RunDirectory) -> None:
    """Replace the trainer's own printing by ours, and keep boolean buffers out of DDP where that is asked for."""
    if run.config.values["ignore_bias_buffers"]:
        model: Any = trainer.model
        buffers = [name for name, buffer in model.named_buffers() if buffer.dtype == torch.bool]
        model._ddp_params_and_buffers_to_ignore = buffers  # the attribute DDP reads
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    # TRL drafts a card at every checkpoint; the run writes its own at the end, from what it measured
    trainer.create_model_card = lambda *args, **kwargs: None


def train(trainer: Trainer, run: RunDirectory) -> None:
    """Train, from a checkpoint when the run goes on from one, and save what came out of it.

    Raises:
        Diverged: the loss or a weight is no longer a finite number.
        Interrupted: the run was asked to stop; the checkpoint to go on from is saved.
        UserError: the checkpoint was trained on other data.
    """
    if run.checkpoint:
        take_up(run, run.checkpoint)
    checkpointing = CheckpointCallback(run, trainer)
    progress = RunCallback(run, trainer)
    trainer.add_callback(checkpointing)  # first: it may find that nothing is left to train, and nothing to show
    trainer.add_callback(progress)
    with run.stop.deferring(), dropping_half_written(checkpointing):
        try:
            trainer.train(resume_from_checkpoint=str(run.checkpoint) if run.checkpoint else None)
        except NothingLeft:
            trainer.is_in_train = False
        except UserError:
            raise  # says all by itself
        except Exception as error:
            if run.checkpoint is None or progress.began is not None or storage_trouble(error, run.path):
                raise
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(
                f"{run.checkpoint} cannot be loaded ({type(error).__name__}: {reason}): is a file in it damaged, or from "
                "another model? Go on from an earlier one with --resume_from_checkpoint PATH"
            ) from error
    step = trainer.state.global_step
    if checkpointing.stopped:
        raise Interrupted(step, checkpointing.folder(step))
    if run.stop.requested:  # after the last step; there is no other to save it
        raise KeyboardInterrupt
    if not _weights_are_finite(trainer):
        raise Diverged("the weights are not finite after training: lower --learning_rate or add --warmup_steps")
    if not any(row["step"] == step and any(name.startswith("eval_") for name in row) for row in run.history):
        trainer.evaluate()  # the last point of the held-out curve, whatever --eval_strategy says
    save(trainer, run)


def _weights_are_finite(trainer: Trainer) -> bool:
    """The same answer in every process; under ZeRO-3 each has a shard to look at (`ds_tensor`)."""
    shards = (getattr(p, "ds_tensor", p) for p in trainer.model.parameters())
    finite = torch.tensor(float(all(torch.isfinite(p).all() for p in shards)), device=trainer.accelerator.device)
    return bool(trainer.accelerator.gather(finite).min())


def save(trainer: Trainer, run: RunDirectory) -> None:
    """Save model or adapter, tokenizer and generation config in the run directory, each file whole or not at all."""
    scratch = run.path / ".model"
    run.check_exists()
    if distributed.is_main_process():
        shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed here
    trainer.accelerator.wait_for_everyone()
    try:
        trainer.save_model(str(scratch))
        trainer.accelerator.wait_for_everyone()
        if distributed.is_main_process():
            # A pickle of the options; resolved_config.yaml says the same in text that is safe to open.
            (scratch / "training_args.bin").unlink(missing_ok=True)
            move_into_place(scratch)
    finally:
        if distributed.is_main_process():
            shutil.rmtree(scratch, ignore_errors=True)


CARD = """\
---
library_name: {library}
tags:
- llmcore-hf
- trl
- {module}
{base}---

# {title}

`{model}` trained with module `{module}` of LLM-Core ({trainer}) on `{source}` ({format}): {n_train} rows, seed
{seed}. `resolved_config.yaml` in this folder repeats the run.

```python
{usage}```

## What this run measured

On held-out rows, before and after training; `summary.json` has the intervals and the checks.

| metric | before | after | rows |
|---|---|---|---|
{rows}
"""


USAGE = """\
from transformers import pipeline

generator = pipeline("text-generation", model="path/to/this/folder")
print(generator([{"role": "user", "content": "..."}], max_new_tokens=64)[0]["generated_text"][-1])
"""


def write_model_card(run: RunDirectory, trainer: Trainer, job: Job, splits: Splits, usage: str = USAGE) -> None:
    """A model card from what the run knows. TRL's own card needs hub ids, which a local model does not have."""
    block = run.summary["eval"]
    rows = [
        f"| {name} | {block['before'][name]:.4f} | {block['after'][name]:.4f} | {block['n'][name]} |"
        for name in block["after"]
    ]
    on_hub = not job.name.startswith("tiny-") and not loading.is_local(job.name)
    card = CARD.format(
        library="peft" if run.summary["model"]["peft"] else "transformers",
        module=run.module.name,
        base=f"base_model: {job.name}\n" if on_hub else "",
        title=run.path.name,
        model=job.name,
        trainer=f"trainer: {type(trainer).__name__}",
        source=splits.source,
        format=splits.format,
        n_train=run.summary["data"]["n_train"],
        seed=run.config.values["seed"],
        rows="\n".join(rows),
        usage=usage,
    )
    run.write("README.md", card)


PROMPT_FILLS = "their prompt fills --max_length {} and leaves no room for an answer"


def describe_data(
    splits: Splits, trainer: Trainer, shares: dict[str, float | None], n_eval: int, too_long: str = PROMPT_FILLS
) -> dict[str, Any]:
    """The `data` block of a summary; `too_long` says why the trainer leaves out rows, with a place for the limit.

    Raises:
        UserError: the trainer leaves out rows, and the user has not said to go on without bad rows.
    """
    n_train = _count(splits.train)
    n_left_out = len(splits.test) - n_eval
    if n_train is not None and not getattr(
        trainer.args, "packing", False
    ):  # packing merges rows, so they cannot be counted
        n_left_out += n_train - len(trainer.train_dataset)
        n_train = len(trainer.train_dataset)
    if n_left_out:
        why = too_long.format(trainer.args.max_length)
        text = f"{n_left_out} rows of {splits.source} cannot be trained on: {why}"
        if splits.on_bad_rows != DROP:
            raise UserError(f"{text}. Raise it, or go on without these rows with --on_bad_rows drop")
        if distributed.is_main_process():
            print(f"{text}. Going on without them: --on_bad_rows drop.", file=sys.stderr)
        splits.report.rows_dropped += n_left_out
        splits.report.counts["too_long"] += n_left_out
    return {
        "source": splits.source,
        "format": splits.format,
        "n_train": n_train,
        "n_eval": n_eval,
        "n_dropped": splits.report.rows_dropped,
        "problems": dict(splits.report.counts),
        "on_bad_rows": splits.on_bad_rows,
        "fingerprint": splits.fingerprint,
        **shares,
    }


def _count(rows: Any) -> int | None:
    """Number of rows; None for a stream, which does not know."""
    return len(rows) if hasattr(rows, "__len__") else None


def record_stream(run: RunDirectory, splits: Splits) -> None:
    """What was found wrong with the rows of a stream is known only when they have come by."""
    if _count(splits.train) is None and splits.report.total:
        if distributed.is_main_process():
            splits.report.save(run.path / BAD_ROWS)
            print(
                f"{splits.report.describe(splits.source)}\nAll of them stand in {run.path / BAD_ROWS}.", file=sys.stderr
            )
        run.summary["data"] |= {"n_dropped": splits.report.rows_dropped, "problems": dict(splits.report.counts)}


def describe_model(trainer: Trainer, job: Job) -> dict[str, Any]:
    """The `model` block of a summary."""
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    trained = getattr(model, "policy", model)  # PPO's module holds the critic as well
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]  # ds: sharded by ZeRO-3
    tokenizer = job.tokenizer
    return {
        "name_or_path": job.name,
        "n_params": sum(size for size, _ in sizes),
        "n_trainable": sum(size for size, trained in sizes if trained),
        "peft": type(trained.active_peft_config).__name__ if hasattr(trained, "active_peft_config") else None,
        "pad_token": tokenizer.pad_token,
        "eos_token": tokenizer.eos_token,
        "pad_is_eos": tokenizer.pad_token_id == tokenizer.eos_token_id,
    }


def pair_check(module: str, splits: Splits) -> Check:
    """No pair of the data may hold the same answer twice."""
    pairs = [*itertools.islice(splits.train, N_MEASURED), *splits.test]
    n_equal = sum(row["chosen"] == row["rejected"] for row in pairs)
    return Check(
        f"{module}.chosen_differs_from_rejected",
        "invariant",
        n_equal == 0,
        {"pairs": len(pairs), "equal": n_equal},
        "0 equal pairs",
        "chosen 与 rejected 相同的样本不含偏好信息，梯度为零。",
        "A pair whose answers agree holds no preference and gives no gradient.",
    )


def token_shares(rows: list[evaluation.Encoded], max_length: int | None) -> dict[str, float | None]:
    """Share of rows cut off at `max_length`, and share of the remaining tokens that carry loss."""
    if not rows:
        return {"truncated_fraction": None, "trained_token_fraction": None}
    kept = [row.truncate(max_length) for row in rows]
    n_tokens = sum(len(row.ids) for row in kept)
    return {
        "truncated_fraction": sum(len(a.ids) < len(b.ids) for a, b in zip(kept, rows, strict=True)) / len(rows),
        "trained_token_fraction": sum(row.n_completion for row in kept) / n_tokens,
    }


def show_text(text: evaluation.Text) -> str:
    """A prompt as the summary shows it: plain text, or the turns one under the other."""
    if isinstance(text, str):
        return text
    if len(text) == 1:
        return str(text[0]["content"])
    return "\n".join(f"{message['role']}: {message.get('content')}" for message in text)


def samples(
    questions: evaluation.Questions,
    reference: str,
    before: evaluation.Answers | None,
    after: evaluation.Answers | None,
) -> list[dict[str, str]]:
    """The first few prompts with their reference and the answers before and after."""
    if before is None or after is None:
        return []
    rows = zip(questions.prompts, questions.references[reference], before.texts, after.texts, strict=True)
    return [
        {"prompt": show_text(prompt), "reference": expected, "before": first, "after": last}
        for prompt, expected, first, last in list(rows)[:N_SAMPLES]
    ]


def prompt_limit(trainer: Trainer, max_length: int | None, max_new_tokens: int) -> float:
    """The longest prompt, in tokens, that the model can be asked and still has room to answer."""
    model: Any = trainer.model
    context = getattr(model.config, "max_position_embeddings", None) or math.inf
    return min(max_length or math.inf, context - max_new_tokens)
