"""What is wrong with a dataset is said with file, row, field and remedy; all of it at once, whatever it is."""

from __future__ import annotations

import json
from collections.abc import Callable
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
    gpt,
    human,
    loaded_rows,
    problems_of,
    read,
    refusal,
    system,
    user,
    write_json,
    write_jsonl,
)
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from llmcore_hf.data.problems import DROP, KEEP, SHOWN, STOP, BadData, Problem, Report
from llmcore_hf.errors import UserError

TEXT, PAIR, CHAT_PAIR = "TRL language modeling", "TRL prompt-completion", "TRL prompt-completion (conversational)"
ALPACA, CHAT, SHAREGPT = "alpaca", "OpenAI messages", "ShareGPT"
TRIPLE, CHAT_TRIPLE = "TRL preference", "TRL preference (conversational)"
IMPLICIT, CHAT_IMPLICIT = "TRL preference, implicit prompt", "TRL preference, implicit prompt (conversational)"
ALPACA_TRIPLE, SHAREGPT_TRIPLE = "alpaca preference", "ShareGPT preference"
LABELLED = "TRL unpaired preference"
BOT = {"from": "bot", "value": "a"}
CALL = {"from": "function_call", "value": "not json"}


def chat(*turns: Any) -> Row:
    return {"messages": list(turns)}


def talk(*turns: Any) -> Row:
    return {"conversations": list(turns)}


def call(**fields: Any) -> Row:
    return {"role": "assistant", "content": None, "tool_calls": [fields]}


def pair(chosen: Any, rejected: Any) -> Row:
    return {"chosen": chosen, "rejected": rejected}


