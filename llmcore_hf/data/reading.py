"""From a dataset's name to raw rows with their place: which file, which row, which line.

Text files (.jsonl, .json, .csv) are read here, row by row, so that one broken line costs one row and is reported with
its place; `datasets` reads everything else. A .jsonl file is cut into shards at line ends, for several processes.
"""

from __future__ import annotations

import csv
import functools
import glob
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcore_hf.data.formats import FieldProblem, Row, kind_of
from llmcore_hf.data.toy import TOY_DATASETS
from llmcore_hf.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, Features, IterableDataset

BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
TEXT_BUILDERS = ("json", "csv")
SAMPLE = 100  # rows looked at to tell the format
SHARD_BYTES = 32 * 2**20
BLOCK_BYTES = 4 * 2**20
IMAGE_COLUMNS = ("image", "images")
HUGE_NUMBER = "holds a number of thousands of digits"  # more than Python converts
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class RawRow:
    """A row as it stands in its source, or the reason why there is none."""

    number: int | None  # from 0; None where only lines are counted
    line: int | None  # from 1; None where there are no lines
    row: Row | None
    problem: FieldProblem | None = None


@dataclass(frozen=True)
class TextShard:
    """A stretch of a text file: from byte `start`, which is the beginning of line `first_line`, to byte `end`."""

    path: str
    kind: str  # jsonl, json, csv
    start: int = 0
    end: int | None = None
    first_line: int = 1

    def rows(self) -> Iterator[RawRow]:
        return {"jsonl": _json_lines, "json": _json_array, "csv": _csv_rows}[self.kind](self)


@dataclass(frozen=True)
class TableShard:
    """Rows that `datasets` has read; `first_row` is the number of the first of them."""

    path: str
    table: Dataset | IterableDataset
    first_row: int = 0

    def rows(self) -> Iterator[RawRow]:
        for number, row in enumerate(self.table, self.first_row):
            yield RawRow(number, None, row)


Shard = TextShard | TableShard


@dataclass
class Source:
    """One split of a dataset, not yet read.

    Attributes:
        split: its name.
        shards: stretches that can be read one by one, in the order of the rows.
        digest: a hash of the content; the same content gives the same digest. None when streaming.
        features: types of columns that are handed on, such as images; only `datasets` knows them.
        sample: the first rows that could be read.
    """

    split: str
    shards: list[Shard]
    digest: str | None
    features: Features | None = None
    sample: list[Row] = field(init=False)

    def __post_init__(self) -> None:
        self.sample = list(islice((raw.row for raw in self.rows() if raw.row is not None), SAMPLE))

    def rows(self) -> Iterator[RawRow]:
        for shard in self.shards:
            yield from shard.rows()

    @property
    def columns(self) -> list[str]:
        """Column names; in a text file, those of its first rows."""
        if self.features is not None:
            return list(self.features)
        return list(dict.fromkeys(name for row in self.sample for name in row))


def looks_like_path(name: str) -> bool:
    """Whether a dataset or model name can only mean a place on disk, not a hub id."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).suffix in BUILDERS


@functools.cache
def toy_dataset(name: str) -> DatasetDict:
    """A toy dataset, made once in a process; images take seconds. Datasets do not change, they give others."""
    return TOY_DATASETS[name]()


def open_dataset(name: str, config_name: str | None = None, streaming: bool = False) -> dict[str, Source]:
    """The splits of the dataset `name`: a toy dataset, a file, a folder or a hub id.

    Raises:
        UserError: there is no such dataset, it is empty, or it cannot be read at all.
    """
    if name in TOY_DATASETS:
        return _from_tables(toy_dataset(name), name)
    path = Path(name).expanduser()
    try:
        name.encode()
    except UnicodeEncodeError:
        raise UserError(f"the name of {name!r} is not UTF-8 text: rename the file") from None
    if path.is_file():
        if path.suffix not in BUILDERS:
            raise UserError(f"{name}: files of type `{path.suffix}` are not read; use {', '.join(BUILDERS)}")
        with _explaining(name):
            return _from_files(BUILDERS[path.suffix], {"train": [str(path)]}, streaming)
    if path.is_dir():
        return _from_folder(path, config_name, streaming)
    if looks_like_path(name):
        raise UserError(f"there is no dataset file or folder {name}")
    from datasets import load_dataset

    with _explaining(name):
        loaded = load_dataset(name, name=config_name, streaming=streaming)
    return _from_tables(loaded, name)


@contextmanager
def _explaining(name: str, hint: str = "") -> Iterator[None]:
    """Turn whatever a reader of `datasets` raises into one message: each raises its own kinds."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = _innermost(error)
        if "corresponds to no data" in reason:  # how `datasets` says that a table is empty
            raise UserError(f"{name} has no rows: give a file with at least two") from error
        raise UserError(f"the dataset {name} cannot be loaded: {reason}{hint and f'; {hint}'}") from error


