"""What the vision modules share: stages of one training, evaluation beside the blind baseline, loading.

A lesson in two stages is one run of one Trainer. Which parameters learn, which rows they see and with which learning rate is a
function of the step, so schedules, checkpoints, stops and exact resume work as in every other module.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Sampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, get_scheduler

from llmcore_hf.alignment import training
from llmcore_hf.alignment.evaluation import evaluating
from llmcore_hf.config import COMMAND_LINE, Config, plain
from llmcore_hf.errors import UserError
from llmcore_hf.models import loading
from llmcore_hf.stats import paired_interval
from llmcore_hf.vlm import evaluation, tiny
from llmcore_hf.vlm.data import MARK, is_caption

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset


PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


@dataclass
class VisionArguments:
    """Options of the vision modules."""

    stage1_steps: int = field(
        default=0,
        metadata={
            "help": "Steps of the first stage, out of --max_steps; 0 leaves it out, as for a trained checkpoint."
        },
    )
    stage1_learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of the first stage."})
    cache_vision_features: bool = field(
        default=False,
        metadata={
            "help": "Keep pixel values and tower outputs of all training images in memory: the tower is frozen, so each is "
            "computed once."
        },
    )
    image: list[str] | None = field(
        default=None, metadata={"help": "Train nothing: answer --question about this image file."}
    )
    question: str | None = field(default=None, metadata={"help": "The question to answer about --image."})


@dataclass
class VisionJob(training.Job):
    """A checkpoint with its processor; `adapter` is the folder of a LoRA adapter on it, which changes what `path` holds."""

    processor: Any = None
    adapter: str | None = None


def house_defaults(explicit: dict[str, Any]) -> dict[str, Any]:
    """Those of every module, and no cutting: a row that is cut may lose a part of its image tokens."""
    return {
        **training.house_defaults(explicit),
        "max_length": None,
        "ddp_find_unused_parameters": True,  # in each stage, others take part
        "per_device_train_batch_size": 8,
    }


def only_asks(config: Config) -> bool:
    """Whether the run trains nothing and answers a question."""
    return config.values["image"] is not None or config.values["question"] is not None


def check_options(config: Config, images_per_row: int | None = None) -> list[str]:
    """Impossible combinations of options that all vision modules have; one sentence each."""
    values, asks = config.values, only_asks(config)
    problems = training.check_options(
        config, tiny.TINY_VLMS, needs_dataset=not asks, merge=None if asks else merge_into_vision_model
    )
    problems += _check_question(config, images_per_row) if asks else []
    if values["max_generation_samples"] == 0:
        problems.append(
            "--max_generation_samples must be greater than 0: the run is judged by answers to held-out questions"
        )
    if values["stage1_steps"] < 0 or 0 < values["max_steps"] <= values["stage1_steps"]:
        problems.append(
            f"--stage1_steps {values['stage1_steps']} must leave steps for the second stage: less than --max_steps "
            f"{values['max_steps']}"
        )
    if not values["stage1_learning_rate"] > 0:
        problems.append(f"--stage1_learning_rate must be greater than 0, not {values['stage1_learning_rate']}")
    for name in ("packing", "padding_free", "dataset_streaming"):
        if values[name]:
            problems.append(f"--{name} is not available with images: leave it off")
    return problems + _check_schedule(values)


def _check_question(config: Config, images_per_row: int | None) -> list[str]:
    values = config.values
    files, question = values["image"], values["question"]
    if not files or question is None:
        return ["--image and --question belong together: give both"]
    problems, n_marks = [], question.count(MARK)
    if not question.replace(MARK, "").strip():
        problems.append("--question is empty: ask something about the image")
    if images_per_row is not None and len(files) != images_per_row:
        problems.append(
            f"--image names {len(files)} images, but this model takes {images_per_row} for each question: ask about one at a "
            "time"
        )
    elif n_marks not in (0, len(files)):
        problems.append(
            f"--question has {n_marks} times `{MARK}`, but --image names {len(files)} image(s): let each image have one, where "
            "it stands in the text, or leave all of them out"
        )
    if config.sources["dataset_name"] == COMMAND_LINE and values["dataset_name"]:
        problems.append("--image asks and trains nothing, so --dataset_name would not be read: leave one of them off")
    return problems


def merge_into_vision_model(adapter: str) -> str:
    """Python that merges a LoRA adapter into its base, for a message. PEFT's own Auto classes know no class for images."""
    return (
        "from peft import PeftModel; from transformers import AutoModelForImageTextToText, AutoProcessor; "
        f"base = AutoModelForImageTextToText.from_pretrained({loading.base_of(adapter)!r}); "
        f"PeftModel.from_pretrained(base, {adapter!r}).merge_and_unload().save_pretrained('merged'); "
        f"AutoProcessor.from_pretrained({adapter!r}).save_pretrained('merged')"
    )