# format of the file, what differs in its bad row, and for each problem: kind, field, a word of text or remedy
BAD_ROWS: list[tuple[str, Row, list[tuple[str, str | None, str]]]] = [
    (TEXT, {"text": None}, [("missing", "text", "fill it in")]),
    (TEXT, {"text": " \n\t"}, [("empty", "text", "fill it in")]),
    (TEXT, {"text": ["a"]}, [("type", "text", "in quotes")]),
    (TEXT, {"text": "\ud800"}, [("encoding", None, "write the character whole")]),
    (PAIR, {"prompt": None, "completion": ""}, [("missing", "prompt", "fill"), ("empty", "completion", "fill")]),
    (PAIR, {"prompt": {"a": 1}, "completion": True}, [("type", "prompt", "an object"), ("type", "completion", "true")]),
    (PAIR, {"completion": float("nan")}, [("type", "completion", "a number")]),
    (PAIR, {"tools": "[{"}, [("json", "tools", "leave it empty")]),
    (PAIR, {"tools": 3}, [("type", "tools", "one object per tool")]),
    (PAIR, {"tools": ["add"]}, [("type", "tools", "one object per tool")]),
    (PAIR, {"image": 3}, [("type", "image", "path as text")]),
    (PAIR, {"images": "a.png"}, [("type", "images", "column `image`")]),
    (PAIR, {"images": ["a.png", 3]}, [("type", "images", "each path as text")]),
    (CHAT_PAIR, {"prompt": []}, [("empty", "prompt", "at least one")]),
    (CHAT_PAIR, {"prompt": "q"}, [("type", "prompt", '"role": "user"')]),
    (CHAT_PAIR, {"prompt": [user("q"), assistant("a")]}, [("order", "prompt", "`user`")]),
    (CHAT_PAIR, {"completion": [user("a")]}, [("order", "completion", "leave out the turns")]),
    (CHAT_PAIR, {"completion": [assistant("a"), user("q")]}, [("order", "completion", "remove the last one")]),
    (
        CHAT,
        chat({**user("q"), "tool_calls": [{"name": "f"}]}, assistant("a")),
        [("role", "messages[0].tool_calls", "assistant")],
    ),
    (
        CHAT,
        chat(user("q"), call(function={"name": " "})),
        [("type", "messages[1].tool_calls", "without a function name")],
    ),
    (CHAT, chat({**user("q"), "id": 10**25}, assistant("a")), [("type", "messages[0].id", "in quotes")]),
    (CHAT_PAIR, {"tools": [{"function": {"limit": float("inf")}}]}, [("type", "tools[0].function.limit", "infinite")]),
    (CHAT_PAIR, {"completion": [assistant("a"), assistant("b")]}, [("order", "completion[1]", "merge the two turns")]),
    (CHAT_PAIR, {"completion": [assistant("a"), system("s"), assistant("b")]}, [("order", "completion[1]", "first")]),
    (CHAT_TRIPLE, {"chosen": [assistant("a"), assistant("b")]}, [("order", "chosen[1]", "merge the two turns")]),
    (
        CHAT_TRIPLE,
        {"prompt": "other", **pair([user("q"), assistant("a")], [user("q"), assistant("b")])},
        [("prompts", "prompt", "answer `q`")],
    ),
    (
        TRIPLE,
        {"score_chosen": "1", "score_rejected": "9.5"},
        [("swapped", "chosen", "score_chosen 1 < score_rejected 9.5")],
    ),
    (
        CHAT,
        chat(user("q"), call(function={"name": "f", "arguments": "5"})),
        [("type", "messages[1].tool_calls.arguments", "a number")],
    ),
    (
        CHAT,
        chat(user("q"), call(function={"name": "f", "arguments": {"x": [2**63]}})),
        [("type", "messages[1].tool_calls[0].function.arguments.x[0]", "64 bits")],
    ),
    (
        CHAT,
        chat(user("q"), call(function={"name": "f", "arguments": {"x": float("nan")}})),
        [("type", "messages[1].tool_calls[0].function.arguments.x", "NaN")],
    ),
    (
        CHAT_PAIR,
        {"prompt": None, "completion": [{"role": "bot", "content": ""}]},
        [("missing", "prompt", "list of messages"), ("role", "completion[0].role", "use one of")],
    ),
    (ALPACA, {"instruction": "", "output": 4}, [("empty", "instruction", "fill"), ("type", "output", "in quotes")]),
    (ALPACA, {"input": 3, "system": 4}, [("type", "input", "in quotes"), ("type", "system", "in quotes")]),
    (ALPACA, {"history": 3}, [("type", "history", "[[instruction, answer], ...]")]),
    (ALPACA, {"history": "hi"}, [("type", "history", "[[instruction, answer], ...]")]),
    (
        ALPACA,
        {"history": [["only"], ["x", "y"], [1, 2]]},
        [("type", "history[0]", "pair"), ("type", "history[2]", "pair")],
    ),
    (CHAT, {"messages": '[{"role": "user"}]'}, [("type", "messages", "a .jsonl file can")]),
    (CHAT, chat("hi", 3), [("type", "messages[0]", '{"role"'), ("type", "messages[1]", '{"role"')]),
    (CHAT, chat(user("q"), {"role": "asistant", "content": "a"}), [("role", "messages[1].role", "use one of")]),
    (CHAT, chat({"content": "q"}, assistant("a")), [("role", "messages[0].role", "nothing")]),
    (
        CHAT,
        chat({"role": "\n\x1b[31m" + "x" * 99, "content": "q"}, assistant("a")),
        [("role", "messages[0].role", "`  [31mxxx")],
    ),
    (CHAT, chat({"role": ["user"], "content": "q"}, assistant("a")), [("role", "messages[0].role", "use one of")]),
    (CHAT, chat({"role": "\ud800", "content": "q"}, assistant("a")), [("role", "messages[0].role", "use one of")]),
    (
        CHAT,
        chat(user(None), assistant(3)),
        [("missing", "messages[0].content", "as text"), ("type", "messages[1].content", "a number")],
    ),
    (CHAT, chat(user(" "), assistant("a")), [("empty", "messages[0].content", "fill")]),
    (CHAT, chat(user("q"), assistant("")), [("empty", "messages[1].content", "fill")]),
    (CHAT, chat(user([]), assistant("a")), [("type", "messages[0].content", "a list")]),
    (CHAT, chat(assistant("a")), [("order", "messages", "add the question")]),
    (CHAT, chat(user("q")), [("order", "messages", "add the missing turn")]),
    (CHAT, chat(system("s")), [("order", "messages", "add the missing turn")]),
    (CHAT, chat(assistant("a"), user("q")), [("order", "messages[0]", "swapped?")]),
    (CHAT, chat(system("s"), assistant("a")), [("order", "messages[1]", "the user first")]),
    (CHAT, chat(user("q"), user("q"), assistant("a")), [("order", "messages[1]", "merge the two")]),
    (CHAT, chat(user("q"), assistant("a"), assistant("b")), [("order", "messages[2]", "merge the two")]),
    (CHAT, chat(user("q"), system("s"), assistant("a")), [("order", "messages[1]", "system turn first")]),
    (
        CHAT,
        chat(user("q"), {"role": "developer", "content": "s"}, assistant("a")),
        [("order", "messages[1]", "developer turn first")],
    ),
    (
        CHAT,
        chat(user("q"), {"role": "tool", "content": "4"}, assistant("a")),
        [("order", "messages[1]", "tool call before it")],
    ),
    (CHAT, chat(user("q"), call(function={})), [("type", "messages[1].tool_calls", '"name"')]),
    (CHAT, chat(user("q"), {**call(), "tool_calls": 3}), [("type", "messages[1].tool_calls", '"name"')]),
    (
        CHAT,
        chat(user("q"), call(function={"name": "f", "arguments": "{"})),
        [("json", "messages[1].tool_calls.arguments", "JSON object")],
    ),
    (SHAREGPT, {"conversations": {"from": "human"}}, [("type", "conversations", '"from": "human"')]),
    (SHAREGPT, talk(human("q"), BOT), [("role", "conversations[1].from", "use one of human")]),
    (SHAREGPT, talk({"from": ["human"], "value": "q"}, gpt("a")), [("role", "conversations[0].from", "use one of")]),
    (SHAREGPT, talk(human(None), gpt("a")), [("missing", "conversations[0].value", "fill")]),
    (SHAREGPT, talk(human("q"), gpt(7)), [("type", "conversations[1].value", "in quotes")]),
    (SHAREGPT, talk(["human", "q"], gpt("a")), [("type", "conversations[0]", '{"from"')]),
    (SHAREGPT, talk(gpt("a"), human("q")), [("order", "conversations[1]", "")]),  # the system column comes first
    (SHAREGPT, talk(human("q"), CALL), [("json", "conversations[1].value", '{"name"')]),
    (SHAREGPT, talk(human("q"), {**CALL, "value": None}), [("missing", "conversations[1].value", "fill")]),
    (
        SHAREGPT,
        talk(human("q"), {"from": "function_call", "value": '{"arguments": {}}'}),
        [("type", "conversations[1].value", '"name"')],
    ),
    (SHAREGPT, {"system": ["s"]}, [("type", "system", "in quotes")]),
    ("TRL prompt-only", {"prompt": 3}, [("type", "prompt", "in quotes")]),
    ("TRL prompt-only", {"answer": 10**30}, [("type", "answer", "as text")]),
    ("TRL prompt-only (conversational)", {"prompt": [user("q"), assistant("a")]}, [("order", "prompt", "")]),
    (TRIPLE, {"rejected": "a2"}, [("equal", "rejected", "remove the row")]),
    (TRIPLE, {"prompt": "", "rejected": None}, [("missing", "rejected", "fill"), ("empty", "prompt", "fill")]),
    (
        TRIPLE,
        {"score_chosen": 1, "score_rejected": 2.5},
        [("swapped", "chosen", "--columns chosen=rejected,rejected=chosen")],
    ),
    (
        TRIPLE,
        {"chosen-rating": 1, "rejected-rating": 2},
        [("swapped", "chosen", "chosen-rating 1 < rejected-rating 2")],
    ),
    (CHAT_TRIPLE, {"rejected": [assistant("a")]}, [("equal", "rejected", "remove the row")]),
    (CHAT_TRIPLE, {"chosen": [user("q2"), assistant("a")]}, [("order", "chosen", "`prompt` has already")]),
    (IMPLICIT, pair("yes", "no"), [("prompts", "rejected", "`prompt` column")]),
    (IMPLICIT, pair("q", "q"), [("equal", "rejected", "remove the row")]),
    (
        CHAT_IMPLICIT,
        pair([user("q"), assistant("a")], [user("r"), assistant("a")]),
        [("prompts", "rejected", "same prompt")],
    ),
    (
        CHAT_IMPLICIT,
        pair(
            [user("q"), assistant("a"), user("r"), assistant("b")],
            [user("q"), assistant("a"), user("s"), assistant("b")],
        ),
        [("prompts", "rejected", "one and the same prompt")],
    ),
    (ALPACA_TRIPLE, {"rejected": "a"}, [("equal", "rejected", "remove the row")]),
    (ALPACA_TRIPLE, {"instruction": None}, [("missing", "instruction", "fill")]),
    (SHAREGPT_TRIPLE, talk(human("q"), gpt("a")), [("order", "conversations", "remove the last one")]),
    (SHAREGPT_TRIPLE, {"chosen": human("c")}, [("order", "chosen", "the answer alone")]),
    (
        SHAREGPT_TRIPLE,
        {"chosen": None, "rejected": "text"},
        [("type", "chosen", '{"from"'), ("type", "rejected", '{"from"')],
    ),
    (LABELLED, {"label": "good"}, [("type", "label", "true or false")]),
    (LABELLED, {"label": None}, [("missing", "label", "true or false")]),
]


