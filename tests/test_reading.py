"""Rows keep their place on the way from a file: shards, processes, folders, symbolic links, the cache, renamed columns."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from data_files import (
    FORMATS,
    GOOD,
    Row,
    assistant,
    converted_rows,
    good_rows,
    loaded_rows,
    problems_of,
    read,
    refusal,
    user,
    write_json,
    write_jsonl,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmcore_hf.data import preparing, reading
from llmcore_hf.errors import UserError

PAIR, CHAT = "TRL prompt-completion", "OpenAI messages"
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"x": {"type": "integer"}}}}]


@pytest.fixture
def tiny_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "SHARD_BYTES", 50)
    monkeypatch.setattr(reading, "BLOCK_BYTES", 16)


def raw_rows(path: Path) -> list[reading.RawRow]:
    return list(reading.open_dataset(str(path))["train"].rows())


# --- shards -------------------------------------------------------------------------------------------------------

line_contents = st.sampled_from(["", " ", "[1]", "{", '{"a": "\u2028 \x85"}']) | st.integers(0, 10**9).map(
    lambda n: json.dumps({"text": "x" * (n % 40), "n": n})
)


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines=st.lists(line_contents, min_size=1, max_size=30),
    end=st.sampled_from(["\n", "\r\n"]),
    bom=st.booleans(),
    shard_bytes=st.integers(1, 90),
    block_bytes=st.integers(1, 40),
)
def test_no_cut_loses_a_row_or_a_line_number(
    tmp_path: Path, lines: list[str], end: str, bom: bool, shard_bytes: int, block_bytes: int
) -> None:
    lines = ['{"text": "first"}', *lines]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" * bom + end.join(lines).encode())
    whole = raw_rows(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "SHARD_BYTES", shard_bytes)
        patch.setattr(reading, "_kind_of_text", lambda path: ("jsonl", 3 * bom))
        patch.setattr(reading, "BLOCK_BYTES", block_bytes)
        source = reading.open_dataset(str(path))["train"]
    assert list(source.rows()) == whole
    assert [raw.line for raw in whole] == [i for i, line in enumerate(lines, 1) if line.strip()]
    assert sum(len(list(shard.rows())) > 0 for shard in source.shards) <= len(lines)


def test_a_long_file_is_cut_and_a_short_one_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", good_rows(PAIR, 40))
    assert len(reading.open_dataset(str(path))["train"].shards) == 1
    monkeypatch.setattr(reading, "SHARD_BYTES", 200)
    monkeypatch.setattr(reading, "BLOCK_BYTES", 64)
    shards = reading.open_dataset(str(path))["train"].shards
    assert len(shards) > 3
    assert all(shard.end - shard.start <= 300 for shard in shards)  # type: ignore[union-attr,operator]


@pytest.mark.parametrize("num_proc", [None, pytest.param(2, marks=pytest.mark.slow)])
def test_a_file_in_shards_is_prepared_as_a_whole(tmp_path: Path, tiny_shards: None, num_proc: int | None) -> None:
    rows: list[Any] = good_rows(PAIR, 60)
    rows[37] = {"prompt": "x", "completion": 3}
    path = write_jsonl(tmp_path / "rows.jsonl", [*rows, rows[5]])
    message, found = problems_of(path)
    assert [(p["kind"], p["line"]) for p in found] == [("type", 38), ("duplicate", 61)], message
    assert "is the same as line 6" in found[1]["text"]
    splits = read(path, num_proc=num_proc, on_bad_rows="drop", test_split_size=0.2)
    assert loaded_rows(splits) == converted_rows(PAIR, rows[:37] + rows[38:])
    numbers = [int(row["prompt"][1:]) for row in splits.train]
    assert numbers == sorted(numbers), "the rows are out of order"


def test_a_table_is_cut_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset

    rows = [*good_rows(PAIR, 30), {"prompt": "", "completion": "a"}, *good_rows(PAIR, 1)]
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    monkeypatch.setattr(reading, "SHARD_BYTES", 100)
    assert len(reading.open_dataset(str(tmp_path / "rows.parquet"))["train"].shards) > 2
    _, found = problems_of(tmp_path / "rows.parquet")
    assert [(p["kind"], p["row"], p["line"]) for p in found] == [("empty", 30, None), ("duplicate", 31, None)]
    assert found[1]["text"] == "is the same as row 0"


def test_a_table_without_rows_is_refused(tmp_path: Path) -> None:
    from datasets import Dataset

    Dataset.from_dict({"prompt": [], "completion": []}).to_parquet(tmp_path / "rows.parquet")
    assert "rows.parquet has no rows: give a file with at least two" in refusal(tmp_path / "rows.parquet")


# --- what a file is -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", "{lines}"),
        ("rows.json", "{lines}"),
        ("rows.json", "{array}"),
        ("rows.json", "\ufeff {array}\n\n"),
        ("rows.jsonl", "{array}"),
        ("rows.jsonl", "\ufeff{lines}"),
        ("rows.jsonl", "\n \n{lines}\n\n"),
    ],
)
def test_arrays_and_lines_are_told_apart(tmp_path: Path, name: str, content: str) -> None:
    rows = good_rows(PAIR, 3)
    lines, array = "\r\n".join(map(json.dumps, rows)), json.dumps(rows, indent=1)
    text = content.replace("{lines}", lines).replace("{array}", array)
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    assert loaded_rows(read(tmp_path / name)) == converted_rows(PAIR, rows)


def test_a_csv_file_may_hold_line_ends_quotes_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b'\xef\xbb\xbf\r\nprompt,completion\r\n"a\r\n""b"", c",d\r\n\r\ne,"f\nf"\r\n')
    assert [(raw.row, raw.number, raw.line) for raw in raw_rows(path)] == [
        ({"prompt": 'a\r\n"b", c', "completion": "d"}, 0, 3),
        ({"prompt": "e", "completion": "f\nf"}, 1, 6),
    ]


def test_a_csv_cell_may_be_as_long_as_a_document(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(f"text\n{'x' * 2**18}\n")
    assert [len(raw.row["text"]) for raw in raw_rows(tmp_path / "rows.csv") if raw.row] == [2**18]


def test_a_link_is_followed_and_a_dangling_one_is_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "real.jsonl", good_rows(PAIR, 3))
    (tmp_path / "link.jsonl").symlink_to("real.jsonl")
    (tmp_path / "dangling.jsonl").symlink_to("nothing.jsonl")
    assert loaded_rows(read(tmp_path / "link.jsonl")) == converted_rows(PAIR, good_rows(PAIR, 3))
    assert "there is no dataset file or folder" in refusal(tmp_path / "dangling.jsonl")


def test_a_file_whose_name_is_no_text_is_refused(tmp_path: Path) -> None:
    assert "rename the file" in refusal(f"{tmp_path}/caf\udce9.jsonl")


FOLDERS: dict[str, tuple[dict[str, str], list[str]]] = {
    "nothing": ({}, ["cannot be loaded", "data files"]),
    "a README": ({"README.md": "# Data"}, ["cannot be loaded", "data files"]),
    "an empty file": ({"train.jsonl": "{lines}", "test.jsonl": ""}, ["test.jsonl is empty"]),
    "an empty array": ({"train.json": "{lines}", "test.json": "[]"}, ["split `test` has no rows", "test.json", "fill it"]),
    "only a header": (
        {"train.csv": "prompt,completion\na,b\nc,d\n", "test.csv": "prompt,completion\n"},
        ["split `test` has no rows", "test.csv"],
    ),
    "two kinds": ({"train.jsonl": "{lines}", "test.csv": "prompt,completion\nx,y\n"}, ["cannot be loaded", "csv", "json"]),
    "nothing but broken lines": ({"train.jsonl": "{\n"}, ["no row of", "train.jsonl, line 1: ", "one JSON object"]),
    "a broken test": ({"train.jsonl": "{lines}", "test.jsonl": '{"prompt": 1}\n'}, ["test.jsonl, line 1", "`prompt`"]),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_cannot_be_loaded_is_refused_in_words(tmp_path: Path, name: str) -> None:
    files, words = FOLDERS[name]
    (tmp_path / "data").mkdir()
    for file, content in files.items():
        lines = "\n".join(map(json.dumps, good_rows(PAIR, 3)))
        (tmp_path / "data" / file).write_text(content.replace("{lines}", lines))
    message = refusal(tmp_path / "data")
    assert all(word in message for word in [str(tmp_path / "data"), *words]), message


def test_files_of_one_split_are_read_in_order_and_named(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "data" / "train-0.jsonl", good_rows(PAIR, 3))
    write_jsonl(tmp_path / "data" / "train-1.jsonl", [{"prompt": 1, "completion": "a"}, GOOD[PAIR](2)])
    _, found = problems_of(tmp_path / "data")
    first, second = (str(tmp_path / "data" / f"train-{i}.jsonl") for i in (0, 1))
    assert [(p["file"], p["line"], p["kind"]) for p in found] == [(second, 1, "type"), (second, 2, "duplicate")]
    assert found[1]["text"] == f"is the same as {first}, line 3"


# --- columns ------------------------------------------------------------------------------------------------------


def test_columns_are_mapped(tmp_path: Path) -> None:
    rows = [{"question": f"q{i}", "answer": f"a{i}", "prompt": i} for i in range(3)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    splits = read(path, columns="prompt=question, completion=answer")
    assert loaded_rows(splits) == converted_rows(PAIR, good_rows(PAIR, 3))
    assert splits.format == PAIR


def test_columns_are_exchanged_together_with_their_scores(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"q{i}", "chosen": "a", "rejected": "b", "chosen_score": 1, "rejected_score": 2} for i in range(3)
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert "are chosen and rejected swapped?" in refusal(path, "preference")
    splits = read(path, "preference", columns="chosen=rejected,rejected=chosen")
    assert {(row["chosen"], row["rejected"]) for row in splits.train} == {("b", "a")}


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ("prompt=nope", ["--columns", "no column nope", "only prompt, completion"]),
        ("prompt=completion", ["`prompt`", "match no known dataset format"]),
        ("prompt", ["`prompt` is not NAME=COLUMN"]),
        ("prompt=", ["is not NAME=COLUMN"]),
        ("prompt=a,", ["`` is not NAME=COLUMN"]),
        ("question=prompt", ["no format reads `question`", "prompt, rejected"]),
        ("prompt=a,prompt=b", ["`prompt` is given twice"]),
    ],
)
def test_a_wrong_mapping_is_refused_with_the_right_names(tmp_path: Path, columns: str, words: list[str]) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", good_rows(PAIR, 3))
    with pytest.raises((UserError, ValueError)) as caught:  # the command line turns a ValueError into its message
        read(path, columns=columns)
    assert all(word in str(caught.value) for word in words), caught.value


# --- handed on ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)], ids=["list", "JSON text"])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_tools_are_handed_on(tmp_path: Path, tools: Any, suffix: str) -> None:
    from datasets import Dataset

    rows = [{**row, "tools": tools} for row in good_rows(CHAT, 3)]
    path = tmp_path / f"rows.{suffix}"
    write_jsonl(path, rows) if suffix == "jsonl" else Dataset.from_list(rows).to_parquet(path)
    assert [row["tools"] for row in read(path).train] == [TOOLS, TOOLS]


@pytest.mark.parametrize(("column", "value"), [("tools", TOOLS), ("image", "cat.png"), ("images", ["a.png", "b.png"])])
def test_a_column_that_appears_late_is_not_lost(tmp_path: Path, column: str, value: Any) -> None:
    rows = [*good_rows(PAIR, 3 * reading.SAMPLE), {"prompt": "x", "completion": "y", column: value}]
    splits = read(write_jsonl(tmp_path / "rows.jsonl", rows), on_bad_rows="drop")
    found = [row[column] for part in (splits.train, splits.test) for row in part if row["prompt"] == "x"]
    assert found == [value]
    assert set(splits.train.column_names) == {"prompt", "completion", column}


@pytest.mark.parametrize("empty", [None, "", []])
def test_an_empty_column_is_left_out(tmp_path: Path, empty: Any) -> None:
    rows = [{**row, "tools": empty, "images": empty} for row in good_rows(PAIR, 3)]
    splits = read(write_jsonl(tmp_path / "rows.jsonl", rows))
    assert splits.train.column_names == ["prompt", "completion"]


@pytest.mark.parametrize("column", ["image", "images", "picture"])
def test_images_of_a_table_keep_their_bytes(tmp_path: Path, column: str) -> None:
    from datasets import Dataset, Features, Image, List, Value
    from PIL import Image as Picture

    pictures = []
    for shade in range(4):
        buffer = io.BytesIO()
        Picture.new("RGB", (2, 2), (shade, 0, 0)).save(buffer, "PNG", compress_level=0)
        pictures.append(buffer.getvalue())
    many = column == "images"
    values = [[{"bytes": data}] if many else {"bytes": data} for data in pictures]
    feature = List(Image()) if many else Image()
    features = Features({"prompt": Value("string"), "completion": Value("string"), column: feature})
    rows = Dataset.from_dict(
        {"prompt": ["a", "b", "c", "d"], "completion": ["x"] * 4, column: values}, features=features
    )
    rows.to_parquet(tmp_path / "rows.parquet")
    splits = read(tmp_path / "rows.parquet", columns="image=picture" if column == "picture" else None)
    name = "images" if many else "image"
    assert splits.train.features[name] == feature
    encoded = splits.train.cast_column(name, List(Image(decode=False)) if many else Image(decode=False))
    first = encoded[0][name][0] if many else encoded[0][name]
    assert first["bytes"] == pictures["abcd".index(encoded[0]["prompt"])]
    assert (splits.train[0][name][0] if many else splits.train[0][name]).size == (2, 2)


def test_extra_keys_of_messages_survive(tmp_path: Path) -> None:
    """Keys differ from message to message; Arrow would fill each with the keys of all."""
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": [1, {"y": None}]}}}
    rows: list[Row] = [
        {"messages": [user("a"), {**assistant("b"), "weight": 0.5}]},
        {"messages": [user("c"), {"role": "assistant", "tool_calls": [call]}]},
    ]
    assert loaded_rows(read(write_json(tmp_path / "rows.json", rows))) == sorted(
        json.dumps(row, sort_keys=True) for row in rows
    )


# --- cache --------------------------------------------------------------------------------------------------------


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by one with each row that is converted."""
    made: list[int] = []
    convert = preparing.prepared_row
    monkeypatch.setattr(preparing, "prepared_row", lambda raw, *args: made.append(1) or convert(raw, *args))
    return made


