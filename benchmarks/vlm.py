"""The vision modules against plain loops over the same models, and two questions about them: `make bench-vlm`.

    speed      training and generation, in images per second, by this project and by the loop one writes first
    cache      training with `--cache_vision_features` and without: time, and whether losses and answers are the same
    stage 1    BLIP-2 with and without its first stage, at an equal number of steps, with several seeds

All of a table is measured in one process, in turn. The command fails when the two sides do not do the same.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tables
import torch
from seeds import run as run_toy
from torch.utils.data import DataLoader

from llmcore_hf import config, registry
from llmcore_hf.alignment.training import ModelArguments
from llmcore_hf.data.loading import DataArguments, Splits
from llmcore_hf.vlm import evaluation, training
from llmcore_hf.vlm.data import is_caption, load_splits
from llmcore_hf.vlm.training import StagedTrainer, VisionJob

TITLES = {"llava": "LLaVA", "blip2": "BLIP-2", "flamingo": "Flamingo"}
N_STEPS, BATCH, N_ASKED, N_TOKENS = 120, 64, 100, 12
TOY_STEPS = 320  # of the shortest toy: over so many the cache is filled once
# What learns in the plain loops: what learns in the last stage of the toys.
FROZEN = {"llava": ("vision_tower",), "blip2": ("vision_model",), "flamingo": ("vision_model", "language_model")}


def prepared(module: str, folder: str, n_steps: int) -> tuple[StagedTrainer, VisionJob, Splits]:
    """The trainer of a module, as `run.py` makes it, in one stage and without evaluation."""
    shared = [
        "--dataset_name",
        "toy-shapes",
        "--stage1_steps",
        "0",
        "--max_steps",
        str(n_steps),
        "--eval_strategy",
        "no",
    ]
    if module == "blip2":
        shared += ["--language_model_steps", str(n_steps)]
    row = registry.get(module)
    found = config.resolve(row, config.read_request(["--module", module, "--toy", *shared, "--output_dir", folder]))
    lesson, args = row.load().LESSON, found.parts[-1]
    job = training.prepare(found, found.part(ModelArguments), args, lesson.kinds, lesson.default_template)
    splits = load_splits(found.part(DataArguments), args.seed, lesson.images_per_row, False, None)
    return lesson.make_trainer(found, job, splits, args), job, splits


# ------------------------------------------------------------ speed


@dataclass
class Trained:
    """What a training came to; seconds of filling the cache and of the steps apart."""

    fill: float
    steps: float
    losses: list[float]
    model: Any
    job: VisionJob
    splits: Splits


def train_ours(module: str, cached: bool, n_steps: int = N_STEPS) -> Trained:
    with tempfile.TemporaryDirectory() as folder:
        trainer, job, splits = prepared(module, folder, n_steps)
        trainer.remove_callback(training_prints(trainer))
        start = time.process_time()
        if cached:
            registry.get(module).load().LESSON.cache_vision(trainer, job, splits)
        filled = time.process_time()
        trainer.train()
        seconds = time.process_time() - filled
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return Trained(filled - start, seconds, losses, trainer.accelerator.unwrap_model(trainer.model), job, splits)


def training_prints(trainer: StagedTrainer) -> Any:
    from transformers import PrinterCallback, ProgressCallback

    callbacks = trainer.callback_handler.callbacks
    return next((c for c in callbacks if isinstance(c, PrinterCallback | ProgressCallback)), callbacks[0])


def train_plainly(module: str, job: VisionJob, splits: Splits) -> float:
    """Seconds of the loop one writes first: chat template, processor, model, loss, AdamW."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(job.path).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in FROZEN[module]))
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=2e-3)
    loader = DataLoader(splits.train, BATCH, shuffle=True, collate_fn=lambda rows: plain_batch(job.processor, rows))
    start = time.process_time()
    for batch in itertools.islice(itertools.chain.from_iterable(itertools.repeat(loader)), N_STEPS):
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return time.process_time() - start


def turns_with_image(row: dict[str, Any]) -> list[dict[str, Any]]:
    first, *others = row["prompt"]
    return [{**first, "content": [{"type": "image"}, {"type": "text", "text": first["content"]}]}, *others]


def plain_batch(processor: Any, rows: list[dict[str, Any]]) -> Any:
    texts = [processor.apply_chat_template(turns_with_image(row) + row["completion"], tokenize=False) for row in rows]
    options = {"padding": True, "return_tensors": "pt", "add_special_tokens": False}
    batch = processor(images=[row["images"] for row in rows], text=texts, **options)
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch


