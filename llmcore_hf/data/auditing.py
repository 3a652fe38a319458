"""Problems that no single row shows: duplicates, prompts in two splits, swapped columns, prompts that are too long."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from llmcore_hf.data.formats import FieldProblem
from llmcore_hf.data.preparing import (
    ASKS,
    FILE,
    KEY,
    LINE,
    META,
    PROBLEMS,
    PROMPT_KEY,
    ROW,
)
from llmcore_hf.data.problems import Problem, place_of
from llmcore_hf.data.reading import image_feature

if TYPE_CHECKING:
    from datasets import Dataset

# Columns are suspected to be swapped when answers end in a question mark far more often than prompts do.
ASKING_SHARE, ASKING_ROWS = 0.5, 10


class Split:
    """A prepared split, and which of its rows are still good.

    Attributes:
        rows: the prepared rows with the columns `META`.
        good: (N,) False for a row with a problem.
        links: for each row what ties it to others besides its prompt, such as the images it shows; None when nothing does.
    """

    links: list[tuple[Hashable, ...]] | None = None

    def __init__(self, name: str, rows: Dataset) -> None:
        self.name, self.rows = name, rows
        self.good = self.column(PROBLEMS, valid=True)

    def column(self, name: str, valid: bool = False) -> np.ndarray:
        """A column as an array (N,); with `valid`, where it is null."""
        values = self.rows.data.column(name)
        return (values.is_null() if valid else values.fill_null(0)).to_numpy()

    def select(self, indices: np.ndarray) -> Dataset:
        """The rows of those numbers; all of them without an index in between, which would slow down every later read."""
        return self.rows if len(indices) == len(self.rows) else self.rows.select(indices)

    def problem(self, index: Any, kind: str, field: str | None, text: str, remedy: str) -> Problem:
        """A problem at the place of row `index`, which is no longer good."""
        self.good[index] = False
        return Problem(kind, self.name, *self.place(index), field, text, remedy)

    def place(self, index: Any) -> tuple[str, int | None, int | None]:
        """(file, row, line) of row `index`."""
        file, row, line = (self.rows.data.column(name)[int(index)].as_py() for name in (FILE, ROW, LINE))
        return file, row, line

    def shown_place(self, index: Any) -> str:
        file, row, line = self.place(index)
        return f"{file}, {place_of(row, line)}"


def of_rows(split: Split) -> Iterator[Problem]:
    """What was found while rows were read and converted."""
    for index in np.flatnonzero(~split.column(PROBLEMS, valid=True)):
        for found in json.loads(split.rows.data.column(PROBLEMS)[int(index)].as_py()):
            yield split.problem(index, **found)


RowCheck = Callable[[dict[str, Any]], Iterable[FieldProblem]]  # what is wrong with a converted row, images not decoded
RowLinks = Callable[[dict[str, Any]], Iterable[Hashable]]  # what no held-out row may have in common with it


def _undecoded(split: Split) -> Dataset:
    """The rows without `META`, images as they are stored."""
    rows = split.rows.remove_columns(list(META))
    for column, feature in split.rows.features.items():
        if (encoded := image_feature(feature, decode=False)) is not None:
            rows = rows.cast_column(column, encoded)
    return rows


def link(split: Split, links_of: RowLinks) -> None:
    """Note what ties each row to others. To be called before suspicious rows are set aside: they may be kept."""
    split.links = [tuple(links_of(row)) for row in _undecoded(split)]


def of_each(split: Split, check: RowCheck) -> Iterator[Problem]:
    """What a module finds in each row that is still good."""
    rows = _undecoded(split)  # the check decodes, and tells what it cannot decode
    for index in np.flatnonzero(split.good):
        for found in check(rows[int(index)]):
            yield split.problem(index, **asdict(found))


def duplicates(split: Split) -> Iterator[Problem]:
    """Rows that stand in the split before, word by word."""
    good = np.flatnonzero(split.good)
    _, first, group = np.unique(split.column(KEY)[good], return_index=True, return_inverse=True)
    original = good[first[group]]  # (N,) the first row with the same content
    again = good != original
    for index, before in zip(good[again], original[again], strict=True):
        same_file = split.place(index)[0] == split.place(before)[0]
        text = f"is the same as {place_of(*split.place(before)[1:]) if same_file else split.shown_place(before)}"
        yield split.problem(index, "duplicate", None, text, "remove one of them")


def leaks(train: Split, held_out: Split, kept: bool = False) -> Iterator[Problem]:
    """Training rows whose prompt stands in a held-out split: what is measured there would in part be memory.

    A held-out row with a problem is not evaluated, unless rows that are only suspicious are `kept`.
    """
    asked = np.flatnonzero(~held_out.column(PROMPT_KEY, valid=True)) if kept else np.flatnonzero(held_out.good)
    keys, first = np.unique(held_out.column(PROMPT_KEY)[asked], return_index=True)
    mine = np.flatnonzero(train.good)
    position = np.searchsorted(keys, train.column(PROMPT_KEY)[mine]).clip(max=len(keys) - 1)
    hit = keys[position] == train.column(PROMPT_KEY)[mine] if len(keys) else np.zeros(len(mine), bool)
    for index, where in zip(mine[hit], asked[first[position[hit]]], strict=True):
        text = f"has the same prompt as {held_out.shown_place(where)} of the held-out split `{held_out.name}`"
        yield train.problem(index, "leak", None, text, "remove it from one of the splits")
    yield from _shared_links(train, held_out, asked)


def _shared_links(train: Split, held_out: Split, asked: np.ndarray) -> Iterator[Problem]:
    """Training rows that are tied to a held-out row by something else than the prompt."""
    if train.links is None or held_out.links is None:
        return
    where = {tie: index for index in asked[::-1] for tie in held_out.links[index]}  # the first row of each
    for index in np.flatnonzero(train.good):
        if shared := [tie for tie in train.links[index] if tie in where]:
            place = held_out.shown_place(where[shared[0]])
            text = f"shows the same image as {place} of the held-out split `{held_out.name}`"
            yield train.problem(index, "leak", None, text, "remove it from one of the splits")


def swapped(split: Split, source: str) -> Iterator[Problem]:
    """Answers that ask and prompts that do not, in most rows: are the columns swapped?"""
    asks = split.column(ASKS)[split.good]
    if len(asks) < ASKING_ROWS or not {"completion", "messages"} & set(split.rows.column_names):
        return
    prompts, answers = float((asks & 1).mean()), float((asks >> 1).mean())
    if answers - prompts < ASKING_SHARE:
        return
    text = f"{answers:.0%} of the answers end in a question mark and {prompts:.0%} of the prompts: are they swapped?"
    yield Problem("swapped", split.name, source, None, None, None, text, "exchange them, for example with --columns")


class LengthLimit(Protocol):
    """Tells rows that are too long; `alignment.training.PromptLimit` is the one that tokenizes.

    Attributes:
        measured: the columns of `META` with the bytes and turns that count.
        remedy: what to change when a row is too long.
    """

    measured: tuple[str, str]
    remedy: str

    def may_be_too_long(self, n_bytes: np.ndarray, n_turns: np.ndarray) -> np.ndarray:
        """(N,) from what is `measured`: False where no tokenization is needed to know that the rows fit."""

    def problem(self, row: dict[str, Any]) -> str | None:
        """What is wrong with the length of a row; None when nothing is."""


def too_long(split: Split, limit: LengthLimit) -> Iterator[Problem]:
    """Rows that the trainer has no room for."""
    candidates = split.good & limit.may_be_too_long(*map(split.column, limit.measured))
    for index in np.flatnonzero(candidates):
        if text := limit.problem(split.rows[int(index)]):
            yield split.problem(index, "too_long", None, text, limit.remedy)