def row_id(case: Any) -> str:
    return f"{case[0]}: {json.dumps(case[1])[:60]}"


@pytest.mark.parametrize("case", BAD_ROWS, ids=row_id)
@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_a_bad_row_is_named_with_field_and_remedy(tmp_path: Path, case: Any, suffix: str) -> None:
    name, change, expected = case
    rows = good_rows(name, 5)
    rows[2] |= change
    path = tmp_path / f"rows.{suffix}"
    lines = [json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) if suffix == "jsonl" else "[\n" + ",\n".join(lines) + "]")
    message, found = problems_of(path, FORMATS[name].task)
    row, line = (None, 3) if suffix == "jsonl" else (2, 4)
    assert [(p["kind"], p["field"]) for p in found] == [(kind, field) for kind, field, _ in expected]
    assert {(p["file"], p["row"], p["line"], p["split"]) for p in found} == {(str(path), row, line, "train")}
    for problem, (_, field, word) in zip(found, expected, strict=True):
        assert word in problem["text"] + "; " + problem["remedy"] and problem["remedy"]
        assert str(path) in message and f"line {line}" in message and (field or "") in message


HEADER = b"prompt,completion\n"
GOOD_LINES = b'{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "d"}\n'
GBK = '{"prompt": "排序", "completion": "好"}\n'.encode("gbk")
# file, its content, and for each problem: kind, row, line, field, a word of text or remedy
BAD_FILES: list[tuple[str, bytes, list[tuple[str, int | None, int, str | None, str]]]] = [
    ("cut.jsonl", GOOD_LINES + b'{"prompt": "e", "comp', [("json", None, 3, None, "column 17")]),
    ("comma.jsonl", GOOD_LINES + b'{"prompt": "e", "completion": "f"},\n', [("json", None, 3, None, "one JSON object")]),
    ("two.jsonl", GOOD_LINES + b'{"prompt": "e"}{"prompt": "f"}\n', [("json", None, 3, None, "column 16")]),
    ("comment.jsonl", b"// rows\n" + GOOD_LINES, [("json", None, 1, None, "column 1")]),
    ("null.jsonl", b"null\n3\n" + GOOD_LINES, [("json", None, n, None, "named fields") for n in (1, 2)]),
    ("blank.jsonl", b"\n\n" + GOOD_LINES + b"\n \n[]\n", [("json", None, 7, None, "a list")]),
    ("crlf.jsonl", GOOD_LINES.replace(b"\n", b"\r\n") + b"{\r\n", [("json", None, 3, None, "one JSON object")]),
    ("bom.jsonl", b"\xef\xbb\xbf" + GOOD_LINES + b"{}\n", [("missing", None, 3, f, "fill") for f in ("prompt", "completion")]),
    ("gbk.jsonl", GOOD_LINES + GBK, [("encoding", None, 3, None, "iconv -f GB18030")]),
    ("latin.jsonl", GOOD_LINES + b'{"prompt": "\xe9", "completion": ""}\n', [("encoding", None, 3, None, "byte 13")]),
    ("deep.jsonl", GOOD_LINES + b"[" * 10**5 + b"]" * 10**5, [("json", None, 3, None, "nested too deeply")]),
    ("digits.jsonl", GOOD_LINES + b'{"prompt": ' + b"9" * 5000 + b"}", [("json", None, 3, None, "thousands of digits")]),
    ("zero.jsonl", GOOD_LINES + b'{"prompt": "a\x01", "completion": "b"}\n', [("json", None, 3, None, "control character")]),
    ("late.json", b"[" + b",\n".join(GOOD_LINES.splitlines()) + b",\n3]", [("json", 2, 3, None, "a number")]),
    ("lines.json", GOOD_LINES + b"{\n", [("json", None, 3, None, "one JSON object")]),
    ("comma.json", b'[{"prompt": "a", "completion": "b"},\n]', [("unreadable", None, 2, None, "column 1")]),
    ("open.json", b'[{"prompt": "a", "completion": "b"},\n{"prompt": "c', [("unreadable", None, 2, None, "column 12")]),
    ("end.json", b'[{"prompt": "a", "completion": "b"}', [("unreadable", None, 1, None, "`,` or `]`")]),
    ("more.json", b'[{"prompt": "a", "completion": "b"}]\n[]', [("unreadable", None, 2, None, "behind the end")]),
    ("digits.json", b'[{"prompt": "a", "completion": "b"},\n{"a": ' + b"9" * 5000 + b"}]", [("unreadable", None, 1, None, "digits")]),
    ("deep.json", b'[{"prompt": "a", "completion": "b"},\n' + b"[" * 10**5, [("unreadable", None, 1, None, "flatten")]),
    ("ragged.csv", HEADER + b"a,b\nc\nd,e,f\n", [("csv", r, r + 2, None, "double quotes") for r in (1, 2)]),
    ("empty.csv", HEADER + b"a,b\n,c\nd,\n", [("empty", 1, 3, "prompt", "fill"), ("empty", 2, 4, "completion", "fill")]),
    ("multi.csv", HEADER + b'"a\nb",c\n\nd,\n', [("empty", 1, 5, "completion", "fill")]),
    ("quote.csv", HEADER + b'a,b\n"c"x,d\ne,f\n', [("csv", 1, 3, None, "mend the quotes")]),
    ("quotes.csv", HEADER + b'a,b\n"c\nd"x,e\nf,g\n', [("unreadable", 1, 3, None, "up to line 4")]),
    ("open.csv", HEADER + b'a,b\n"c,d\ne,f\n', [("unreadable", 1, 3, None, "mend the quotes")]),
    ("gbk.csv", HEADER + b"a,b\n" + "排序,好\n".encode("gbk"), [("unreadable", None, 3, None, "iconv -f GB18030")]),
    ("messages.csv", b'messages\n"[]"\n"[]"\n', [("type", r, r + 2, "messages", ".jsonl file can") for r in (0, 1)]),
    ("images.csv", b"prompt,completion,images\na,b,c.png\n", [("type", 0, 2, "images", "column `image`")]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "expected"), BAD_FILES, ids=[name for name, *_ in BAD_FILES])
