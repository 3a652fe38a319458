"""What is wrong with a dataset: each problem with its place and its remedy, and what is done about it."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from llmcore_hf.errors import UserError

SHOWN = 20
STOP, DROP, KEEP = "stop", "drop", "keep"
POLICIES = (STOP, DROP, KEEP)
# Rows that can be trained on, but should perhaps not be: `keep` leaves them in.
SUSPICIOUS = ("duplicate", "leak", "swapped")
# Nothing behind such a place can be read, so going on would leave out rows that nobody has seen.
FATAL = ("unreadable",)


@dataclass(frozen=True)
class Problem:
    """One problem of one row, or of a whole split when `row` and `line` are None.

    Attributes:
        kind: what it is counted under, such as `missing`, `role`, `duplicate`.
        split: split of the dataset.
        file: file or dataset.
        row: number of the row in it, counted from 0.
        line: line of the file, counted from 1.
        field: column, with the place inside it: `messages[1].role`.
        text: what is wrong.
        remedy: what to change.
    """

    kind: str
    split: str
    file: str
    row: int | None
    line: int | None
    field: str | None
    text: str
    remedy: str

    def __str__(self) -> str:
        place = place_of(self.row, self.line)
        where = ", ".join(part for part in (self.file, place) if part)
        field = f"`{self.field}` " if self.field else ""
        return f"{where}: {field}{self.text} ({self.kind}); {self.remedy}"


def place_of(row: int | None, line: int | None) -> str:
    """`row 6 (line 45)`, `row 6`, `line 45` or nothing."""
    if row is None:
        return f"line {line}" if line is not None else ""
    return f"row {row} (line {line})" if line is not None else f"row {row}"


class BadData(UserError):
    """The dataset has problems and the user has not said to go on."""


class Report:
    """Collects the problems of a dataset as they are found: counts, the first few, and all of them on disk.

    Attributes:
        counts: problems of each kind.
        first: the first 20.
        rows_dropped: rows that the run goes on without.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.first: list[Problem] = []
        self.rows_dropped = 0
        # On disk, so that memory stays flat however many there are; it goes when the report goes.
        self._spool = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115

    def add(self, problems: Iterable[Problem]) -> None:
        for problem in problems:
            self.counts[problem.kind] += 1
            if len(self.first) < SHOWN:
                self.first.append(problem)
            self._spool.write(json.dumps(asdict(problem), ensure_ascii=False) + "\n")

    @property
    def total(self) -> int:
        return self.counts.total()

    def stops(self, policy: str) -> bool:
        """Whether a run with `--on_bad_rows policy` must not go on."""
        if policy == DROP:
            return any(self.counts[kind] for kind in FATAL)
        if policy == KEEP:
            return any(kind not in SUSPICIOUS for kind in self.counts)
        return self.total > 0

    def describe(self, source: str) -> str:
        """The problems for people: a line each for the first 20, then how many more of which kind."""
        kinds = ", ".join(f"{kind} {n}" for kind, n in self.counts.most_common())
        plural = "s" if self.total != 1 else ""
        lines = [f"{self.total} problem{plural} in {source} ({kinds}; rows count from 0, lines from 1):"]
        lines += [f"  - {problem}" for problem in self.first]
        if self.total > len(self.first):
            lines.append(f"  ... and {self.total - len(self.first)} more")
        return "\n".join(lines)

    def save(self, path: Path) -> None:
        """Write all problems to `path`, one JSON object per line, whole or not at all."""
        self._spool.seek(0)
        scratch = path.with_name(f".{path.name}.tmp")
        with open(scratch, "w", encoding="utf-8") as file:
            shutil.copyfileobj(self._spool, file)
        os.replace(scratch, path)
        self._spool.seek(0, os.SEEK_END)


def ways_out(report: Report) -> str:
    """What the user can do, besides mending the file."""
    kinds = set(report.counts)
    if kinds & set(FATAL):
        return "Mend the file: what stands behind that place cannot be read."
    ways = ["mend the data", "go on without these rows with --on_bad_rows drop"]
    if kinds <= set(SUSPICIOUS):
        ways.append("keep them with --on_bad_rows keep")
    return f"{', or '.join(ways).capitalize()}."
