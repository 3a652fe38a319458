"""Cached vision features: each training image is decoded, processed and seen by the tower once, and nothing else changes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from transformers import BatchFeature
from transformers.modeling_outputs import BaseModelOutput

from llmcore_hf.data import shapes
from llmcore_hf.errors import UserError
from llmcore_hf.vlm import tiny
from llmcore_hf.vlm.vision_cache import CachedCollator, VisionCache


class Tower(torch.nn.Module):
    """Notes how many images it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 4)
        self.sizes: list[int] = []

    def forward(self, pixel_values: torch.Tensor, scale: float = 1.0) -> BaseModelOutput:
        self.sizes.append(len(pixel_values))
        features = self.linear(pixel_values.flatten(2).transpose(1, 2)) * scale
        return BaseModelOutput(last_hidden_state=features, hidden_states=(features - 1, None, features))


class ImageProcessor:
    def __init__(self) -> None:
        self.n_images = 0

    def __call__(self, images: Any, **options: Any) -> Any:
        flat = [image for item in images for image in (item if isinstance(item, list) else [item])]
        self.n_images += len(flat)
        pixels = [torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8) for image in flat]
        return BatchFeature({"pixel_values": torch.stack(pixels).view(len(flat), 32, 32, 3).movedim(3, 1) / 255})


@pytest.fixture
def pictures() -> list[Any]:
    return [picture for picture, _ in shapes.pictures("train", 5, seed=1)]


@pytest.fixture
def rows(pictures: list[Any]) -> Dataset:
    """Seven rows of five images; two rows share theirs, one has two."""
    features = Features({"images": List(Image()), "answer": Value("string")})
    shown = [[0], [1], [2], [0], [1], [3], [4, 0]]
    return Dataset.from_list([{"images": [pictures[i] for i in ids], "answer": str(ids)} for ids in shown], features)


def cache_of(rows: Dataset, tower: torch.nn.Module) -> tuple[VisionCache, ImageProcessor]:
    processor = ImageProcessor()
    return VisionCache(tower, SimpleNamespace(image_processor=processor), rows, batch_size=2), processor


def test_every_training_image_is_computed_once(rows: Dataset, pictures: list[Any]) -> None:
    tower = Tower()
    plain = {i: tower(ImageProcessor()([p])["pixel_values"], scale=3.0) for i, p in enumerate(pictures)}
    tower.sizes.clear()
    cache, processor = cache_of(rows, tower)
    collator = CachedCollator(lambda found: [image for row in found for image in row["images"]], cache)
    for _ in range(3):
        found = collator([cache.rows[i] for i in (6, 3, 5)])
        assert [image.tobytes() for image in found] == [pictures[i].tobytes() for i in (4, 0, 0, 3)]
        pixels = cache.processor.image_processor([found[:2], found[2:]], return_tensors="pt")["pixel_values"]
        output = tower(pixels, scale=3.0)
        for name in ("last_hidden_state", "hidden_states"):
            values = output[name][2] if name == "hidden_states" else output[name]
            expected = torch.cat([plain[i].last_hidden_state for i in (4, 0, 0, 3)])
            assert torch.allclose(values, expected)
        assert isinstance(output, BaseModelOutput) and output.hidden_states[1] is None
    assert processor.n_images == 5 and tower.sizes == [2, 2, 2], "five images, in batches of one size"


def test_other_images_are_computed_as_ever(rows: Dataset) -> None:
    tower = Tower()
    cache, processor = cache_of(rows, tower)
    other = shapes.pictures("test", 1, seed=9)[0][0]
    assert CachedCollator(lambda found: found[0]["images"], cache)([{"images": [other]}]) == [other]
    known = next(iter(cache.images.values()))
    pixels = cache.processor.image_processor([known, other], return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels, processor([known, other])["pixel_values"])
    tower.sizes.clear()
    assert torch.equal(tower(pixels).last_hidden_state, Tower.forward(tower, pixels).last_hidden_state)
    assert tower.sizes == [2, 2, 2, 2, 2], "filled with five images, then the two, and the two again"


@pytest.mark.parametrize("kind", ["palette", "transparency"])
def test_images_that_differ_in_what_is_seen_alone_are_told_apart(tmp_path: Path, kind: str) -> None:
    """The same numbers of colors in every pixel; the colors themselves stand in the palette, or are seen through."""
    import numpy as np
    from PIL import Image as PillowImage

    for i, color in enumerate(((255, 0, 0), (0, 0, 255))):
        image = PillowImage.new("P", (32, 32), 0)
        image.putpalette([*(color if kind == "palette" else (255, 0, 0)), *[0] * 765])
        image.save(tmp_path / f"{i}.png", **({"transparency": 0} if kind == "transparency" and i else {}))
    features = Features({"images": List(Image())})
    rows = Dataset.from_list([{"images": [str(tmp_path / f"{i}.png")]} for i in range(2)], features)
    processor = tiny.image_processor("clip")
    cache = VisionCache(Tower(), SimpleNamespace(image_processor=processor), rows, batch_size=2)
    decoded = [row["images"][0] for row in rows]
    pixels = cache.processor.image_processor(decoded, return_tensors="pt")["pixel_values"]
    assert np.array_equal(np.asarray(decoded[0]), np.asarray(decoded[1])), "what a hash of the pixels alone would see"
    assert torch.equal(pixels, processor(decoded, return_tensors="pt")["pixel_values"]) and not torch.equal(*pixels)


def test_a_tower_that_differs_from_step_to_step_is_refused(rows: Dataset) -> None:
    with pytest.raises(UserError, match="the vision tower has dropout"):
        cache_of(rows, torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.1)))


def test_what_is_saved_stays_as_it_was(rows: Dataset) -> None:
    tower = Tower()
    before = set(tower.state_dict())
    cache, processor = cache_of(rows, tower)
    assert set(tower.state_dict()) == before
    assert cache.processor.image_processor is not processor and cache.processor.image_processor.n_images == 5


def test_images_that_differ_in_their_last_pixel_are_not_taken_for_each_other(pictures: list[Any]) -> None:
    """Most pictures begin alike: with a white corner, or a black edge."""
    other = pictures[0].copy()
    last = other.size[0] - 1, other.size[1] - 1
    other.putpixel(last, tuple(255 - value for value in other.getpixel(last)))
    features = Features({"images": List(Image())})
    tower = Tower()
    cache, _ = cache_of(Dataset.from_list([{"images": [pictures[0]]}, {"images": [other]}], features), tower)
    pixels = cache.processor.image_processor([pictures[0], other], return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels, ImageProcessor()([pictures[0], other])["pixel_values"])
    output = tower(pixels).last_hidden_state
    assert len(cache.outputs) == 2 and torch.allclose(output, Tower.forward(tower, pixels).last_hidden_state)
    assert not torch.allclose(output[0, -1], output[1, -1])
