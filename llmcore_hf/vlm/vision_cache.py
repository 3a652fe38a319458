"""What a frozen vision tower says about a training image never changes: it is computed once, and not in every step.

Three things are kept for each image of the training rows: the decoded image, its pixel values, as the image processor makes
them, and the output of the tower. Whatever is not among them, such as held-out images, is computed as ever. Everything is
computed in the order of the dataset and in batches of one size, so a resumed run gets the same bits.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from datasets import Image, List
from torch import nn

from llmcore_hf.errors import UserError
from llmcore_hf.vlm import images

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image as Picture


class VisionCache:
    """Images, pixel values and tower outputs of `rows`.

    Args:
        tower: a frozen part of the model, called with `pixel_values`; its outputs are kept on the device they are made on.
        processor: whose image processor reads the images.
        batch_size: images that go through the tower at a time.

    Attributes:
        rows: the same rows with their images still encoded; `CachedCollator` puts the decoded ones in.
        processor: one for the collator that knows the pixel values; save the other.

    Raises:
        UserError: the tower has dropout, so it does not say the same every time.
    """

    def __init__(self, tower: nn.Module, processor: Any, rows: Dataset, batch_size: int) -> None:
        if any(isinstance(module, nn.Dropout) and module.p > 0 for module in tower.modules()):
            raise UserError(
                "--cache_vision_features: the vision tower has dropout, its features differ from step to step"
            )
        self.batch_size = batch_size
        self.compute: Callable[..., Any] = tower.forward
        self.process = processor.image_processor
        self.rows = rows.cast_column("images", List(Image(decode=False)))
        self.images = dict(self._decoded())
        self.pixels = {key_of(image): self._pixels_of(image) for image in self.images.values()}
        self.outputs: dict[bytes, dict[str, Any]] = {}
        self.processor = copy.copy(processor)
        self.processor.image_processor = CachedImageProcessor(self)
        tower.forward = self.forward  # the weights, and what is saved, stay as they are

    def _decoded(self) -> Iterator[tuple[Any, Picture]]:
        """Each image once, decoded as the rows themselves do; rows often share one."""
        seen = set()
        for row in self.rows.select_columns(["images"]):
            for encoded in row["images"]:
                if (name := name_of(encoded)) not in seen:
                    seen.add(name)
                    image = Image().decode_example(encoded)
                    image.load()
                    yield name, image

    def _pixels_of(self, image: Picture) -> torch.Tensor:
        return self.process([image], return_tensors="pt")["pixel_values"][0]  # (3, H, W)

    def forward(self, pixel_values: torch.Tensor, **options: Any) -> Any:
        """What the tower says about images, (N, 3, H, W)."""
        if not self.outputs:
            self._fill(pixel_values, options)
        found = [self.outputs.get(digest(pixels)) for pixels in pixel_values.cpu()]
        known = [output for output in found if output is not None]
        if len(known) < len(found):
            return self.compute(pixel_values, **options)
        return self.kind(**{name: _together([output[name] for output in known]) for name in known[0]})

    @torch.no_grad()
    def _fill(self, like: torch.Tensor, options: dict[str, Any]) -> None:
        """All outputs, when the first one is wanted: only then it is known with which options the model calls its tower."""
        everything = list(self.pixels.values())
        for start in range(0, len(everything), self.batch_size):
            batch = everything[start : start + self.batch_size]
            whole = [*batch, *everything[: self.batch_size - len(batch)]]  # one size: the same sums in the same order
            output = self.compute(torch.stack(whole).to(like), **options)
            self.kind = type(output)
            for i, pixels in enumerate(batch):
                self.outputs[digest(pixels.to(like.dtype))] = {name: _one(value, i) for name, value in output.items()}


class CachedImageProcessor:
    """An image processor that looks known images up; otherwise it is the one that the cache was made with."""

    def __init__(self, cache: VisionCache) -> None:
        self.cache = cache

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache.process, name)

    def __call__(self, images: Any, **options: Any) -> Any:
        from transformers import BatchFeature

        known = [self.cache.pixels.get(key_of(image)) for image in flattened(images)]
        if any(pixels is None for pixels in known):
            return self.cache.process(images, **options)
        return BatchFeature({"pixel_values": torch.stack([pixels for pixels in known if pixels is not None])})


@dataclass
class CachedCollator:
    """A collator that gets images as the cache knows them."""

    collator: Any
    cache: VisionCache

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        return self.collator([{**row, "images": [self._decoded(image) for image in row["images"]]} for row in rows])

    def _decoded(self, image: Any) -> Any:
        return self.cache.images[name_of(image)] if isinstance(image, dict) else image


def flattened(found: Any) -> Iterator[Picture]:
    """The images of a list, or of a list of lists."""
    for item in found:
        yield from item if isinstance(item, list | tuple) else [item]


def name_of(encoded: dict[str, Any]) -> Any:
    """What tells an encoded image from others: its bytes, or where it lies."""
    return encoded["bytes"] or encoded["path"]


def key_of(image: Picture) -> bytes:
    """A hash of what an image processor sees: colors, and not their numbers in a palette."""
    seen = images.read(image)
    content = hashlib.blake2b(seen.tobytes(), digest_size=16)
    content.update(str(seen.size).encode())
    return content.digest()


def digest(pixels: torch.Tensor) -> bytes:
    content = pixels.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.blake2b(content, digest_size=16).digest()


def _one(value: Any, i: int) -> Any:
    """The part of an output that belongs to the image of number `i` in its batch."""
    if isinstance(value, tuple):
        return tuple(_one(item, i) for item in value)
    return None if value is None else value[i].clone()


def _together(values: list[Any]) -> Any:
    if isinstance(values[0], tuple):
        return tuple(_together(list(items)) for items in zip(*values, strict=True))
    return None if values[0] is None else torch.stack(values)