def test_the_same_file_is_converted_once(tmp_path: Path, conversions: list[int]) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", good_rows(PAIR, 7))
    first = read(path)
    assert len(conversions) == 7
    path.touch()
    assert loaded_rows(read(path)) == loaded_rows(first)
    assert len(conversions) == 7, "it was converted again"


@pytest.mark.parametrize("change", ["content", "name", "columns", "code"])
def test_whatever_the_result_depends_on_is_in_the_key(
    tmp_path: Path, conversions: list[int], monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{**row, "other": f"o{i}"} for i, row in enumerate(good_rows(PAIR, 7))])
    read(path)
    options: dict[str, Any] = {}
    if change == "content":
        path.write_bytes(path.read_bytes().replace(b"a3", b"a9"))
    elif change == "name":  # messages name the file
        path = path.rename(tmp_path / "moved.jsonl")
    elif change == "columns":
        options["columns"] = "completion=other"
    else:
        monkeypatch.setattr(preparing, "_code_version", lambda: "another")
    read(path, **options)
    assert len(conversions) == 14


def test_a_moved_file_is_named_where_it_is(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [*good_rows(PAIR, 3), {"prompt": 1}])
    refusal(path)
    moved = path.rename(tmp_path / "moved.jsonl")
    message = refusal(moved)
    assert f"{moved}, line 4" in message and "rows.jsonl, " not in message


