"""Briefs say what a run's summary bears out, and nothing else."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from string import Formatter
from typing import Any

import jsonschema
import pytest
from conftest import ROOT
from learning_runs import DELETE, RUNS, WITH_BRIEF, place, put, recorded

from llmcore_hf import cli, registry, resources
from llmcore_hf.errors import UserError
from llmcore_hf.learning import brief, evidence
from llmcore_hf.learning.claims import Claim
from llmcore_hf.learning.evidence import Run
from llmcore_hf.learning.texts import LANGUAGES, read_yaml
from llmcore_hf.run_dir import validate_summary

SUCCESS = re.compile(r"升到|已经学会|成功了|rose from|rose to|improved")
NUMBER = re.compile(r"(?<![A-Za-z0-9])\d+(?:\.\d+)?(?:e-?\d+)?")


def source_of(module: str) -> brief.Source:
    source = brief.load(module)
    assert source is not None
    return source


def changed(name: str, *changes: tuple[list[Any], Any], **fields: Any) -> Run:
    summary = json.loads((RUNS / name / "summary.json").read_text(encoding="utf-8"))
    for path, new in changes:
        put(summary, path, new)
    return Run(RUNS / name, {**summary, **fields})


# ---------------------------------------------------------------- sources


@pytest.mark.parametrize("name", [path.name for path in RUNS.iterdir()])
def test_the_recorded_runs_are_summaries(name: str) -> None:
    validate_summary(recorded(name).summary)


@pytest.mark.parametrize("module", WITH_BRIEF)
def test_a_source_fits_its_schema(module: str) -> None:
    schema = json.loads(resources.path("schema/brief.schema.json").read_text(encoding="utf-8"))
    jsonschema.validate(read_yaml(resources.path(f"recipes/{module}/brief.yaml")), schema)


def test_every_module_has_a_brief() -> None:
    assert [module.name for module in registry.MODULES] == WITH_BRIEF


@pytest.mark.parametrize("key", ["on", "off", "yes", "no", "Yes", "NO", "true"])
def test_a_key_that_yaml_takes_for_true_or_false_is_refused(key: str, tmp_path: Path) -> None:
    file = tmp_path / "brief.yaml"
    text = "result:\n  - id: x\n    values: {%s: [seed]}\n    zh: 是\n    en: is\n"
    file.write_text(text % key, encoding="utf-8")
    with pytest.raises(UserError, match=r"brief.yaml，result/0/values：有个键被读成 (true|false)"):
        read_yaml(file)
    file.write_text(text % f'"{key}"', encoding="utf-8")
    assert read_yaml(file)["result"][0]["values"] == {key: ["seed"]}


def fields(text: str) -> set[tuple[str, str]]:
    return {(name, spec or "") for _, name, spec, _ in Formatter().parse(text) if name is not None}


@pytest.mark.parametrize("module", WITH_BRIEF)
def test_both_languages_put_the_same_values_into_a_claim(module: str) -> None:
    for claim in source_of(module).claims():
        assert fields(claim.text["zh"]) == fields(claim.text["en"]), claim
        assert {name for name, _ in fields(claim.text["zh"])} <= set(claim.values), claim


@pytest.mark.parametrize("module", WITH_BRIEF)
def test_both_languages_have_the_same_numbers(module: str) -> None:
    def check(value: Any) -> None:
        if isinstance(value, dict) and {"zh", "en"} <= set(value):
            zh, en = (set(NUMBER.findall(re.sub(r"{[^}]*}", "", value[language]))) for language in LANGUAGES)
            assert zh == en, value
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            check(item)

    check(read_yaml(resources.path(f"recipes/{module}/brief.yaml")))


@pytest.mark.parametrize("module", WITH_BRIEF)
def test_a_claim_of_a_held_out_change_needs_an_interval_without_zero(module: str) -> None:
    """Whoever says a held-out metric rose or fell must have asked its interval."""
    for claim in source_of(module).result:
        evaluated = {path[2] for path in claim.values.values() if path[:2] == ["eval", "after"]}
        if not evaluated or not re.search(r"升|涨|降", claim.text["zh"]):
            continue
        asked = {
            c[kind][0][2] for c in claim.when for kind in ("above", "below") if kind in c and c[kind][0][1] == "ci95"
        }
        assert asked & evaluated, claim


@pytest.mark.parametrize("module", WITH_BRIEF)
def test_every_claim_of_a_result_is_made_about_a_good_run(module: str) -> None:
    """A path that leads nowhere would silence a claim for ever."""
    run = recorded(module)
    source = source_of(module)
    silent = [claim for claim in source.claims() if claim.found(run) is None]
    assert not silent, silent


@pytest.mark.parametrize("module", WITH_BRIEF)
def test_fixed_texts_hold_no_measured_number(module: str) -> None:
    """A number with a fraction outside a claim must be a constant of the theory."""
    known = {"0.693", "2.3", "0.95", "0.5", "5e-7", "2e-5", "0.3"}
    source = source_of(module)
    texts = [getattr(source, name)["zh"] for name in ("definition", "principle", "engineering", "next")]
    texts += [question.answer["zh"] for question in source.questions]
    found = {number for text in texts for number in NUMBER.findall(text) if "." in number or "e" in number}
    assert found <= known, found - known


# ---------------------------------------------------------------- length


@pytest.mark.parametrize("module", WITH_BRIEF)
def test_the_spoken_answer_takes_three_minutes(module: str) -> None:
    parts = {language: brief.spoken(source_of(module), recorded(module), language) for language in LANGUAGES}
    lengths = {language: sum(brief.spoken_length(t, language) for t in parts[language].values()) for language in parts}
    assert 650 <= lengths["zh"] <= 750, lengths
    assert 330 <= lengths["en"] <= 480, lengths


def spoken_length(source: brief.Source, run: Run, language: str) -> int:
    return sum(brief.spoken_length(text, language) for text in brief.spoken(source, run, language).values())


@pytest.mark.parametrize("outcome", ["warn", "fail", "both", "error"])
@pytest.mark.parametrize("name", [path.name for path in RUNS.iterdir()])
def test_the_spoken_answer_stays_short_whatever_went_wrong(name: str, outcome: str) -> None:
    summary = json.loads((RUNS / name / "summary.json").read_text(encoding="utf-8"))
    for number, check in enumerate(summary["checks"]):
        check["status"] = {"both": ("warn", "fail")[number % 2], "error": "pass"}.get(outcome, outcome)
    for status in {"warn": ["ok"], "error": ["failed"]}.get(outcome, ["ok", "failed", "diverged", "interrupted"]):
        run = Run(RUNS / name, {**summary, "status": status, "error": "out of memory " * 100})
        for language in LANGUAGES:
            source = source_of(summary["module"])
            assert spoken_length(source, run, language) <= brief.LIMIT[language], status


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_two_checks_that_matter_most_are_named_and_the_rest_counted(language: str) -> None:
    """Failures come before warnings, invariants before learning checks."""
    ids = list(recorded("ppo").checks)
    statuses = ["warn", "warn", "warn", "fail", "warn", "fail", "warn"]  # the last failure is of an invariant
    changes = [(["checks", id, "status"], status) for id, status in zip(ids, statuses, strict=True)]
    changes.append((["checks", ids[5], "kind"], "invariant"))
    run = changed("ppo", *changes)
    result = brief.result_of(source_of("ppo"), run, language)
    assert result.index(ids[5]) < result.index(ids[3]) and sum(id in result for id in ids) == 2
    assert all(run.checks[id][f"why_{language}"] in result for id in (ids[5], ids[3]))
    assert brief.WORDS["more"][language].format(failed=0, warned=5) in result and "summary.json" in result
    page = brief.markdown(source_of("ppo"), run, language)
    assert all(id in page for id in ids)  # as limits


def test_a_chinese_text_is_folded_without_spaces() -> None:
    for module in WITH_BRIEF:
        source = source_of(module)
        for text in (source.definition, source.principle, source.engineering, source.next):
            assert not re.search(r"[\u4e00-\u9fff，。；：”）] [\u4e00-\u9fff“]", text["zh"])


# ---------------------------------------------------------------- numbers follow the summary


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("module", WITH_BRIEF)
def test_a_changed_number_changes_the_text_and_a_missing_one_removes_its_sentence(module: str, language: str) -> None:
    run = recorded(module)
    tried = 0
    for claim in source_of(module).claims():
        for name, path in claim.values.items():
            value = run.look_up(path)
            if path[0] == "options" or isinstance(value, str | bool) or f"{{{name}" not in claim.text[language]:
                continue
            sentence = claim.say(run, language)
            other = claim.say(
                changed(module, (list(path), value * 1.37 + 1 if isinstance(value, float) else value + 7)), language
            )
            assert other != sentence, (claim.id, path)
            assert claim.say(changed(module, (list(path), None)), language) is None
            if not isinstance(path[-1], int):
                assert claim.say(changed(module, (list(path), DELETE)), language) is None
            tried += 1
    assert tried >= 5


def test_the_page_follows_the_summary() -> None:
    page = brief.markdown(source_of("dpo"), recorded("dpo"), "zh")
    assert "从 50.0% 升到 100.0%" in page and "正是 ln 2" in page
    other = changed("dpo", (["eval", "after", "preference_accuracy"], 0.871))
    assert "从 50.0% 升到 87.1%" in brief.markdown(source_of("dpo"), other, "zh")
    gone = changed("dpo", (["eval", "after", "preference_accuracy"], DELETE))
    assert "偏好准确率从" not in brief.markdown(source_of("dpo"), gone, "zh")


@pytest.mark.parametrize(("low", "claimed"), [(0.01, True), (0.0, False), (-0.2, False), (None, False)])
def test_no_improvement_is_claimed_when_the_interval_holds_zero(low: float | None, claimed: bool) -> None:
    run = changed("dpo", (["eval", "ci95", "preference_accuracy", 0], low))
    assert ("偏好准确率从" in brief.result_of(source_of("dpo"), run, "zh")) is claimed
    assert ("Preference accuracy rose" in brief.result_of(source_of("dpo"), run, "en")) is claimed


def test_a_claim_that_reads_a_check_needs_the_check_to_have_passed() -> None:
    for status in ("warn", "fail", "skip"):
        run = changed("dpo", (["checks", "dpo.step0_loss_is_ln2", "status"], status))
        claim = next(claim for claim in source_of("dpo").result if claim.id == "start")
        assert claim.say(recorded("dpo"), "zh") and claim.say(run, "zh") is None


def test_a_claim_that_reads_two_checks_needs_both() -> None:
    ids = ["dpo.step0_loss_is_ln2", "dpo.no_likelihood_displacement"]
    values: Any = {"a": ["checks", ids[0], "observed"], "b": ["checks", ids[1], "observed", "change_of_logps_chosen"]}
    claim = Claim("x", values, (), {"zh": "{a} {b}", "en": "{a} {b}"})
    assert claim.say(recorded("dpo"), "zh")
    for id in ids:
        assert claim.say(changed("dpo", (["checks", id, "status"], "fail")), "zh") is None


def test_a_value_of_another_kind_silences_the_claim() -> None:
    claim = Claim("x", {"a": ["seed"]}, (), {"zh": "{a:.2f}", "en": "{a:.2f}"})
    assert claim.say(recorded("dpo"), "zh") == "42.00"
    assert claim.say(changed("dpo", seed="many"), "zh") is None
    assert claim.say(changed("dpo", seed=[1]), "zh") is None


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ({"above": [["seed"], 41]}, True),
        ({"above": [["seed"], 42]}, False),
        ({"below": [["seed"], 42.5]}, True),
        ({"below": [["seed"], 42]}, False),
        ({"below": [["nothing", "there"], 0]}, False),
        ({"below": [["seed"], ["wall_seconds"]]}, False),
        ({"above": [["nothing", "there"], 0]}, False),
        ({"above": [["module"], 0]}, False),
        ({"equals": [["module"], "dpo"]}, True),
        ({"equals": [["options", "loss_type", 1], "sft"]}, True),
        ({"equals": [["options", "loss_type", 5], "sft"]}, False),
        ({"passed": "dpo.step0_loss_is_ln2"}, True),
        ({"passed": "dpo.never_heard_of"}, False),
    ],
)
def test_preconditions(condition: dict[str, Any], expected: bool) -> None:
    claim = Claim("x", {}, (condition,), {"zh": "是", "en": "yes"})
    assert (claim.say(recorded("dpo"), "en") == "yes") is expected


# ---------------------------------------------------------------- runs that went wrong


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("status", ["failed", "diverged", "interrupted"])
@pytest.mark.parametrize("module", WITH_BRIEF)
def test_a_run_that_did_not_succeed_is_no_success_story(module: str, status: str, language: str) -> None:
    run = changed(module, status=status, error="something went wrong")
    source = source_of(module)
    result = brief.result_of(source, run, language)
    assert result.startswith(
        {"zh": "先说结论：这次运行没有成功", "en": "The conclusion first: this run did not succeed"}[language]
    )
    page = brief.markdown(source, run, language)
    claimed = [
        s for claim in source.claims() if claim not in source.limits and (s := claim.say(recorded(module), language))
    ]
    assert claimed and not [sentence for sentence in claimed if sentence in page]
    assert not SUCCESS.search(result) and brief.HEADINGS["sources"][language] not in page
    assert {"zh": "下一步", "en": "Next"}[language] in result
    assert "方法起作用" not in page and "the method works" not in page


@pytest.mark.parametrize("module", WITH_BRIEF)
def test_a_failed_check_is_named_with_its_reason_even_when_the_status_says_ok(module: str) -> None:
    run = recorded(module)
    check = next(iter(run.checks.values()))
    for status in ("ok", "failed"):
        bad = changed(module, (["checks", check["id"], "status"], "fail"), status=status)
        for language in LANGUAGES:
            result = brief.result_of(source_of(module), bad, language)
            assert check["id"] in result and check[f"why_{language}"] in result


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize(("status", "failing"), [("failed", 0), ("ok", 1), ("interrupted", 0)])
def test_the_head_of_a_failed_run_says_so_first(status: str, failing: int, language: str) -> None:
    changes = [(["checks", "dpo.step0_loss_is_ln2", "status"], "fail")] if failing else []
    head = brief._about(changed("dpo", *changes, status=status), language)
    assert head.startswith(
        {"zh": f"**没有成功（状态 {status}", "en": f"**It did not succeed (status {status}"}[language]
    )
    assert not re.search(r"5/5|\d of \d", head)
    assert {"zh": f"{failing} 条检查没有通过", "en": f"checks failed: {failing}"}[language] in head
    assert not brief._about(recorded("dpo"), language).startswith("**")


def test_an_error_without_a_reason_is_not_called_none() -> None:
    result = brief.result_of(source_of("dpo"), changed("dpo", status="failed", error=None), "zh")
    assert "原因没有记下来" in result and "None" not in result


def test_the_recorded_failure_is_told_as_it_was() -> None:
    page = brief.markdown(source_of("dpo"), recorded("dpo_sigmoid"), "zh")
    assert "dpo.no_likelihood_displacement 没有通过" in page and "-1.766" in page and "其余 4 条检查通过" in page
    assert "SFT 项重跑" in page and not SUCCESS.search(page)


def test_a_warning_is_said_and_nothing_is_made_of_it() -> None:
    id = "dpo.held_out_preference_accuracy_rose"
    run = changed(
        "dpo", (["checks", id, "status"], "warn"), (["eval", "ci95", "preference_accuracy", 0], -0.1), toy=False
    )
    page = brief.markdown(source_of("dpo"), run, "zh")
    assert f"检查 {id} 只得到警告" in page and "偏好准确率从" not in page and "toy 配方" not in page
    run.summary["toy"] = True
    assert "方法起作用" not in brief.markdown(source_of("dpo"), run, "zh")
    assert "方法起作用" in brief.markdown(source_of("dpo"), recorded("dpo"), "zh")


def test_a_check_that_was_not_made_is_a_limit() -> None:
    run = changed("dpo", (["checks", "dpo.reference_did_not_move", "status"], "skip"))
    page = brief.markdown(source_of("dpo"), run, "zh")
    assert "检查 dpo.reference_did_not_move 没有做" in page and "确实冻结了" not in page


def test_a_run_without_numbers_claims_nothing() -> None:
    kept = ("module", "status", "run_id", "seed")
    bare = Run(RUNS / "nowhere", {"checks": [], **{name: recorded("mdp").summary[name] for name in kept}})
    assert brief.result_of(source_of("mdp"), bare, "zh").startswith("这次运行的记录里没有")


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("module", [name for name in WITH_BRIEF if source_of(name).rests_on_evaluation])
def test_a_run_that_evaluated_nothing_says_so_and_claims_no_result(module: str, language: str) -> None:
    source, run = source_of(module), changed(module, eval=None)
    page, said = brief.markdown(source, run, language), brief.result_of(source, run, language)
    assert said.startswith(brief.WORDS["not_evaluated"][language]) and not SUCCESS.search(said)
    assert brief.WORDS["evaluate_next"][language] in said and brief.WORDS["toy"][language] not in page
    assert page.count(brief.WORDS["not_evaluated"][language]) == 2  # it is a limit, too
    assert not [claim.id for claim in source.result if (s := claim.say(recorded(module), language)) and s in page]


def test_lessons_with_exact_values_need_no_evaluation() -> None:
    """Their recorded runs have none. The comparison of architectures reads those of its three runs, in `comparison`."""
    exact = {name for name in WITH_BRIEF if recorded(name).summary["eval"] is None}
    assert {name for name in WITH_BRIEF if not source_of(name).rests_on_evaluation} == exact | {"vlm"}


# ---------------------------------------------------------------- the command


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_it_finds_the_latest_run_by_itself(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place("dpo", folder)
    assert cli.main(["brief", "--module", "dpo"]) == 0
    assert "20250101-000000-0000" in capsys.readouterr().out
    place("dpo_sigmoid", folder)
    assert cli.main(["brief", "--module", "dpo", "--lang", "en"]) == 0
    out = capsys.readouterr().out
    assert "20250102-000000-0000" in out and "status failed" in out


def test_without_the_link_the_newest_run_counts(folder: Path) -> None:
    place("dpo", folder)
    newest = place("dpo_sigmoid", folder, lambda s: s.update(started_at="2025-06-01T00:00:00+00:00"))
    (newest.parent / "latest").unlink()
    found = evidence.latest("dpo")
    assert found is not None and found.path == newest


def test_a_run_may_be_named_and_the_brief_saved(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["brief", "--module", "gae", "--run", str(RUNS / "gae"), "--save", "gae.md"]) == 0
    assert capsys.readouterr().out == "gae.md\n"
    assert Path("gae.md").read_text(encoding="utf-8") == brief.markdown(source_of("gae"), recorded("gae"), "zh")


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["--module", "dpo"], 1, "python run.py --module dpo --toy"),
        (["--module", "dpo", "--lang", "en"], 1, "there is no run of dpo"),
        (["--module", "dqo", "--lang", "en"], 2, "there is no module `dqo`. Did you mean `dpo`? There are: mdp, td_"),
        (["--module", "dqo"], 2, "没有模块 `dqo`。是不是 `dpo`？有这些：mdp, td_learning"),
        (["--module", "dpo", "--run", "nowhere", "--lang=en"], 1, "holds no summary.json"),
        (["--module", "sft", "--run", str(RUNS / "dpo"), "--lang", "en"], 1, "is a run of `dpo`, not of `sft`"),
        ([], 2, "--module"),
        (["--module", "dpo", "--lnag", "en"], 2, "--lnag"),
        (["--modul", "dpo"], 2, "--module"),
        (["--module", "dpo", "--run", str(RUNS / "dpo"), "--save", "no/such/folder/x.md"], 1, "No such file"),
        (["--module", "dpo", "--run", str(RUNS / "dpo"), "--save", "/"], 1, ": /\n"),
        (["--module", "dpo", "--run", str(RUNS / "dpo"), "--save", "."], 1, ": .\n"),
        (["--module", "dpo", "--run", str(RUNS / "dpo"), "--save", ""], 2, "--save：需要一个值"),
        (["--module", "dpo", "--run", "", "--lang", "en"], 2, "--run: expected one argument"),
    ],
)
def test_what_is_wrong_is_said_in_one_message(
    argv: list[str], code: int, said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["brief", *argv]) == code
    captured = capsys.readouterr()
    assert said in captured.err and captured.out == ""
    assert not list(folder.iterdir())


def test_a_planned_module_is_told_from_a_mistyped_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there = tuple(module for module in registry.MODULES if module.name != "vlm")
    monkeypatch.setattr(registry, "MODULES", there)
    assert cli.main(["brief", "--module", "vlm", "--lang", "en"]) == 1
    assert "`vlm` (level 5) is planned, but not there yet" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"checks": [], "module": "dpo"}', '{"checks": [1]}', "[" * 100_000]
)
def test_a_damaged_summary_is_named(content: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place("dpo", folder) / "summary.json").write_text(content)
    assert cli.main(["brief", "--module", "dpo", "--lang", "en"]) == 1
    assert "summary.json is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["wall_seconds"], "long"),
        (["eval"], True),
        (["eval", "before"], None),
        (["eval", "ci95"], DELETE),
        (["checks", "dpo.step0_loss_is_ln2", "status"], DELETE),
        (["checks", "dpo.step0_loss_is_ln2", "observed"], DELETE),
    ],
)
@pytest.mark.parametrize("command", ["brief", "cards", "progress", "export"])
def test_a_summary_with_a_part_of_another_kind_is_damaged(
    command: str, path: list[Any], value: Any, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(summary: dict[str, Any]) -> None:
        if len(path) == 1:
            summary[path[0]] = value
        else:
            put(summary, path, value)

    place("dpo", folder, change)
    argv = [command, "--module", "dpo"] if command in ("brief", "cards") else [command]
    assert cli.main([*argv, "--lang", "en"]) == 1
    assert "summary.json is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_finite_number_is_no_evidence(number: float) -> None:
    page = brief.markdown(source_of("dpo"), changed("dpo", (["eval", "after", "rewards/margins"], number)), "zh")
    assert not re.search(r"\b(nan|inf)\b", page) and "隐式奖励差的均值从零涨到" not in page


@pytest.mark.parametrize("content", [b"a: b: c", b"\xff\xfe\x00", b"beta: [1"])
def test_damaged_options_of_a_run_are_named(content: bytes, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place("dpo", folder) / "resolved_config.yaml").write_bytes(content)
    assert cli.main(["brief", "--module", "dpo", "--lang", "en"]) == 1
    captured = capsys.readouterr()
    assert "resolved_config.yaml is damaged" in captured.err and captured.out == ""


def test_it_never_imports_torch_and_answers_at_once(folder: Path) -> None:
    place("dpo", folder)
    code = (
        "import sys, time; sys.argv = ['interview_brief.py', 'brief', '--module', 'dpo'];"
        f"sys.path.insert(0, {str(ROOT)!r}); from llmcore_hf import cli; code = cli.main(sys.argv[1:]);"
        "heavy = {'torch', 'transformers', 'trl', 'datasets', 'numpy', 'matplotlib'} & set(sys.modules);"
        "print(code, sorted(heavy), time.process_time(), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=60)
    said, seconds = done.stderr.rsplit(" ", 1)
    assert said == "0 []", done.stderr
    assert float(seconds) < 0.5  # of CPU, from the start of the interpreter


def test_the_script_is_the_command(folder: Path) -> None:
    place("dpo", folder)
    script = [sys.executable, str(ROOT / "scripts" / "interview_brief.py"), "--module", "dpo"]
    done = subprocess.run(script, cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout == brief.markdown(source_of("dpo"), recorded("dpo"), "zh")
