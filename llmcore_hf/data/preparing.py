"""Raw rows -> one Arrow file of TRL's columns, with what is known about each row beside it.

A row that cannot be used stays in the file as its problems, so that nothing is lost on the way and everything about a
dataset can be said at once. The file is cached by content: the same bytes, format and code are prepared once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcore_hf.data import formats
from llmcore_hf.data.formats import BadRow, FieldProblem, Format, Row
from llmcore_hf.data.reading import IMAGE_COLUMNS, SAMPLE, RawRow, Shard, Source, image_feature
from llmcore_hf.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset, Features, IterableDataset

# What is known about a row, in columns beside TRL's. Every name that a user's column could have is avoided.
FILE, ROW, LINE = "__file__", "__row__", "__line__"  # where it stands
KEY, PROMPT_KEY = "__key__", "__prompt_key__"  # hashes of the row and of its prompt
PROMPT_BYTES, PROMPT_TURNS = "__prompt_bytes__", "__prompt_turns__"  # its prompt's size; turns is 0 for plain text
ROW_BYTES, ROW_TURNS = "__row_bytes__", "__row_turns__"  # the same of its prompt and its longest answer together
UNBOUNDED = 2**40  # bytes of tools, tool calls and images: only tokenizing them tells
ASKS = "__asks__"  # 1: the prompt ends with a question mark, 2: the answer does
PROBLEMS = "__problems__"  # JSON, null when there are none
META = (FILE, ROW, LINE, KEY, PROMPT_KEY, PROMPT_BYTES, PROMPT_TURNS, ROW_BYTES, ROW_TURNS, ASKS, PROBLEMS)
ANSWERS = ("text", "completion", "chosen", "rejected")
HALF_A_CHARACTER = "holds half of a surrogate pair, which is no text"
QUESTION_MARKS = ("?", "？")


def prepare(
    source: Source, fmt: Format, columns: dict[str, str], num_proc: int | None = None, prompts_only: bool = False
) -> Dataset:
    """All rows of `source` in TRL's columns and the columns `META`; from the cache when nothing has changed.

    Args:
        columns: target column -> column of the file, from `--columns`.
        prompts_only: keep the prompt alone, and the other columns of the file as they are, for reward functions.
    """
    from datasets import Dataset

    _refuse_empty(source)
    # Any row of a text file may be the first to hold tools or an image; columns that stay empty are taken away again.
    carried = formats.CARRIED_COLUMNS if source.features is None else _carried(source, columns)
    passed_on = _passed_on(source, fmt, columns) if prompts_only else None
    features = features_of(source, fmt, columns, carried, passed_on)
    n_processes = min(num_proc or 1, len(source.shards))
    rows = Dataset.from_generator(
        prepared_rows,
        features=features,
        gen_kwargs=_per_shard(source, fmt, columns, carried, passed_on),
        num_proc=n_processes if n_processes > 1 else None,
        fingerprint=_cache_key(source, fmt, columns, features),
    )
    empty = [name for name in carried if rows.data.column(name).null_count == len(rows)]
    return rows.remove_columns(empty) if empty else rows


def stream(source: Source, fmt: Format, columns: dict[str, str]) -> IterableDataset:
    """The same rows one after the other, while they are trained on."""
    from datasets import IterableDataset

    _refuse_empty(source)
    carried = _carried(source, columns)
    return IterableDataset.from_generator(
        prepared_rows,
        features=features_of(source, fmt, columns, carried),
        gen_kwargs=_per_shard(source, fmt, columns, carried, None),
    )


def _refuse_empty(source: Source) -> None:
    if next(source.rows(), None) is None:
        files = ", ".join(dict.fromkeys(shard.path for shard in source.shards))
        raise UserError(f"the split `{source.split}` has no rows: fill it, or remove it{files and f' ({files})'}")


def _carried(source: Source, columns: dict[str, str]) -> tuple[str, ...]:
    return tuple(name for name in formats.CARRIED_COLUMNS if columns.get(name, name) in source.columns)


def _passed_on(source: Source, fmt: Format, columns: dict[str, str]) -> tuple[str, ...]:
    """Columns of the file that go to reward functions, as in TRL: all but the prompt and the completion.

    A reference answer in `completion` reaches them under another name: `--columns answer=completion`.
    """
    names = dict.fromkeys([*columns, *(name for name in source.columns if name not in columns.values())])
    for name in names:
        if not name.isprintable() or name in META:
            raise UserError(f"the column {name!r} cannot be passed on to reward functions: rename it, or remove it")
    return tuple(name for name in names if name not in ("prompt", "completion", *formats.CARRIED_COLUMNS))


def _per_shard(
    source: Source,
    fmt: Format,
    columns: dict[str, str],
    carried: tuple[str, ...],
    passed_on: tuple[str, ...] | None,
) -> dict[str, list[Any]]:
    """Arguments of `prepared_rows`: `from_generator` hands out lists to processes by their length."""
    same = {"format_name": fmt.name, "columns": columns, "carried": carried, "passed_on": passed_on}
    return {"shards": source.shards, **{name: [value] * len(source.shards) for name, value in same.items()}}


def features_of(
    source: Source,
    fmt: Format,
    columns: dict[str, str],
    carried: tuple[str, ...],
    passed_on: tuple[str, ...] | None = None,
) -> Features:
    """Types of the prepared columns. Messages are stored as JSON: their keys differ from message to message."""
    from datasets import Features, Json, List, Value

    kinds = {formats.TEXT: Value("string"), formats.MESSAGES: List(Json()), formats.LABEL: Value("bool")}
    handed_on = {"tools": Json(), "image": Value("string"), "images": List(Value("string"))}  # images in files: paths
    outputs = fmt.outputs if passed_on is None else formats.as_prompts(fmt) or {}
    features = {name: kinds[kind] for name, kind in outputs.items()}
    for name in passed_on or ():
        features[name] = Json() if source.features is None else source.features[columns.get(name, name)]
    for name in carried:
        if source.features is not None and name in IMAGE_COLUMNS:
            given = source.features[columns.get(name, name)]
            features[name] = image_feature(given, decode=True) or given  # the vision modules want images, not bytes
        else:
            features[name] = handed_on[name]
    numbers = {name: Value("int64") for name in META if name not in (FILE, PROBLEMS)}
    return Features({**features, FILE: Value("string"), **numbers, PROBLEMS: Value("string")})


def prepared_rows(
    shards: list[Shard],
    format_name: list[str],
    columns: list[dict[str, str]],
    carried: list[tuple[str, ...]],
    passed_on: list[tuple[str, ...] | None],
) -> Iterator[Row]:
    """Convert the rows of some shards. The lists have one entry per shard."""
    for shard, name, mapping, handed_on, others in zip(shards, format_name, columns, carried, passed_on, strict=True):
        fmt = next(fmt for fmt in formats.FORMATS if fmt.name == name)
        for raw in shard.rows():
            yield prepared_row(raw, shard.path, fmt, mapping, handed_on, others)


def prepared_row(
    raw: RawRow,
    path: str,
    fmt: Format,
    columns: dict[str, str],
    carried: tuple[str, ...],
    passed_on: tuple[str, ...] | None = None,
) -> Row:
    """One row in TRL's columns and `META`; without TRL's columns when it has problems."""
    place = {FILE: path, ROW: raw.number, LINE: raw.line}
    if raw.problem is not None or raw.row is None:
        return place | {PROBLEMS: _dump([raw.problem])}
    row = renamed(raw.row, columns)
    doubts = fmt.doubts(row)
    try:
        converted = fmt.convert(row)
        _check_carried(converted, carried)
        others: Row = {}
        if passed_on is not None:
            handed_on = {name: converted[name] for name in formats.CARRIED_COLUMNS if name in converted}
            converted = {"prompt": formats.prompt_of(converted), **handed_on}
            others = _others(row, passed_on, raw.line is not None)
        known = place | converted | others | _known_about(converted, others)
        return known | {PROBLEMS: _dump(doubts)} if doubts else known
    except BadRow as error:
        return place | {PROBLEMS: _dump([*error.problems, *doubts])}
    except UnicodeEncodeError:
        problem = FieldProblem("encoding", None, HALF_A_CHARACTER, "write the character whole")
    except RecursionError:
        problem = FieldProblem("json", None, "is nested too deeply", "flatten the object")
    return place | {PROBLEMS: _dump([problem])}


def _others(row: Row, names: tuple[str, ...], is_text: bool) -> Row:
    """The columns that are passed on as they are. In a text file any value may stand in them: they are stored as JSON.

    Raises:
        BadRow: a number in them is one that JSON in Arrow cannot hold.
    """
    values = {name: row.get(name) for name in names}
    if not is_text:
        return values
    found = formats.Found()
    for name, value in values.items():
        formats.check_numbers(value, name, found)
    if found:
        raise BadRow(found)
    # `Json` would read the text "0466" as the number 466
    return {k: json.dumps(v, ensure_ascii=False) if isinstance(v, str) else v for k, v in values.items()}


def _check_carried(converted: Row, carried: tuple[str, ...]) -> None:
    """Raises `BadRow` when a stream, whose columns are known from its first rows, shows a new one."""
    late = [name for name in formats.CARRIED_COLUMNS if name in converted and name not in carried]
    text, remedy = (
        f"is not in the first {SAMPLE} rows, which tell the columns of a stream",
        "move such a row to the front",
    )
    if late:
        raise BadRow([FieldProblem("type", name, text, remedy) for name in late])


def renamed(row: Row, columns: dict[str, str]) -> Row:
    """The row with its columns renamed as `--columns` says."""
    if not columns:
        return row
    moved = set(columns.values())
    if {"chosen", "rejected"} & set(columns):  # scores stand beside the columns as they were
        moved |= {name for pair in formats.SCORES for name in pair}
    kept = {name: value for name, value in row.items() if name not in moved}
    return kept | {name: row[origin] for name, origin in columns.items() if origin in row}


def _dump(problems: Any) -> str:
    text = json.dumps([asdict(problem) for problem in problems], ensure_ascii=False)
    return text.encode("utf-8", "replace").decode()  # a wrong value that is shown may be no text


def _known_about(converted: Row, others: Row | None = None) -> Row:
    """What is known about a row in TRL's columns; `others` are columns that only make it differ from another row."""
    prompt = formats.prompt_of(converted)
    turns = prompt if isinstance(prompt, list) else []
    answers = [converted[name] for name in ANSWERS if name in converted] or [
        converted.get("messages", [])[len(turns) :]
    ]
    key, n_bytes = _hash((others or {}) | converted), _size(prompt) + _size(converted.get("tools"))
    images = [converted[name] for name in IMAGE_COLUMNS if name in converted]  # one question, two images: two prompts
    return {
        KEY: key,
        PROMPT_KEY: key if prompt is None else _hash([prompt, *images] if images else prompt),
        PROMPT_BYTES: n_bytes,
        PROMPT_TURNS: len(turns),
        ROW_BYTES: n_bytes + max(map(_size, answers)),
        ROW_TURNS: len(turns) + max(len(answer) if isinstance(answer, list) else 0 for answer in answers),
        ASKS: _asks(turns[-1].get("content") if turns else prompt) + 2 * _asks(_last_text(converted)),
    }


