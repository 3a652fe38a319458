"""Rows that are trained on while they are read: checked when they come by, held-out prompts left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from data_files import GOOD, Row, good_rows, write_jsonl
from data_files import read as load_rows

from llmcore_hf import cli
from llmcore_hf.alignment import sft, training
from llmcore_hf.data import reading
from llmcore_hf.data.loading import Splits
from llmcore_hf.data.problems import BadData
from llmcore_hf.errors import UserError

PAIR, TRIPLE = "TRL prompt-completion", "TRL preference"
BAD: Row = {"prompt": "x", "completion": 3}


def read(path: Path, task: str = "sft", max_eval_samples: int | None = 3, **options: Any) -> Splits:
    return load_rows(path, task, dataset_streaming=True, max_eval_samples=max_eval_samples, **options)


def prompts(rows: Any) -> list[str]:
    return [row["prompt"] for row in rows]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet", "arrow"])
def test_the_first_rows_are_held_out_and_the_rest_is_trained_on(tmp_path: Path, suffix: str) -> None:
    from datasets import Dataset

    rows, path = good_rows(PAIR, 10), tmp_path / f"rows.{suffix}"
    if suffix == "jsonl":
        write_jsonl(path, rows)
    elif suffix == "json":
        path.write_text(json.dumps(rows))
    elif suffix == "arrow":
        Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
        path = next((tmp_path / "saved").glob("*.arrow"))
    else:
        getattr(Dataset.from_list(rows), f"to_{suffix}")(path)
    found = read(path)
    assert found.test.to_list() == found.validation.to_list() == rows[:3]
    assert list(found.train) == list(found.train) == rows[3:]  # twice: two epochs
    assert (found.format, found.report.total) == (PAIR, 0)


def test_a_file_in_a_folder_with_splits_streams_too(tmp_path: Path) -> None:
    for split, numbers in {"train": range(5), "validation": range(5, 7), "test": range(7, 9)}.items():
        write_jsonl(tmp_path / "data" / f"{split}.jsonl", [GOOD[PAIR](i) for i in numbers])
    found = read(tmp_path / "data", max_train_samples=4, chooses_best=True)
    assert [prompts(part) for part in (found.train, found.validation, found.test)] == [
        ["q0", "q1", "q2", "q3"],
        ["q5", "q6"],
        ["q7", "q8"],
    ]


def test_bad_rows_are_dropped_and_counted_once_over_two_epochs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*good_rows(PAIR, 4), BAD, {"prompt": "", "completion": ""}, *good_rows(PAIR, 6)[4:]]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    with path.open("a") as file:
        file.write("{\n")
    found = read(path, on_bad_rows="drop", max_eval_samples=1)
    assert prompts(found.train) == prompts(found.train) == ["q1", "q2", "q3", "q4", "q5"]
    assert (found.report.counts, found.report.rows_dropped) == ({"type": 1, "empty": 2, "json": 1}, 3)
    assert [problem.line for problem in found.report.first] == [5, 6, 6, 9]
    assert capsys.readouterr().err == "", "all of them are told at the end"


@pytest.mark.parametrize("at", [0, 5])
@pytest.mark.parametrize("policy", ["stop", "keep"])
def test_a_bad_row_stops_the_run_with_its_place(tmp_path: Path, at: int, policy: str) -> None:
    rows = good_rows(PAIR, 8)
    rows[at] = BAD
    with pytest.raises(BadData, match=rf"rows.jsonl, line {at + 1}: `completion`"):
        list(read(write_jsonl(tmp_path / "rows.jsonl", rows), on_bad_rows=policy).train)


def test_a_bad_row_among_the_held_out_is_dropped(tmp_path: Path) -> None:
    found = read(write_jsonl(tmp_path / "rows.jsonl", [BAD, *good_rows(PAIR, 5)]), on_bad_rows="drop")
    assert prompts(found.test) == ["q0", "q1"] and prompts(found.train) == ["q2", "q3", "q4"]
    assert found.report.rows_dropped == 1


@pytest.mark.parametrize("policy", ["stop", "drop", "keep"])
def test_a_prompt_held_out_here_is_not_trained_on_and_nobody_is_blamed(tmp_path: Path, policy: str) -> None:
    again = {"prompt": "q1", "completion": "another answer"}
    found = read(write_jsonl(tmp_path / "rows.jsonl", [*good_rows(PAIR, 5), again]), on_bad_rows=policy)
    assert prompts(found.train) == ["q3", "q4"]
    assert (found.report.counts, found.report.rows_dropped) == ({"leak": 1}, 1)


@pytest.mark.parametrize(("policy", "trained"), [("stop", None), ("drop", ["q0"]), ("keep", ["q0", "q1"])])
@pytest.mark.parametrize("split", ["test", "validation"])
def test_a_prompt_of_a_given_held_out_split_is_a_leak(
    tmp_path: Path, policy: str, trained: list[str] | None, split: str
) -> None:
    write_jsonl(tmp_path / "data" / "train.jsonl", [GOOD[PAIR](0), GOOD[PAIR](1)])
    write_jsonl(tmp_path / "data" / "test.jsonl", [GOOD[PAIR](7)])
    write_jsonl(tmp_path / "data" / f"{split}.jsonl", [{"prompt": "q1", "completion": "x"}])
    found = read(tmp_path / "data", on_bad_rows=policy)
    if trained is None:
        with pytest.raises(BadData, match=f"train.jsonl, line 2: has a prompt of the held-out split `{split}`"):
            list(found.train)
        return
    assert prompts(found.train) == trained
    assert found.report.rows_dropped == (policy == "drop")


def test_suspicious_rows_are_kept_whole(tmp_path: Path) -> None:
    rows = [{**row, "score_chosen": 1, "score_rejected": 2} for row in good_rows(TRIPLE, 5)]
    found = read(write_jsonl(tmp_path / "rows.jsonl", rows), "preference", on_bad_rows="keep")
    assert list(found.train) == good_rows(TRIPLE, 5)[3:]
    assert (found.report.counts, found.report.rows_dropped) == ({"swapped": 5}, 0)


def test_a_long_prompt_is_found(tmp_path: Path) -> None:
    limit = sft.prompt_limit_of(training.load_job("tiny-qwen"), 50)
    rows = [*good_rows(PAIR, 5), {"prompt": "long " * 50, "completion": "a"}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(BadData, match=r"line 6: its prompt of \d+ tokens fills --max_length 50"):
        list(read(path, limit=limit).train)
    assert prompts(read(path, limit=limit, on_bad_rows="drop").train) == ["q3", "q4"]


def test_a_column_that_comes_too_late_is_a_problem(tmp_path: Path) -> None:
    late = {"prompt": "x", "completion": "y", "image": "a.png"}
    path = write_jsonl(tmp_path / "rows.jsonl", [*good_rows(PAIR, reading.SAMPLE), late])
    with pytest.raises(BadData, match=r"line 101: `image` .* move such a row to the front"):
        list(read(path).train)
    path = write_jsonl(tmp_path / "rows.jsonl", [*good_rows(PAIR, reading.SAMPLE - 1), late])
    assert [row["image"] for row in read(path).train][-1] == "a.png"


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        (good_rows(PAIR, 5), {"max_eval_samples": None}, "--max_eval_samples"),
        (good_rows(PAIR, 5), {"chooses_best": True}, "leave out --dataset_streaming"),
        ([BAD, *good_rows(PAIR, 5)], {"max_eval_samples": 1, "on_bad_rows": "drop"}, "no usable row to hold out"),
    ],
)
def test_what_a_stream_cannot_do_is_refused(tmp_path: Path, rows: list[Row], options: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        read(write_jsonl(tmp_path / "rows.jsonl", rows), **options)


@pytest.mark.slow
@pytest.mark.parametrize("module", ["sft", "dpo", "reward"])
def test_a_run_on_a_stream_records_what_it_left_out(monkeypatch, tmp_path: Path, module: str) -> None:
    rows = good_rows(PAIR if module == "sft" else TRIPLE, 30)
    rows[20] = {**rows[20], "prompt": ""}
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    monkeypatch.chdir(tmp_path)
    argv = ["--module", module, "--model_name_or_path", "tiny-qwen", "--dataset_name", str(path), "--max_length", "64"]
    argv += ["--dataset_streaming", "--max_steps", "8", "--per_device_train_batch_size", "8", "--max_eval_samples", "4"]
    argv += ["--on_bad_rows", "drop", "--output_dir", "run"]
    if module != "reward":  # which generates nothing
        argv += ["--max_generation_samples", "2", "--max_new_tokens", "4"]
    assert cli.main(argv) == 0
    block = json.loads((tmp_path / "run" / "summary.json").read_text())["data"]
    assert (block["n_train"], block["n_eval"], block["n_dropped"]) == (None, 4, 1)
    assert (block["problems"], block["on_bad_rows"]) == ({"empty": 1}, "drop")
    (found,) = map(json.loads, (tmp_path / "run" / "bad_rows.jsonl").read_text().splitlines())
    assert (found["line"], found["field"]) == (21, "prompt")
