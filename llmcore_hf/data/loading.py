"""Load a dataset, find out its format, convert it to TRL's columns, and set rows aside for evaluation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl import ScriptArguments

from llmcore_hf.data import formats
from llmcore_hf.data.toy import TOY_DATASETS
from llmcore_hf.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

ROW = "__llmcore_row__"
BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
EXAMPLES = {"sft": "messages, prompt/completion, alpaca or text", "preference": "prompt/chosen/rejected"}


@dataclass
class DataArguments(ScriptArguments):
    """Where the data come from and how much of them is used."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "A hub id, a folder, a file (.json, .jsonl, .csv, .parquet, .arrow), or a built-in toy dataset: "
            + ", ".join(TOY_DATASETS)
            + "."
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
    max_generation_samples: int = field(
        default=64, metadata={"help": "Answer the first N held-out prompts, before and after training."}
    )
    max_new_tokens: int = field(default=128, metadata={"help": "Length limit of those answers, in tokens."})


@dataclass
class Splits:
    """A dataset ready for TRL, and what the summary says about it.

    `validation` is what the curves show during training; `test` is looked at before and after, never in between.
    They are the same rows when the dataset offers only one held-out split.
    """

    train: Dataset
    validation: Dataset
    test: Dataset
    source: str
    format: str
    fingerprint: str


def looks_like_path(name: str) -> bool:
    """Whether a dataset or model name can only mean a place on disk, not a hub id."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).suffix in BUILDERS


def load(args: DataArguments, task: str, seed: int, num_proc: int | None = None, chooses_best: bool = False) -> Splits:
    """Load the dataset that `args` names for a `task` (`sft` or `preference`).

    With `chooses_best` (`--load_best_model_at_end`) validation rows are never the test rows: what was chosen on them
    could not be reported on them.

    Raises:
        UserError: it cannot be read, has another format than the task needs, or a row is unusable.
    """
    name = str(args.dataset_name)
    raw = _number_rows(_read(name, args.dataset_config))
    splits = _choose_splits(raw, args, seed, chooses_best)
    columns = [column for column in splits["train"].column_names if column != ROW]
    fmt = formats.detect(columns, splits["train"][0], name)
    if fmt.task != task:
        other = {"preference": "dpo", "sft": "sft"}[fmt.task]
        raise UserError(
            f"{name} is in {fmt.name} format, which is data for --module {other}; "
            f"this module needs {EXAMPLES[task]} columns"
        )
    limits = {"train": args.max_train_samples, "validation": args.max_eval_samples, "test": args.max_eval_samples}
    chosen = {split: rows.select(range(min(limits[split] or len(rows), len(rows)))) for split, rows in splits.items()}
    converted = {split: _convert(rows, fmt, f"{name} ({split})", num_proc) for split, rows in chosen.items()}
    return Splits(**converted, source=name, format=fmt.name, fingerprint=fingerprint(converted))


def _read(name: str, config_name: str | None) -> DatasetDict:
    from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

    if name in TOY_DATASETS:
        return TOY_DATASETS[name]()
    path = Path(name).expanduser()
    try:
        if path.is_file():
            if path.stat().st_size == 0:
                raise UserError(f"{name} is empty")
            if path.suffix not in BUILDERS:
                raise UserError(f"{name}: files of type `{path.suffix}` are not read; use {', '.join(BUILDERS)}")
            _check_encoding(path)
            loaded = load_dataset(BUILDERS[path.suffix], data_files=str(path))
        elif path.is_dir() and ((path / "dataset_dict.json").exists() or (path / "state.json").exists()):
            loaded = load_from_disk(str(path))
        elif path.is_dir() or not looks_like_path(name):
            loaded = load_dataset(str(path) if path.is_dir() else name, name=config_name)
        else:
            raise UserError(f"there is no dataset file or folder {name}")
    except UserError:
        raise
    except Exception as error:  # each builder raises its own kinds; the innermost cause says what is wrong
        raise UserError(f"the dataset {name} cannot be loaded: {_innermost(error)}") from error
    return DatasetDict({"train": loaded}) if isinstance(loaded, Dataset) else loaded


def _check_encoding(path: Path) -> None:
    """Raises `UserError` when a text file is not UTF-8, and says in which line."""
    if BUILDERS[path.suffix] not in ("json", "csv"):
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                raise UserError(f"{path}: line {number} is not UTF-8 text; save the file as UTF-8") from None


def _number_rows(raw: DatasetDict) -> DatasetDict:
    """Give every row its number in the file, counted from 0, for messages about it after rows have been shuffled."""
    from datasets import DatasetDict

    return DatasetDict({split: rows.add_column(ROW, range(len(rows))) for split, rows in raw.items()})


def _innermost(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()) or type(error).__name__


def _choose_splits(raw: DatasetDict, args: DataArguments, seed: int, chooses_best: bool) -> dict[str, Dataset]:
    """Name the train, validation and test rows; rows set aside are taken from the training split."""
    if args.dataset_train_split not in raw:
        raise UserError(
            f"{args.dataset_name} has no split `{args.dataset_train_split}`, only {', '.join(raw)}: "
            f"choose one with --dataset_train_split"
        )
    if args.dataset_test_split not in raw and args.dataset_test_split != DataArguments.dataset_test_split:
        raise UserError(
            f"{args.dataset_name} has no split `{args.dataset_test_split}`, only {', '.join(raw)}: "
            f"choose one with --dataset_test_split"
        )
    train = raw[args.dataset_train_split]
    if args.dataset_test_split in raw:
        test = raw[args.dataset_test_split]
    else:
        train, test = _set_aside(train, args, seed)
    if "validation" in raw:
        validation = raw["validation"]
    else:
        train, validation = _set_aside(train, args, seed) if chooses_best else (train, test)
    if min(len(train), len(test), len(validation)) == 0:
        raise UserError(f"{args.dataset_name} has an empty split")
    return {"train": train, "validation": validation, "test": test}


def _set_aside(rows: Dataset, args: DataArguments, seed: int) -> tuple[Dataset, Dataset]:
    """(rows that stay, rows set aside), at least one of each."""
    if len(rows) < 2:
        raise UserError(f"{args.dataset_name} has {len(rows)} row(s): at least two are needed, one to hold out")
    n = min(max(1, round(args.test_split_size * len(rows))), len(rows) - 1)
    parts = rows.train_test_split(test_size=n, seed=seed)
    return parts["train"], parts["test"]


def _convert(rows: Dataset, fmt: formats.Format, where: str, num_proc: int | None) -> Dataset:
    def convert(row: dict[str, Any]) -> dict[str, Any]:
        try:
            return fmt.convert(row)
        except formats.FieldError as error:
            raise UserError(f"{where}: row {row[ROW]}: {error}") from None

    # `datasets` keys its cache by the name of an imported function, not by its code: a cached result could be stale.
    return rows.map(
        convert,
        remove_columns=rows.column_names,
        num_proc=num_proc,
        load_from_cache_file=False,
        desc=f"Converting {where}",
    )


def fingerprint(splits: Mapping[str, Dataset]) -> str:
    """A hash of the content: the same rows give the same fingerprint, wherever they were loaded from."""
    digest = hashlib.sha256()
    for name, rows in splits.items():
        digest.update(name.encode())
        for row in rows:
            digest.update(json.dumps(row, sort_keys=True, default=str, ensure_ascii=False).encode())
    return digest.hexdigest()[:16]