def test_every_format_has_a_good_row() -> None:
    assert set(GOOD) == set(FORMATS)


def test_a_folder_with_files_of_two_kinds_is_refused(tmp_path: Path) -> None:
    """`datasets` would read the more frequent kind and say nothing of the other."""
    write_jsonl(tmp_path / "train.jsonl", good_rows("TRL prompt-completion", 3))
    (tmp_path / "more.csv").write_text("prompt,completion\nq,a\n")
    message = refusal(tmp_path)
    assert "more.csv" in message and "Name one file" in message
    (tmp_path / "more.csv").unlink()
    (tmp_path / "dataset_infos.json").write_text("{}")  # what a clone of an old hub dataset holds besides
    assert len(read(tmp_path).train) + len(read(tmp_path).test) == 3


def test_a_name_that_looks_like_a_pattern_is_a_name(tmp_path: Path) -> None:
    from datasets import Dataset

    path = tmp_path / "[a]*b?.parquet"
    Dataset.from_list(good_rows("TRL prompt-completion", 3)).to_parquet(path)
    assert len(reading.open_dataset(str(path))["train"].sample) == 3
    folder = tmp_path / "[a]"
    folder.mkdir()
    assert "rename it" in refusal(folder)


@pytest.mark.parametrize(("encoding", "name"), [("utf-16", "UTF-16"), ("utf-32", "UTF-32")])
def test_a_wide_encoding_is_named(tmp_path: Path, encoding: str, name: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}', encoding=encoding)
    assert f"{name} text: save the file as UTF-8" in refusal(path)


