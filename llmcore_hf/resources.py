"""Where the files that come with the project are, in a checkout and in an installed wheel alike."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_BUNDLED = _PACKAGE / "_resources"
# A wheel carries recipes/, learning/ and accelerate_configs/ inside the package; a checkout has them beside it.
_ROOTS = (_BUNDLED if _BUNDLED.is_dir() else _PACKAGE.parent, _PACKAGE)


def path(name: str) -> Path:
    """Absolute path of a shipped file or folder, such as `recipes/dpo/toy.yaml` or `schema/summary.schema.json`.

    Raises:
        FileNotFoundError: nothing of that name is shipped.
    """
    for root in _ROOTS:
        if (root / name).exists():
            return root / name
    raise FileNotFoundError(f"`{name}` is not among the files of this installation ({_PACKAGE})")
