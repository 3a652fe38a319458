"""Exporting all briefs: files, index, and the page to print."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from learning_runs import WITH_BRIEF, place, recorded

from llmcore_hf import cli, registry
from llmcore_hf.learning import brief, export, plan
from llmcore_hf.learning.texts import LANGUAGES


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("language", LANGUAGES)
def test_each_module_with_a_run_gets_its_file_and_the_index_names_the_rest(folder: Path, language: str) -> None:
    for name in ("dpo", "gae"):
        place(name, folder)
    assert cli.main(["export", "--lang", language]) == 0
    out = folder / "output" / "briefs" / language
    assert sorted(path.name for path in out.iterdir()) == [export.WRITTEN, "dpo.md", "gae.md", "index.html", "index.md"]
    source = brief.load("dpo")
    assert source and (out / "dpo.md").read_text(encoding="utf-8") == brief.markdown(source, recorded("dpo"), language)
    index = (out / "index.md").read_text(encoding="utf-8")
    for name in WITH_BRIEF:
        title = {"zh": registry.get(name).title_zh, "en": registry.get(name).title_en}[language]
        assert (f"[{title}]({name}.md)" in index) is (name in ("dpo", "gae"))
        assert (f"`python run.py --module {name} --toy`" in index) is (name not in ("dpo", "gae"))
    for day in plan.load().days:
        assert f"| {day.day} | `{day.module}` |" in index
    for link in re.findall(r"\]\(([^)]+)\)", index):
        assert (out / link).exists()


def test_the_page_to_print_holds_everything_and_asks_nothing_of_the_network(folder: Path) -> None:
    place("dpo_sigmoid", folder)
    place("mdp", folder)
    assert cli.main(["export", "--to", "printed"]) == 0
    page = (folder / "printed" / "index.html").read_text(encoding="utf-8")
    assert page.count("<section") == 2 and '<section id="mdp">' in page and 'href="#mdp"' in page
    assert page.count('<ul class="sources">') == 1  # a run that failed has none
    assert "没有成功" in page and "<table>" in page and "charset" in page
    assert not re.search(r"(?:src|href)=\"(?!#)", page) and "<script" not in page and "url(" not in page


def test_what_a_run_says_is_shown_and_not_executed(folder: Path) -> None:
    place("dpo", folder, lambda s: s.update(status="failed", error="<script>alert(1)</script>"))
    assert cli.main(["export"]) == 0
    assert "<script" not in (folder / "output" / "briefs" / "zh" / "index.html").read_text(encoding="utf-8")


def test_without_any_run_it_says_so_and_writes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export"]) == 1
    assert "没有找到任何运行" in capsys.readouterr().err and not list(folder.iterdir())


def briefs(folder: Path) -> set[str]:
    return {path.name for path in (folder / "output" / "briefs" / "zh").glob("*.md")}


def test_the_brief_of_a_run_that_is_gone_goes_and_nothing_else_does(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("dpo", "gae", "mdp"):
        place(name, folder)
    assert cli.main(["export"]) == 0
    out = folder / "output" / "briefs" / "zh"
    (out / "notes.md").write_text("mine")
    (out / "gae.md").write_text((out / "gae.md").read_text(encoding="utf-8") + "\nmy own words", encoding="utf-8")
    for name in ("dpo", "gae"):
        shutil.rmtree(folder / "output" / name)
    capsys.readouterr()
    assert cli.main(["export"]) == 0
    captured = capsys.readouterr()
    assert briefs(folder) == {"index.md", "mdp.md", "gae.md", "notes.md"}
    assert "dpo.md" in captured.out and "gae.md" in captured.err and "被改过" in captured.err
    shutil.rmtree(folder / "output" / "mdp")
    assert cli.main(["export"]) == 1
    assert briefs(folder) == {"gae.md", "notes.md"} and not (out / "index.html").exists()


@pytest.mark.parametrize("record", ["{", "[1]", '{"../../mdp/keep.md": "x", "notes.md": 3}'])
def test_a_damaged_record_of_what_was_written_deletes_nothing(folder: Path, record: str) -> None:
    place("mdp", folder)
    assert cli.main(["export"]) == 0
    out = folder / "output" / "briefs" / "zh"
    (out / "notes.md").write_text("mine")
    (folder / "output" / "mdp" / "keep.md").write_text("mine")
    (out / export.WRITTEN).write_text(record)
    assert cli.main(["export"]) == 0
    assert (out / "notes.md").exists() and (folder / "output" / "mdp" / "keep.md").exists()


def test_a_file_outside_the_folder_is_never_deleted(folder: Path) -> None:
    place("mdp", folder)
    (folder / "keep.md").write_text("mine")
    out = folder / "output" / "briefs" / "zh"
    out.mkdir(parents=True)
    (out / export.WRITTEN).write_text(f'{{"../../../keep.md": "{export._sha256(b"mine")}"}}')
    assert cli.main(["export"]) == 0
    assert (folder / "keep.md").exists()


@pytest.mark.parametrize(("language", "said"), [("zh", "跳过：{} 已损坏"), ("en", "left out: {} is damaged")])
def test_a_damaged_run_is_left_out_and_the_others_are_written(
    folder: Path, language: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    place("mdp", folder)
    damaged = place("dpo", folder) / "summary.json"
    damaged.write_text("{")
    assert cli.main(["export", "--lang", language]) == 1
    assert said.format(Path("output/dpo/latest/summary.json")) in capsys.readouterr().err
    out = folder / "output" / "briefs" / language
    assert (out / "mdp.md").exists() and not (out / "dpo.md").exists()
    row = next(line for line in (out / "index.md").read_text(encoding="utf-8").splitlines() if "| `dpo` |" in line)
    assert export.WORDS["damaged"][language] in row


def test_the_index_does_not_count_the_checks_of_a_failed_run(folder: Path) -> None:
    place("mdp", folder, lambda s: s.update(status="failed", error="out of memory"))
    assert cli.main(["export"]) == 0
    index = (folder / "output" / "briefs" / "zh" / "index.md").read_text(encoding="utf-8")
    row = next(line for line in index.splitlines() if "| `mdp` |" in line)
    assert "**没有成功（failed）**" in row and not re.search(r"\d/\d", row)
