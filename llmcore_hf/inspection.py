"""`llmcore data inspect FILE`: what a dataset is, what is wrong with it, and what a trainer makes of it.

The row at the end comes from TRL's own trainer and collator, so it shows what is trained on and not what should be.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llmcore_hf import registry
from llmcore_hf.errors import ConfigError, UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from rich.text import Text

    from llmcore_hf.alignment.training import Job, SeenRow
    from llmcore_hf.data.auditing import Split
    from llmcore_hf.data.loading import Opened
    from llmcore_hf.registry import Module

USAGE = """\
usage: {prog} data inspect FILE [options]

FILE is what --dataset_name takes: a file, a folder, a hub id, a toy dataset. Exit code 1 when there are problems.

"""
VISION_MODULES = ["llava", "blip2", "flamingo"]
DECODED = (
    "each was decoded, and counted against the places in its row; tokens are not shown: they are made by the processor of a "
    "vision model"
)
NOT_LOOKED_AT = "not looked at: no module of this version trains on such rows with images"
N_MEASURED = 1000  # rows whose lengths are measured, spread evenly over the dataset


@dataclass
class InspectArguments:
    """Options of `data inspect`."""

    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    dataset_train_split: str = field(default="train", metadata={"help": "The split that is trained on."})
    columns: str | None = field(default=None, metadata={"help": "As in training: `prompt=question,completion=answer`."})
    model_name_or_path: str = field(
        default="tiny-qwen",
        metadata={"help": "Whose tokenizer and chat template to use: a folder, a hub id, a tiny one."},
    )
    module: str | None = field(
        default=None,
        metadata={"help": "Show rows as this module's trainer sees them; else the first that trains on such data."},
    )
    max_length: int = field(default=1024, metadata={"help": "Length limit in tokens, as in training."})
    row: int = field(
        default=0,
        metadata={
            "help": "Which row to show as the trainer sees it, counted from 0; when it cannot be read, the next."
        },
    )
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes that read the file."})


def main(argv: list[str], prog: str) -> int:
    """Run `data ...` and return the exit code: 0 without problems, 1 with.

    Raises:
        UserError: wrong options, or a dataset that cannot be read at all.
    """
    options = _options()
    if not argv or argv[0] != "inspect":
        raise ConfigError([f"`{' '.join(['data', *argv[:1]])}` is no command: `data inspect FILE` is"])
    if "--help" in argv or "-h" in argv or len(argv) == 1:
        print(USAGE.format(prog=prog) + _help(options), end="")
        return 0 if len(argv) > 1 else 2
    problems: list[str] = []
    name, tokens = (argv[1], argv[2:]) if not argv[1].startswith("--") else ("", argv[1:])
    if not name:
        problems.append("name the dataset first: data inspect FILE --max_length 2048")
    values = options.from_command_line(tokens, problems)
    problems += [f"--{n} must be greater than 0" for n in ("max_length", "dataset_num_proc") if not _is_fine(values, n)]
    if problems:
        raise ConfigError(problems, " of `data inspect`")
    return inspect(name, InspectArguments(**values))


def _options() -> Any:
    from llmcore_hf.config import Options

    return Options((InspectArguments,))


def _is_fine(values: dict[str, Any], name: str) -> bool:
    return values.get(name) is None or values[name] > 0


def _help(options: Any) -> str:
    lines = [
        f"  --{name:<22} {f.metadata['help']} (default: {options.defaults[name]})" for name, f in options.fields.items()
    ]
    return "\n".join(lines) + "\n"


def inspect(name: str, args: InspectArguments) -> int:
    """Print everything about the dataset `name`; 1 when it has problems."""
    from rich.console import Console

    from llmcore_hf.alignment import training
    from llmcore_hf.data import auditing, preparing
    from llmcore_hf.data.loading import DataArguments, column_mapping, find_problems, open_for_training
    from llmcore_hf.data.problems import Report
    from llmcore_hf.data.reading import IMAGE_COLUMNS

    try:
        column_mapping(args.columns)
    except ValueError as error:
        raise ConfigError([f"--columns: {error}"]) from None
    training.quieten()
    data_args = DataArguments(
        dataset_name=name,
        dataset_config=args.dataset_config,
        dataset_train_split=args.dataset_train_split,
        columns=args.columns,
    )
    opened = open_for_training(data_args)
    splits = {
        split: auditing.Split(split, preparing.prepare(source, opened.format, opened.columns, args.dataset_num_proc))
        for split, source in opened.sources.items()
    }
    has_images = bool(set(IMAGE_COLUMNS) & set(splits[args.dataset_train_split].rows.column_names))
    looks = has_images and opened.format.task == "sft"
    module = None if looks and args.module in VISION_MODULES else _module_for(opened, args.module)
    module = None if has_images else module  # whose tokenizer makes nothing of images
    job = training.load_job(args.model_name_or_path) if module else None
    limit = module.load().prompt_limit_of(job, args.max_length) if module else None
    report = Report()
    row_check = _image_check(name, args.module) if looks else None
    report.add(find_problems(splits, args.dataset_train_split, name, limit, row_check=row_check))

    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 120)
    _print_facts(console, opened, splits, VISION_MODULES if looks else [] if has_images else None)
    if has_images:
        console.print(f"images    {DECODED if looks else NOT_LOOKED_AT}", markup=False)
    try:
        if module and job:
            _print_rows(console, splits[args.dataset_train_split], module, job, args)
    finally:  # also when the template refuses a row: the problems may be the reason
        fine = "No problems found in the text." if has_images and not looks else "No problems found."
        print(f"\n{report.describe(name) if report.total else fine}")
    return 1 if report.total else 0


def _image_check(name: str, module: str | None) -> Any:
    """What finds problems of images: for one of the vision modules, with the number of images that it takes."""
    from llmcore_hf.vlm.data import row_check_of

    return row_check_of(name, registry.get(module).load().LESSON.images_per_row if module in VISION_MODULES else None)


def _module_for(opened: Opened, name: str | None) -> Module | None:
    """The module whose view of the rows is shown; None when no module trains on such data.

    Raises:
        ConfigError: the one that is named does not train on such data.
    """
    if name is None:
        return registry.for_task(opened.format.task)
    module = registry.get(name)
    if module.trains_on != opened.format.task:
        raise ConfigError([f"--module {name} does not train on {opened.format.name} data like {opened.name}"])
    return module


def _print_facts(console: Any, opened: Opened, splits: dict[str, Split], suited: list[str] | None) -> None:
    """What the dataset is; `suited` names the modules that train on it, unless its format alone says so."""
    from llmcore_hf.data import formats

    fmt, columns = opened.format, next(iter(opened.sources.values())).columns
    outputs = ", ".join(f"{name} ({kind})" for name, kind in fmt.outputs.items())
    if suited is None:
        suited = [module.name for module in registry.MODULES if module.trains_on == fmt.task]
    counts = ", ".join(
        f"{name} {len(split.good)} ({int(split.good.sum())} without problems)" for name, split in splits.items()
    )
    facts = {
        "dataset": opened.name,
        "format": f"{fmt.name}: {formats.why(fmt)}",
        "columns": f"{', '.join(columns)} -> {outputs}",
        "unused": ", ".join(sorted(set(columns) - {opened.columns.get(name, name) for name in fmt.reads})),
        "mapped": ", ".join(f"{target} from {origin}" for target, origin in opened.columns.items()),
        "for": f"--module {' or '.join(suited)}" if suited else "no module of this version",
        "rows": counts,
    }
    for key, value in facts.items():
        if value:
            console.print(f"{key:<9} {value}", markup=False)


def _print_rows(console: Any, split: Split, module: Module, job: Job, args: InspectArguments) -> None:
    """Lengths of a sample of rows, and one row with the tokens that carry loss."""
    import numpy as np

    from llmcore_hf.data.preparing import META, PROBLEMS

    readable = np.flatnonzero(split.column(PROBLEMS, valid=True))  # also rows that are too long or stand twice
    if not len(readable):
        return
    if args.row not in range(len(split.good)):
        raise ConfigError([f"--row {args.row}: there are {len(split.good)} rows, counted from 0"])
    shown = readable[np.searchsorted(readable, args.row).clip(max=len(readable) - 1)]  # that row, or the next such one
    spread = np.unique(np.linspace(0, len(readable) - 1, min(N_MEASURED, len(readable))).astype(int))
    rows = split.rows.select(np.concatenate([[shown], readable[spread]])).remove_columns(list(META))
    seen = _as_trained(module, job, rows, args.max_length)
    _print_lengths(console, [row for rows in seen[1:] for row in rows], len(seen) - 1, args)
    place = split.shown_place(int(shown))
    for row in seen[0]:
        cut = f", cut off after {len(row.ids)} of {row.n_full} tokens" if len(row.ids) < row.n_full else ""
        console.print(f"\n{row.title}, as the trainer sees it ({place}{cut}):", style="bold", markup=False)
        console.print(_coloured(row, job, console.is_terminal))
    legend = "green: carries loss" if console.is_terminal else "[[ ]] holds the tokens that carry loss"
    console.print(f"({legend}; the rest is context)", markup=False)


def _as_trained(module: Module, job: Job, rows: Dataset, max_length: int) -> list[list[SeenRow]]:
    from llmcore_hf.alignment.training import REFUSALS

    try:
        seen: list[list[SeenRow]] = module.load().as_trained(job, rows, max_length)
    except REFUSALS as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(
            f"the tokenizer of {job.name} cannot write these rows: {reason}. Name the model that they are for with "
            "--model_name_or_path"
        ) from error
    return seen


def _print_lengths(console: Any, rows: list[SeenRow], n_rows: int, args: InspectArguments) -> None:
    import numpy as np

    lengths = {
        "prompt": [row.n_prompt for row in rows],
        "answer": [row.n_full - row.n_prompt for row in rows],
        "together": [row.n_full for row in rows],
    }
    console.print(f"tokens    of {n_rows} rows, tokenizer of {args.model_name_or_path}", markup=False)
    console.print(f"          {'':<10}{'median':>8}{'95 %':>8}{'longest':>9}", markup=False)
    for name, values in lengths.items():
        numbers = f"{np.median(values):>8.0f}{np.percentile(values, 95):>8.0f}{max(values):>9}"
        console.print(f"          {name:<10}{numbers}", markup=False)
    whole = [row.n_full == len(row.ids) for row in rows]
    cut, left_out = 1 - sum(whole) / len(rows), sum(len(row.ids) > args.max_length for row in rows) / len(rows)
    trained, total = sum(sum(row.carries_loss) for row in rows), sum(len(row.ids) for row in rows)
    if left_out:  # by a trainer that does not cut
        console.print(f"too long  {left_out:.1%} for --max_length {args.max_length}: left out", markup=False)
    else:
        console.print(f"cut off   {cut:.1%} at --max_length {args.max_length}", markup=False)
    console.print(f"loss      on {trained / max(total, 1):.1%} of the tokens that are left", markup=False)


def _coloured(row: SeenRow, job: Job, coloured: bool) -> Text:
    from rich.text import Text

    text = Text()
    for carries_loss, ids in row.stretches():
        piece = _printable(job.tokenizer.decode(ids))
        if coloured:
            text.append(piece, style="black on green" if carries_loss else "dim")
        else:
            text.append(f"[[{piece}]]" if carries_loss else piece)
    return text


def _printable(text: str) -> str:
    """The text with every character that would steer a terminal made visible."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