def ask_plainly(model: Any, job: VisionJob, rows: list[dict[str, Any]]) -> list[str]:
    """Answers, one question after the other, as model cards show it."""
    answers = []
    for row in rows:
        prompt = turns_with_image(row)
        text = job.processor.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        inputs = job.processor(images=row["images"], text=text, return_tensors="pt", add_special_tokens=False)
        with torch.no_grad():
            output = model.eval().generate(**inputs, max_new_tokens=N_TOKENS, do_sample=False)
        new = output[0, inputs["input_ids"].shape[1] :]
        answers.append(job.tokenizer.decode(new, skip_special_tokens=True))
    return answers


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def speed_of(module: str, repeats: int) -> tuple[list[str], bool]:
    """Rows of the tables of speed and of the cache, and whether both sides did the same."""
    from accelerate import Accelerator

    train_ours(module, cached=True, n_steps=10)  # warm up
    rounds = []
    for _ in range(repeats):
        ours, cached = train_ours(module, cached=False), train_ours(module, cached=True)
        rounds.append((ours.steps, cached.steps, cached.fill, train_plainly(module, ours.job, ours.splits)))
    steps, cached_steps, fill, plain = (statistics.median(values) for values in zip(*rounds, strict=True))
    rows = [row for row in ours.splits.test if not is_caption(row)][:N_ASKED]
    accelerator = Accelerator(cpu=True)

    def ask(model: Any) -> list[str]:
        return evaluation.generate(model, ours.job.processor, rows, N_TOKENS, N_ASKED, accelerator).texts

    batched, answers = timed(lambda: ask(ours.model))
    single, same = timed(lambda: ask_plainly(ours.model, ours.job, rows))
    apart = max(abs(a - b) for a, b in zip(ours.losses, cached.losses, strict=True))
    equal, answers_equal = answers == same, ask(cached.model) == answers
    images, whole = N_STEPS * BATCH, TOY_STEPS / N_STEPS
    title, words = TITLES[module], {True: "yes", False: "NO"}
    return [
        f"| {title} | {images / steps:,.0f} | {images / plain:,.0f} | {plain / steps:.2f} "
        f"| {N_ASKED / batched:,.0f} | {N_ASKED / single:,.0f} | {single / batched:.1f} | {words[equal]} |",
        f"| {title} | {fill:.1f} | {images / cached_steps:,.0f} | {steps / cached_steps:.2f} "
        f"| {steps * whole / (fill + cached_steps * whole):.2f} | {plain / cached_steps:.2f} | {apart:.1e} | {words[answers_equal]} |",
    ], equal and answers_equal and apart <= 1e-5


# ------------------------------------------------------------ what the first stage buys


# Half of the toy's budget; the last 60 steps train the language model, too, unless it stays frozen.
BUDGET = ("--max_steps", "236", "--eval_strategy", "no")
ABLATION = {
    "stages 1 and 2": ("--stage1_steps", "130", "--language_model_steps", "60"),
    "stage 2 alone": ("--stage1_steps", "0", "--language_model_steps", "60"),
    "stages 1 and 2, language model frozen": ("--stage1_steps", "130", "--language_model_steps", "0"),
    "stage 2 alone, language model frozen": ("--stage1_steps", "0", "--language_model_steps", "0"),
}
SHOWN = ("vqa_accuracy", "vqa_accuracy/shuffled", "caption_accuracy", "hard/vqa_accuracy", "hard/caption_accuracy")


def ablation_row(name: str, seeds: list[int]) -> str:
    """Mean over the seeds, and their range."""
    found = [run_toy("blip2", seed, *BUDGET, *ABLATION[name])["eval"]["after"] for seed in seeds]
    cells = []
    for metric in SHOWN:
        values = [after[metric] for after in found]
        cells.append(f"{statistics.mean(values):.3f} ({min(values):.3f} - {max(values):.3f})")
    return f"| {name} | {' | '.join(cells)} |"


def measure_speed(repeats: int) -> bool:
    torch.set_num_threads(1)
    results = {module: speed_of(module, repeats) for module in TITLES}
    lines = [
        f"Measured on {tables.machine()}, one thread; {N_STEPS} steps of {BATCH} rows, median of {repeats}. Seconds are those of the",
        "processor, so that other work on the machine counts little.",
        "",
        "| images per second | training, ours | plain loop | ours / plain | answers, ours in batches | plain loop, one by one "
        "| ours / plain | same answers |",
        "|---|---|---|---|---|---|---|---|",
        *(rows[0] for rows, _ in results.values()),
        "",
        "Training with `--cache_vision_features`: pixel values and tower outputs of 1,200 images are made once.",
        "",
        f"| | seconds to fill | images per second | cached / not | the same over {TOY_STEPS} steps, with filling | cached / plain loop "
        "| losses apart, at most | same answers |",
        "|---|---|---|---|---|---|---|---|",
        *(rows[1] for rows, _ in results.values()),
    ]
    tables.replace("vlm", "\n".join(lines))
    return all(good for _, good in results.values())


def measure_stage1(seeds: list[int]) -> bool:
    lines = [
        f"{BUDGET[1]} steps each, seeds {', '.join(map(str, seeds))}: mean (range). `hard`: color-shape pairs never trained on.",
        "",
        f"| | {' | '.join(SHOWN)} |",
        "|---|" + "---|" * len(SHOWN),
        *(ablation_row(name, seeds) for name in ABLATION),
    ]
    tables.replace("vlm stage 1", "\n".join(lines))
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", default=["speed", "stage1"], choices=["speed", "stage1"])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    args = parser.parse_args()
    good = measure_speed(args.repeats) if "speed" in args.parts else True
    good &= measure_stage1(args.seeds) if "stage1" in args.parts else True
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