def _check_schedule(values: dict[str, Any]) -> list[str]:
    """Schedules that depend on more than the step cannot be repeated for each stage."""
    kind = str(plain(values["lr_scheduler_type"]))
    if kind in ("reduce_lr_on_plateau", "greedy", "warmup_stable_decay"):
        return [f"--lr_scheduler_type {kind} cannot be repeated for each stage: use cosine, linear or constant"]
    return []


def prepare(
    config: Config, model_args: Any, args: Any, kinds: tuple[str, ...], default_template: str | None = None
) -> VisionJob:
    """Quieten the libraries, seed every generator, find the checkpoint and read its processor.

    Args:
        kinds: the `model_type`s that the module trains.
        default_template: the chat template of a checkpoint that has none.

    Raises:
        UserError: there is no such checkpoint, or it is of another kind.
    """
    from transformers import AutoConfig, AutoProcessor, set_seed

    training.quieten()
    set_seed(args.seed)
    name = str(model_args.model_name_or_path)
    path = str(tiny.ensure(name)) if name in tiny.TINY_VLMS else loading.resolve_name(name)
    adapter = path if loading.is_adapter(path) else None
    path = loading.base_of(adapter) if adapter else path
    options = {"revision": model_args.model_revision, "trust_remote_code": args.trust_remote_code}
    loading.load_tokenizer(path, **options)  # fails first, with a clear message
    kind = AutoConfig.from_pretrained(path, **options).model_type
    if kind not in kinds:
        raise UserError(f"{name} is a model of type `{kind}`; module `{config.module}` takes {' or '.join(kinds)}")
    try:
        has_processor = adapter and any(Path(adapter, name).is_file() for name in PROCESSOR_FILES)
        processor = AutoProcessor.from_pretrained(adapter if has_processor else path, **options)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"{name} has no processor that can be loaded: {' '.join(str(error).split())}") from error
    processor.chat_template = processor.chat_template or processor.tokenizer.chat_template or default_template
    if not processor.chat_template:
        raise UserError(f"{name} has no chat template: take a checkpoint that was trained on conversations")
    args.model_init_kwargs = loading.init_kwargs(model_args, args.model_init_kwargs)
    return VisionJob(name, path, processor.tokenizer, loading.context_length(path, **options), processor, adapter)


