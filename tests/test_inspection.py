"""`llmcore data inspect`: what it says about a dataset, its exit codes, and the tokens it marks."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from data_files import FORMATS, GOOD, assistant, good_rows, user, write_jsonl
from PIL import Image

from llmcore_hf import cli, inspection
from llmcore_hf.alignment import dpo, sft, training

PAIR, CHAT, TRIPLE = "TRL prompt-completion", "OpenAI messages", "TRL preference"
TASKS = {"sft": sft, "preference": dpo}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def inspect(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*argv: Any) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main(["data", "inspect", *map(str, argv)])
        return code, *capsys.readouterr()

    return run


def test_it_tells_format_counts_lengths_and_a_row(tmp_path: Path, inspect: Any) -> None:
    rows = [{"question": f"q{i}", "answer": "a" * i} for i in range(1, 6)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    code, out, _ = inspect(path, "--columns", "prompt=question,completion=answer", "--row", 2)
    assert code == 0 and "No problems found." in out
    assert "TRL prompt-completion: it has the columns prompt, completion" in out
    assert "prompt from question, completion from answer" in out and "--module sft" in out
    assert "train 5 (5 without problems)" in out
    assert re.search(r"prompt +2 +2 +2\n +answer +4 +6 +6\n", out), out  # an answer ends with a token of its own
    assert f"as the trainer sees it ({path}, line 3):\nq3[[aaa<|im_end|>]]" in out
    assert "\x1b" not in out


def test_what_is_cut_off_is_told(tmp_path: Path, inspect: Any) -> None:
    rows = [{"prompt": f"q{i}", "completion": "a" * n} for i, n in enumerate((100, 47, 10, 10))]  # 47: 50 tokens in all
    code, out, _ = inspect(write_jsonl(tmp_path / "rows.jsonl", rows), "--max_length", "50")
    assert code == 0
    assert "cut off   25.0% at --max_length 50" in out and "cut off after 50 of 103 tokens" in out
    assert "[[" + "a" * 48 + "]]" in out


def test_lengths_are_measured_on_a_sample_spread_over_the_dataset(
    tmp_path: Path, inspect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspection, "N_MEASURED", 3)
    rows = [{"prompt": f"q{i}", "completion": "a" * (10 + i)} for i in range(9)]
    _, out, _ = inspect(write_jsonl(tmp_path / "rows.jsonl", rows))
    assert "tokens    of 3 rows" in out
    assert re.search(r"answer +15 +19 +19\n", out), out  # rows 0, 4 and 8: 11, 15 and 19 tokens


def test_problems_are_told_and_are_the_exit_code(tmp_path: Path, inspect: Any) -> None:
    rows = [{"prompt": "x"}, *good_rows(PAIR, 3), GOOD[PAIR](0), {"prompt": "long " * 50, "completion": "a"}]
    code, out, _ = inspect(write_jsonl(tmp_path / "rows.jsonl", rows), "--max_length", "30")
    assert code == 1
    assert "train 6 (3 without problems)" in out
    assert "3 problems in" in out and "missing 1" in out and "duplicate 1" in out and "too_long 1" in out
    assert "line 2:" in out or "line 2)" in out  # the first row cannot be shown: the next one is


def test_nothing_that_can_be_read_is_told_too(tmp_path: Path, inspect: Any) -> None:
    code, out, _ = inspect(write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "", "completion": "a"}] * 3))
    assert code == 1 and "empty 3" in out and "as the trainer sees it" not in out


def test_a_format_without_a_module_is_described(tmp_path: Path, inspect: Any) -> None:
    code, out, _ = inspect(write_jsonl(tmp_path / "rows.jsonl", good_rows("TRL unpaired preference", 3)))
    assert code == 0 and "no module of this version" in out


@pytest.mark.parametrize("name", [name for name, fmt in FORMATS.items() if fmt.task in TASKS])
def test_marked_tokens_are_those_that_trl_trains(tmp_path: Path, inspect: Any, name: str) -> None:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    fmt = FORMATS[name]
    path = write_jsonl(tmp_path / "rows.jsonl", good_rows(name, 3))
    code, out, _ = inspect(path)
    shown = re.findall(r"as the trainer sees it \(.*\):\n((?:.|\n)*?)\n\n?(?=With rejected|\()", out)
    job = training.load_job("tiny-qwen")
    rows = Dataset.from_list([fmt.convert(row) for row in good_rows(name, 1)])
    off = {"report_to": "none", "use_cpu": True, "bf16": False, "activation_checkpointing": False}
    if fmt.task == "sft":
        args = SFTConfig(output_dir=str(tmp_path), assistant_only_loss="messages" in rows.column_names, **off)
        trainer = SFTTrainer(job.path, args=args, train_dataset=rows, processing_class=job.tokenizer)
        batch = trainer.data_collator([trainer.train_dataset[0]])
        trained = [batch["input_ids"][0][batch["labels"][0] != -100]]
    else:
        args = DPOConfig(output_dir=str(tmp_path), **off)
        trainer = DPOTrainer(job.path, args=args, train_dataset=rows, processing_class=job.tokenizer)
        batch = trainer.data_collator([trainer.train_dataset[0]])
        trained = [ids[mask.bool()] for ids, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True)]
    assert code == 0 and len(shown) == len(trained), out
    for text, ids in zip(shown, trained, strict=True):
        assert "".join(re.findall(r"\[\[((?:.|\n)*?)\]\]", text)) == job.tokenizer.decode(ids)


def test_a_reward_model_marks_the_token_at_which_the_score_is_read(tmp_path: Path, inspect: Any) -> None:
    rows = [{"prompt": f"q{i}", "chosen": "yes", "rejected": "no " * 10} for i in range(4)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    code, out, _ = inspect(path, "--module", "reward")
    assert code == 0 and "--module dpo or reward" in out
    assert "q0yes[[<|im_end|>]]" in out and "q0no no" in out and "no [[<|im_end|>]]" in out
    assert "cut off   0.0%" in out
    code, out, _ = inspect(path, "--module", "reward", "--max_length", "20")
    assert code == 1 and "too_long 4" in out
    assert "too long  50.0% for --max_length 20: left out" in out and "cut off" not in out
    assert inspect(path, "--max_length", "20")[0] == 0  # dpo cuts them off


def test_a_module_that_does_not_train_on_such_data_is_no_view(tmp_path: Path, inspect: Any) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", good_rows(PAIR, 3))
    code, _, err = inspect(path, "--module", "reward")
    assert code == 2 and "--module reward does not train on" in err
    code, _, err = inspect(path, "--module", "rewad")
    assert code == 2 and "Did you mean `reward`?" in err


def test_tokens_are_coloured_on_a_terminal(tmp_path: Path) -> None:
    from rich.console import Console

    from llmcore_hf.inspection import _coloured

    job = training.load_job("tiny-qwen")
    ids = job.tokenizer("question answer")["input_ids"]
    row = training.SeenRow("Row", ids, [i > 5 for i in range(len(ids))], 6, len(ids))
    text = _coloured(row, job, coloured=True)
    console = Console(force_terminal=True, color_system="standard", width=100, file=(tmp_path / "out").open("w"))
    console.print(text)
    console.file.close()
    assert text.plain == "question answer" and "[[" not in text.plain
    assert "\x1b[" in (tmp_path / "out").read_text()


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        ([], 2, ["data inspect FILE"]),
        (["inspct", "x.jsonl"], 2, ["`data inspct` is no command", "data inspect FILE"]),
        (["inspect"], 2, ["usage"]),
        (["inspect", "--max_length", "5"], 2, ["name the dataset first"]),
        (["inspect", "{good}", "--max_lenght", "5"], 2, ["max_lenght", "max_length"]),
        (["inspect", "{good}", "--max_length", "0"], 2, ["--max_length must be greater than 0"]),
        (["inspect", "{good}", "--max_length", "many"], 2, ["max_length", "many"]),
        (["inspect", "{good}", "--dataset_num_proc", "-1"], 2, ["--dataset_num_proc must be greater than 0"]),
        (["inspect", "{good}", "--columns", "prompt"], 2, ["--columns", "NAME=COLUMN"]),
        (["inspect", "{good}", "--columns", "prompt=nope"], 1, ["--columns", "nope"]),
        (["inspect", "{good}", "--row", "3"], 2, ["--row 3", "3 rows"]),
        (["inspect", "{good}", "--row", "-1"], 2, ["--row -1", "3 rows"]),
        (["inspect", "{good}", "--dataset_train_split", "trian"], 1, ["`trian`", "only train"]),
        (["inspect", "{good}", "--model_name_or_path", "./nothing"], 1, ["./nothing"]),
        (["inspect", "nothing.jsonl"], 1, ["there is no dataset file or folder nothing.jsonl"]),
        (["inspect", "{folder}"], 1, ["cannot be loaded", "data files"]),
        (["inspect", "{empty}"], 1, ["empty.jsonl is empty"]),
        (["inspect", "{strange}"], 1, ["`q`", "match no known dataset format"]),
        (["inspect", "{parts}"], 1, ["the tokenizer of tiny-qwen cannot write", "--model_name_or_path"]),
    ],
)
def test_a_wrong_call_is_one_message_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], code: int, words: list[str]
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.jsonl").touch()
    parts = {"messages": [user([{"type": "image"}]), assistant("a")]}
    files = {
        "good": write_jsonl(tmp_path / "good.jsonl", good_rows(PAIR, 3)),
        "strange": write_jsonl(tmp_path / "strange.jsonl", [{"q": 1}]),
        "parts": write_jsonl(tmp_path / "parts.jsonl", [parts] * 2),
        "empty": tmp_path / "empty.jsonl",
        "folder": tmp_path / "folder",
    }
    assert cli.main(["data", *(word.format(**files) for word in argv)]) == code
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err + captured.out
    assert all(word in captured.err + captured.out for word in words), captured


def test_help_names_every_option(inspect: Any) -> None:
    from dataclasses import fields

    from llmcore_hf.inspection import InspectArguments

    code, out, _ = inspect("--help")
    assert code == 0 and "usage" in out
    assert all(f"--{f.name} " in out and f.metadata["help"] in out for f in fields(InspectArguments))


@pytest.mark.slow
def test_the_script_does_the_same(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [*good_rows(PAIR, 3), {"prompt": "x"}])
    command = [sys.executable, str(ROOT / "scripts" / "inspect_data.py"), str(path)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1, result.stderr
    assert "line 4: `completion` is missing" in result.stdout and "[[a0<|im_end|>]]" in result.stdout
    assert "Traceback" not in result.stderr and "\x1b" not in result.stdout


def test_columns_that_nothing_reads_are_named(tmp_path: Path, inspect: Any) -> None:
    rows = [{"prompt": f"q{i}", "completion": "a", "source": "x", "system": ""} for i in range(3)]
    _, out, _ = inspect(write_jsonl(tmp_path / "rows.jsonl", rows))
    assert re.search(r"^unused +source$", out, re.MULTILINE), out


def test_what_would_steer_a_terminal_is_shown_as_text(tmp_path: Path, inspect: Any) -> None:
    rows = [{"text": f"\x1b[31mred\x07 {i}\n数据"} for i in range(3)]
    _, out, _ = inspect(write_jsonl(tmp_path / "rows.jsonl", rows))
    assert "\\x1b[31mred\\x07 0\n数据" in out and "\x1b" not in out


def test_problems_are_told_also_when_the_template_refuses_a_row(tmp_path: Path, inspect: Any) -> None:
    part = {"role": "user", "content": [{"type": "text", "text": "q"}]}  # parts are for vision models
    rows = [{"messages": [part, assistant("a")]}, {"messages": [user("q")]}]
    code, out, err = inspect(write_jsonl(tmp_path / "rows.jsonl", rows))
    assert code == 1
    assert "1 problem in" in out and "must end with a turn" in out
    assert "cannot write these rows" in err and "Traceback" not in err


def test_images_are_decoded_and_counted(tmp_path: Path, inspect: Any) -> None:
    for i in range(4):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i}.png")
    rows = [{"image": f"{i}.png", "messages": [user("What is it?"), assistant(f"thing {i}")]} for i in range(4)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    code, out, _ = inspect(path)
    assert code == 0 and "No problems found.\n" in out
    assert "for       --module llava or blip2 or flamingo" in out and "images    each was decoded" in out
    assert inspect(path, "--module", "blip2", "--model_name_or_path", "tiny-blip2")[0] == 0
    two = write_jsonl(tmp_path / "two.jsonl", [{**rows[0], "image": None, "images": ["0.png", "1.png"]}, *rows[1:]])
    assert inspect(two)[0] == inspect(two, "--module", "llava")[0] == 0
    code, out, _ = inspect(two, "--module", "blip2")
    assert code == 1 and "holds 2 images, but this model takes 1" in out
    (tmp_path / "1.png").write_text("no image")
    rows[2]["messages"] = [user("<image> or <image>?"), assistant("a")]
    code, out, _ = inspect(write_jsonl(path, rows))
    assert code == 1 and "train 4 (2 without problems)" in out and "No problems" not in out
    assert "line 2: `image`" in out and "is not an image" in out and "line 3: `the turns` name 2 images" in out


def test_images_that_nothing_looks_at_are_not_called_fine(tmp_path: Path, inspect: Any) -> None:
    rows = [{"image": "nowhere.png", "prompt": f"q{i}", "chosen": "a", "rejected": "b"} for i in range(3)]
    code, out, _ = inspect(write_jsonl(tmp_path / "rows.jsonl", rows))
    assert code == 0 and "images    not looked at" in out and "No problems found in the text." in out
    assert "for       no module of this version" in out
