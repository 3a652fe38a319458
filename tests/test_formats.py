"""Each dataset format is recognised by its columns and becomes the columns TRL's trainers expect."""

from __future__ import annotations

from typing import Any

import pytest

from llmcore_hf.data import formats
from llmcore_hf.errors import UserError

Row = dict[str, Any]


def user(text: str) -> Row:
    return {"role": "user", "content": text}


def assistant(text: str) -> Row:
    return {"role": "assistant", "content": text}


def system(text: str) -> Row:
    return {"role": "system", "content": text}


def human(text: str) -> Row:
    return {"from": "human", "value": text}


def gpt(text: str) -> Row:
    return {"from": "gpt", "value": text}


DEVELOPER = {"role": "developer", "content": "s"}


def calling(arguments: Any) -> Row:
    function = {"name": "f", "arguments": arguments}
    return {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "type": "function", "function": function}]}


# name of the format, its task, a row in it, the same row as TRL wants it
CASES: list[tuple[str, str, Row, Row]] = [
    ("TRL language modeling", "sft", {"text": "once"}, {"text": "once"}),
    (
        "TRL prompt-completion",
        "sft",
        {"prompt": "2+2=", "completion": "4"},
        {"prompt": "2+2=", "completion": "4"},
    ),
    (
        "TRL prompt-completion (conversational)",
        "sft",
        {"prompt": [user("2+2")], "completion": [assistant("4")]},
        {"prompt": [user("2+2")], "completion": [assistant("4")]},
    ),
    (
        "alpaca",
        "sft",
        {"instruction": "Add", "input": "2 2", "output": "4"},
        {"prompt": [user("Add\n2 2")], "completion": [assistant("4")]},
    ),
    (
        "alpaca",
        "sft",
        {"instruction": "Add", "input": "", "output": "4"},
        {"prompt": [user("Add")], "completion": [assistant("4")]},
    ),
    (
        "alpaca",
        "sft",
        {"instruction": "Add", "output": "4"},
        {"prompt": [user("Add")], "completion": [assistant("4")]},
    ),
    (
        "alpaca",
        "sft",
        {"instruction": "And 3?", "output": "6", "system": "Be brief", "history": [["Double 2", "4"]]},
        {
            "prompt": [system("Be brief"), user("Double 2"), assistant("4"), user("And 3?")],
            "completion": [assistant("6")],
        },
    ),
    (
        "OpenAI messages",
        "sft",
        {"messages": [system("s"), user("q"), assistant("a"), user("r"), assistant("b")]},
        {"messages": [system("s"), user("q"), assistant("a"), user("r"), assistant("b")]},
    ),
    (
        "ShareGPT",
        "sft",
        {"conversations": [human("q"), gpt("a")], "system": "s"},
        {"messages": [system("s"), user("q"), assistant("a")]},
    ),
    (
        "ShareGPT",
        "sft",
        {"conversations": [{"from": "system", "value": "s"}, human("q"), gpt("a"), human("r"), gpt("b")]},
        {"messages": [system("s"), user("q"), assistant("a"), user("r"), assistant("b")]},
    ),
    ("ShareGPT", "sft", {"conversations": [user("q"), assistant("a")]}, {"messages": [user("q"), assistant("a")]}),
    (
        "TRL preference",
        "preference",
        {"prompt": "2+2=", "chosen": "4", "rejected": "5"},
        {"prompt": "2+2=", "chosen": "4", "rejected": "5"},
    ),
    (
        "TRL preference (conversational)",
        "preference",
        {"prompt": [user("2+2")], "chosen": [assistant("4")], "rejected": [assistant("5")]},
        {"prompt": [user("2+2")], "chosen": [assistant("4")], "rejected": [assistant("5")]},
    ),
    (  # the prompt as text beside whole conversations, as in HuggingFaceH4/ultrafeedback_binarized
        "TRL preference (conversational)",
        "preference",
        {"prompt": "q", "chosen": [user("q"), assistant("4")], "rejected": [user("q"), assistant("5")]},
        {"prompt": [user("q")], "chosen": [assistant("4")], "rejected": [assistant("5")]},
    ),
    (
        "TRL preference, implicit prompt (conversational)",
        "preference",
        {"chosen": [user("q"), assistant("4")], "rejected": [user("q"), assistant("5")]},
        {"prompt": [user("q")], "chosen": [assistant("4")], "rejected": [assistant("5")]},
    ),
    (
        "TRL preference, implicit prompt",
        "preference",
        {"chosen": "q? yes", "rejected": "q? no"},
        {"prompt": "q?", "chosen": " yes", "rejected": " no"},
    ),
    (
        "TRL unpaired preference",
        "unpaired preference",
        {"prompt": "2+2=", "completion": "5", "label": "false"},
        {"prompt": "2+2=", "completion": "5", "label": False},
    ),
    (
        "TRL unpaired preference (conversational)",
        "unpaired preference",
        {"prompt": [user("2+2")], "completion": [assistant("4")], "label": 1},
        {"prompt": [user("2+2")], "completion": [assistant("4")], "label": True},
    ),
    ("TRL prompt-only", "prompt", {"prompt": "2+2="}, {"prompt": "2+2="}),
    ("TRL prompt-only (conversational)", "prompt", {"prompt": [user("2+2")]}, {"prompt": [user("2+2")]}),
    (
        "ShareGPT",
        "sft",
        {
            "conversations": [
                human("Weather?"),
                {"from": "function_call", "value": '{"name": "look", "arguments": {"at": "sky"}}'},
                {"from": "observation", "value": "sunny"},
                gpt("Sunny."),
            ]
        },
        {
            "messages": [
                user("Weather?"),
                {
                    "role": "assistant",
                    "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}],
                },
                {"role": "tool", "content": "sunny"},
                assistant("Sunny."),
            ]
        },
    ),
    (  # the other name of an answer of a tool
        "ShareGPT",
        "sft",
        {
            "conversations": [
                human("q"),
                {"from": "function_call", "value": '{"name": "f"}'},
                {"from": "function_response", "value": "4"},
                gpt("a"),
            ]
        },
        {
            "messages": [
                user("q"),
                {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f"}}]},
                {"role": "tool", "content": "4"},
                assistant("a"),
            ]
        },
    ),
    (  # what the API of OpenAI writes: arguments as JSON text
        "OpenAI messages",
        "sft",
        {"messages": [DEVELOPER, user("q"), calling('{"x": 1}'), {"role": "tool", "content": "4"}, assistant("a")]},
        {"messages": [DEVELOPER, user("q"), calling({"x": 1}), {"role": "tool", "content": "4"}, assistant("a")]},
    ),
    (  # parts of text and images, which the vision modules read
        "OpenAI messages",
        "sft",
        {"messages": [{"role": "user", "content": [{"type": "image"}]}, assistant("a cat")], "images": ["cat.png"]},
        {"messages": [{"role": "user", "content": [{"type": "image"}]}, assistant("a cat")], "images": ["cat.png"]},
    ),
    (
        "alpaca preference",
        "preference",
        {"instruction": "Add", "input": "2 2", "chosen": "4", "rejected": "5"},
        {"prompt": [user("Add\n2 2")], "chosen": [assistant("4")], "rejected": [assistant("5")]},
    ),
    (
        "ShareGPT preference",
        "preference",
        {"conversations": [human("q"), gpt("a"), human("r")], "chosen": gpt("4"), "rejected": gpt("5")},
        {
            "prompt": [user("q"), assistant("a"), user("r")],
            "chosen": [assistant("4")],
            "rejected": [assistant("5")],
        },
    ),
]
IDS = [f"{name}-{i}" for i, (name, *_) in enumerate(CASES)]


def convert(row: Row) -> Row:
    return formats.detect(list(row), [row], "data.json").convert(row)


@pytest.mark.parametrize(("name", "task", "row", "expected"), CASES, ids=IDS)
def test_a_row_is_recognised_and_converted(name: str, task: str, row: Row, expected: Row) -> None:
    fmt = formats.detect(list(row), [row], "data.json")
    assert (fmt.name, fmt.task) == (name, task)
    assert fmt.convert(row) == expected


@pytest.mark.parametrize(("name", "task", "row", "expected"), CASES, ids=IDS)
def test_columns_that_no_format_knows_do_no_harm(name: str, task: str, row: Row, expected: Row) -> None:
    row = {"id": 7, "source": "web", **row}
    fmt = formats.detect(list(row), [row], "data.json")
    assert (fmt.name, fmt.convert(row)) == (name, expected)


def test_every_format_has_a_case() -> None:
    assert {fmt.name for fmt in formats.FORMATS} == {name for name, *_ in CASES}


def test_an_implicit_text_prompt_is_what_both_answers_begin_with() -> None:
    row = convert({"chosen": "Human: hi\n\nAssistant: hello", "rejected": "Human: hi\n\nAssistant: go"})
    assert row["prompt"] + row["chosen"] == "Human: hi\n\nAssistant: hello"
    assert row["prompt"] + row["rejected"] == "Human: hi\n\nAssistant: go"
    assert row["prompt"].startswith("Human: hi\n\nAssistant:")


def test_tools_stay_with_the_conversation() -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    assert convert({"messages": [user("q"), assistant("a")], "tools": tools})["tools"] == tools


def test_a_tool_call_needs_no_text() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add"}}], "name": None}
    messages = [user("q"), call, {"role": "tool", "content": "4"}, assistant("4")]
    converted = convert({"messages": messages})["messages"]
    assert converted[1] == {"role": "assistant", "tool_calls": [{"function": {"name": "add"}}]}


def test_half_of_the_first_rows_decide() -> None:
    """The others are then reported one by one."""
    talks, texts = {"prompt": [user("q")], "completion": [assistant("a")]}, {"prompt": "q", "completion": "a"}
    found = [formats.detect(list(texts), rows, "").name for rows in ([talks, texts], [talks, texts, texts])]
    assert found == ["TRL prompt-completion (conversational)", "TRL prompt-completion"]


def test_unknown_columns_are_refused_with_the_list_of_formats() -> None:
    with pytest.raises(UserError) as caught:
        formats.detect(["question", "answer"], [{"question": "q", "answer": "a"}], "my.json")
    message = str(caught.value)
    assert "my.json" in message and "`question`, `answer`" in message
    for fmt in formats.FORMATS:
        assert fmt.name in message
        assert all(column in message for column in fmt.columns)
