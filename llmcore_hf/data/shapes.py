"""The toy task: one colored shape in one quarter of a small picture, to be described and asked about.

An object is a triple (color, shape, position): 6 x 4 x 4 = 96 of them. The split is made by triple, so that an answer is
never remembered with its picture:

    train        the triples everything is trained on, the vision towers and language models of the toys included
    validation   triples never trained on; every pair of their attributes is
    test         the same, looked at before and after training only
    hard         color-shape pairs of which no triple was ever trained on, in any position

Images are 32 x 32. Size, place within the quarter and background vary, so that no two images of a triple are equal.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from itertools import combinations, product
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from PIL.Image import Image

COLORS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 230),
    "yellow": (235, 215, 40),
    "purple": (150, 60, 180),
    "orange": (245, 140, 30),
}
SHAPES = ("circle", "square", "triangle", "cross")
POSITIONS = ("top left", "top right", "bottom left", "bottom right")
QUESTIONS = {"color": "What color is it?", "shape": "What shape is it?", "position": "Where is it?"}
DESCRIBE = "Describe the image."
WHAT = "What is it?"  # which attribute is meant, only examples tell
SHOTS = (0, 1, 2, 4)
N_FEW_SHOT = 2400
IMAGE_SIZE = 32

# The data are part of the lesson, so they do not change with the seed of a run.
DATA_SEED = 20240607
N_HARD_PAIRS, N_TEST, N_VALIDATION = 4, 14, 6
SPLIT_IMAGES = {"train": 1200, "validation": 50, "test": 100, "hard": 50}

Triple = tuple[str, str, str]  # color, shape, position


def split_triples() -> dict[str, list[Triple]]:
    """Every triple, assigned to one split; every pair of attributes outside `hard` occurs in `train`."""
    rng = random.Random(DATA_SEED)
    pairs = list(product(COLORS, SHAPES))
    # One pair of each shape, with different colors: no attribute loses more of its training triples than it must.
    hard_pairs = set(zip(rng.sample(list(COLORS), N_HARD_PAIRS), SHAPES, strict=True))
    hard = [(*pair, position) for pair in pairs if pair in hard_pairs for position in POSITIONS]
    rest = [(*pair, position) for pair in pairs if pair not in hard_pairs for position in POSITIONS]
    while True:
        rng.shuffle(rest)
        train = rest[N_TEST + N_VALIDATION :]
        if _pairs(train) == _pairs(rest):
            return {
                "train": train,
                "validation": rest[N_TEST : N_TEST + N_VALIDATION],
                "test": rest[:N_TEST],
                "hard": hard,
            }


def _pairs(triples: Iterable[Triple]) -> set[tuple[str, str]]:
    return {pair for triple in triples for pair in combinations(triple, 2)}


def caption(triple: Triple) -> str:
    """`("red", "circle", "top left")` -> `a red circle at the top left`."""
    color, shape, position = triple
    return f"{'an' if color == 'orange' else 'a'} {color} {shape} at the {position}"


def questions(triple: Triple) -> dict[str, tuple[str, str]]:
    """Kind of question -> (question, answer): `caption`, `color`, `shape`, `position`."""
    answers = dict(zip(QUESTIONS, triple, strict=True))
    return {"caption": (DESCRIBE, caption(triple)), **{kind: (QUESTIONS[kind], answers[kind]) for kind in QUESTIONS}}


def render(triples: Sequence[Triple], rng: random.Random) -> Image:
    """A picture of the objects, at most one in each quarter. Drawn four times as large and scaled down: smooth edges."""
    from PIL import Image, ImageDraw

    zoom = 4
    background = tuple(rng.randint(225, 255) for _ in range(3))
    image = Image.new("RGB", (IMAGE_SIZE * zoom, IMAGE_SIZE * zoom), background)
    draw = ImageDraw.Draw(image)
    for color, shape, position in triples:
        column, row = POSITIONS.index(position) % 2, POSITIONS.index(position) // 2
        radius = rng.uniform(4.0, 5.5)
        x, y = (16 * quarter + 8 + rng.uniform(-1.5, 1.5) for quarter in (column, row))
        _draw(draw, shape, COLORS[color], zoom * x, zoom * y, zoom * radius)
    return image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)


def _draw(draw: Any, shape: str, color: tuple[int, int, int], x: float, y: float, radius: float) -> None:
    box = (x - radius, y - radius, x + radius, y + radius)
    third = radius / 3
    if shape == "circle":
        draw.ellipse(box, fill=color)
    elif shape == "square":
        draw.rectangle(box, fill=color)
    elif shape == "triangle":
        draw.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=color)
    else:
        draw.rectangle((x - third, y - radius, x + third, y + radius), fill=color)
        draw.rectangle((x - radius, y - third, x + radius, y + third), fill=color)


def pictures(split: str, n: int, seed: int = DATA_SEED) -> list[tuple[Image, Triple]]:
    """`n` pictures of one object each; the triples of the split take turns."""
    rng = random.Random(f"{seed}-{split}")
    triples = split_triples()[split]
    return [(render([triple], rng), triple) for triple in (triples[i % len(triples)] for i in range(n))]


def _rows(split: str) -> Dataset:
    """One row per picture and question: `images`, `prompt`, `completion`."""
    from datasets import Dataset, Features, Image, List, Value

    turns = List({"role": Value("string"), "content": Value("string")})
    features = Features({"images": List(Image()), "prompt": turns, "completion": turns})
    rows = [
        {
            "images": [image],
            "prompt": [{"role": "user", "content": question}],
            "completion": [{"role": "assistant", "content": answer}],
        }
        for image, triple in pictures(split, SPLIT_IMAGES[split])
        for question, answer in questions(triple).values()
    ]
    return Dataset.from_list(rows, features=features)


def answer(triple: Triple, kind: str) -> str:
    """The attribute `kind` of a triple."""
    return triple[list(QUESTIONS).index(kind)]


def few_shot(rng: random.Random, split: str, n_shots: int) -> tuple[Any, ...]:
    """(kind, triple, ..., triple): the attribute that is asked for, `n_shots` examples and, last, what is asked about.

    No two of them agree in an attribute more than they must, so that copying the answer of an example is seldom right.
    """
    triples = split_triples()[split]
    kind, shown = rng.choice(list(QUESTIONS)), [rng.choice(triples)]
    while len(shown) <= n_shots:
        triple = rng.choice(triples)
        if answer(triple, kind) != answer(shown[-1], kind) and triple not in shown:
            shown.append(triple)
    return kind, *shown


def few_shot_rows(split: str, n: int, shots: Sequence[int]) -> list[dict[str, Any]]:
    """Rows whose question, `What is it?`, says what is meant only through the examples before it, each with its image."""
    rng = random.Random(f"{DATA_SEED}-{split}-few-shot")
    rows = []
    for i in range(n):
        kind, *shown = few_shot(rng, split, shots[i % len(shots)])
        turns = []
        for triple in shown:
            turns.append({"role": "user", "content": [{"type": "image"}, {"type": "text", "text": WHAT}]})
            turns.append({"role": "assistant", "content": [{"type": "text", "text": answer(triple, kind)}]})
        images = [render([triple], rng) for triple in shown]
        rows.append({"images": images, "prompt": turns[:-1], "completion": turns[-1:]})
    return rows


def toy_shapes_few_shot() -> DatasetDict:
    """`toy-shapes`, and as many training rows with 0, 1, 2 or 4 examples."""
    from datasets import Dataset, DatasetDict, Features, Image, Json, List, concatenate_datasets

    features = Features({"images": List(Image()), "prompt": List(Json()), "completion": List(Json())})
    plain = toy_shapes()
    examples = Dataset.from_list(few_shot_rows("train", N_FEW_SHOT, SHOTS), features=features)
    splits = {split: plain[split].cast(features) for split in ("train", "validation", "test")}
    return DatasetDict(splits | {"train": concatenate_datasets([splits["train"], examples])})


def toy_shapes() -> DatasetDict:
    """The splits as TRL's vision datasets: columns `images`, `prompt`, `completion`."""
    from datasets import DatasetDict

    return DatasetDict({split: _rows(split) for split in SPLIT_IMAGES})
