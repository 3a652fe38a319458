"""Datasets on disk for the tests: good rows of every format, and what `load` finds in a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmcore_hf.data import formats
from llmcore_hf.data.loading import DataArguments, Splits, load
from llmcore_hf.errors import UserError

Row = dict[str, Any]


def user(text: Any) -> Row:
    return {"role": "user", "content": text}


def assistant(text: Any) -> Row:
    return {"role": "assistant", "content": text}


def system(text: Any) -> Row:
    return {"role": "system", "content": text}


def human(text: Any) -> Row:
    return {"from": "human", "value": text}


def gpt(text: Any) -> Row:
    return {"from": "gpt", "value": text}


GOOD: dict[str, Callable[[int], Row]] = {
    "TRL language modeling": lambda i: {"text": f"text {i}"},
    "TRL prompt-completion": lambda i: {"prompt": f"q{i}", "completion": f"a{i}"},
    "TRL prompt-completion (conversational)": lambda i: {
        "prompt": [system("s"), user(f"q{i}")],
        "completion": [assistant(f"a{i}")],
    },
    "alpaca": lambda i: {
        "instruction": f"do {i}",
        "input": "",
        "output": f"done {i}",
        "system": "s",
        "history": [["hi", "ho"]],
    },
    "OpenAI messages": lambda i: {"messages": [system("s"), user(f"q{i}"), assistant("a"), user("r"), assistant("b")]},
    "ShareGPT": lambda i: {"conversations": [human(f"q{i}"), gpt("a"), human("r"), gpt("b")], "system": "s"},
    "TRL preference": lambda i: {"prompt": f"q{i}", "chosen": f"a{i}", "rejected": f"b{i}"},
    "TRL preference (conversational)": lambda i: {
        "prompt": [user(f"q{i}")],
        "chosen": [assistant("a")],
        "rejected": [assistant("b")],
    },
    "TRL preference, implicit prompt": lambda i: {"chosen": f"q{i}: yes", "rejected": f"q{i}: no"},
    "TRL preference, implicit prompt (conversational)": lambda i: {
        "chosen": [user(f"q{i}"), assistant("a")],
        "rejected": [user(f"q{i}"), assistant("b")],
    },
    "alpaca preference": lambda i: {"instruction": f"do {i}", "input": "x", "chosen": "a", "rejected": "b"},
    "ShareGPT preference": lambda i: {
        "conversations": [human(f"q{i}"), gpt("a"), human("r")],
        "chosen": gpt("c"),
        "rejected": gpt("d"),
    },
    "TRL unpaired preference": lambda i: {"prompt": f"q{i}", "completion": f"a{i}", "label": i % 2 == 0},
    "TRL unpaired preference (conversational)": lambda i: {
        "prompt": [user(f"q{i}")],
        "completion": [assistant("a")],
        "label": True,
    },
    "TRL prompt-only": lambda i: {"prompt": f"q{i}"},
    "TRL prompt-only (conversational)": lambda i: {"prompt": [system("s"), user(f"q{i}")]},
}
FORMATS = {fmt.name: fmt for fmt in formats.FORMATS}


def good_rows(name: str, n: int) -> list[Row]:
    return [GOOD[name](i) for i in range(n)]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_json(path: Path, rows: list[Any]) -> Path:
    """One array, its first row in line 2, each row in a line of its own."""
    path.write_text("[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]", encoding="utf-8")
    return path


def read(
    path: Path | str,
    task: str = "sft",
    seed: int = 0,
    num_proc: int | None = None,
    chooses_best: bool = False,
    limit: Any = None,
    **options: Any,
) -> Splits:
    return load(DataArguments(dataset_name=str(path), **options), task, seed, num_proc, chooses_best, limit)


def problems_of(path: Path, task: str = "sft", **options: Any) -> tuple[str, list[Row]]:
    """The message that `load` stops with, and all the problems it has written down."""
    file = path.parent / "bad_rows.jsonl.txt"
    file.unlink(missing_ok=True)
    limit = options.pop("limit", None)
    try:
        load(DataArguments(dataset_name=str(path), **options), task, 0, limit=limit, bad_rows_file=file)
    except UserError as error:
        found = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        return str(error), [json.loads(line) for line in found]
    raise AssertionError(f"{path} was loaded without a complaint")


def refusal(path: Path | str, task: str = "sft", **options: Any) -> str:
    """The message that `load` stops with."""
    return problems_of(Path(path), task, **options)[0]


def as_set(rows: Any) -> set[str]:
    return {json.dumps(row, sort_keys=True) for row in rows}


def loaded_rows(splits: Splits) -> list[str]:
    """All rows, of whichever side, in one order."""
    return sorted(json.dumps(row, sort_keys=True) for part in (splits.train, splits.test) for row in part)


def converted_rows(name: str, rows: list[Row]) -> list[str]:
    return sorted(json.dumps(FORMATS[name].convert(row), sort_keys=True) for row in rows)