def _size(value: Any) -> int:
    """Bytes of a text, or of all texts of a conversation; `UNBOUNDED` for what a chat template writes at its own length."""
    if value is None:
        return 0
    if isinstance(value, str):
        return len(value.encode())
    if isinstance(value, list) and all(isinstance(turn, dict) and set(turn) == {"role", "content"} for turn in value):
        return sum(_size(turn["content"]) for turn in value)
    return UNBOUNDED


def _hash(value: Any) -> int:
    """64 bits of the content, the same on every machine; a pair in a million rows agrees by chance once in 10^7."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)


def _asks(text: Any) -> bool:
    return isinstance(text, str) and text.rstrip().endswith(QUESTION_MARKS)


def _last_text(converted: Row) -> Any:
    answer = converted.get("completion") or converted.get("messages") or ""
    return answer[-1].get("content") if isinstance(answer, list) else answer


def _cache_key(source: Source, fmt: Format, columns: dict[str, str], features: Features) -> str:
    """What the prepared file depends on. File names are part of it, because messages name them."""
    files = list(dict.fromkeys(shard.path for shard in source.shards))
    parts = [source.digest, fmt.name, columns, files, str(features), _code_version()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


@cache
def _code_version() -> str:
    """A hash of the code that prepares rows: after a change of it, nothing old comes out of the cache."""
    from llmcore_hf.data import reading

    digest = hashlib.sha256()
    for module in (formats.__file__, reading.__file__, __file__):
        digest.update(Path(str(module)).read_bytes())
    return digest.hexdigest()
