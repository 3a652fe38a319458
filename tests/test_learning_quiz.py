"""Quiz items hold together, and the quiz asks, grades, explains, and remembers."""

from __future__ import annotations

import ast
import io
import json
import math
import random
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from conftest import ROOT
from learning_runs import place, put, recorded

from llmcore_hf import cli, registry, resources
from llmcore_hf.learning import items, plan, quiz, quiz_export, state
from llmcore_hf.learning.items import LEVELS, Item, Unreadable
from llmcore_hf.learning.texts import LANGUAGES, read_yaml

ITEMS = items.all_items()
BY_ID = {item.id: item for item in ITEMS}
NUMBER = re.compile(r"(?<![A-Za-z0-9.])\d+(?:\.\d+)?")


def rows(level: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = read_yaml(resources.path(f"learning/quizzes/level{level}.yaml"))
    return found


ROWS = [row for level in LEVELS for row in rows(level)]


# ---------------------------------------------------------------- the items


@pytest.mark.parametrize("level", LEVELS)
def test_a_level_fits_the_schema_and_has_every_type(level: int) -> None:
    jsonschema.validate(rows(level), json.loads(resources.path("schema/quiz.schema.json").read_text(encoding="utf-8")))
    assert len(items.load(level)) >= 12
    assert {item.type for item in items.load(level)} == {"single", "multiple", "numeric", "ordering", "short", "curve"}


def test_ids_are_unique_and_name_their_level_and_a_module() -> None:
    assert len(BY_ID) == len(ITEMS)
    known = {module.name for module in registry.MODULES} | set(plan.load().required(5))
    for item in ITEMS:
        assert item.id.startswith(f"l{item.level}-") and item.module in known


@pytest.mark.parametrize("level", LEVELS)
def test_a_level_asks_about_every_module_it_requires(level: int) -> None:
    assert set(plan.load().required(level)) <= {item.module for item in items.load(level)}


def test_every_module_is_asked_about() -> None:
    assert {module.name for module in registry.MODULES} <= {item.module for item in ITEMS}


@pytest.mark.parametrize("row", [row for row in ROWS if "test" in row], ids=lambda row: row["id"])
def test_a_backing_test_exists(row: dict[str, Any]) -> None:
    file, name = row["test"].split("::")
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("row", [row for row in ROWS if row["type"] == "numeric"], ids=lambda row: row["id"])
def test_a_number_is_what_its_expression_gives_and_traps_are_wrong(row: dict[str, Any]) -> None:
    computed = eval(row["compute"], {"__builtins__": {"min": min, "sum": sum}, "math": math})
    assert abs(computed - row["answer"]) <= row["tolerance"] / 2
    values = [trap["value"] for trap in row["traps"]]
    for i, value in enumerate(values):
        assert abs(value - row["answer"]) > row["tolerance"]
        assert all(abs(value - other) > row["tolerance"] for other in values[i + 1 :])


@pytest.mark.parametrize("row", [row for row in ROWS if row["type"] == "curve"], ids=lambda row: row["id"])
def test_a_curve_has_a_value_for_each_step_and_its_formula(row: dict[str, Any]) -> None:
    curve = row["curve"]
    assert all(len(line) == len(curve["x"]) for line in curve["series"].values())
    assert "run.py --module" in curve["produced_by"] or set(curve["compute"]) == set(curve["series"])
    for name, expression in curve.get("compute", {}).items():
        for x, value in zip(curve["x"], curve["series"][name], strict=True):
            assert abs(eval(expression, {"__builtins__": {}, "x": x}) - value) < 0.011


def test_choices_have_right_ones_and_reasons_of_their_own() -> None:
    for item in ITEMS:
        n_right = sum(choice.right for choice in item.choices)
        if item.type in ("single", "curve"):
            assert n_right == 1, item.id
        if item.type == "multiple":
            assert 2 <= n_right < len(item.choices), item.id
        for language in LANGUAGES:
            assert len({choice.why[language] for choice in item.choices}) == len(item.choices), item.id
            assert len({choice.text[language] for choice in item.choices}) == len(item.choices), item.id


def test_the_right_choice_is_not_given_away_by_its_place() -> None:
    places = [
        quiz_export._shown(item).index(next(i for i, c in enumerate(item.choices) if c.right))
        for item in ITEMS
        if item.type == "single"
    ]
    assert len(set(places)) == 4 and max(places.count(place) for place in range(4)) < 0.5 * len(places)


def test_both_languages_have_the_same_numbers() -> None:
    def check(value: Any, where: str) -> None:
        if isinstance(value, dict):
            for a, b in (("zh", "en"), ("why_zh", "why_en"), ("ask_zh", "ask_en")):
                if a in value:
                    # single digits are often written as words
                    zh, en = (
                        {n for n in NUMBER.findall(value[k].replace(",000", "000")) if len(n) > 1 and n != "70"}
                        for k in (a, b)
                    )
                    words = {"75": "7.5"}  # 75 亿 is 7.5 billion
                    zh, en = ({words.get(n, n) for n in found} for found in (zh, en))
                    assert zh == en, (where, value[a], value[b])
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            check(item, where)

    for row in ROWS:
        check(row, row["id"])


@pytest.mark.parametrize("row", [row for row in ROWS if "run" in row], ids=lambda row: row["id"])
def test_an_item_about_a_run_is_asked_about_the_learners_numbers(
    row: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    item = BY_ID[row["id"]]
    assert items.about_run(item) == item  # there is no run yet
    place(row["run"]["module"], tmp_path)
    asked = items.about_run(item)
    assert asked.ask != item.ask and not re.search(r"[{}]", asked.ask["zh"] + asked.ask["en"])
    if "answer" in row["run"]:
        assert asked.answer is not None and items.grade(asked, str(asked.answer), "zh").right
        assert asked.traps == ()  # their numbers belong to the general question


@pytest.mark.parametrize(
    ("id", "module", "path", "value", "answer"),
    [
        ("l4-own-kl-penalty", "ppo", ["metrics", "objective/non_score_reward", "last"], -0.123, -0.123),
        ("l4-own-silent-groups", "grpo", ["metrics", "frac_reward_zero_std", "last"], 0.375, 0.625),
    ],
)
def test_the_answer_about_a_run_follows_its_log(
    id: str, module: str, path: list[Any], value: float, answer: float, folder: Path
) -> None:
    place(module, folder, lambda summary: put(summary, path, value))
    asked = items.about_run(BY_ID[id])
    assert items.grade(asked, str(answer), "zh").right and not items.grade(asked, str(BY_ID[id].answer), "zh").right


def test_the_penalty_in_the_log_is_the_coefficient_times_the_kl(folder: Path) -> None:
    place("ppo", folder)
    metrics = recorded("ppo").summary["metrics"]
    coef, kl = (metrics[f"objective/{name}"]["last"] for name in ("kl_coef", "kl"))
    asked = items.about_run(BY_ID["l4-own-kl-penalty"])
    assert f"{kl:.4f}" in asked.ask["zh"] and asked.answer == pytest.approx(-coef * kl, rel=1e-5)
    assert not items.grade(asked, str(coef * kl), "zh").right


@pytest.mark.parametrize(("size", "advantage"), [(8, 7 / 8**0.5), (4, 1.5), (2, 0.5**0.5)])
def test_the_advantage_is_that_of_the_learners_group(size: int, advantage: float, folder: Path) -> None:
    run = place("grpo", folder)
    config = run / "resolved_config.yaml"
    config.write_text(
        re.sub(r"(?m)^num_generations: .*", f"num_generations: {size}", config.read_text("utf-8")), "utf-8"
    )
    asked = items.about_run(BY_ID["l4-own-group-advantage"])
    assert f"num_generations = {size}" in asked.ask["en"] and asked.answer == pytest.approx(advantage, abs=1e-3)


@pytest.mark.parametrize(
    ("id", "module", "change"),
    [
        ("l4-own-kl-penalty", "ppo", lambda s: put(s, ["metrics", "objective/kl_coef", "first"], 0.2)),  # it adapts
        ("l4-own-first-ratio", "ppo", lambda s: put(s, ["checks", "ppo.first_ratio_is_one", "status"], "skip")),
        ("l4-own-silent-groups", "grpo", lambda s: put(s, ["metrics", "frac_reward_zero_std", "last"], float("nan"))),
    ],
)
def test_a_run_that_does_not_meet_the_condition_is_not_asked_about(
    id: str, module: str, change: Any, folder: Path
) -> None:
    place(module, folder, change)
    assert items.about_run(BY_ID[id]) == BY_ID[id]


def test_level_4_is_graded_against_the_runs_of_ppo_and_grpo() -> None:
    assert {"ppo", "grpo"} <= {row["run"]["module"] for row in rows(4) if row["type"] == "numeric" and "run" in row}


# ---------------------------------------------------------------- grading


def right_answer(item: Item) -> str:
    if item.type == "numeric":
        return str(item.answer)
    if item.type == "short":
        return " ".join(point["any"][0] for point in item.points)
    letters = zip("ABCDEFGH", item.choices, strict=False)
    return "".join(letter for letter, choice in letters if item.type == "ordering" or choice.right)


@pytest.mark.parametrize("item", ITEMS, ids=lambda item: item.id)
def test_the_right_answer_is_right_and_others_are_not(item: Item) -> None:
    right = right_answer(item)
    assert items.grade(item, right, "zh").right
    if item.type == "numeric":
        for trap in item.traps:
            verdict = items.grade(item, str(trap["value"]), "en")
            assert not verdict.right and verdict.notes == [f"{trap['value']:g}: {trap['why_en']}"]
    elif item.type == "short":
        assert not items.grade(item, "我不知道", "zh").right
    elif item.type == "ordering":
        verdict = items.grade(item, right[::-1], "zh")
        assert not verdict.right and len(verdict.notes) == len(item.choices)
    elif item.type == "multiple":
        assert not items.grade(item, right[:-1], "zh").right
        assert not items.grade(item, "ABCDE"[: len(item.choices)], "zh").right
    else:
        for index, choice in enumerate(item.choices):
            assert items.grade(item, "ABCDEF"[index].lower(), "zh").right is choice.right


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("item", [item for item in ITEMS if item.type == "short"], ids=lambda item: item.id)
def test_a_model_answer_makes_every_point_and_the_question_none_to_spare(item: Item, language: str) -> None:
    assert items.grade(item, items.solution(item, language), language).right
    assert not items.grade(item, item.ask[language], language).right


def test_letters_follow_the_order_that_was_shown() -> None:
    item = BY_ID["l1-markov"]  # its first choice is the right one
    assert items.grade(item, "C", "zh", shown=[2, 1, 0, 3]).right
    assert not items.grade(item, "A", "zh", shown=[2, 1, 0, 3]).right
    assert items.grade(item, "ｃ", "zh", shown=[2, 1, 0, 3]).right
    order = BY_ID["l1-policy-iteration"]
    assert items.grade(order, "D C B A", "zh", shown=[3, 2, 1, 0]).right


@pytest.mark.parametrize(
    ("typed", "right"),
    [
        ("2.75", True),
        (" 2.7504 ", True),
        ("275%", True),
        ("２．７５", True),
        ("２７５％", True),
        ("2.8", False),
        ("nan", False),
        ("inf", False),
    ],
)
def test_numbers_may_be_written_in_several_ways(typed: str, right: bool) -> None:
    assert items.grade(BY_ID["l1-return"], typed, "zh").right is right


@pytest.mark.parametrize("typed", ["1018624", "1,018,624", "１，０１８，６２４", "1018624.0", "1.018624e6"])
def test_thousands_may_be_set_off(typed: str) -> None:
    assert items.grade(BY_ID["l5-zero-peak"], typed, "en").right


@pytest.mark.parametrize(
    ("id", "typed"),
    [
        ("l1-markov", "E"),
        ("l1-markov", "AB"),
        ("l1-markov", "甲"),
        ("l1-return", "two"),
        ("l1-return", "2,75"),
        ("l5-zero-peak", "1,01,8624"),
        ("l5-zero-peak", "0,001"),
        ("l1-policy-iteration", "AB"),
        ("l1-policy-iteration", "AABB"),
        ("l1-why-online", "?"),
    ],
)
def test_what_cannot_be_read_is_not_graded(id: str, typed: str) -> None:
    with pytest.raises(Unreadable):
        items.grade(BY_ID[id], typed, "zh")


# ---------------------------------------------------------------- spaced repetition


def answers(*given: tuple[float, bool]) -> list[dict[str, Any]]:
    start = datetime(2025, 1, 1, tzinfo=UTC)
    return [{"item": "x", "right": right, "at": (start + timedelta(days=day)).isoformat()} for day, right in given]


@pytest.mark.parametrize(
    ("given", "day", "is_due"),
    [
        ([(0, True)], 100, False),  # never wrong: nothing to repeat
        ([(0, False)], 0, True),
        ([(0, False), (0, True)], 0.9, False),
        ([(0, False), (0, True)], 1, True),
        ([(0, False), (0, True), (1, True)], 3.9, False),
        ([(0, False), (0, True), (1, True)], 4, True),
        ([(0, False), (0, True), (1, True), (4, True), (11, True)], 24, False),
        ([(0, False), (0, True), (1, True), (4, True), (11, True)], 25, True),
        ([(0, False), (0, True), (1, True), (4, True), (11, True), (25, True)], 999, False),  # done
        ([(0, False), (0, True), (1, False)], 1, True),  # wrong again: from the beginning
    ],
)
def test_wrong_answers_come_back_after_growing_intervals(given: Any, day: float, is_due: bool) -> None:
    at = datetime(2025, 1, 1, tzinfo=UTC) + timedelta(days=day)
    assert bool(quiz.due(answers(*given), at)) is is_due


# ---------------------------------------------------------------- the command


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(state.PLACE, str(tmp_path / "state.json"))
    return tmp_path


def play(argv: list[str], lines: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    return cli.main(["quiz", *argv])


def typed_answers(level: int, seed: int) -> list[str]:
    """What a perfect learner types, given the shuffling of that seed."""
    shuffle, lines = random.Random(seed), []
    for item in items.load(level):
        shown = list(range(len(item.choices)))
        shuffle.shuffle(shown)
        if item.type == "ordering" and shown == sorted(shown):
            shown.reverse()
        if item.choices:
            wanted = (
                range(len(shown)) if item.type == "ordering" else [i for i, c in enumerate(item.choices) if c.right]
            )
            lines.append("".join("ABCDEFGH"[shown.index(index)] for index in wanted))
        else:
            lines.append(right_answer(item))
    return lines


@pytest.mark.parametrize("level", LEVELS)
def test_a_perfect_learner_gets_every_point(level: int, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    lines = typed_answers(level, seed=level)
    assert play(["--level", str(level), "--seed", str(level)], lines, monkeypatch) == 0
    n = len(items.load(level))
    assert f"答对 {n}/{n}" in capsys.readouterr().out
    assert quiz.answered_right(state.read()["answers"]) == {item.id for item in items.load(level)}


def test_it_grades_explains_and_keeps_what_was_answered_before_leaving(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert play(["--level", "1", "--lang", "en"], ["Z", "", "6", "q"], monkeypatch) == 0
    out = capsys.readouterr().out
    assert "I can't read that" in out and "counts as not right" in out and "That is without the discount" in out
    assert "Sutton & Barto" in out and "0 of 2 right" in out and f"{len(items.load(1)) - 2} items to go" in out
    assert [(a["item"], a["right"]) for a in state.read()["answers"]] == [("l1-markov", False), ("l1-return", False)]


@pytest.mark.parametrize("language", LANGUAGES)
def test_three_answers_that_cannot_be_read_end_the_item(
    language: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """As of `yes A`: the number is never given, and the quiz comes to its end all the same."""
    level = items.load(1)
    lines = ["A"] * (quiz.TRIES * len(level))
    assert play(["--level", "1", "--lang", language], lines, monkeypatch) == 0
    numeric = [item for item in level if item.type == "numeric"]
    out = capsys.readouterr().out
    unreadable = [item for item in level if item.type in ("numeric", "ordering", "short")]
    said = quiz.WORDS["gave_up"][language].split("{answer}")[0].format(n=quiz.TRIES)
    assert out.count(said) == len(unreadable) and items.solution(numeric[0], language) in out
    kept = {answer["item"]: answer["right"] for answer in state.read()["answers"]}
    assert set(kept) == {item.id for item in level} and not any(kept[item.id] for item in unreadable)


def test_the_end_of_input_keeps_what_was_answered(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert play(["--level", "1"], ["", "Z"], monkeypatch) == 0
    assert "答对 0/1" in capsys.readouterr().out
    assert [answer["item"] for answer in state.read()["answers"]] == ["l1-markov"]


def test_a_damaged_run_does_not_stop_the_quiz(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    (place("dpo", folder) / "summary.json").write_text("{")
    assert play(["--module", "dpo"], ["q"], monkeypatch) == 0
    assert play(["--module", "dpo"], [""] * 20, monkeypatch) == 0
    shown = capsys.readouterr()
    assert BY_ID["l3-ln2"].ask["zh"] in shown.out and "summary.json 已损坏" in shown.err


def test_the_end_of_input_ends_the_quiz(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert play(["--module", "bcq"], [], monkeypatch) == 0
    assert "答对 0/0" in capsys.readouterr().out and state.read()["answers"] == []


def test_review_asks_what_was_wrong_and_count_prefers_what_is_new(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert play(["--review"], [], monkeypatch) == 0
    assert "现在没有要复习的题" in capsys.readouterr().out
    state.record_answer("l1-return", False)
    state.record_answer("an item that is gone", False)
    state.record_answer("l1-markov", True)
    assert play(["--review"], ["2.75"], monkeypatch) == 0
    assert "答对 1/1" in capsys.readouterr().out
    assert play(["--level", "1", "--count", "2"], ["10"], monkeypatch) == 0
    out = capsys.readouterr().out
    assert BY_ID["l1-forever"].ask["zh"] in out and BY_ID["l1-markov"].ask["zh"] not in out


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        ([], 2, "choose what to ask"),
        (["--level", "6"], 2, "--level"),
        (["--level", "1", "--module", "dpo"], 2, "not allowed with"),
        (["--level", "1", "--count", "0"], 2, "at least 1"),
        (["--module", "dqo"], 2, "Did you mean `dpo`?"),
        (["--export", "out", "--review"], 2, "--export writes all items"),
        (["--export", "out", "--count", "3"], 2, "--export writes all items"),
        (["--export", "out", "--seed", "0"], 2, "--export writes all items"),
    ],
)
def test_a_wrong_option_is_one_message(argv: list[str], code: int, said: str, capsys: Any) -> None:
    assert cli.main(["quiz", *argv, "--lang", "en"]) == code
    assert said in capsys.readouterr().err


# ---------------------------------------------------------------- paper


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("level", LEVELS)
def test_the_pages_of_the_repository_are_those_of_the_items(level: int, language: str) -> None:
    """After a change: `python scripts/quiz.py --export learning/quizzes` (and with `--lang en`)."""
    page = (ROOT / "learning" / "quizzes" / quiz_export.page_name(level, language)).read_text(encoding="utf-8")
    assert page == quiz_export.markdown(level, list(items.load(level)), language)
    assert page.count("<details>") == len(items.load(level))


def test_the_deck_has_stable_ids_and_four_columns(folder: Path, capsys: Any) -> None:
    assert cli.main(["quiz", "--export", "out", "--level", "3"]) == 0
    assert capsys.readouterr().out.split() == ["out/level3.md", "out/anki-zh.txt"]
    lines = (folder / "out" / "anki-zh.txt").read_text(encoding="utf-8").splitlines()
    notes = [line.split("\t") for line in lines if not line.startswith("#")]
    assert "#guid column:1" in lines and {len(note) for note in notes} == {4}
    assert [note[0] for note in notes] == [f"llmcore-{item.id}-zh" for item in items.load(3)]
    assert not any("<script" in line for line in lines)


def test_it_imports_nothing_heavy(folder: Path) -> None:
    import subprocess
    import sys

    code = (
        f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); from llmcore_hf import cli;"
        "code = cli.main(['quiz', '--level', '4', '--count', '1']);"
        "print(code, sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)), time.process_time(), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, input="q\n", timeout=60
    )
    said, seconds = done.stderr.rsplit(" ", 1)
    assert said == "0 []" and float(seconds) < 0.5
