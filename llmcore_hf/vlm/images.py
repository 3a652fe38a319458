"""Reading images that come from anywhere: each problem is told with its file, and nothing is decoded that is too large.

Needs Pillow and NumPy alone; torchvision is never imported.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmcore_hf.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 64_000_000  # 192 MB when decoded; Pillow warns at 89 million and refuses at twice that
MAX_16_BIT = 65535
DEEP = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")  # modes with more than 8 bits; Pillow cuts them off at 255


class BadImage(UserError):
    """An image cannot be used; the message says why and how to mend it, not where it stands."""


def read(source: Any) -> Image:
    """The image of a path, of bytes, of `{"path": ..., "bytes": ...}` as `datasets` has it, or a PIL image: upright, as RGB.

    Raises:
        BadImage: it is missing, no image, cut off, has more than `MAX_PIXELS` pixels, or values of an unknown range.
    """
    from PIL import Image

    if isinstance(source, Image.Image):
        return _as_rgb(source, "the image")
    if isinstance(source, dict):
        source = source.get("bytes") or source.get("path")
    with _opened(source) as (image, name):
        return _as_rgb(image, name)  # decodes it, which finds what is cut off


def as_kept(source: Any) -> dict[str, Any]:
    """The image as `datasets` keeps it, `{"path": ..., "bytes": ...}`.

    What `datasets` and an image processor would not show as `read` does is written anew: they cut 16 bits off at 255.
    """
    kept = {"path": source, "bytes": None} if isinstance(source, str) else source
    with _opened(kept.get("bytes") or kept.get("path")) as (image, name):
        if image.mode not in DEEP:
            return kept
        buffer = io.BytesIO()
        _as_rgb(image, name).save(buffer, "PNG")
    return {"path": None, "bytes": buffer.getvalue()}


@contextmanager
def _opened(source: Any) -> Iterator[tuple[Image, str]]:
    """An image whose header is read, and its name; whatever is raised while it is in use says what is wrong with it."""
    from PIL import Image, UnidentifiedImageError

    file: io.BytesIO | Path
    if isinstance(source, bytes):
        name = f"{len(source)} bytes"
        file = io.BytesIO(source)
    elif isinstance(source, str | Path) and str(source):
        name = str(source)
        file = _existing(name)
    else:
        raise BadImage(f"{type(source).__name__} is not an image: give a path, or an image encoded as PNG or JPEG")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                _check_size(image.size, name)
                yield image, name
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise BadImage(f"{name} is not an image that Pillow can read: give PNG, JPEG, WebP, GIF or BMP") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise BadImage(f"{name} is too large ({error}): scale it down first") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # what decoders raise on damaged data
        raise BadImage(f"{name} is damaged or cut off ({error}): fetch or save it again") from None


def _existing(name: str) -> Path:
    file = Path(name).expanduser()
    if file.is_dir():
        raise BadImage(f"{name} is a folder: name an image file in it")
    if not file.is_file():
        if "://" in name:
            raise BadImage(f"{name} is an address, and nothing is fetched here: download it and give the file")
        raise BadImage(f"there is no file {name}: correct the path")
    return file


def _as_rgb(image: Image, name: str) -> Image:
    """8 bits per channel, turned as its EXIF data say: `datasets` turns it, too."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode in DEEP:
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > MAX_16_BIT:
            raise BadImage(f"{name} has values whose range is not known (mode {image.mode}): save it with 8 or 16 bits")
        image = Image.fromarray(np.rint(values / (MAX_16_BIT / 255)).astype(np.uint8))
    if image.has_transparency_data:  # on white, as the image processors of transformers put it
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def _check_size(size: tuple[int, int], name: str) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        raise BadImage(
            f"{name} has {width} x {height} pixels, more than the {MAX_PIXELS:,} that are decoded: scale it down first"
        )


def content_key(source: Any) -> bytes | None:
    """A hash of an image's file, wherever it lies and whatever its name; None when there is no such file.

    Takes what a dataset holds: a path, or `{"path": ..., "bytes": ...}`.
    """
    content = source.get("bytes") or source.get("path") if isinstance(source, dict) else source
    if isinstance(content, str):
        file = Path(content).expanduser()
        content = file.read_bytes() if file.is_file() else None
    return hashlib.blake2b(content, digest_size=16).digest() if content else None