def _innermost(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()) or type(error).__name__


def _from_folder(path: Path, config_name: str | None, streaming: bool) -> dict[str, Source]:
    from datasets import load_dataset, load_dataset_builder, load_from_disk

    if glob.escape(str(path)) != str(path):
        raise UserError(f"{path}: `datasets` takes a folder with [, * or ? in its name for a pattern: rename it")
    with _explaining(str(path)):
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            return _from_tables(load_from_disk(str(path)), str(path))
        builder = load_dataset_builder(str(path), name=config_name)
        found = builder.config.data_files or {}
        files = {str(split): [str(file) for file in paths] for split, paths in found.items()}
        if builder.name in BUILDERS.values() and all(Path(f).suffix in BUILDERS for fs in files.values() for f in fs):
            _refuse_left_out(path, [file for paths in files.values() for file in paths])
            return _from_files(builder.name, files, streaming)
        return _from_tables(load_dataset(str(path), name=config_name, streaming=streaming), str(path))


def _from_files(builder: str, files: dict[str, list[str]], streaming: bool) -> dict[str, Source]:
    if builder not in TEXT_BUILDERS:
        return _from_table_files(builder, files, streaming)
    sources = {}
    for split, paths in files.items():
        _refuse_empty(paths)
        if streaming:
            kinds = [_kind_of_text(Path(path)) for path in paths]
            shards = [TextShard(path, *kind) for path, kind in zip(paths, kinds, strict=True)]
            sources[split] = Source(split, list(shards), None)
            continue
        scanned = [_scan(Path(path)) for path in paths]
        digest = hashlib.sha256("".join(digest for _, digest in scanned).encode()).hexdigest()
        sources[split] = Source(split, [shard for shards, _ in scanned for shard in shards], digest)
    return sources


def _from_table_files(builder: str, files: dict[str, list[str]], streaming: bool) -> dict[str, Source]:
    """Parquet and Arrow files. `datasets` caches them by time stamp; under a name made of the content it must read anew."""
    from datasets import load_dataset

    paths = [path for found in files.values() for path in found]
    _refuse_empty(paths)
    digest = None if streaming else hashlib.sha256("".join(map(_digest_of, paths)).encode()).hexdigest()
    # `datasets` takes a name with [ or * for a pattern
    escaped = {split: [glob.escape(path) for path in found] for split, found in files.items()}
    with _explaining(paths[0], f"is it a {Path(paths[0]).suffix} file, and whole?"):
        loaded = load_dataset(builder, name=digest and digest[:32], data_files=escaped, streaming=streaming)
        return _from_tables(loaded, paths[0] if len(paths) == 1 else str(Path(paths[0]).parent), digest)


