"""Reading images that come from anywhere: each problem is told with its file, and nothing is decoded that is too large.

Needs Pillow alone; torchvision is never imported.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcore_hf.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 64_000_000  # 192 MB when decoded; Pillow warns at 89 million and refuses at twice that


class BadImage(UserError):
    """An image cannot be used; the message says why and how to mend it, not where it stands."""


def read(source: Any) -> Image:
    """The image of a path, of bytes, of `{"path": ..., "bytes": ...}` as `datasets` has it, or a PIL image; as RGB.

    Raises:
        BadImage: it is missing, no image, cut off, or has more than `MAX_PIXELS` pixels.
    """
    from PIL import Image, UnidentifiedImageError

    if isinstance(source, Image.Image):
        return source.convert("RGB")
    if isinstance(source, dict):
        source = source.get("bytes") or source.get("path")
    file: io.BytesIO | Path
    if isinstance(source, bytes):
        name = f"{len(source)} bytes"
        file = io.BytesIO(source)
    elif isinstance(source, str | Path) and str(source):
        name = str(source)
        file = Path(source).expanduser()
        if not file.is_file():
            raise BadImage(f"there is no file {name}: correct the path, or remove the row")
    else:
        raise BadImage(f"{type(source).__name__} is not an image: give a path, or an image encoded as PNG or JPEG")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                _check_size(image.size, name)
                return image.convert("RGB")  # decodes it, which finds what is cut off
    except UnidentifiedImageError:
        raise BadImage(f"{name} is not an image that Pillow can read: give PNG, JPEG, WebP, GIF or BMP") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise BadImage(f"{name} is too large ({error}): scale it down first") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # what decoders raise on damaged data
        raise BadImage(f"{name} is damaged or cut off ({error}): fetch or save it again") from None


def _check_size(size: tuple[int, int], name: str) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        raise BadImage(
            f"{name} has {width} x {height} pixels, more than the {MAX_PIXELS:,} that are decoded: scale it down first"
        )


def content_key(source: Any) -> bytes | None:
    """A hash of an image's file, wherever it lies and whatever its name; None when it cannot be read, which `read` tells.

    Takes what a dataset holds: a path, or `{"path": ..., "bytes": ...}`.
    """
    content = source.get("bytes") or source.get("path") if isinstance(source, dict) else source
    if isinstance(content, str):
        try:
            content = Path(content).expanduser().read_bytes()
        except (OSError, ValueError):
            return None
    return hashlib.blake2b(content, digest_size=16).digest() if isinstance(content, bytes) and content else None
