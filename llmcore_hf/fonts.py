"""Which fonts can write a text in a picture: matplotlib's own has no Chinese, Japanese or Korean."""

from __future__ import annotations

from functools import cache
from pathlib import Path

BUNDLED = "DejaVu Sans"  # comes with matplotlib
# How files of well-known fonts with Chinese begin: on Linux, Windows and macOS.
WIDE_FONTS = (
    "NotoSansCJK-Regular",
    "NotoSansSC",
    "SourceHanSans",
    "wqy",
    "DroidSansFallback",
    "msyh",
    "simhei",
    "simsun",
    "PingFang",
    "STHeiti",
    "Arial Unicode",
)


def families_for(text: str) -> list[str] | None:
    """Font families that together have every character of the text; None when one is in no font known here."""
    from matplotlib import font_manager
    from matplotlib.ft2font import FT2Font

    def lacks(file: str) -> set[str]:
        font = FT2Font(file)
        return {c for c in text if c.isprintable() and not c.isspace() and not font.get_char_index(ord(c))}

    missing = lacks(font_manager.findfont(BUNDLED))
    if not missing:
        return [BUNDLED]
    for file in wide_fonts():
        if not missing & lacks(file):
            font_manager.fontManager.addfont(file)
            return [BUNDLED, font_manager.FontProperties(fname=file).get_name()]
    return None


@cache
def wide_fonts() -> list[str]:
    """Files of the fonts of this machine that have Chinese, those of `WIDE_FONTS` in their order."""
    from matplotlib import font_manager

    found = [Path(file) for file in font_manager.findSystemFonts()]
    return [str(file) for start in WIDE_FONTS for file in sorted(found) if file.name.lower().startswith(start.lower())]