def _digest_of(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _refuse_left_out(folder: Path, read: list[str]) -> None:
    """`datasets` reads the most frequent kind of file in a folder and passes over the others without a word."""
    known = {Path(file).resolve() for file in read}
    beside = {file.parent for file in known}
    left_out = [
        file.name
        for parent in sorted(beside)
        for file in sorted(parent.iterdir())
        if file.suffix in BUILDERS and file.resolve() not in known and file.name != "dataset_infos.json"
    ]
    if left_out:
        raise UserError(
            f"{folder} holds data files that would not be read beside {Path(read[0]).name}: {', '.join(left_out)}. Name one "
            "file, or leave files of one kind in the folder, with names that begin with train, validation or test"
        )


def _refuse_empty(paths: list[str]) -> None:
    for path in paths:
        if Path(path).stat().st_size == 0:
            raise UserError(f"{path} is empty: give a file with at least two rows")


def _from_tables(loaded: Any, name: str, content: str | None = None) -> dict[str, Source]:
    """Sources of what `datasets` has loaded; `content` is a hash of the files, where there are files."""
    from datasets import Dataset, IterableDataset

    splits = {"train": loaded} if isinstance(loaded, Dataset | IterableDataset) else dict(loaded)
    sources = {}
    for split, rows in splits.items():
        for column, feature in (rows.features or {}).items():
            if (encoded := image_feature(feature, decode=False)) is not None:
                rows = rows.cast_column(column, encoded)  # decoding and encoding again would change the bytes
        digest = (content and f"{content} {split}") or (rows._fingerprint if isinstance(rows, Dataset) else None)
        place = name if len(splits) == 1 else f"{name} ({split})"
        sources[str(split)] = Source(str(split), _table_shards(rows, place), digest, rows.features)
    return sources


def image_feature(feature: Any, decode: bool) -> Any:
    """The same column of images, decoded or as bytes; None when it holds no images."""
    from datasets import Image, List

    if isinstance(feature, List) and isinstance(feature.feature, Image):
        return List(Image(decode=decode))
    return Image(decode=decode) if isinstance(feature, Image) else None


def _table_shards(rows: Dataset | IterableDataset, place: str) -> list[Shard]:
    from datasets import Dataset

    if not isinstance(rows, Dataset):
        return [TableShard(place, rows)]
    n_shards = max(1, -(-rows.data.nbytes // SHARD_BYTES))
    shards: list[Shard] = []
    first = 0
    for i in range(min(n_shards, len(rows))):
        part = rows.shard(n_shards, i, contiguous=True)
        shards.append(TableShard(place, part, first))
        first += len(part)
    return shards


def _scan(path: Path) -> tuple[list[TextShard], str]:
    """The shards of a text file and a hash of its content, in one pass over its bytes."""
    kind, begin = _kind_of_text(path)
    digest, cuts = hashlib.sha256(kind.encode()), [(begin, 1)]
    offset, line, next_cut = 0, 1, SHARD_BYTES
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            end_of_line = block.find(b"\n", max(next_cut - offset, 0)) if offset + len(block) > next_cut else -1
            if kind == "jsonl" and end_of_line >= 0:
                cuts.append((offset + end_of_line + 1, line + block.count(b"\n", 0, end_of_line + 1)))
                next_cut = cuts[-1][0] + SHARD_BYTES
            line += block.count(b"\n")
            offset += len(block)
    ends = [start for start, _ in cuts[1:]] + [offset]
    found = zip(cuts, ends, strict=True)
    return [TextShard(str(path), kind, start, end, first) for (start, first), end in found if start < end], (
        digest.hexdigest()
    )


def _kind_of_text(path: Path) -> tuple[str, int]:
    """`csv`, `json` (one array) or `jsonl`, and the byte where it begins, behind a byte order mark.

    A .json file may hold an array or, as many do, one object per line.
    """
    with open(path, "rb") as file:
        head = file.read(BLOCK_BYTES)
    for name, marks in (("UTF-32", (b"\xff\xfe\0\0", b"\0\0\xfe\xff")), ("UTF-16", (b"\xff\xfe", b"\xfe\xff"))):
        if head.startswith(marks):
            raise UserError(f"{path} is {name} text: save the file as UTF-8")
    if b"\0" in head:
        raise UserError(f"{path} is not a text file (it holds zero bytes): give a {', '.join(BUILDERS)} file")
    begin = len(BYTE_ORDER_MARK) if head.startswith(BYTE_ORDER_MARK) else 0
    head = head[begin:].lstrip()
    if not head:
        raise UserError(f"{path} is empty: it holds nothing but white space")
    if path.suffix == ".csv":
        return "csv", begin
    first_line, _, rest = head.partition(b"\n")
    if path.suffix == ".jsonl":  # a line that holds a list is a bad row; a file that is one list has the wrong suffix
        is_array = head.startswith(b"[") and not (rest.strip() and _is_json(first_line))
    else:
        is_cut_off = not rest and len(head) + begin == BLOCK_BYTES  # one very long line, of which this is the beginning
        is_array = head.startswith(b"[") or not (is_cut_off or _is_json(first_line))
    return "json" if is_array else "jsonl", begin


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _json_lines(shard: TextShard) -> Iterator[RawRow]:
    with open(shard.path, "rb") as file:
        file.seek(shard.start)
        position, number = shard.start, shard.first_line
        for line in file:
            if shard.end is not None and position >= shard.end:
                return
            if line.strip():
                yield _json_line(line, number)
            position += len(line)
            number += 1


def _json_line(line: bytes, number: int) -> RawRow:
    try:
        row = json.loads(line.decode("utf-8").rstrip())
    except UnicodeDecodeError as error:
        return RawRow(None, number, None, _not_utf8(line, error))
    except json.JSONDecodeError as error:
        text = f"is not valid JSON at column {error.colno}: {error.msg}"
        return RawRow(None, number, None, FieldProblem("json", None, text, "write one JSON object per line"))
    except ValueError:
        return RawRow(None, number, None, FieldProblem("json", None, HUGE_NUMBER, "write it as text, in quotes"))
    except RecursionError:
        return RawRow(None, number, None, FieldProblem("json", None, "is nested too deeply", "flatten the object"))
    return _as_row(row, None, number)


def _as_row(value: Any, number: int | None, line: int | None) -> RawRow:
    if isinstance(value, dict):
        return RawRow(number, line, value)
    text = f"holds {kind_of(value)}, not an object with named fields"
    return RawRow(number, line, None, FieldProblem("json", None, text, 'write {"prompt": ..., "completion": ...}'))


def _not_utf8(data: bytes, error: UnicodeDecodeError) -> FieldProblem:
    try:
        data.decode("gb18030")
        guess = "it may be GBK: iconv -f GB18030 -t UTF-8 old > new"
    except UnicodeDecodeError:
        guess = "save the file as UTF-8"
    return FieldProblem("encoding", None, f"is not UTF-8 text (byte {error.start + 1} of the line)", guess)


def _json_array(shard: TextShard) -> Iterator[RawRow]:
    """The elements of one JSON array, each with the line it begins in."""
    text, problem = _decode(Path(shard.path))
    if problem:
        yield problem
        return
    number, line, counted = 0, 1, 0
    try:
        for value, position in _elements(text):
            line, counted = line + text.count("\n", counted, position), position
            yield _as_row(value, number, line)
            number += 1
    except json.JSONDecodeError as error:
        yield _unreadable(error.lineno, f"column {error.colno}: not valid JSON: {error.msg}", "mend the file there")
    except ValueError:
        yield _unreadable(line, f"the element behind this line {HUGE_NUMBER}", "write it as text, in quotes")
    except RecursionError:
        yield _unreadable(line, "an element is nested too deeply", "flatten it")


def _elements(text: str) -> Iterator[tuple[Any, int]]:
    """Decode an array element by element: (value, position). Raises `json.JSONDecodeError` where it is broken."""
    decoder, position = json.JSONDecoder(), _skip_space(text, 0)
    if not text.startswith("[", position):
        raise json.JSONDecodeError("expected a list of rows, [{...}, {...}], or one object per line", text, position)
    position = _skip_space(text, position + 1)
    closed = text.startswith("]", position)
    while not closed:
        value, end = decoder.raw_decode(text, position)
        yield value, position
        position = _skip_space(text, end)
        closed = text.startswith("]", position)
        if not closed:
            if not text.startswith(",", position):
                raise json.JSONDecodeError("expected `,` or `]`", text, position)
            position = _skip_space(text, position + 1)
    rest = _skip_space(text, position + 1)
    if rest < len(text):
        raise json.JSONDecodeError("there is more behind the end of the list", text, rest)


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _unreadable(line: int, text: str, remedy: str) -> RawRow:
    return RawRow(None, line, None, FieldProblem("unreadable", None, text, remedy))


def _decode(path: Path) -> tuple[str, RawRow | None]:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig"), None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        begin = data.rfind(b"\n", 0, error.start) + 1
        end = data.find(b"\n", error.end)
        problem = _not_utf8(
            data[begin : end if end >= 0 else len(data)], UnicodeDecodeError("utf-8", b"", error.start - begin, 0, "")
        )
        return "", _unreadable(line, problem.text, problem.remedy)


def _csv_rows(shard: TextShard) -> Iterator[RawRow]:
    csv.field_size_limit(2**31 - 1)
    with open(shard.path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        header: list[str] | None = None
        number = 0
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                last = f" up to line {reader.line_num}" if reader.line_num > line else ""
                kind = "unreadable" if last else "csv"  # an open quote has swallowed lines: how many rows, nobody knows
                text = f"is not valid CSV{last}: {error}"
                yield RawRow(number, line, None, FieldProblem(kind, None, text, "mend the quotes"))
                number += 1
                continue
            except UnicodeDecodeError:
                yield _decode(Path(shard.path))[1] or _unreadable(line, "is not UTF-8 text", "save the file as UTF-8")
                return
            if header is None and cells:
                header = cells
                if problem := _wrong_header(header):
                    yield RawRow(None, line, None, problem)
                    return
            elif header is not None and cells:
                yield _csv_row(header, cells, number, line)
                number += 1


def _wrong_header(header: list[str]) -> FieldProblem | None:
    twice = next((name for i, name in enumerate(header) if name in header[:i]), None)
    if twice is not None:
        return FieldProblem("unreadable", twice, "stands twice among the column names", "give each column its own name")
    if len(header) == 1 and (separator := next((mark for mark in ";\t|" if mark in header[0]), None)):
        text = f"separates its columns with {separator!r}, not with a comma"
        return FieldProblem("unreadable", None, text, "save the file with commas")
    return None


def _csv_row(header: list[str], cells: list[str], number: int, line: int) -> RawRow:
    if len(cells) == len(header):
        return RawRow(number, line, dict(zip(header, cells, strict=True)))
    text = f"has {len(cells)} cells under {len(header)} column names"
    remedy = "put a text that holds commas or line ends in double quotes"
    return RawRow(number, line, None, FieldProblem("csv", None, text, remedy))