def test_a_bad_place_in_a_file_is_named(tmp_path: Path, name: str, content: bytes, expected: Any) -> None:
    (tmp_path / name).write_bytes(content)
    message, found = problems_of(tmp_path / name)
    if found:  # nothing is written down where not even the format could be told
        assert [(p["kind"], p["row"], p["line"], p["field"]) for p in found] == [place[:4] for place in expected]
    for kind, _, line, _, word in expected:
        assert all(part in message for part in (f"{tmp_path / name}, ", f"line {line}", word, f"({kind}); ")), message


# what cannot be loaded at all: file, content, words of the message
REFUSED: list[tuple[str, bytes, list[str]]] = [
    ("empty.jsonl", b"", ["empty.jsonl is empty", "two rows"]),
    ("blank.jsonl", b" \n\n", ["blank.jsonl is empty", "white space"]),
    ("bom.json", b"\xef\xbb\xbf", ["bom.json is empty"]),
    ("none.json", b"[]", ["none.json has no rows", "two"]),
    ("header.csv", b"prompt,completion\n", ["header.csv has no rows", "two"]),
    ("empty.parquet", b"", ["empty.parquet is empty"]),
    ("utf16.jsonl", GOOD_LINES.decode().encode("utf-16"), ["UTF-16", "UTF-8"]),
    ("utf16.csv", "prompt,completion\na,b\n".encode("utf-16-be"), ["zero bytes", ".csv"]),
    ("binary.jsonl", b"PK\x03\x04\0\0", ["zero bytes", ".parquet"]),
    ("wrong.parquet", GOOD_LINES, ["cannot be loaded", "is it a .parquet file"]),
    ("wrong.arrow", GOOD_LINES, ["cannot be loaded", "is it a .arrow file"]),
    ("rows.xlsx", b"x", [".xlsx", ".json", ".jsonl", ".csv", ".parquet", ".arrow"]),
    ("html.jsonl", b"<html>\n", ["html.jsonl, line 1", "column 1", "one JSON object per line"]),
    ("gbk.jsonl", GBK, ["gbk.jsonl, line 1", "GB18030"]),
    ("object.json", json.dumps({"prompt": "a", "completion": "b"}, indent=1).encode(), ["line 1", "a list of rows"]),
    ("numbers.json", b"[1, 2]", ["numbers.json, row 0 (line 1)", "a number"]),
    ("one.jsonl", GOOD_LINES.splitlines()[0], ["1 row", "two"]),
    ("wrapped.json", b'{"data": [{"prompt": "a", "completion": "b"}]}', ["`data`", "--columns"]),
    ("other.jsonl", b'{"q": "a", "a": "b"}\n' * 3, ["`q`, `a`", "--columns", "alpaca", "ShareGPT", "prompt, completion"]),
    ("space.csv", b"prompt, completion\na,b\n", ["` completion`", "Rename them"]),
    ("semicolon.csv", b"prompt;completion\na;b\n", ["line 1", "';'", "with commas"]),
    ("twice.csv", b"prompt,prompt,completion\na,b,c\n", ["line 1", "`prompt` stands twice", "own name"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "words"), REFUSED, ids=[name for name, *_ in REFUSED])
def test_a_file_that_cannot_be_loaded_is_refused_in_words(
    tmp_path: Path, name: str, content: bytes, words: list[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    message = refusal(tmp_path / name)
    assert name in message and all(word in message for word in words), message


def test_the_tables_are_as_long_as_promised() -> None:
    assert len(BAD_ROWS) + len(BAD_FILES) + len(REFUSED) >= 60
    assert {name for name, *_ in BAD_ROWS} >= set(GOOD) - {"TRL unpaired preference (conversational)"}


def test_every_problem_of_every_row_is_reported_at_once(tmp_path: Path) -> None:
    """Of 1001 bad rows with two problems each, 20 problems are shown and all are written down."""
    bad = [{"prompt": "", "completion": i} for i in range(1001)]
    path = write_jsonl(tmp_path / "rows.jsonl", [*good_rows(PAIR, 3), *bad, *good_rows(PAIR, 1)])
    message, found = problems_of(path)
    assert message.startswith(f"2003 problems in {path} (empty 1001, type 1001, duplicate 1;")
    assert message.count("\n  - ") == SHOWN == 20
    assert "... and 1983 more" in message and "bad_rows" in message
    assert [p["line"] for p in found] == [n for n in range(4, 1005) for _ in "12"] + [1005]


def test_problems_of_all_splits_and_kinds_come_together(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "data" / "train.jsonl", [*good_rows(PAIR, 3), {"prompt": "x"}, GOOD[PAIR](1)])
    write_jsonl(tmp_path / "data" / "test.jsonl", [{"prompt": "y", "completion": 2}, GOOD[PAIR](2)])
    _, found = problems_of(tmp_path / "data")
    assert [(p["split"], p["kind"], p["line"]) for p in found] == [
        ("train", "missing", 4),
        ("test", "type", 1),
        ("train", "duplicate", 5),
        ("train", "leak", 3),
    ]


def problem(kind: str) -> Problem:
    return Problem(kind, "train", "f", 0, None, None, "t", "r")


@pytest.mark.parametrize(
    ("kinds", "stops"),
    [
        ((), ()),
        (("missing",), (STOP, KEEP)),
        (("duplicate",), (STOP,)),
        (("leak", "swapped", "duplicate"), (STOP,)),
        (("duplicate", "type"), (STOP, KEEP)),
        (("unreadable",), (STOP, DROP, KEEP)),
    ],
)
def test_what_stops_a_run(kinds: tuple[str, ...], stops: tuple[str, ...]) -> None:
    report = Report()
    report.add(map(problem, kinds))
    assert {policy for policy in (STOP, DROP, KEEP) if report.stops(policy)} == set(stops)


def test_a_report_that_was_saved_keeps_all_that_comes_later(tmp_path: Path) -> None:
    report = Report()
    for kind in ("first", "second", "third"):
        report.add([problem(kind)])
        report.save(tmp_path / "bad_rows.jsonl")
    lines = (tmp_path / "bad_rows.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["first", "second", "third"]


@pytest.mark.parametrize(
    ("row", "line", "place"), [(6, 45, "f, row 6 (line 45): "), (6, None, "f, row 6: "), (None, 45, "f, line 45: ")]
)
def test_a_place_is_a_row_a_line_or_both(row: int | None, line: int | None, place: str) -> None:
    assert str(Problem("k", "train", "f", row, line, None, "t", "r")).startswith(place)
    assert str(Problem("k", "train", "f", None, None, "x", "t", "r")) == "f: `x` t (k); r"


@pytest.mark.parametrize("policy", [DROP, KEEP])
@pytest.mark.parametrize(
    ("name", "content"),
    [("rows.csv", HEADER + b'a,b\nx,y\n"c,d\ne,f\n'), ("rows.json", b"[" + GOOD_LINES.replace(b"\n", b",") + b"{]")],
)
def test_nobody_goes_on_where_rows_behind_cannot_be_read(
    tmp_path: Path, name: str, content: bytes, policy: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadData, match="what stands behind that place cannot be read"):
        read(tmp_path / name, on_bad_rows=policy)


def test_keep_stops_at_rows_that_cannot_be_trained_on(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [*good_rows(PAIR, 3), GOOD[PAIR](0), {"prompt": 3}])
    assert "--on_bad_rows keep" not in refusal(path)
    assert "type 1" in refusal(path, on_bad_rows="keep")


def test_suspicious_rows_are_kept_whole_or_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{**row, "score_chosen": 1, "score_rejected": i} for i, row in enumerate(good_rows(TRIPLE, 5))]
    path = write_jsonl(tmp_path / "rows.jsonl", [*rows, rows[0]])
    assert "or keep them with --on_bad_rows keep" in refusal(path, "preference")
    kept = read(path, "preference", on_bad_rows="keep")
    assert loaded_rows(kept) == converted_rows(TRIPLE, [*rows, rows[0]])
    assert (kept.report.counts, kept.report.rows_dropped) == ({"swapped": 3, "duplicate": 1}, 0)
    assert "Going on with these rows: --on_bad_rows keep" in capsys.readouterr().err
    dropped = read(path, "preference", on_bad_rows="drop")
    assert loaded_rows(dropped) == converted_rows(TRIPLE, rows[:2])
    assert (dropped.report.counts, dropped.report.rows_dropped) == ({"swapped": 3, "duplicate": 1}, 4)
    assert "--on_bad_rows drop" in capsys.readouterr().err


# --- generated ----------------------------------------------------------------------------------------------------

Break = Callable[[Row, str], Any]
ROLES = ("role", "from")


def turns_of(row: Row, column: str, least: int = 1) -> list[Any]:
    """The turns in a column; skips the example when there are not as many."""
    turns = row.get(column)
    assume(isinstance(turns, list) and len(turns) >= least)
    return list(turns)  # type: ignore[arg-type]


def change_turn(row: Row, column: str, change: Callable[[Row], Row]) -> Row:
    turns = turns_of(row, column)
    return {**row, column: [*turns[:-1], change(turns[-1])]}


def equal_answers(row: Row, column: str) -> Row:
    assume("chosen" in row)
    return {**row, "chosen": row["rejected"]}


BREAKS: dict[str, Break] = {
    "delete": lambda row, column: {name: value for name, value in row.items() if name != column},
    "null": lambda row, column: {**row, column: None},
    "number": lambda row, column: {**row, column: 7},
    "object": lambda row, column: {**row, column: {"a": [1]}},
    "empty": lambda row, column: {**row, column: [] if isinstance(row[column], list) else ""},
    "blank": lambda row, column: {**row, column: " \n\u3000"},
    "first turn last": lambda row, column: {**row, column: (turns := turns_of(row, column, least=2))[1:] + turns[:1]},
    "no last turn": lambda row, column: {**row, column: turns_of(row, column)[:-1]},
    "turn is text": lambda row, column: change_turn(row, column, lambda turn: "text"),  # type: ignore[arg-type,return-value]
    "no role": lambda row, column: change_turn(row, column, lambda t: {k: v for k, v in t.items() if k not in ROLES}),
    "unknown role": lambda row, column: change_turn(row, column, lambda t: t | dict.fromkeys(ROLES, "robot")),
    "number as text": lambda row, column: change_turn(row, column, lambda t: t | {"content": 7, "value": 7}),
    "no text": lambda row, column: change_turn(row, column, lambda t: t | {"content": None, "value": None}),
    "equal answers": equal_answers,
    "half a character": lambda row, column: (
        {**row, column: "\udc00"} if isinstance(row[column], str) else assume(False)
    ),
    "no object": lambda row, column: [row],
}
BREAK_LINES: dict[str, Callable[[bytes, int], bytes]] = {
    "cut": lambda line, at: line[: 1 + at % (len(line) - 1)],
    "not UTF-8": lambda line, at: line[: at % len(line)] + b"\xff" + line[at % len(line) :],
    "twice": lambda line, at: line + line,
    "comma": lambda line, at: line + b",",
    "control character": lambda line, at: line.replace(b'"', b'"\x02', 1),
}
many = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def without_a_break(name: str, broken: Any, column: str) -> bool:
    """Whether a change happens to leave a row that the format allows."""
    if not isinstance(broken, dict):
        return False
    try:
        FORMATS[name].convert(broken)
    except (ValueError, RecursionError):
        return False
    return True


@many
@given(
    data=st.data(), name=st.sampled_from(sorted(GOOD)), n=st.integers(4, 7), suffix=st.sampled_from(["jsonl", "json"])
)
def test_exactly_the_broken_row_is_named_and_dropped(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, name: str, n: int, suffix: str
) -> None:
    fmt, rows = FORMATS[name], good_rows(name, n)
    at = data.draw(st.integers(0, n - 1), "row")
    lines: list[bytes] = [json.dumps(row, ensure_ascii=False).encode() for row in rows]
    how = data.draw(st.sampled_from([*BREAKS, *(BREAK_LINES if suffix == "jsonl" else ())]), "break")
    if how in BREAKS:
        column = data.draw(st.sampled_from(fmt.columns), "column")
        broken = BREAKS[how](dict(rows[at]), column)
        # that a conversation may as well be a prompt is the one change a format allows: the turn that is missing is there
        assume(not (how == "no last turn" and without_a_break(name, broken, column)))
        lines[at] = json.dumps(broken).encode()
    else:
        lines[at] = BREAK_LINES[how](lines[at], data.draw(st.integers(0, 10**4), "byte"))
    path = tmp_path_factory.mktemp("broken") / f"rows.{suffix}"
    path.write_bytes(b"\n".join(lines) if suffix == "jsonl" else b"[\n" + b",\n".join(lines) + b"\n]")

    message, found = problems_of(path, fmt.task)
    place = (None, at + 1) if suffix == "jsonl" else (at, at + 2)
    assert found, message
    assert {(p["row"], p["line"]) for p in found} == {place}
    assert all(p["text"] and p["remedy"] for p in found)
    rest = rows[:at] + rows[at + 1 :]
    dropped = read(path, fmt.task, on_bad_rows="drop")
    assert loaded_rows(dropped) == converted_rows(name, rest)
    assert dropped.report.rows_dropped == 1


def outcomes(path: Path, **options: Any) -> list[int | str]:
    """Per task what becomes of a dataset: the rows it was loaded with, or the words it was refused with."""
    found: list[int | str] = []
    for task in ("sft", "preference", "prompt"):
        try:
            splits = read(path, task, **options)
            found.append(min(len(list(splits.train)), len(list(splits.test))))
        except UserError as error:
            found.append(str(error))
    return found


def is_fine(outcome: int | str) -> bool:
    return outcome > 0 if isinstance(outcome, int) else len(outcome) > 10


@many
@given(
    content=st.binary(max_size=60) | st.text("[]{},:\"'\\ \n\r\t\0ab1é\ufeff\u2028", max_size=60).map(str.encode),
    suffix=st.sampled_from([".json", ".jsonl", ".csv", ".parquet", ".arrow"]),
    head=st.sampled_from(
        [b"", b"[", b'{"text": ', b"text\n", b'{"text": "a"}\n{"text": "b"}\n', b"text,x\na,b\nc,d\n"]
    ),
)
def test_any_bytes_are_loaded_or_refused_in_words(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, suffix: str, head: bytes
) -> None:
    path = tmp_path_factory.mktemp("bytes") / f"rows{suffix}"
    path.write_bytes(head + content)
    assert all(map(is_fine, outcomes(path, on_bad_rows="drop")))


texts = st.sampled_from(["user", "assistant", "tool", "human", "gpt", "function_call", "[]", "{}", "\ud800"]) | st.text(
    max_size=4
)
keys = st.sampled_from(
    ["role", "content", "from", "value", "tool_calls", "function", "name", "arguments", "type", "bytes", "path"]
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys | texts, inner, max_size=4),
    max_leaves=12,
)


@st.composite
def odd_rows(draw: st.DrawFn) -> list[Any]:
    """Rows with the columns of some format and anything in them."""
    name = draw(st.sampled_from(sorted(GOOD)))
    more = ("tools", "image", "images", "history", "system", "input", "score_chosen", "score_rejected")
    columns = st.sampled_from([*FORMATS[name].columns, *more]) | texts
    odd = st.lists(st.dictionaries(columns, values, max_size=6) | values, max_size=4)
    return draw(odd) + good_rows(name, 3)


@many
@given(rows=odd_rows(), suffix=st.sampled_from(["jsonl", "json"]), policy=st.sampled_from([STOP, DROP, KEEP]))
def test_any_values_are_loaded_or_refused_in_words(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any], suffix: str, policy: str
) -> None:
    path = tmp_path_factory.mktemp("values") / f"rows.{suffix}"
    lines = [json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) if suffix == "jsonl" else f"[{', '.join(lines)}]")
    assert all(map(is_fine, outcomes(path, on_bad_rows=policy)))


