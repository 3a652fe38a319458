"""A task with real images: handwritten digits, 8 x 8 pixels in 17 shades, as scikit-learn ships them (1,797 scans).

Source: UCI Machine Learning Repository, "Optical Recognition of Handwritten Digits" (Alpaydin & Kaynak 1998), the test part.
The writers of the test part are others than those of the original training part; it has no column for writers, so the split
here is random, stratified by digit.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from llmcore_hf.errors import UserError

if TYPE_CHECKING:
    from datasets import DatasetDict

DATA_SEED = 20240607
QUESTION = "What digit is it?"
N_HELD_OUT = {"test": 30, "validation": 10}  # of each digit; the rest, about 140, is for training
SCALE = 4  # an 8 x 8 scan becomes 32 x 32


def toy_digits() -> DatasetDict:
    """Splits with the columns `images`, `prompt`, `completion`, as TRL's vision datasets have them.

    Raises:
        UserError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError(
            "toy-digits are the handwritten digits in scikit-learn, which is not installed: pip install 'llmcore-hf[digits]'"
        ) from None
    from datasets import Dataset, DatasetDict, Features, Image, List, Value
    from PIL import Image as Pillow

    scans = load_digits()
    turns = List({"role": Value("string"), "content": Value("string")})
    features = Features({"images": List(Image()), "prompt": turns, "completion": turns})
    size = (8 * SCALE, 8 * SCALE)
    rows: dict[str, list[dict]] = {"train": [], **{name: [] for name in N_HELD_OUT}}
    for split, index in _split(scans.target.tolist()):
        pixels = (255 - scans.images[index] * (255 / 16)).round().astype("uint8")  # dark ink on white paper
        image = Pillow.fromarray(pixels).convert("RGB").resize(size, Pillow.Resampling.BICUBIC)
        answer = str(scans.target[index])
        row = {
            "prompt": [{"role": "user", "content": QUESTION}],
            "completion": [{"role": "assistant", "content": answer}],
        }
        rows[split].append({"images": [image], **row})
    return DatasetDict({split: Dataset.from_list(items, features=features) for split, items in rows.items()})


def _split(digits: list[int]) -> list[tuple[str, int]]:
    """(split, index) of every scan, in random order."""
    order = list(range(len(digits)))
    random.Random(DATA_SEED).shuffle(order)
    taken = {split: dict.fromkeys(range(10), 0) for split in N_HELD_OUT}
    placed = []
    for index in order:
        split = next((s for s, n in N_HELD_OUT.items() if taken[s][digits[index]] < n), "train")
        if split != "train":
            taken[split][digits[index]] += 1
        placed.append((split, index))
    return placed
