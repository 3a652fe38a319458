"""The plan of 14 days, the guides generated from it, cards, and progress."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from learning_runs import RUNS, WITH_BRIEF, place

from llmcore_hf import cli, config, registry
from llmcore_hf.learning import cards, items, plan, progress, state
from llmcore_hf.learning.texts import LANGUAGES

PAGES = [ROOT / name for name in plan.GUIDES.values()]
PAGES += sorted((ROOT / "learning").glob("*.md"))
PAGES += [
    page
    for name in ("quizzes", "cards", "exercises", "bugzoo")
    for page in sorted((ROOT / "learning" / name).glob("*.md"))
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(state.PLACE, str(tmp_path / "state.json"))
    return tmp_path


# ---------------------------------------------------------------- the plan


def test_there_are_14_days_and_five_levels_that_agree_with_the_registry() -> None:
    assert [day.day for day in plan.load().days] == list(range(1, 15))
    assert [level.level for level in plan.load().levels] == [1, 2, 3, 4, 5]
    for day in plan.load().days:
        if module := plan.find(day.module):
            assert (module.day, module.level) == (day.day, day.level), day
    for level in plan.load().levels:
        for name in level.modules:
            if module := plan.find(name):
                assert module.level == level.level, name


def test_the_commands_of_all_days_parse_and_missing_modules_are_said_to_be_missing() -> None:
    for day in plan.load().days:
        python, script, *argv = day.command.split()
        assert (python, script) == ("python", "run.py")
        request = config.read_request(argv)
        assert (request.module, request.toy, request.options) == (day.module, True, [])
        if module := plan.find(day.module):
            assert config.resolve(module, request).toy
        else:
            assert cli.main(argv) == 2


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_guides_are_up_to_date(language: str) -> None:
    """After a change of plan or registry: `python scripts/roadmap.py --update`."""
    file = ROOT / plan.GUIDES[language]
    assert file.read_text(encoding="utf-8") == plan.updated_guide(file, language)


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_day_whose_module_is_missing_is_not_shown_as_working(language: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "MODULES", tuple(m for m in registry.MODULES if m.name != "dpo"))
    rows = {
        line.split("|")[1].strip(): line for line in plan.days_table(language).splitlines() if line.startswith("| ")
    }
    assert "recipes/" not in rows["6"] and {"zh": "尚未加入", "en": "not there yet"}[language] in rows["6"]
    assert "[" in rows["5"] and "recipes/sft/" in rows["5"]


def test_the_guides_are_twins() -> None:
    texts = [(ROOT / plan.GUIDES[language]).read_text(encoding="utf-8") for language in LANGUAGES]
    commands = [re.findall(r"python run\.py --module \w+ --toy", text) for text in texts]
    assert commands[0] == commands[1] and len(commands[0]) >= 14
    assert texts[0].count("- [ ]") == texts[1].count("- [ ]") == 10
    assert [len(re.findall(r"^#+ ", text, re.M)) for text in texts] == [10, 10]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_link_is_dead(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), link


def test_every_script_of_the_guides_exists() -> None:
    for page in PAGES:
        for script in re.findall(r"python (scripts/\w+\.py)", page.read_text(encoding="utf-8")):
            assert (ROOT / script).is_file(), (page, script)


def test_markers_that_were_lost_are_named(folder: Path, capsys: Any) -> None:
    (folder / "LEARNING_GUIDE.md").write_text("# no markers")
    assert cli.main(["roadmap", "--update"]) == 1
    assert "LEARNING_GUIDE.md" in (said := capsys.readouterr().err) and "daily:begin" in said
    assert (folder / "LEARNING_GUIDE.md").read_text() == "# no markers"


@pytest.mark.parametrize("command", ["roadmap", "progress", "cards --module dpo"])
def test_commands_import_nothing_heavy_and_answer_at_once(command: str, folder: Path) -> None:
    place("dpo", folder)
    code = (
        f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); from llmcore_hf import cli;"
        f"code = cli.main({command.split()!r});"
        "print(code, sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)), time.process_time(), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=60)
    said, seconds = done.stderr.rsplit(" ", 1)
    assert said == "0 []", done.stderr
    assert float(seconds) < 0.5


# ---------------------------------------------------------------- cards


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("module", WITH_BRIEF)
def test_the_cards_of_the_repository_are_fresh(module: str, language: str, folder: Path) -> None:
    """After a change of a brief: delete the card and run `python scripts/cards.py --update` where there is no output/."""
    name = cards.card_name(module, language)
    text = cards.updated(cards.fresh(module, language), module, None, language, name)
    assert (ROOT / "learning" / "cards" / name).read_text(encoding="utf-8") == text
    assert "{{" not in text


def test_an_update_fills_in_the_evidence_and_leaves_the_rest_alone(folder: Path) -> None:
    place("dpo", folder)
    assert cli.main(["cards", "--update"]) == 0
    made = {path.name for path in (folder / "learning" / "cards").iterdir()}
    assert made == {cards.card_name(module, language) for module in WITH_BRIEF for language in LANGUAGES}
    card = folder / "learning" / "cards" / "dpo.md"
    text = card.read_text(encoding="utf-8")
    assert "从 50.0% 升到 100.0%" in text and "| `dpo.step0_loss_is_ln2` | pass |" in text
    mine = text.replace("## 我的笔记", "## 我的笔记\n\n面试被问过 β。").replace("## 一句话", "## 一句话（改写）")
    card.write_text(mine, encoding="utf-8")
    place("dpo_sigmoid", folder)
    assert cli.main(["cards", "--update", "--module", "dpo"]) == 0
    after = card.read_text(encoding="utf-8")
    assert "面试被问过 β。" in after and "## 一句话（改写）" in after
    assert "status **failed**" in (folder / "learning" / "cards" / "dpo.en.md").read_text(encoding="utf-8")
    assert "没有成功" in after and "从 50.0% 升到 100.0%" not in after
    outside = [re.sub(r"<!-- (\w+):begin -->.*?<!-- \1:end -->", "", t, flags=re.S) for t in (mine, after)]
    assert outside[0] == outside[1]


def test_a_card_whose_run_is_damaged_stays_as_it_is_and_the_others_are_updated(folder: Path, capsys: Any) -> None:
    place("gae", folder)
    (place("dpo", folder) / "summary.json").write_text("{")
    assert cli.main(["cards", "--update"]) == 1
    assert "dpo/latest/summary.json 已损坏" in capsys.readouterr().err
    made = {path.name for path in (folder / "learning" / "cards").glob("*")}
    assert "gae.md" in made and "mdp.en.md" in made and not {"dpo.md", "dpo.en.md"} & made


def test_a_card_without_its_markers_is_left_alone(folder: Path, capsys: Any) -> None:
    assert cli.main(["cards", "--update", "--module", "gae"]) == 0
    card = folder / "learning" / "cards" / "gae.md"
    mine = card.read_text(encoding="utf-8").replace("<!-- evidence:end -->", "")
    card.write_text(mine, encoding="utf-8")
    place("gae", folder)
    capsys.readouterr()
    assert cli.main(["cards", "--update", "--module", "gae"]) == 1
    assert "evidence:end" in capsys.readouterr().err and card.read_text(encoding="utf-8") == mine
    assert "Not run yet" in (folder / "learning" / "cards" / "gae.en.md").read_text(encoding="utf-8")


def test_without_an_order_cards_says_what_to_do(folder: Path, capsys: Any) -> None:
    assert cli.main(["cards"]) == 1
    assert "--update" in capsys.readouterr().err


# ---------------------------------------------------------------- progress


def answer_all(level: int) -> None:
    for item in items.load(level):
        state.record_answer(item.id, True)


def pass_exercises(level: int) -> None:
    for name, at in progress.exercises().items():
        if at == level:
            state.record_exercise(name, True)


def passed(folder: Path) -> list[int]:
    return [level.level for level in progress.collect().levels if level.passed]


def test_a_level_needs_runs_every_quiz_item_and_the_exercises(folder: Path, capsys: Any) -> None:
    def next_step() -> str:
        assert passed(folder) == [] and cli.main(["progress", "--lang", "en"]) == 0
        return str(capsys.readouterr().out.splitlines()[-1])

    assert next_step() == "Next: `python run.py --module mdp --toy`"
    place("mdp", folder)
    place("td_learning", folder)
    assert next_step() == "Next: `python scripts/quiz.py --level 1`"
    answer_all(1)
    assert next_step() == "Next: `python scripts/exercise.py show td`"
    pass_exercises(1)
    assert passed(folder) == [1]


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.update(status="failed"),
        lambda s: s.update(status="interrupted"),
        lambda s: s["checks"][0].update(status="fail"),
        lambda s: s["checks"][-1].update(status="warn"),
        lambda s: s.update(checks=[]),
    ],
)
def test_a_run_that_failed_does_not_count(folder: Path, change: Any, capsys: Any) -> None:
    answer_all(1)
    pass_exercises(1)
    place("td_learning", folder)
    place("mdp", folder, change)
    assert passed(folder) == []
    assert cli.main(["progress"]) == 0
    out = capsys.readouterr().out
    assert "（不算）" in out and "`mdp` 的一次没有失败和警告的运行" in out and "--module mdp --toy" in out


def test_of_runs_that_count_the_newest_is_shown(folder: Path) -> None:
    place("mdp", folder)
    newest = place("mdp", folder, lambda s: s.update(run_id="later", started_at="2025-02-01T00:00:00+00:00"))
    place("mdp", folder, lambda s: s.update(run_id="last", started_at="2025-03-01T00:00:00+00:00", status="failed"))
    run = progress.collect().runs["mdp"]
    assert run is not None and run.path == newest


def test_answers_and_exercises_count_for_their_own_level(folder: Path) -> None:
    answer_all(2)
    pass_exercises(2)
    state.record_answer("an item that is gone", True)
    levels = progress.collect().levels
    assert [level.quiz_right for level in levels] == [0, levels[1].quiz_all, 0, 0, 0]
    assert [sum(level.exercises.values()) for level in levels] == [0, len(levels[1].exercises), 0, 0, 0]
    assert sum(len(level.exercises) for level in levels) == len(progress.exercises())


def test_a_later_experiment_that_fails_takes_nothing_away(folder: Path) -> None:
    for name in ("sft", "dpo", "dpo_sigmoid"):
        place(name, folder)
    answer_all(3)
    pass_exercises(3)
    assert passed(folder) == [3]


@pytest.mark.parametrize(
    ("language", "said"),
    [("zh", "9 种错误里认出 {} 种，答错过 {} 种"), ("en", "{} of 9 bugs recognized, {} missed so far")],
)
def test_the_bug_zoo_is_part_of_the_progress(language: str, said: str, folder: Path, capsys: Any) -> None:
    def shown() -> str:
        assert cli.main(["progress", "--lang", language]) == 0
        return str(capsys.readouterr().out)

    assert said.format(0, 0) in shown()
    for bug, right in (("kl_sign", False), ("pad_is_eos", True), ("pad_is_eos", False), ("no_such_bug", True)):
        state.record_answer(f"bugzoo-{bug}", right)
    assert said.format(1, 1) in shown()
    state.record_answer("bugzoo-kl_sign", True)
    assert said.format(2, 0) in shown()


def test_the_zoo_comes_after_the_levels() -> None:
    found = {"kl_sign": "found", "pad_is_eos": "missed"}
    assert progress._next_command(progress.Progress({}, [], found)) == "python scripts/bugzoo.py"
    assert progress._next_command(progress.Progress({}, [], {"kl_sign": "found"})) is None


def test_missing_modules_are_said_to_be_missing(folder: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "MODULES", tuple(m for m in registry.MODULES if m.name != "bcq"))
    assert cli.main(["progress", "--lang", "en"]) == 0
    out = capsys.readouterr().out
    assert "| 11 | `bcq` | module not there yet |" in out and "`bcq` (module not there yet)" in out


def test_a_level_says_which_of_its_own_exercises_are_missing(folder: Path) -> None:
    place("mdp", folder)
    place("td_learning", folder)
    answer_all(1)
    state.record_exercise("td", True)
    state.record_exercise("gae", True)  # of another level
    state.record_exercise("value_iteration", False)
    command = "python scripts/exercise.py show value_iteration"
    assert progress.collect().levels[0].lacks("en") == [f"exercises value_iteration (`{command}`)"]


def test_the_certificate_names_runs_by_their_hash(folder: Path, capsys: Any) -> None:
    assert cli.main(["progress", "--certificate", "c.md"]) == 1
    assert "不能发证书" in capsys.readouterr().err and not (folder / "c.md").exists()
    places = [place(name, folder) for name in ("mdp", "td_learning")]
    answer_all(1)
    pass_exercises(1)
    assert cli.main(["progress", "--certificate", "c.md"]) == 0
    text = (folder / "c.md").read_text(encoding="utf-8")
    for run in places:
        assert hashlib.sha256((run / "summary.json").read_bytes()).hexdigest() in text
    assert "Level 1" in text and "Level 2" not in text
    assert cli.main(["progress", "--certificate", "c.png"]) == 0
    assert (folder / "c.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main(["progress", "--certificate", "c.pdf"]) == 2


def test_a_damaged_state_file_is_reported_by_the_command(folder: Path, capsys: Any) -> None:
    (folder / "state.json").write_text("{")
    assert cli.main(["progress", "--lang", "en"]) == 0
    assert "is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("language", "said", "row"),
    [("zh", "已损坏", "`mdp` | 记录已损坏"), ("en", "is damaged", "`mdp` | its record is damaged")],
)
def test_a_damaged_run_is_named_and_the_rest_is_shown(
    language: str, said: str, row: str, folder: Path, capsys: Any
) -> None:
    place("td_learning", folder)
    file = place("mdp", folder) / "summary.json"
    file.write_text("{")
    assert cli.main(["progress", "--lang", language]) == 1
    shown = capsys.readouterr()
    assert f"{file.resolve()} {said}" in shown.err and row in shown.out
    assert "`td_learning` | `20250101-000000-0000` | ok" in shown.out


def test_an_older_run_counts_when_a_later_one_is_damaged(folder: Path, capsys: Any) -> None:
    place("mdp", folder)
    (place("mdp", folder, lambda s: s.update(run_id="later")) / "summary.json").write_text("[]")
    assert cli.main(["progress"]) == 1
    assert "`mdp` | `20250101-000000-0000` | ok" in capsys.readouterr().out


def test_recorded_runs_cover_every_module_with_a_brief() -> None:
    assert set(WITH_BRIEF) <= {path.name for path in RUNS.iterdir()}
