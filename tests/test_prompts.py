"""Any dataset that holds prompts can be answered by a policy; its other columns reach the reward functions unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from data_files import assistant, good_rows, read, refusal, system, user, write_json, write_jsonl

VALUES = ["0466", 7, 1.5, True, None, ["a", "0"], {"k": "01"}, ""]
# name of a format -> what is left of its row number i
PROMPTS = {
    "TRL prompt-completion": lambda i: f"q{i}",
    "TRL prompt-completion (conversational)": lambda i: [system("s"), user(f"q{i}")],
    "alpaca": lambda i: [system("s"), user("hi"), assistant("ho"), user(f"do {i}")],
    "OpenAI messages": lambda i: [system("s"), user(f"q{i}")],
    "ShareGPT": lambda i: [system("s"), user(f"q{i}")],
    "TRL preference": lambda i: f"q{i}",
    "TRL preference (conversational)": lambda i: [user(f"q{i}")],
    "TRL preference, implicit prompt (conversational)": lambda i: [user(f"q{i}")],
    "ShareGPT preference": lambda i: [user(f"q{i}"), assistant("a"), user("r")],
    "TRL unpaired preference": lambda i: f"q{i}",
    "TRL prompt-only": lambda i: f"q{i}",
    "TRL prompt-only (conversational)": lambda i: [system("s"), user(f"q{i}")],
}


def rows_of(path: Path, **options: Any) -> list[dict[str, Any]]:
    splits = read(path, "prompt", **options)
    return sorted([*splits.train, *splits.test], key=lambda row: str(row["prompt"]))


@pytest.mark.parametrize("name", PROMPTS)
def test_the_prompt_of_every_format_is_kept(tmp_path: Path, name: str) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", good_rows(name, 4))
    assert [row["prompt"] for row in rows_of(path)] == [PROMPTS[name](i) for i in range(4)]


@pytest.mark.parametrize("write", [write_jsonl, write_json])
def test_other_columns_of_a_text_file_keep_value_and_type(tmp_path: Path, write: Any) -> None:
    rows = [{"prompt": f"q{i}", "answer": value, "id": i} for i, value in enumerate(VALUES)]
    found = rows_of(write(tmp_path / "rows.json", rows))
    assert found == rows
    assert [type(row["answer"]) for row in found] == [type(value) for value in VALUES]


def test_other_columns_of_a_table_keep_their_own_type(tmp_path: Path) -> None:
    from datasets import Dataset, Features, Value

    features = Features({"prompt": Value("string"), "answer": Value("string"), "weight": Value("float32")})
    rows = [{"prompt": f"q{i}", "answer": "0466", "weight": 0.5} for i in range(4)]
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    splits = read(tmp_path / "rows.parquet", "prompt")
    assert splits.train.features == features
    assert sorted([*splits.train, *splits.test], key=lambda row: row["prompt"]) == rows


def test_a_csv_holds_texts(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("prompt,answer\n" + "".join(f"q{i},04{i}\n" for i in range(4)))
    assert [row["answer"] for row in rows_of(tmp_path / "rows.csv")] == ["040", "041", "042", "043"]


def test_a_reference_answer_reaches_reward_functions_under_another_name(tmp_path: Path) -> None:
    """TRL keeps `completion` from reward functions; a column under another name is handed on."""
    path = write_jsonl(tmp_path / "rows.jsonl", good_rows("TRL prompt-completion", 4))
    assert rows_of(path)[0] == {"prompt": "q0"}
    assert rows_of(path, columns="answer=completion")[0] == {"prompt": "q0", "answer": "a0"}
    alpaca = write_jsonl(tmp_path / "alpaca.jsonl", good_rows("alpaca", 4))
    assert rows_of(alpaca)[0]["output"] == "done 0"
    assert rows_of(alpaca, columns="answer=output,prompt=instruction")[0]["answer"] == "done 0"


def test_tools_stay_with_the_prompt(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    rows = [{"prompt": [user(f"q{i}")], "tools": tools} for i in range(4)]
    assert rows_of(write_jsonl(tmp_path / "rows.jsonl", rows))[0]["tools"] == tools


def test_rows_that_differ_in_another_column_are_no_duplicates(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "answer": "a"}, {"prompt": "q", "answer": "b"}, {"prompt": "r", "answer": "a"}]
    assert len(rows_of(write_jsonl(tmp_path / "rows.jsonl", rows))) == 3
    again = write_jsonl(tmp_path / "again.jsonl", [*rows, rows[0]])
    assert "duplicate" in refusal(again, "prompt")


def test_texts_without_prompts_are_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", good_rows("TRL language modeling", 4))
    message = refusal(path, "prompt")
    assert "`text` match no known dataset format" in message and "TRL prompt-only" in message


def test_prompts_alone_are_no_data_for_sft(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", good_rows("TRL prompt-only", 4))
    message = refusal(path, "sft")
    assert "`prompt` match no known dataset format" in message and "prompt-only" not in message


def test_a_text_column_beside_the_prompt_is_passed_on(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": f"q{i}", "text": "t"} for i in range(4)])
    assert rows_of(path)[0] == {"prompt": "q0", "text": "t"}


@pytest.mark.parametrize("column", ["__row__", "a\ud800"])
def test_a_column_that_cannot_be_passed_on_is_refused(tmp_path: Path, column: str) -> None:
    import json

    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"q{i}", column: 1}) + "\n" for i in range(4)))
    assert "rename it" in refusal(path, "prompt")
