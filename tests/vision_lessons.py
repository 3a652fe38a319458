"""A vision lesson up to the point where it would train, on a few pictures: what tests of its parts begin with."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmcore_hf import config, registry
from llmcore_hf.alignment.training import ModelArguments
from llmcore_hf.data import shapes
from llmcore_hf.data.loading import DataArguments
from llmcore_hf.vlm import tiny, training
from llmcore_hf.vlm.data import load_splits

SMALL = ("--per_device_train_batch_size", "4", "--learning_rate", "1e-2", "--use_cpu")
QUIET = ("--save_strategy", "no", "--eval_strategy", "no", "--logging_strategy", "no", "--disable_tqdm", "true")


@dataclass
class Begun:
    """A lesson whose trainer stands ready."""

    lesson: Any
    config: Any
    job: Any
    splits: Any
    trainer: Any

    @property
    def model(self) -> Any:
        return self.trainer.model

    def lesson_job(self, model: str) -> training.VisionJob:
        """Another checkpoint, as the lesson finds it."""
        model_args = dataclasses.replace(self.config.part(ModelArguments), model_name_or_path=model)
        kinds, template = self.lesson.kinds, self.lesson.default_template
        return training.prepare(self.config, model_args, self.config.parts[-1], kinds, template)

    def load(self, job: training.VisionJob) -> Any:
        return training.load_whole(job).eval()


def pictures_of_shapes(folder: Path, n: int = 8) -> str:
    """A dataset of `n` pictures on disk, each with a question and a description; its name."""
    rows = []
    for i, (image, triple) in enumerate(shapes.pictures("train", n)):
        image.save(folder / f"{i}.png")
        for question, answer in (shapes.questions(triple)[kind] for kind in ("color", "caption")):
            rows.append({"image": f"{i}.png", "prompt": question, "completion": answer})
    (folder / "shapes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "shapes.jsonl")


def begin(module: str, folder: Path, *options: str) -> Begun:
    """Everything that `run` does before it trains: the lesson's own `make_trainer`, nothing stubbed."""
    model = ("--model_name_or_path", f"tiny-{module}", "--dataset_name", pictures_of_shapes(folder))
    argv = ["--module", module, *model, "--output_dir", str(folder / "run"), *SMALL, *QUIET, *options]
    row = registry.get(module)
    resolved = config.resolve(row, config.read_request(argv))
    lesson, args = row.load().LESSON, resolved.parts[-1]
    job = training.prepare(resolved, resolved.part(ModelArguments), args, lesson.kinds, lesson.default_template)
    splits = load_splits(resolved.part(DataArguments), args.seed, lesson.images_per_row, False, None)
    return Begun(lesson, resolved, job, splits, lesson.make_trainer(resolved, job, splits, args))


def tiny_path(module: str) -> Path:
    return tiny.ensure(f"tiny-{module}")