def load_whole(job: VisionJob, **options: Any) -> Any:
    """The model to ask: the checkpoint, with its adapter merged into it."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(job.path, **options)
    if job.adapter is None:
        return model
    from peft import PeftModel

    merged: Any = PeftModel.from_pretrained(model, job.adapter)
    return merged.merge_and_unload()


# --- stages ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """A stretch of a training.

    Attributes:
        n_steps: its length in optimizer steps.
        learning_rate: the peak of its own schedule.
        trains: name of a parameter -> whether it learns; those that the checkpoint or PEFT froze never do.
        rows: numbers of the training rows it draws from.
        frozen: parts of the model that must stay as they are, by a module's name: what is checked, whatever `trains` says.
        lengths: for each training row how long it is, in any unit, when they differ much: batches are then of similar rows,
            and little is padded.
    """

    name: str
    n_steps: int
    learning_rate: float
    trains: Callable[[str], bool]
    rows: Sequence[int]
    frozen: Sequence[str] = ()
    lengths: Sequence[int] | None = None


def caption_rows(rows: Dataset) -> list[int]:
    """Numbers of the rows that ask for a description; all when there are none."""
    prompts = rows.select_columns(["prompt"])
    found = [i for i, row in enumerate(prompts) if is_caption(row)]
    return found or list(range(len(rows)))


N_SORTED = 8  # batches whose rows are sorted by length together


class StageSampler(Sampler[int]):
    """Row numbers of all steps: those of the first stage, then those of the second. Rows are reshuffled when all were seen."""

    def __init__(self, stages: Sequence[Stage], batch_size: int, seed: int) -> None:
        self.stages, self.batch_size, self.seed = stages, batch_size, seed

    def __len__(self) -> int:
        return sum(stage.n_steps for stage in self.stages) * self.batch_size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed)
        for stage in self.stages:
            endless = (
                stage.rows[i]
                for _ in itertools.count()
                for i in torch.randperm(len(stage.rows), generator=generator).tolist()
            )
            drawn = itertools.islice(endless, stage.n_steps * self.batch_size)
            yield from drawn if stage.lengths is None else self._by_length(drawn, stage.lengths, generator)

    def _by_length(self, drawn: Iterator[int], lengths: Sequence[int], generator: torch.Generator) -> Iterator[int]:
        """The same rows, a few batches at a time: sorted by length, cut into batches, the batches in random order."""
        size = self.batch_size
        while window := sorted(itertools.islice(drawn, N_SORTED * size), key=lengths.__getitem__):
            for i in torch.randperm(len(window) // size, generator=generator).tolist():
                yield from window[i * size : (i + 1) * size]


class StageCallback(TrainerCallback):
    """Lets the parameters of the current stage learn, and takes note of what changed while it must not.

    Attributes:
        moved: names of parameters that changed in a stage that does not train them.
        with_gradient: names of parameters that got a gradient in such a stage.
    """

    def __init__(self, trainer: StagedTrainer) -> None:
        self.trainer = trainer
        self.current: Stage | None = None
        self.before: dict[str, str] = {}
        self.moved: list[str] = []
        self.with_gradient: set[str] = set()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        stage = self.trainer.stage_at(state.global_step)
        if state.global_step in self.trainer.ends[:-1]:
            self.trainer.at_end_of(self.trainer.stages[self.trainer.ends.index(state.global_step)])
        if stage is not self.current:
            self._leave()
            self.current = stage
            for name, parameter in self.trainer.trainable.items():
                parameter.requires_grad_(stage.trains(name))
                parameter.grad = None
            self.before = digests(self._frozen())

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.with_gradient |= {name for name, p in self._frozen().items() if p.grad is not None}

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._leave()
        self.current = None
        for parameter in self.trainer.trainable.values():
            parameter.requires_grad_(True)

    def _leave(self) -> None:
        if self.current is not None:
            after = digests(self._frozen())
            self.moved += [name for name in after if after[name] != self.before[name]]

    def _frozen(self) -> dict[str, torch.nn.Parameter]:
        """What must not learn now: what the stage names, and whatever does not require a gradient."""
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        parts = set(self.current.frozen) if self.current else set()
        return {n: p for n, p in model.named_parameters() if not p.requires_grad or parts & set(n.split("."))}


def digests(parameters: dict[str, torch.nn.Parameter]) -> dict[str, str]:
    """A hash of each parameter's bytes."""
    return {
        name: hashlib.sha256(p.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, p in parameters.items()
    }


class StagedTrainer(Trainer):
    """A Trainer whose run has stages, and that evaluates beside the blind baseline. Mixed into TRL's where that fits.

    Attributes:
        stages: in their order; `args.max_steps` is the sum of their lengths.
        ends: for each stage, the number of steps after which it is over.
        at_end_of: called with each stage but the last when it is over.
        trainable: parameters that learn in any of them.
    """

    stages: Sequence[Stage]
    ends: list[int]
    at_end_of: Callable[[Stage], None]
    trainable: dict[str, torch.nn.Parameter]
    lr_scheduler: Any

    def begin(self, stages: Sequence[Stage]) -> None:
        """Take up the stages; to be called once, before training."""
        self.stages = [stage for stage in stages if stage.n_steps]
        self.ends = list(itertools.accumulate(stage.n_steps for stage in self.stages))
        self.at_end_of = lambda stage: None
        set_processor(self.data_collator, self.processing_class)
        for name, parameter in self.model.named_parameters():
            if not any(stage.trains(name) for stage in self.stages):
                parameter.requires_grad_(False)
        self.trainable = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.stage_callback = StageCallback(self)
        self.add_callback(self.stage_callback)

    def stage_at(self, step: int) -> Stage:
        """The stage of the optimizer step that comes after `step` steps."""
        return next((s for s, end in zip(self.stages, self.ends, strict=True) if step < end), self.stages[-1])

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The Trainer loads by the names in the file and ignores what does not fit. LLaVA is saved under its published names,
        which are others than its modules': nothing would fit, and nobody be told. `from_pretrained` knows both."""
        model = self.accelerator.unwrap_model(model or self.model)
        if not isinstance(model, PreTrainedModel) or self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        loaded = type(model).from_pretrained(resume_from_checkpoint, dtype=model.dtype)
        model.load_state_dict(loaded.state_dict())

    def _load_best_model(self) -> None:
        if isinstance(self.accelerator.unwrap_model(self.model), PreTrainedModel):
            self._load_from_checkpoint(self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    def _get_train_sampler(self, train_dataset: Any = None) -> StageSampler:
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return StageSampler(self.stages, batch, self.args.seed)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Every stage gets a whole schedule of its own, warm-up included."""
        if self.lr_scheduler is None:
            optimizer = optimizer or self.optimizer
            factors = [self._factor(stage) for stage in self.stages]
            starts = [0, *self.ends]

            def factor(step: int) -> float:
                number = next(i for i, stage in enumerate(self.stages) if stage is self.stage_at(step))
                return factors[number](step - starts[number])

            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _factor(self, stage: Stage) -> Callable[[int], float]:
        """Step of a stage -> its learning rate over `args.learning_rate`."""
        stand_in = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        warmup = self.args.get_warmup_steps(stage.n_steps)
        options = self.args.lr_scheduler_kwargs or {}
        schedule = get_scheduler(self.args.lr_scheduler_type, stand_in, warmup, stage.n_steps, options)
        share = stage.learning_rate / self.args.learning_rate
        return lambda step: share * schedule.lr_lambdas[0](step)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """What the trainer measures, and the share of answers that greedy decoding would get right: `eval_vqa_accuracy`, and
        `eval_vqa_accuracy_blind` with the images of other rows."""
        metrics = super().evaluate(*args, **kwargs)
        rows = [row for row in self.eval_dataset if not is_caption(row)] if self.eval_dataset is not None else []
        if rows:
            more = {
                "eval_vqa_accuracy": self._share_right(rows),
                "eval_vqa_accuracy_blind": self._share_right(evaluation.blind(rows, "shuffled")),
            }
            self.log(more)
            metrics |= more
        return metrics

    def _share_right(self, rows: list[dict[str, Any]]) -> float:
        size, right = self.args.per_device_eval_batch_size, []
        with evaluating(self.model), self.accelerator.autocast():
            for start in range(0, len(rows), size):
                batch = self._prepare_inputs(self.data_collator([dict(row) for row in rows[start : start + size]]))
                right += evaluation.answers_right(self.model, self.generation_inputs(batch), batch["labels"])
        return sum(right) / len(right)

    def generation_inputs(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What of a batch the model takes to predict the answers."""
        return {name: value for name, value in batch.items() if name != "labels"}


def set_processor(collator: Any, processor: Any) -> None:
    """Let TRL's collator, or the one within a module's own, make its prompts with the processor."""
    getattr(collator, "collator", collator).processor = evaluation.PromptProcessor(processor)


def stage_checks(prefix: str, trainer: StagedTrainer) -> list[Any]:
    """What was frozen got no gradient and did not change, in any stage."""
    from llmcore_hf.checks import Check

    callback = trainer.stage_callback
    return [
        Check(
            f"{prefix}.frozen_parts_did_not_change",
            "invariant",
            not callback.moved and not callback.with_gradient,
            {"changed": len(callback.moved), "with_gradient": len(callback.with_gradient)},
            "0 frozen parameters changed or got a gradient, in any stage",
            "冻结的部分（视觉塔；第一阶段还有语言模型）不能有梯度，也不能变：否则比较的就不是连接器。",
            "What is frozen (the vision tower; in the first stage the language model) must get no gradient and not change: "
            "otherwise it is not the connector that is compared.",
        )
    ]


def token_shares(trainer: Trainer, rows: Dataset, n: int = 64) -> dict[str, float | None]:
    """Share of rows cut off, known to be none without `--max_length`, and share of tokens that carry loss."""
    batch = trainer.data_collator([rows[i] for i in range(min(n, len(rows)))])
    trained, tokens = (batch["labels"] != -100).sum().item(), batch["attention_mask"].sum().item()
    return {
        "truncated_fraction": None if trainer.args.max_length else 0.0,
        "trained_token_fraction": trained / tokens,
    }


def learning_checks(prefix: str, block: dict[str, Any], blind: dict[str, tuple[float, float]]) -> list[Any]:
    """Has anything been learned that shows on held-out rows, and does it come from the image?

    Args:
        blind: blind baseline -> 95 % interval of what the accuracy exceeds it by.
    """
    from llmcore_hf.checks import Check

    after, name = block["after"], headline(block["after"])
    low, high = block["ci95"][name]
    return [
        Check(
            f"{prefix}.held_out_accuracy_rose",
            "learning",
            low > 0,
            {"change": block["delta"][name], "from": low, "to": high},
            "95 % interval of the change in accuracy lies above 0",
            "留出集上的问答准确率没有显著上升：没有学到能推广到新组合的东西。",
            "Accuracy on held-out questions did not clearly rise: nothing was learned that carries over to new images.",
        ),
        *(
            Check(
                f"{prefix}.sees_more_than_{how}",
                "learning",
                interval[0] > 0,
                {"accuracy": after[name], how: after[f"{name}/{how}"], "from": interval[0], "to": interval[1]},
                "95 % interval of what the accuracy exceeds the blind baseline by lies above 0",
                "换成别的图或空白图也答得一样好，说明模型只靠语言先验在猜，没有看图。",
                "Who answers as well from another image or a blank one guesses from the question and does not look.",
            )
            for how, interval in blind.items()
        ),
    ]


def above_blind(measured: dict[str, list[float]]) -> dict[str, tuple[float, float]]:
    """Blind baseline -> 95 % interval of what the accuracy exceeds it by, on the same rows."""
    name = headline(measured)
    return {how: paired_interval(measured[f"{name}/{how}"], measured[name]) for how in evaluation.BLIND}


def headline(measured: dict[str, Any]) -> str:
    """What the run is judged by: answers to questions, or descriptions where nothing else is asked for."""
    return next(name for name in evaluation.KINDS if name in measured)


def stage_lengths(args: Any, stage1_steps: int, n_rows: int) -> tuple[int, int]:
    """Steps of the two stages; without `--max_steps`, the second counts `--num_train_epochs`. Sets `args.max_steps`."""
    if args.max_steps <= 0:
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        args.max_steps = stage1_steps + math.ceil(args.num_train_epochs * math.ceil(n_rows / batch))
    return stage1_steps, args.max_steps - stage1_steps


def peft_config(model_args: Any, targets: str, connector: list[str]) -> Any:
    """TRL's LoRA configuration; where the options do not say, LoRA on the language model and the connector trained whole."""
    from trl import get_peft_config

    config = get_peft_config(model_args)
    if config is not None:
        config.target_modules = model_args.lora_target_modules or targets
        config.modules_to_save = model_args.lora_modules_to_save or connector
    return config


@contextmanager
def eager_attention(model: Any) -> Iterator[None]:
    """The attention that keeps its weights, for as long as they are wanted."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = base.config._attn_implementation
    base.set_attn_implementation("eager")
    try:
        yield
    finally:
        base.set_attn_implementation(before)


def as_grids(maps: dict[str, torch.Tensor]) -> tuple[list[str], np.ndarray]:
    """Names, and weights over the patches, each (B, patches) in rows of an image, as (B, maps, side, side)."""
    stacked = torch.stack(list(maps.values()), dim=1).float().cpu()  # (B, K, patches)
    side = math.isqrt(stacked.shape[-1])
    return list(maps), stacked.unflatten(-1, (side, side)).numpy()