def test_a_json_file_of_lines_may_begin_with_a_long_one(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text("".join(json.dumps({"text": "x" * n}) + "\n" for n in (reading.BLOCK_BYTES + 10, 3)))
    assert [len(raw.row["text"]) for raw in raw_rows(path) if raw.row] == [reading.BLOCK_BYTES + 10, 3]


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize("in_folder", [False, True])
def test_a_table_that_is_written_over_with_its_time_kept_is_read_anew(tmp_path: Path, suffix: str, in_folder) -> None:
    """`cp -p`, rsync and archives keep time stamps, by which `datasets` alone would take the old rows for the new."""
    import os

    import pyarrow.ipc
    from datasets import Dataset

    def first_prompt_after_writing(text: str) -> str:
        rows = Dataset.from_list([{"prompt": f"{text}{i}", "completion": "a"} for i in range(3)])
        path = tmp_path / f"train.{suffix}"
        if suffix == "parquet":
            rows.to_parquet(path)
        else:
            with (
                pyarrow.OSFile(str(path), "wb") as sink,
                pyarrow.ipc.new_stream(sink, rows.data.table.schema) as writer,
            ):
                writer.write_table(rows.data.table)
        os.utime(path, (1e9, 1e9))
        splits = read(tmp_path if in_folder else path)
        return min([*splits.train["prompt"], *splits.test["prompt"]])

    assert first_prompt_after_writing("old") == "old0"
    assert first_prompt_after_writing("new") == "new0"
