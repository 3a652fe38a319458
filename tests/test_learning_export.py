"""Exporting all briefs: files, index, and the page to print."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from learning_runs import WITH_BRIEF, place, recorded

from llmcore_hf import cli, registry
from llmcore_hf.learning import brief, plan
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
    assert sorted(path.name for path in out.iterdir()) == ["dpo.md", "gae.md", "index.html", "index.md"]
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