def test_a_json_array_may_hold_what_splits_lines_elsewhere(tmp_path: Path) -> None:
    """U+2028, U+2029 and U+0085 end a line for Python's `splitlines`, not for JSON."""
    rows = [{"prompt": f"a\u2028b\u2029c\x85d{i}", "completion": "x\u2028"} for i in range(3)]
    for path in (write_jsonl(tmp_path / "rows.jsonl", rows), write_json(tmp_path / "rows.json", rows)):
        assert loaded_rows(read(path)) == converted_rows(PAIR, rows)
    write_jsonl(tmp_path / "rows.jsonl", [*rows, {"prompt": 3, "completion": "x"}])
    assert problems_of(tmp_path / "rows.jsonl")[1][0]["line"] == 4


@pytest.mark.parametrize("column", ["question", "conversations"])
def test_a_prompt_in_a_column_of_another_name_is_not_passed_over(tmp_path: Path, column: str) -> None:
    rows = [{column: f"q{i}", "chosen": f"The answer is {i}", "rejected": f"The answer is not {i}"} for i in range(3)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert f"--columns prompt={column}" in refusal(path, "preference")
    assert read(path, "preference", columns=f"prompt={column}").format == TRIPLE


def test_the_split_that_is_trained_on_is_not_held_out(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", good_rows(PAIR, 4))
    assert "hold out another one" in refusal(path, dataset_test_split="train")


def test_an_open_quote_that_swallows_rows_is_not_one_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('prompt,completion\nq0,a\nq1,"a\nq2,b\nq3,"c" d\nq4,a\n')
    assert "up to line 5" in refusal(path, on_bad_rows=DROP)


def test_a_conversation_brings_its_prompt_whatever_other_columns_there_are(tmp_path: Path) -> None:
    rows = [{**GOOD[CHAT_IMPLICIT](i), "question": "x", "input": ""} for i in range(3)]
    assert read(write_jsonl(tmp_path / "rows.jsonl", rows), "preference").format == CHAT_IMPLICIT
