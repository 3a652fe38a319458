"""Load a dataset: read, convert to TRL's columns, report every problem, and set rows aside for evaluation."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from trl import ScriptArguments

from llmcore_hf import distributed, registry
from llmcore_hf.data import auditing, formats, preparing
from llmcore_hf.data.auditing import LengthLimit, RowCheck, RowLinks, Split
from llmcore_hf.data.formats import Format
from llmcore_hf.data.preparing import KEY, META, PROMPT_KEY
from llmcore_hf.data.problems import DROP, KEEP, POLICIES, STOP, BadData, Problem, Report, ways_out
from llmcore_hf.data.reading import BUILDERS, Source, looks_like_path, open_dataset
from llmcore_hf.data.toy import TOY_DATASETS
from llmcore_hf.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

__all__ = ["DataArguments", "Splits", "load", "looks_like_path"]

EXAMPLES = {
    "sft": "messages, prompt/completion, alpaca or text",
    "preference": "prompt/chosen/rejected",
    "prompt": "prompt, messages or alpaca",
}


@dataclass
class DataArguments(ScriptArguments):
    """Where the data come from and how much of them is used."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": f"A hub id, a folder, a file ({', '.join(BUILDERS)}), or a built-in toy dataset: "
            + ", ".join(TOY_DATASETS)
            + "."
        },
    )
    columns: str | None = field(
        default=None,
        metadata={"help": "Which columns hold what, where names differ: `prompt=question,completion=answer`."},
    )
    on_bad_rows: str = field(
        default=STOP,
        metadata={
            "help": "What to do about rows with problems: `stop` names them and stops; `drop` goes on without them and "
            "records which; `keep` goes on with rows that are only suspicious (duplicates, prompts in two splits, "
            "swapped columns).",
            "choices": list(POLICIES),
        },
    )
    test_split_size: float = field(
        default=0.1,
        metadata={"help": "Share of the training rows set aside for evaluation when there is no test split."},
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on N rows only."})
    max_eval_samples: int | None = field(
        default=500, metadata={"help": "Evaluate on N held-out rows only; `none` for all."}
    )


def column_mapping(text: str | None, task: str | None = None) -> dict[str, str]:
    """`prompt=question,completion=answer` as target column -> column of the file.

    For the task `prompt` every target is good: reward functions get the column under that name.

    Raises:
        ValueError: it is not of that form, or names a column that no format reads; the message says which.
    """
    mapping: dict[str, str] = {}
    for part in (text or "").split(","):
        target, equals, origin = (piece.strip() for piece in part.partition("="))
        if not text:
            break
        if not (target and equals and origin):
            raise ValueError(f"`{part}` is not NAME=COLUMN, as in prompt=question,completion=answer")
        if target not in formats.known_columns() and task != formats.PROMPT:
            raise ValueError(f"no format reads `{target}`: the names are {', '.join(sorted(formats.known_columns()))}")
        if target in mapping:
            raise ValueError(f"`{target}` is given twice")
        mapping[target] = origin
    return mapping


@dataclass
class Splits:
    """A dataset ready for TRL, and what the summary says about it.

    `validation` is what the curves show during training; `test` is looked at before and after, never in between.
    They are the same rows when the dataset offers only one held-out split. `train` is an `IterableDataset` when
    streaming; then `fingerprint` tells the held-out rows alone, and `report` grows while the run goes on.
    """

    train: Dataset | IterableDataset
    validation: Dataset
    test: Dataset
    source: str
    format: str
    fingerprint: str
    report: Report
    on_bad_rows: str


def load(
    args: DataArguments,
    task: str,
    seed: int,
    num_proc: int | None = None,
    chooses_best: bool = False,
    limit: LengthLimit | None = None,
    bad_rows_file: Path | None = None,
    row_check: RowCheck | None = None,
    row_links: RowLinks | None = None,
) -> Splits:
    """Load the dataset that `args` names for a `task`: `sft`, `preference`, or `prompt`, which any dataset with prompts suits.

    With `chooses_best` (`--load_best_model_at_end`) validation rows are never the test rows: what was chosen on them
    could not be reported on them. Problems are written to `bad_rows_file`, one JSON object per line. `row_check` finds what
    only the module knows to be wrong with a converted row, `row_links` what else than its prompt must not be held out.

    Raises:
        UserError: it cannot be read, or has another format than the task needs.
        BadData: rows have problems, and `--on_bad_rows` does not let the run go on.
    """
    with _main_process_first():
        opened = _open(args, task)
        names = _named_splits(args, opened.sources)
        if args.dataset_streaming:
            from llmcore_hf.data.streaming import stream_splits

            return stream_splits(args, opened, names, chooses_best, limit)
        splits = {
            name: Split(
                name, preparing.prepare(source, opened.format, opened.columns, num_proc, task == formats.PROMPT)
            )
            for name, source in opened.sources.items()
            if name in names.values()
        }
    if row_links is not None:
        for split in splits.values():
            auditing.link(split, row_links)
    report = Report()
    report.add(find_problems(splits, names["train"], opened.name, limit, args.on_bad_rows == KEEP, row_check))
    judge(report, opened.name, args.on_bad_rows, bad_rows_file)
    if args.on_bad_rows == KEEP:
        for split in splits.values():
            split.good[:] = True
    report.rows_dropped = sum(int((~split.good).sum()) for split in splits.values())
    chosen = _choose_rows(args, names, splits, seed, chooses_best)
    rows = {role: split.select(indices) for role, (split, indices) in chosen.items()}
    return Splits(
        **{role: selected.remove_columns(list(META)) for role, selected in rows.items()},
        source=opened.name,
        format=opened.format.name,
        fingerprint=fingerprint({role: split.column(KEY)[indices] for role, (split, indices) in chosen.items()}),
        report=report,
        on_bad_rows=args.on_bad_rows,
    )


@dataclass
class Opened:
    """A dataset whose format is known."""

    name: str
    sources: dict[str, Source]
    format: Format
    columns: dict[str, str]


def open_for_training(args: DataArguments, task: str | None = None) -> Opened:
    """Open the dataset that `args` names and tell its format; without a `task`, whatever it is for.

    Raises:
        UserError: it cannot be read, `--columns` names columns it has not, or no format fits.
    """
    name, mapping = str(args.dataset_name), column_mapping(args.columns, task)
    sources = open_dataset(name, args.dataset_config, args.dataset_streaming)
    train = _require_split(sources, args.dataset_train_split, "train", name)
    if missing := [origin for origin in mapping.values() if origin not in train.columns]:
        raise UserError(f"--columns: {name} has no column {', '.join(missing)}, only {', '.join(train.columns)}")
    sample = [preparing.renamed(row, mapping) for row in train.sample]
    if not sample:
        raise UserError(_no_row(train, name))
    columns = list(dict.fromkeys([*mapping, *(c for c in train.columns if c not in mapping.values())]))
    return Opened(name, sources, formats.detect(columns, sample, name, task), mapping)


def _no_row(source: Source, name: str) -> str:
    """Why nothing could be read of a split: its first problem."""
    for shard in source.shards:
        for raw in shard.rows():
            if raw.problem:
                place: dict[str, Any] = {"split": source.split, "file": shard.path, "row": raw.number, "line": raw.line}
                return f"no row of {name} can be read: {Problem(**place, **asdict(raw.problem))}"
    return f"{name} has no rows: give a file with at least two"


def _open(args: DataArguments, task: str) -> Opened:
    opened = open_for_training(args, task)
    fmt = opened.format
    if fmt.task != task and task != formats.PROMPT:
        other = registry.for_task(fmt.task)
        meant = f"which is data for --module {other.name}" if other else "which no module here trains on"
        raise UserError(
            f"{opened.name} is in {fmt.name} format, {meant}; this module needs {EXAMPLES[task]} columns "
            "(--columns maps other names to them)"
        )
    return opened


@contextmanager
def _main_process_first() -> Iterator[None]:
    """The main process prepares; the others then find the result in the cache. An error in one ends them all."""
    if distributed.world_size() == 1:
        yield
        return
    from accelerate import PartialState

    state = PartialState()
    if not state.is_main_process:
        state.wait_for_everyone()
    try:
        yield
    finally:  # also when it failed: the others wait, and then fail in the same way
        if state.is_main_process:
            state.wait_for_everyone()


def _require_split(sources: dict[str, Source], name: str, kind: str, dataset: str) -> Source:
    if name not in sources:
        raise UserError(
            f"{dataset} has no split `{name}`, only {', '.join(sources)}: choose one with --dataset_{kind}_split"
        )
    return sources[name]


def _named_splits(args: DataArguments, sources: dict[str, Source]) -> dict[str, str]:
    """Role -> name of the split that plays it; a role without a split is cut from the training rows."""
    names = {"train": args.dataset_train_split}
    if args.dataset_test_split in sources or args.dataset_test_split != DataArguments.dataset_test_split:
        _require_split(sources, args.dataset_test_split, "test", str(args.dataset_name))
        names["test"] = args.dataset_test_split
        if names["test"] == names["train"]:
            raise UserError(
                f"--dataset_test_split {names['test']} is the split that is trained on: hold out another one"
            )
    if "validation" in sources:
        names["validation"] = "validation"
    return names


def find_problems(
    splits: dict[str, Split],
    train: str,
    source: str,
    limit: LengthLimit | None,
    kept: bool = False,
    row_check: RowCheck | None = None,
) -> Iterator[Problem]:
    """Everything that is wrong with the splits; rows with problems are no longer `good` afterwards.

    `kept` says that the run goes on with rows that are only suspicious.
    """
    for split in splits.values():
        yield from auditing.of_rows(split)
        if row_check is not None:
            yield from auditing.of_each(split, row_check)
    for split in splits.values():
        yield from auditing.duplicates(split)
        yield from auditing.swapped(split, source)
        if limit is not None:
            yield from auditing.too_long(split, limit)
    for name, split in splits.items():
        if name != train:
            yield from auditing.leaks(splits[train], split, kept)


def judge(report: Report, source: str, policy: str, bad_rows_file: Path | None, quiet: bool = False) -> None:
    """Record the problems, say them (unless `quiet`), and stop unless the user has said to go on.

    Raises:
        BadData: the run must not go on.
    """
    if not report.total:
        return
    text = report.describe(source)
    if bad_rows_file is not None and distributed.is_main_process():
        report.save(bad_rows_file)
        text += f"\nAll of them stand in {bad_rows_file}."
    if report.stops(policy):
        raise BadData(f"{text}\n{ways_out(report)}")
    if distributed.is_main_process() and not quiet:
        went_on = "Going on without rows that have problems" if policy == DROP else "Going on with these rows"
        print(f"{text}\n{went_on}: --on_bad_rows {policy}.", file=sys.stderr)


def _choose_rows(
    args: DataArguments, names: dict[str, str], splits: dict[str, Split], seed: int, chooses_best: bool
) -> dict[str, tuple[Split, np.ndarray]]:
    """Role -> a split and the numbers of its rows that play it; rows set aside are taken from the training rows.

    Raises:
        UserError: no row is left for a role.
    """
    chosen = {role: (splits[name], np.flatnonzero(splits[name].good)) for role, name in names.items()}
    train, indices = chosen["train"]
    if "test" not in chosen:
        indices, aside = _set_aside(train, indices, args, seed)
        chosen["test"] = train, aside
    if "validation" not in chosen:
        chosen["validation"] = chosen["test"]
        if chooses_best:
            indices, aside = _set_aside(train, indices, args, seed)
            chosen["validation"] = train, aside
    chosen["train"] = train, indices
    limits = {"train": args.max_train_samples, "validation": args.max_eval_samples, "test": args.max_eval_samples}
    chosen = {role: (split, numbers[: limits[role]]) for role, (split, numbers) in chosen.items()}
    for role, (_, numbers) in chosen.items():
        if not len(numbers):
            raise UserError(f"{args.dataset_name} has no usable row for the {role} split")
    return chosen


def _set_aside(split: Split, indices: np.ndarray, args: DataArguments, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows that stay, rows set aside), at least one of each; rows with the same prompt or image stay together."""
    group = _groups(split, indices)
    n_groups = len(np.unique(group))
    if n_groups < 2:
        what = "prompt(s)" if split.links is None else "prompt(s) about images of their own"
        raise UserError(
            f"{args.dataset_name} has {len(indices)} row(s) with {n_groups} different {what}: at least two are "
            "needed, one to hold out"
        )
    n = min(max(1, round(args.test_split_size * len(indices))), len(indices) - 1)
    order, sizes = np.random.default_rng(seed).permutation(n_groups), np.bincount(group)
    fitting = order[sizes[order] <= n]  # a prompt of half the rows would take them all along
    if not len(fitting):
        fitting = np.array([sizes.argmin()])
    n_aside = max(1, int(np.searchsorted(np.cumsum(sizes[fitting]), n, side="right")))
    aside = np.isin(group, fitting[: min(n_aside, n_groups - 1)])
    return indices[~aside], indices[aside]


def _groups(split: Split, indices: np.ndarray) -> np.ndarray:
    """(N,) for each row the number of its group: rows with the same prompt, and rows with a link in common, at once or
    through others."""
    _, group = np.unique(split.column(PROMPT_KEY)[indices], return_inverse=True)
    if split.links is None:
        return group
    above = list(range(len(indices)))  # group -> one that it was joined to, itself at the top

    def top(number: int) -> int:
        while above[number] != number:
            number = above[number] = above[above[number]]
        return number

    first: dict[Any, int] = {}
    for index, number in zip(indices, group.tolist(), strict=True):
        for tie in split.links[index]:
            above[top(number)] = top(first.setdefault(tie, number))
    return np.unique([top(number) for number in group.tolist()], return_inverse=True)[1]


def fingerprint(keys: dict[str, np.ndarray]) -> str:
    """A hash of the content, from the hashes of the rows of each split: wherever they were loaded from, it is the same."""
    digest = hashlib.sha256()
    for name, hashes in keys.items():
        digest.update(name.encode())
        digest.update(hashes.astype(">i8").tobytes())
    return digest.hexdigest()[:16]
