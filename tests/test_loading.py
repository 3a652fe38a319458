"""Datasets from files, folders and the hub: read, recognised, converted, split; or refused with one clear message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from llmcore_hf.data.loading import DataArguments, Splits, load, looks_like_path
from llmcore_hf.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

REAL_DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
ROWS = [{"prompt": f"2 + {i} =", "completion": str(2 + i)} for i in range(20)]
HELD_OUT = [{"prompt": f"3 + {i} =", "completion": str(3 + i)} for i in range(3)]
PAIRS = [{"prompt": f"2 + {i} =", "chosen": str(2 + i), "rejected": str(i)} for i in range(20)]


def dataset(rows: list[dict[str, Any]]) -> Dataset:
    from datasets import Dataset

    return Dataset.from_list(rows)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(
    path: Path | str,
    task: str = "sft",
    seed: int = 0,
    num_proc: int | None = None,
    chooses_best: bool = False,
    **options: Any,
) -> Splits:
    return load(DataArguments(dataset_name=str(path), **options), task, seed, num_proc, chooses_best)


def refusal(path: Path | str, task: str = "sft", **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        read(path, task, **options)
    return str(caught.value)


def as_set(rows: Dataset) -> set[str]:
    return {json.dumps(row, sort_keys=True) for row in rows}


def write_arrow(path: Path) -> None:
    dataset(ROWS).save_to_disk(path.parent / "saved")
    (path.parent / "saved" / "data-00000-of-00001.arrow").rename(path)


WRITERS = {
    "array.json": lambda path: path.write_text(json.dumps(ROWS, indent=2)),
    "lines.json": lambda path: write_jsonl(path, ROWS),
    "rows.jsonl": lambda path: write_jsonl(path, ROWS),
    "rows.csv": lambda path: (
        dataset([{"instruction": r["prompt"], "output": f"is {r['completion']}"} for r in ROWS])
        .to_pandas()
        .to_csv(path, index=False)
    ),
    "rows.parquet": lambda path: dataset(ROWS).to_parquet(path),
    "rows.arrow": write_arrow,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_of_each_kind_is_read_whole(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    found = read(tmp_path / name)
    assert sorted(found.train.column_names) == ["completion", "prompt"]
    assert (len(found.train), len(found.test)) == (18, 2)
    assert found.source == str(tmp_path / name)
    if name == "rows.csv":
        assert found.format == "alpaca"
        expected = {f"is {2 + i}" for i in range(20)}
        assert {row["completion"][0]["content"] for part in (found.train, found.test) for row in part} == expected
    else:
        assert found.format == "TRL prompt-completion"
        assert as_set(found.train) | as_set(found.test) == as_set(dataset(ROWS))


def test_the_fingerprint_tells_content_not_place(tmp_path: Path) -> None:
    for name in ("array.json", "rows.jsonl", "rows.parquet"):
        WRITERS[name](tmp_path / name)
    same = {read(tmp_path / name).fingerprint for name in ("array.json", "rows.jsonl", "rows.parquet")}
    other = read(write_jsonl(tmp_path / "other.jsonl", [{**row, "completion": "-"} for row in ROWS])).fingerprint
    assert len(same) == 1 and other not in same


def test_a_folder_of_split_files(tmp_path: Path) -> None:
    for split, rows in (("train", ROWS[:12]), ("validation", ROWS[12:15]), ("test", ROWS[15:])):
        write_jsonl(tmp_path / f"{split}.jsonl", rows)
    found = read(tmp_path)
    assert found.train.to_list() == ROWS[:12]
    assert found.validation.to_list() == ROWS[12:15]
    assert found.test.to_list() == ROWS[15:]


@pytest.mark.parametrize("with_splits", [True, False])
def test_a_folder_from_save_to_disk(tmp_path: Path, with_splits: bool) -> None:
    from datasets import DatasetDict

    if with_splits:
        DatasetDict({"train": dataset(ROWS[:15]), "test": dataset(ROWS[15:])}).save_to_disk(tmp_path / "saved")
    else:
        dataset(ROWS).save_to_disk(tmp_path / "saved")
    found = read(tmp_path / "saved")
    assert len(found.train) + len(found.test) == 20
    assert as_set(found.train) | as_set(found.test) == as_set(dataset(ROWS))
    assert not with_splits or found.test.to_list() == ROWS[15:]


def test_a_hub_id_goes_through_load_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import DatasetDict

    calls = []

    def load_dataset(*args: Any, **kwargs: Any) -> DatasetDict:
        calls.append((args, kwargs))
        return DatasetDict({"train": dataset(ROWS), "held": dataset(HELD_OUT)})

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    found = read("someone/sums", dataset_config="easy", dataset_test_split="held")
    assert calls == [(("someone/sums",), {"name": "easy", "streaming": False})]
    assert (len(found.train), len(found.test), found.source) == (20, 3, "someone/sums")


@pytest.mark.parametrize(
    ("name", "is_path"),
    [
        ("org/name", False),
        ("name", False),
        ("./x", True),
        ("/x", True),
        ("~/x", True),
        ("a/b/c", True),
        ("x.csv", True),
    ],
)
def test_a_path_is_told_from_a_hub_id(name: str, is_path: bool) -> None:
    assert looks_like_path(name) is is_path


@pytest.mark.parametrize(("name", "task"), [("toy-sort", "sft"), ("toy-sort-preference", "preference")])
def test_a_toy_dataset_is_known_by_name(name: str, task: str) -> None:
    found = read(name, task, max_train_samples=50, max_eval_samples=None)
    assert (len(found.train), len(found.validation), len(found.test)) == (50, 200, 400)


# --- rows set aside -----------------------------------------------------------------------------------------------


def test_rows_set_aside_are_not_trained_on(tmp_path: Path) -> None:
    found = read(write_jsonl(tmp_path / "rows.jsonl", ROWS), test_split_size=0.25)
    assert (len(found.train), len(found.test)) == (15, 5)
    assert not as_set(found.train) & as_set(found.test)
    assert as_set(found.validation) == as_set(found.test)


def test_what_chooses_the_best_model_is_not_what_reports_it(tmp_path: Path) -> None:
    found = read(write_jsonl(tmp_path / "rows.jsonl", ROWS), test_split_size=0.25, chooses_best=True)
    parts = [as_set(part) for part in (found.train, found.validation, found.test)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == len(ROWS)


def test_which_rows_are_set_aside_depends_on_the_seed_alone(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    assert as_set(read(path, seed=1).test) == as_set(read(path, seed=1).test)
    assert len({frozenset(as_set(read(path, seed=seed).test)) for seed in range(6)}) > 1


@pytest.mark.parametrize("size", [0.001, 0.999])
def test_both_sides_of_a_split_keep_a_row(tmp_path: Path, size: float) -> None:
    found = read(write_jsonl(tmp_path / "rows.jsonl", ROWS[:3]), test_split_size=size)
    assert len(found.train) >= 1 and len(found.test) >= 1
    assert len(found.train) + len(found.test) == 3


def test_limits_take_the_first_rows(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", ROWS[:12])
    write_jsonl(tmp_path / "validation.jsonl", HELD_OUT)
    write_jsonl(tmp_path / "test.jsonl", ROWS[12:])
    found = read(tmp_path, max_train_samples=5, max_eval_samples=2)
    assert found.train.to_list() == ROWS[:5]
    assert found.validation.to_list() == HELD_OUT[:2]
    assert found.test.to_list() == ROWS[12:14]


# --- the data of others -------------------------------------------------------------------------------------------


def test_messages_survive_the_trip_through_arrow(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "add"}}]}
    more = [call, {"role": "tool", "content": "4"}, {"role": "assistant", "content": "4"}]
    rows = [{"messages": [{"role": "user", "content": f"2+2? {i}"}, *more]} for i in range(4)]
    found = read(write_jsonl(tmp_path / "rows.jsonl", rows))
    assert found.format == "OpenAI messages"
    assert as_set(found.train) | as_set(found.test) == {json.dumps(row, sort_keys=True) for row in rows}


def real(name: str) -> Path:
    if not (REAL_DATA / name).exists():
        pytest.skip(f"{name} is not on this machine")
    return REAL_DATA / name


def test_real_alpaca_data() -> None:
    path = real("alpaca_en_demo.json")
    found = read(path, max_eval_samples=None, on_bad_rows="drop")
    source = json.loads(path.read_text())
    assert found.format == "alpaca"
    assert len(found.train) + len(found.test) == len(source) - 14
    assert (found.report.counts, found.report.rows_dropped) == ({"duplicate": 14}, 14)
    answers = {row["completion"][0]["content"] for part in (found.train, found.test) for row in part}
    assert answers == {row["output"] for row in source}
    assert all([turn["role"] for turn in row["prompt"]] == ["user"] for row in found.train)


def test_real_sharegpt_preference_data() -> None:
    path = real("dpo_en_demo.json")
    found = read(path, "preference", max_eval_samples=None, on_bad_rows="drop")
    source = json.loads(path.read_text())
    assert found.format == "ShareGPT preference"
    assert (found.report.counts, found.report.rows_dropped) == ({"duplicate": 5}, 5)
    pairs = {(r["chosen"][0]["content"], r["rejected"][0]["content"]) for p in (found.train, found.test) for r in p}
    assert pairs == {(row["chosen"]["value"], row["rejected"]["value"]) for row in source}
    assert all(row["prompt"][-1]["role"] == "user" for row in found.train)


# --- refusals -----------------------------------------------------------------------------------------------------


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").touch()
    assert "rows.jsonl is empty" in refusal(tmp_path / "rows.jsonl")


def test_a_file_without_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text("[]")
    assert "rows.json" in refusal(tmp_path / "rows.json")


def test_a_csv_file_with_only_a_header_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("prompt,completion\n")
    assert "rows.csv" in refusal(tmp_path / "rows.csv")


def test_a_wrong_suffix_is_refused_with_the_right_ones(tmp_path: Path) -> None:
    (tmp_path / "rows.xlsx").write_text("x")
    message = refusal(tmp_path / "rows.xlsx")
    assert ".xlsx" in message
    assert all(suffix in message for suffix in (".json", ".jsonl", ".csv", ".parquet"))


def test_wrong_columns_are_refused_with_the_formats(tmp_path: Path) -> None:
    message = refusal(write_jsonl(tmp_path / "rows.jsonl", [{"q": "a", "a": "b"}] * 3))
    assert "alpaca" in message and "ShareGPT" in message and "prompt" in message and "rows.jsonl" in message


def test_preference_data_are_not_for_sft(tmp_path: Path) -> None:
    message = refusal(write_jsonl(tmp_path / "rows.jsonl", PAIRS), "sft")
    assert "--module dpo" in message and "TRL preference" in message


def test_sft_data_are_not_for_dpo(tmp_path: Path) -> None:
    message = refusal(write_jsonl(tmp_path / "rows.jsonl", ROWS), "preference")
    assert "--module sft" in message and "chosen" in message and "rejected" in message


def test_one_row_is_too_few(tmp_path: Path) -> None:
    message = refusal(write_jsonl(tmp_path / "rows.jsonl", ROWS[:1]))
    assert "1 row" in message and "two" in message


def test_a_missing_training_split_is_refused_with_those_there_are(tmp_path: Path) -> None:
    message = refusal(write_jsonl(tmp_path / "rows.jsonl", ROWS), dataset_train_split="trian")
    assert "`trian`" in message and "only train" in message and "--dataset_train_split" in message


def test_a_misspelt_test_split_is_refused(tmp_path: Path) -> None:
    """Silently holding out training rows instead would report on other rows than those asked for."""
    for split in ("train", "validation"):
        write_jsonl(tmp_path / f"{split}.jsonl", ROWS)
    assert "`valdation`" in refusal(tmp_path, dataset_test_split="valdation")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert "nowhere.json" in refusal(tmp_path / "nowhere.json")


def test_an_unreachable_hub_id_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    message = refusal("someone/sums")
    assert "someone/sums" in message and "no route to the hub" in message


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    """The cache of the conversion goes by content, not by name."""
    path = tmp_path / "rows.jsonl"
    first = read(write_jsonl(path, ROWS))
    changed = [{**row, "completion": "-"} for row in ROWS]
    second = read(write_jsonl(path, changed))
    assert first.fingerprint != second.fingerprint
    assert {row["completion"] for row in second.train} == {"-"}


def test_a_prompt_of_most_rows_is_not_set_aside_with_all_of_them(tmp_path: Path) -> None:
    often = [{"prompt": "2 + 2 =", "completion": f"4, answer {i}"} for i in range(80)]
    path = write_jsonl(tmp_path / "rows.jsonl", [*often, *ROWS])
    for seed in range(5):
        found = read(path, seed=seed)
        assert (len(found.train), len(found.test)) == (90, 10)
