"""Held-out evaluation of vision-language models: generated answers, with the right image, another one, and none.

The blind baseline: whoever answers as well from another row's image, or from a blank one, has not looked. Accuracy counts
only as far as it exceeds that.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

from llmcore_hf.alignment.evaluation import Answers, generate_from
from llmcore_hf.vlm.data import answer_of, is_caption

if TYPE_CHECKING:
    from accelerate import Accelerator
    from datasets import Dataset
    from transformers import Trainer

    from llmcore_hf.vlm.training import VisionJob

Row = dict[str, Any]
BLIND = ("shuffled", "blank")
KINDS = {"vqa_accuracy": False, "caption_accuracy": True}  # metric -> whether its rows are captions


def blind(rows: Sequence[Row], how: str) -> list[Row]:
    """The same questions with the images of other rows, in a fixed random order, or with gray ones of the same size.

    Every row keeps the number of its images. No row gets its own, unless it has more than half of all.
    """
    from PIL import Image

    assert how in BLIND
    if how == "blank":
        gray = (128, 128, 128)
        return [{**row, "images": [Image.new("RGB", image.size, gray) for image in row["images"]]} for row in rows]
    order = list(range(len(rows)))
    random.Random(0).shuffle(order)
    images = [image for i in order for image in rows[i]["images"]]
    shift = max((len(row["images"]) for row in rows), default=0)
    others = iter([*images[shift:], *images[:shift]])
    dealt = {i: [next(others) for _ in rows[i]["images"]] for i in order}
    return [{**row, "images": dealt[i]} for i, row in enumerate(rows)]


class PromptProcessor:
    """A processor whose prompts begin as the checkpoint knows them, for a collator that would leave special tokens out.

    TRL leaves them out because a chat template may bring them. Where it does not, `apply_chat_template` and published code
    let the tokenizer put its own first (Llama, OPT): so it is done here, in training and in evaluation alike.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __getattr__(self, name: str) -> Any:
        return getattr(self.processor, name)

    def __call__(self, images: Any = None, text: Any = None, **options: Any) -> Any:
        if images is not None:  # a prompt; answers come without images
            bos = self.processor.tokenizer.bos_token
            options["add_special_tokens"] = not (bos and text[0].startswith(bos))
        return self.processor(images=images, text=text, **options)


def blind_query(rows: Sequence[Row], how: str) -> list[Row]:
    """The same with the last image of each row alone exchanged: the examples before it keep theirs."""
    asked = blind([{**row, "images": row["images"][-1:]} for row in rows], how)
    pairs = zip(rows, asked, strict=True)
    return [{**row, "images": [*row["images"][:-1], *other["images"]]} for row, other in pairs]


def encode_prompts(processor: Any, rows: Sequence[Row]) -> Any:
    """Padded prompts of the rows, ready for `generate`: padding stands on the left."""
    from trl.data_utils import prepare_multimodal_messages

    prompts = [prepare_multimodal_messages(row["prompt"], images=row["images"]) for row in rows]
    texts = [processor.apply_chat_template(p, add_generation_prompt=True, tokenize=False) for p in prompts]
    images = [row["images"] for row in rows]
    inputs = PromptProcessor(processor)(images, texts, padding=True, padding_side="left", return_tensors="pt")
    return padded(inputs, "left")


def padded(batch: Any, side: Literal["left", "right"]) -> Any:
    """The batch with all its padding on one side. BLIP-2's processor puts image tokens before the padding on the left."""
    mask = batch["attention_mask"]  # (B, T)
    order = torch.argsort(mask if side == "left" else 1 - mask, dim=1, stable=True)
    for name in ("input_ids", "attention_mask", "labels"):
        if name in batch:
            batch[name] = batch[name].gather(1, order)
    return batch


def generate(
    model: Any, processor: Any, rows: Sequence[Row], max_new_tokens: int, batch_size: int, accelerator: Accelerator
) -> Answers:
    """Greedy answers to the prompts of the rows, in their order."""

    def encode(numbers: list[int]) -> Any:
        return encode_prompts(processor, [rows[i] for i in numbers])

    return generate_from(model, processor.tokenizer, len(rows), encode, max_new_tokens, batch_size, accelerator)


@dataclass
class HeldOut:
    """Held-out rows that are asked before and after training, and how.

    Attributes:
        rows: rows of the test split, decoded.
        hard: rows of a harder split, reported beside; may be empty.
    """

    rows: list[Row]
    hard: list[Row]
    max_new_tokens: int
    batch_size: int
    answers: list[str] = field(init=False)  # to `rows`, of the last measurement

    @classmethod
    def of(cls, test: Dataset, hard: Dataset | None, n: int, max_new_tokens: int, batch_size: int) -> HeldOut:
        rows, hard_rows = ([*split.select(range(min(n, len(split))))] if split else [] for split in (test, hard))
        return cls(rows, hard_rows, max_new_tokens, batch_size)

    def ask(self, rows: list[Row], trainer: Trainer, job: VisionJob) -> Answers:
        """What the model answers to the rows."""
        model = trainer.accelerator.unwrap_model(trainer.model)
        return generate(model, job.processor, rows, self.max_new_tokens, self.batch_size, trainer.accelerator)

    def measure(self, trainer: Trainer, job: VisionJob) -> dict[str, list[float]]:
        """Per metric one value for each of its rows. `.../shuffled` and `.../blank` are the blind baselines."""
        return self.measure_by(lambda rows: self.ask(rows, trainer, job))

    def measure_by(self, ask: Callable[[list[Row]], Answers]) -> dict[str, list[float]]:
        """The same of anything that answers rows."""
        answers = ask(self.rows)
        self.answers = answers.texts
        metrics = _by_kind(self.rows, answers.texts)
        for name, wanted in KINDS.items():
            rows = [row for row in self.rows if is_caption(row) is wanted]
            for how in BLIND if rows else ():
                metrics[f"{name}/{how}"] = scores(rows, ask(blind(rows, how)).texts)
        if self.hard:
            hard = _by_kind(self.hard, ask(self.hard).texts)
            metrics |= {f"hard/{name}": values for name, values in hard.items()}
        metrics["completions/terminated"] = [float(ended) for ended in answers.terminated]
        return metrics


def scores(rows: Sequence[Row], answers: Sequence[str]) -> list[float]:
    """1 for each answer that equals the reference, else 0."""
    from llmcore_hf.metrics import ExactMatch

    references = [answer_of(row).strip() for row in rows]
    return ExactMatch().compute(predictions=list(answers), references=references)["scores"]


def _by_kind(rows: Sequence[Row], answers: Sequence[str]) -> dict[str, list[float]]:
    """Accuracy of the answers to questions and, apart, of the descriptions."""
    all_scores = scores(rows, answers)
    captions = [is_caption(row) for row in rows]
    found = {name: [s for s, c in zip(all_scores, captions, strict=True) if c is kind] for name, kind in KINDS.items()}
    return {name: values for name, values in found.items() if values}


def answers_right(model: Any, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> list[bool]:
    """For each row: whether every token with a label, (B, T), is the likeliest one after those before it.

    That is so exactly when greedy decoding would give this answer, and costs one forward pass.
    """
    labels = labels[:, 1:]
    logits = model(**inputs).logits[:, :-1]  # (B, T-1, V)
    return ((logits.argmax(-1) == labels) | (labels == -100)).all(dim=1).tolist()
