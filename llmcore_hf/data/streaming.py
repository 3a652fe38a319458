"""Train on rows while they are read (`--dataset_streaming`): nothing is prepared beforehand, nothing lies on disk.

Every row is checked when it comes by. Problems that need the whole dataset (duplicates, swapped columns) cannot be
seen; a training prompt that is held out can, and is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from llmcore_hf.data import preparing
from llmcore_hf.data.auditing import LengthLimit
from llmcore_hf.data.loading import DataArguments, Opened, Splits, fingerprint, judge
from llmcore_hf.data.preparing import FILE, KEY, LINE, META, PROBLEMS, PROMPT_KEY, ROW
from llmcore_hf.data.problems import KEEP, Problem, Report
from llmcore_hf.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


class Gate:
    """Lets the good rows of one split through and deals with the others as `--on_bad_rows` says.

    A row that comes by again (another epoch, a look at the first row) is counted once.
    """

    def __init__(self, split: str, args: DataArguments, limit: LengthLimit | None, report: Report) -> None:
        self.split, self.args, self.limit, self.report = split, args, limit, report
        self.set_aside_here = False  # held-out rows were chosen here: that a prompt is among them is nobody's fault
        self.held_out: dict[int, str] = {}  # prompt hash -> name of the held-out split it stands in
        self.seen: set[tuple[Any, ...]] = set()

    def __call__(self, row: dict[str, Any]) -> bool:
        """Whether the row is trained on. Raises `BadData` for a problem that stops the run."""
        problems = list(self._problems(row))
        if not problems:
            return True
        our_doing = [problem for problem in problems if problem.kind == "leak" and self.set_aside_here]
        kept = self.args.on_bad_rows == KEEP and not our_doing
        place = row[FILE], row[ROW], row[LINE]
        if place not in self.seen:
            self.seen.add(place)
            found = Report()
            found.add(problem for problem in problems if problem not in our_doing)
            judge(found, str(self.args.dataset_name), self.args.on_bad_rows, None, quiet=True)
            self.report.add(problems)
            self.report.rows_dropped += not kept
        return kept

    def _problems(self, row: dict[str, Any]) -> Iterator[Problem]:
        place = {"split": self.split, "file": row[FILE], "row": row[ROW], "line": row[LINE]}
        if row[PROBLEMS] is not None:
            yield from (Problem(**place, **found) for found in json.loads(row[PROBLEMS]))
            return
        if row[PROMPT_KEY] in self.held_out:
            text = f"has a prompt of the held-out split `{self.held_out[row[PROMPT_KEY]]}`"
            yield Problem("leak", **place, field=None, text=text, remedy="remove it from one of the splits")
        if self.limit is not None and (too_long := self._too_long(row, self.limit)):
            yield Problem("too_long", **place, field=None, text=too_long, remedy=self.limit.remedy)

    @staticmethod
    def _too_long(row: dict[str, Any], limit: LengthLimit) -> str | None:
        sizes = (np.array([row[name]]) for name in limit.measured)
        return limit.problem(row) if limit.may_be_too_long(*sizes)[0] else None


def stream_splits(
    args: DataArguments, opened: Opened, names: dict[str, str], chooses_best: bool, limit: LengthLimit | None
) -> Splits:
    """Training rows as a stream, held-out rows in memory: of their own split, or the first rows of the stream.

    Raises:
        UserError: the held-out rows cannot be told apart from those that are trained on.
        BadData: a row among the held-out ones has problems.
    """
    report = Report()
    if args.max_eval_samples is None:
        raise UserError("--dataset_streaming holds out the first --max_eval_samples rows: give a number")
    if chooses_best and "validation" not in names:
        raise UserError(
            f"--load_best_model_at_end chooses on a split `validation`, which {opened.name} has not: add one, or leave "
            "out --dataset_streaming, so that rows can be set aside"
        )
    train = preparing.stream(opened.sources[names["train"]], opened.format, opened.columns)
    n_aside = 0 if "test" in names else args.max_eval_samples
    held_out: dict[str, Dataset] = {}
    for role in ("test", "validation"):
        if role in names or role == "test":
            name = names.get(role, names["train"])
            rows = preparing.stream(opened.sources[name], opened.format, opened.columns)
            held_out[role] = _first(rows, Gate(name, args, limit, report), args.max_eval_samples)
    gate = Gate(names["train"], args, limit, report)
    gate.set_aside_here = n_aside > 0
    for role, rows in held_out.items():
        gate.held_out |= dict.fromkeys(rows[PROMPT_KEY], names.get(role, role))
    held_out.setdefault("validation", held_out["test"])
    rows = train.skip(n_aside).filter(gate)
    if args.max_train_samples:
        rows = rows.take(args.max_train_samples)
    return Splits(
        train=rows.remove_columns(list(META)),
        **{role: rows.remove_columns(list(META)) for role, rows in held_out.items()},
        source=opened.name,
        format=opened.format.name,
        fingerprint=fingerprint({role: np.array(rows[KEY][:]) for role, rows in held_out.items()}),
        report=report,
        on_bad_rows=args.on_bad_rows,
    )


def _first(rows: IterableDataset, gate: Gate, n: int) -> Dataset:
    """The first `n` rows, without those that the gate holds back."""
    from datasets import Dataset

    found = [row for row in islice(rows, n) if gate(row)]
    if not found:
        raise UserError(f"{gate.args.dataset_name} has no usable row to hold out among its first {n}")
    return Dataset.from_list(found, features=rows.features)
