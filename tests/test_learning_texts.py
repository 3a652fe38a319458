"""What the course says, it says in the language that was asked for."""

from __future__ import annotations

import ast
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from learning_runs import RUNS, place

from llmcore_hf import cli
from llmcore_hf.learning import state
from llmcore_hf.learning.texts import LANGUAGES, in_language_of, say

CHINESE = re.compile(r"[\u4e00-\u9fff]")
FILES = sorted((ROOT / "llmcore_hf" / "learning").glob("*.py"))
SPEAKING = ("UserError", "ConfigError", "WrongOptions", "print")
INTERNAL = (
    "specimens.py",
    "grading.py",
    "formulas.py",
)  # not read by the learner, or shown within a sentence of others


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(state.PLACE, str(tmp_path / "state.json"))
    return tmp_path


@pytest.mark.parametrize(
    "argv",
    [
        "brief",
        "brief --module dqo",
        "brief --module dpo",
        "brief --module dpo --run nowhere",
        f"brief --module sft --run {RUNS / 'dpo'}",
        "brief --module dpo --run",
        "brief --module dpo --lnag x",
        "export",
        "progress --certificate c.pdf",
        "progress --certificate c.md",
        "cards",
        "cards --module dqo",
        "cheatsheet --update",
        "roadmap --update",
        "quiz",
        "quiz --module dqo",
        "quiz --level 6",
        "quiz --level x",
        "quiz --level 1 --module dpo",
        "quiz --level 1 --count 0",
        "quiz --export out --review",
        "exercise",
        "exercise list gae",
        "exercise show",
        "exercise show gea",
        "exercise check gae --file nowhere.py",
        "exercise check gae --seconds 0 --solution",
        "exercise show gae --save taken",
        "bugzoo --seed -1",
        "bugzoo --seed x",
    ],
)
def test_an_error_is_said_in_the_language_of_the_command(argv: str, folder: Path, capsys: Any) -> None:
    (folder / "taken").write_text("")
    for language in LANGUAGES:
        assert cli.main([*argv.split(), f"--lang={language}"]) in (1, 2)
        said = re.sub(r"`[^`]*`|\S*/\S*", "", capsys.readouterr().err)
        assert bool(CHINESE.search(said)) is (language == "zh"), said
        if language == "zh":  # names, options and paths are English; sentences are not
            assert not re.search(r"(?<![-\w])[a-z]+ [a-z]+ [a-z]+ [a-z]+(?![-\w,])", said), said


def test_without_lang_an_error_is_chinese(capsys: Any) -> None:
    assert cli.main(["quiz"]) == 2
    assert CHINESE.search(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("argv", "language"),
    [
        ([], "zh"),
        (["--lang", "en"], "en"),
        (["--lang=en"], "en"),
        (["--lang", "fr"], "zh"),
        (["--lang"], "zh"),
        (["--lang", "zh", "--lang", "en"], "en"),
    ],
)
def test_the_language_holds_for_one_command(argv: list[str], language: str) -> None:
    with in_language_of(argv):
        assert say(zh="zh", en="en") == language
    assert say(zh="zh", en="en") == "zh"


@pytest.mark.parametrize(("language", "said"), [("zh", "已损坏"), ("en", "is damaged")])
def test_what_is_damaged_is_said_in_both_languages(language: str, said: str, folder: Path, capsys: Any) -> None:
    (folder / "state.json").write_text("{")
    assert cli.main(["exercise", "list", "--lang", language]) == 0
    assert said in capsys.readouterr().err
    (place("dpo", folder) / "resolved_config.yaml").write_text("a: b: c")
    assert cli.main(["brief", "--module", "dpo", "--lang", language]) == 1
    assert said in capsys.readouterr().err
    shutil.rmtree(folder / "output")
    (place("dpo", folder) / "summary.json").write_text("{")
    assert cli.main(["brief", "--module", "dpo", "--lang", language]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("command", cli.COURSE)
def test_the_help_of_a_command_is_in_its_language(command: str, capsys: Any) -> None:
    for language in LANGUAGES:
        with pytest.raises(SystemExit):
            cli.main([command, "--help", "--lang", language])
        lines = [line for line in capsys.readouterr().out.splitlines() if re.search(r"  \S.*\s{2,}\S", line)]
        assert len(lines) >= 3 and all(bool(CHINESE.search(line)) is (language == "zh") for line in lines), lines


def messages(tree: ast.AST) -> Iterator[ast.expr]:
    """What errors are raised with, and what is printed."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in SPEAKING:
            yield from node.args


def words(text: ast.expr) -> str:
    """The part of a text that is written in the source."""
    parts = text.values if isinstance(text, ast.JoinedStr) else [text]
    return "".join(part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str))


@pytest.mark.parametrize("file", [file for file in FILES if file.name not in INTERNAL], ids=lambda file: file.name)
def test_no_message_is_written_in_one_language_only(file: Path) -> None:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    assert [words(text) for text in messages(tree) if re.search(r"[A-Za-z]{2}", words(text))] == []
