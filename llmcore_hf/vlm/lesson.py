"""The course of a vision lesson, the same for each architecture; what differs is in the module's `VisionLesson`."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcore_hf import distributed
from llmcore_hf.alignment import evaluation as text_evaluation
from llmcore_hf.alignment import training as text_training
from llmcore_hf.alignment.training import ModelArguments
from llmcore_hf.checks import Check
from llmcore_hf.config import Config
from llmcore_hf.curves import Panel
from llmcore_hf.data.loading import DataArguments, Splits
from llmcore_hf.data.reading import toy_dataset
from llmcore_hf.errors import UserError
from llmcore_hf.run_dir import RunDirectory
from llmcore_hf.vlm import evaluation, images, pictures, training
from llmcore_hf.vlm.data import answer_of, is_caption, load_splits, question_of, with_parts
from llmcore_hf.vlm.evaluation import HeldOut
from llmcore_hf.vlm.training import Stage, StagedTrainer, VisionArguments, VisionJob
from llmcore_hf.vlm.vision_cache import CachedCollator, VisionCache

if TYPE_CHECKING:
    import numpy as np
    from trl import SFTConfig

N_GRID, N_MAPS = 24, 4  # images shown
USAGE = """\
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("path/to/this/folder")
processor = AutoProcessor.from_pretrained("path/to/this/folder")
turn = {"role": "user", "content": [{"type": "image", "path": "image.png"}, {"type": "text", "text": "..."}]}
inputs = processor.apply_chat_template(
    [turn], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
print(processor.decode(model.generate(**inputs, max_new_tokens=32)[0], skip_special_tokens=True))
"""


class VisionLesson:
    """One architecture.

    Attributes:
        name: the module's name.
        title: how pictures call it.
        kinds: the `model_type`s of its checkpoints.
        tower: the name of the vision tower among the model's modules.
        images_per_row: how many images a question has; None for any number.
        default_template: the chat template of a checkpoint that has none.
        panels: what its curves show besides losses and accuracies.
        usage: how the model card loads what the run saved.
    """

    name: str
    title: str
    kinds: tuple[str, ...]
    tower: str
    images_per_row: int | None = None
    default_template: str | None = None
    panels: tuple[Panel, ...] = ()
    usage: str = USAGE

    def make_trainer(self, config: Config, job: VisionJob, splits: Splits, args: SFTConfig) -> StagedTrainer:
        """The trainer, with its stages begun."""
        raise NotImplementedError

    def cache_vision(self, trainer: StagedTrainer, job: VisionJob, splits: Splits) -> None:
        """Let the tower see each training image once."""
        model: Any = trainer.accelerator.unwrap_model(trainer.model)
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        cache = VisionCache(
            model.get_submodule(self.tower), job.processor, splits.train, trainer.args.per_device_train_batch_size
        )
        collator = trainer.data_collator
        training.set_processor(collator, cache.processor)
        trainer.train_dataset, trainer.data_collator = cache.rows, CachedCollator(collator, cache)

    def look(self, model: Any, job: VisionJob, rows: list[dict[str, Any]]) -> tuple[list[str], np.ndarray]:
        """Names of K attention maps, and the maps of the rows, (N, K, side, side)."""
        raise NotImplementedError

    def milestone(
        self, stage: str, trainer: StagedTrainer, job: VisionJob, held_out: HeldOut
    ) -> dict[str, list[float]]:
        """Metrics that belong to the end of a stage that is not the last, one value per row."""
        return {}

    def leave(self, stage: str, trainer: StagedTrainer, run_dir: RunDirectory) -> None:
        """What a stage that is not the last leaves behind."""

    def start_checks(self, trainer: StagedTrainer, job: VisionJob, splits: Splits) -> list[Check]:
        """What must hold before the first step."""
        return []

    def measure(
        self, trainer: StagedTrainer, job: VisionJob, splits: Splits, held_out: HeldOut
    ) -> dict[str, list[float]]:
        """Held-out metrics of its own, one value per row."""
        return {}

    def end_checks(self, block: dict[str, Any], after: dict[str, list[float]]) -> list[Check]:
        """What should have been learned, from the `eval` block and the values per row after training."""
        return []

    def own_panels(self, block: dict[str, Any]) -> list[Callable[[Any], None]]:
        """What its curves show that no log history holds, each drawn on axes of its own, from the `eval` block."""
        return []

    def shown_history(self, history: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The log history as its curves show it: without what must not stand on one axis with the rest."""
        return history

    def run(self, config: Config, run_dir: RunDirectory) -> None:
        """Load, evaluate, train, evaluate again on the same held-out rows, check, and write the evidence."""
        args: SFTConfig = config.parts[-1]
        options = config.part(VisionArguments)
        job = training.prepare(config, config.part(ModelArguments), args, self.kinds, self.default_template)
        if options.image is not None:
            answer_question(config, job, args, run_dir)
            return
        data_args, generation = config.part(DataArguments), config.part(text_evaluation.GenerationArguments)
        bad_rows_file = run_dir.path / text_training.BAD_ROWS
        splits = load_splits(data_args, args.seed, self.images_per_row, args.load_best_model_at_end, bad_rows_file)
        with text_training.explaining(job, splits):
            trainer = self.make_trainer(config, job, splits, args)
        if options.cache_vision_features:
            self.cache_vision(trainer, job, splits)
        text_training.attach(trainer, run_dir)
        held_out = HeldOut.of(
            splits.test,
            hard_rows(data_args),
            generation.max_generation_samples,
            generation.max_new_tokens,
            args.per_device_eval_batch_size,
        )
        shares = training.token_shares(trainer, splits.train)
        run_dir.summary["data"] = text_training.describe_data(splits, trainer, shares, len(splits.test))
        run_dir.summary["model"] = text_training.describe_model(trainer, job)

        run_dir.checks += self.start_checks(trainer, job, splits)
        before, answers_before = self._measure(held_out, trainer, job, splits)
        for stage in trainer.stages[:-1]:
            before |= self.milestone(stage.name, trainer, job, held_out)
        trainer.at_end_of = lambda stage: self._end_stage(stage, trainer, job, held_out, run_dir)
        text_training.train(trainer, run_dir)
        after, answers_after = self._measure(held_out, trainer, job, splits)

        milestones = {name: values for name, values in before.items() if name not in after}
        run_dir.summary["eval"] = block = text_evaluation.compare(
            {**before, **{name: mean_of(values) for name, values in milestones.items()}},
            {**after, **{name: (last_logged(run_dir, name), len(values)) for name, values in milestones.items()}},
        )
        run_dir.checks += training.stage_checks(self.name, trainer)
        run_dir.checks += training.learning_checks(self.name, block, training.above_blind(after))
        run_dir.checks += self.end_checks(block, after)
        run_dir.summary["samples"] = samples(held_out.rows, answers_before, answers_after)
        text_training.write_model_card(run_dir, trainer, job, splits, self.usage)
        self._draw(trainer, job, splits, held_out.rows, answers_after, run_dir)

    def _measure(
        self, held_out: HeldOut, trainer: StagedTrainer, job: VisionJob, splits: Splits
    ) -> tuple[dict[str, Any], list[str]]:
        """Metrics of the held-out rows, and the answers to them."""
        return held_out.measure(trainer, job) | self.measure(trainer, job, splits, held_out), held_out.answers

    def _end_stage(
        self, stage: Stage, trainer: StagedTrainer, job: VisionJob, held_out: HeldOut, run_dir: RunDirectory
    ) -> None:
        """Log what belongs to the end of a stage: the history keeps it, also for a run that is resumed later."""
        measured = self.milestone(stage.name, trainer, job, held_out)
        if measured:
            run_dir.log(
                {"step": trainer.state.global_step} | {name: mean_of(values)[0] for name, values in measured.items()}
            )
        self.leave(stage.name, trainer, run_dir)

    def _draw(
        self,
        trainer: StagedTrainer,
        job: VisionJob,
        splits: Splits,
        rows: list[dict[str, Any]],
        answers: list[str],
        run_dir: RunDirectory,
    ) -> None:
        where = f"{Path(job.name).name} on {Path(splits.source).name}"
        block = run_dir.summary["eval"]
        run_dir.write(
            "training_curves.png",
            pictures.curves(
                f"{self.title}: {where}",
                self.shown_history(run_dir.history),
                block,
                self.panels,
                self.own_panels(block),
            ),
        )
        shown = spread(len(rows), N_GRID)
        title = f"{self.title}: held-out images, after training"
        run_dir.write("held_out.png", pictures.grid(title, [rows[i] for i in shown], [answers[i] for i in shown]))
        asked = [i for i, row in enumerate(rows) if not is_caption(row)] or list(range(len(rows)))
        numbers = [asked[i] for i in spread(len(asked), N_MAPS)]
        chosen = [rows[i] for i in numbers]
        model = trainer.accelerator.unwrap_model(trainer.model)
        with text_evaluation.evaluating(model):
            names, maps = self.look(model, job, chosen)
        seen = [pictures.seen_by(job.processor.image_processor, row["images"][-1]) for row in chosen]
        said = [answers[i] for i in numbers]
        title = f"{self.title}: where it looks"
        run_dir.write("attention.png", pictures.attention(title, chosen, seen, maps, names, said))


def mean_of(values: list[float]) -> tuple[float, int]:
    return sum(values) / len(values), len(values)


def last_logged(run_dir: RunDirectory, name: str) -> float:
    return next(row[name] for row in reversed(run_dir.history) if name in row)


def spread(n: int, wanted: int) -> list[int]:
    """At most `wanted` numbers below n, far apart; the step shares no divisor with 12, so that all kinds of questions come up."""
    step = next(s for s in range(max(1, n // wanted), 0, -1) if math.gcd(s, 12) == 1)
    return list(range(0, n, step))[:wanted]


def hard_rows(data_args: DataArguments) -> Any:
    """Rows of the harder split; None for data without one."""
    return toy_dataset("toy-shapes")["hard"] if str(data_args.dataset_name).startswith("toy-shapes") else None


def samples(rows: list[dict[str, Any]], before: list[str], after: list[str]) -> list[dict[str, str]]:
    """The first few questions with their reference and the answers before and after."""
    chosen = zip(rows, before, after, strict=True)
    return [
        {"prompt": question_of(row), "reference": answer_of(row), "before": first, "after": last}
        for row, first, last in list(chosen)[: text_training.N_SAMPLES]
    ]


def answer_question(config: Config, job: VisionJob, args: Any, run_dir: RunDirectory) -> None:
    """Answer one question about images, with the checkpoint as it is.

    Raises:
        UserError: an image cannot be read, or the model cannot be loaded.
    """
    from accelerate import Accelerator
    from safetensors import SafetensorError

    options = config.part(VisionArguments)
    pictures_given = []
    for file in options.image or []:
        try:
            pictures_given.append(images.read(file))
        except images.BadImage as error:
            raise UserError(f"--image: {error}") from None
    accelerator = Accelerator(cpu=args.use_cpu)
    try:
        model = training.load_whole(job, **(args.model_init_kwargs or {}))
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"the model {job.name} cannot be loaded: {reason}. Is it whole? Else fetch it again") from error
    row = {"images": pictures_given, "prompt": [with_parts({"role": "user", "content": options.question})]}
    n_tokens = config.part(text_evaluation.GenerationArguments).max_new_tokens
    answers = evaluation.generate(model.to(accelerator.device), job.processor, [row], n_tokens, 1, accelerator)
    if distributed.is_main_process():
        print(f"{options.question}\n{answers.texts[0]}")
    run_dir.summary["samples"] = [
        {"prompt": options.question, "reference": None, "before": None, "after": answers.texts[0]}
    ]
