"""The bug zoo: the edits fit today's source and are undone, the evidence tells the bug, and the game is fair."""

from __future__ import annotations

import io
import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT

from llmcore_hf import cli
from llmcore_hf.errors import UserError
from llmcore_hf.learning import bugzoo, items, quiz, state
from llmcore_hf.learning.breakages import BREAKAGES, Breakage
from llmcore_hf.learning.texts import LANGUAGES, in_language_of

sys.path.insert(0, str(ROOT / "benchmarks"))

BUGS = list(bugzoo.load()["bugs"])
RECORD = json.loads((ROOT / "tests" / "bugzoo_runs.json").read_text(encoding="utf-8"))
NUMBER = re.compile(r"\d+(?:\.\d+)?")


# ---------------------------------------------------------------- the edits


def test_nine_bugs_are_in_the_zoo_and_each_has_an_edit() -> None:
    assert set(BUGS) == set(BREAKAGES) and len(BUGS) >= 8
    assert set(bugzoo.load()["modules"]) == {breakage.module for breakage in BREAKAGES.values()}


@pytest.mark.parametrize("bug", BUGS)
def test_an_edit_fits_the_source_and_is_undone(bug: str) -> None:
    breakage = BREAKAGES[bug]
    before, after = breakage.sources()
    assert before != after and len(breakage.diff().splitlines()) < 30
    file = breakage.source_file()
    original = getattr(file, breakage.function)
    with breakage.applied():
        assert getattr(file, breakage.function) is not original
    assert getattr(file, breakage.function) is original


def test_a_module_that_imported_the_function_gets_the_broken_one() -> None:
    from llmcore_hf.ppo import advantages, trainer

    own = trainer.gae
    with BREAKAGES["gae_off_by_one"].applied():
        assert trainer.gae is advantages.gae is not own
    assert trainer.gae is advantages.gae is own


def test_it_is_undone_when_the_run_raises() -> None:
    from llmcore_hf.ppo import advantages

    own = advantages.kl_k1
    with pytest.raises(ValueError, match="run"), BREAKAGES["kl_sign"].applied():
        raise ValueError("run")
    assert advantages.kl_k1 is own


def test_an_edit_that_no_longer_fits_is_an_error() -> None:
    stale = Breakage("ppo", "llmcore_hf.ppo.advantages", "kl_k1", (("return nothing", "return 0"),))
    with pytest.raises(LookupError, match="return nothing"), stale.applied():
        pass


def test_no_product_code_knows_the_zoo() -> None:
    for file in [*(ROOT / "llmcore_hf").rglob("*.py"), *(ROOT / "recipes").rglob("*.py")]:
        if "learning" not in file.parts and file.name != "cli.py":
            assert not re.search("bugzoo|breakage", file.read_text(encoding="utf-8")), file


# what single functions do when they are broken, without a run


def test_the_broken_kl_is_negative_where_the_true_one_is_positive() -> None:
    from llmcore_hf.ppo import advantages

    p, ref = torch.tensor([0.7, 0.3]).double(), torch.tensor([0.5, 0.5]).double()
    with BREAKAGES["kl_sign"].applied():
        broken = (p * advantages.kl_k1(p.log(), ref.log())).sum()
    assert (p * advantages.kl_k1(p.log(), ref.log())).sum() == -broken > 0


def test_the_broken_gae_has_no_baseline_and_chases_itself() -> None:
    from llmcore_hf.ppo import advantages

    rewards, mask, none = torch.tensor([[0.0, 0.0, 1.0]]), torch.ones(1, 3), torch.zeros(1)
    found = []
    for values in (torch.zeros(1, 3), torch.full((1, 3), 5.0)):
        with BREAKAGES["gae_off_by_one"].applied():
            broken = advantages.gae(rewards, values, mask, none, 1.0, 0.95)
        found.append(broken)
        assert not torch.allclose(broken, advantages.gae(rewards, values, mask, none, 1.0, 0.95)) or not values.any()
    assert torch.equal(*found)  # whatever the critic says


def test_broken_rewards_are_alike_within_a_group() -> None:
    from types import SimpleNamespace

    from llmcore_hf.alignment import grpo
    from llmcore_hf.ppo.rewards import make_scorers

    def function(completions: list[str], **more: Any) -> list[float]:
        return [float(text) for text in completions]

    (scorer,) = make_scorers([function], None, None)
    row = {"prompts": ["a", "a", "b", "b"], "completions": ["1", "0", "0.5", "0.25"], "completion_ids": [[1]] * 4}
    given = {"trainer_state": SimpleNamespace(global_step=0), "log_metric": print, "log_extra": print}
    with BREAKAGES["zero_variance_groups"].applied():
        broken = grpo.checked(scorer)(**row, **given)
    assert grpo.checked(scorer)(**row, **given) == [1, 0, 0.5, 0.25]
    assert broken[0] == broken[1] and broken[2] == broken[3]


# ---------------------------------------------------------------- real runs


BUG_SEED = {bugzoo.bug_of(seed): seed for seed in reversed(range(len(BUGS)))}


def check_case(case: bugzoo.Case) -> None:
    """The marks are there, all that is shown is known, and no check is named."""
    for mark in bugzoo.telltales(case):
        assert mark.holds, mark
    assert case.healthy.summary["seed"] == case.broken.summary["seed"] == case.seed
    for row in bugzoo.load()["modules"][case.module]["shown"]:
        assert None not in (case.healthy.look_up(row["path"]), case.broken.look_up(row["path"])), row
    assert case.broken.with_status("fail")  # these two are noticed
    shown = json.dumps(bugzoo.shown_summary(case.broken)) + "".join(bugzoo.page(case, lang) for lang in LANGUAGES)
    assert not any(check in shown for check in case.broken.checks)
    assert bugzoo.picture(case).startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_run_that_is_really_broken_shows_its_marks(tmp_path: Path, one_thread: None) -> None:
    from llmcore_hf.learning import specimens

    seed = BUG_SEED["pad_is_eos"]
    made = [specimens.make("sft", seed, tmp_path / str(bug), bug) for bug in (None, "pad_is_eos")]
    check_case(bugzoo.Case(seed, tmp_path, "pad_is_eos", *made))


@pytest.mark.slow
def test_the_command_makes_both_runs_and_opens_them_after_the_answer(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert bugzoo.bug_of(0) == "truncation_as_termination"
    assert play(["--lang", "en"], right_letter(0) + "\n", monkeypatch) == 0
    assert "Right." in capsys.readouterr().out
    case = bugzoo.prepare(0, "en")  # as it was made
    assert case.broken.path.parent == case.folder / bugzoo.OPEN
    assert (case.folder / "runs" / "output.txt").is_file() and not (folder / "output" / "actor_critic").exists()
    check_case(case)


@pytest.mark.parametrize("bug", BUGS)
def test_the_campaign_ran_the_bug_as_it_is_today_and_its_marks_held(bug: str) -> None:
    """After a change of an edit, of options, or of bounds: `make bugzoo`."""
    from bugzoo import MAX_SECONDS, recipe_of  # type: ignore[attr-defined]

    entry = RECORD[bug]
    assert entry["recipe"] == recipe_of(bug)
    assert len(entry["runs"]) >= 3
    for run in entry["runs"].values():
        assert run["seconds"] <= MAX_SECONDS
        rows = bugzoo.load()["bugs"][bug]["telltale"]
        assert list(run["telltales"]) == [" / ".join(row["path"]) for row in rows]
        for row, (healthy, broken) in zip(rows, run["telltales"].values(), strict=True):
            ranges = {"healthy": row["healthy"], "broken": row["broken"]}
            assert bugzoo.Telltale("", healthy, broken, ranges).holds, (row, healthy, broken)


@pytest.mark.parametrize("bug", BUGS)
def test_one_mark_at_least_separates_broken_from_healthy(bug: str) -> None:
    rows = bugzoo.load()["bugs"][bug]["telltale"]
    assert any(row["healthy"][1] < row["broken"][0] or row["broken"][1] < row["healthy"][0] for row in rows)


# ---------------------------------------------------------------- the cases


def test_nine_seeds_in_a_row_show_each_bug_once() -> None:
    for start in (0, 9, 900):
        assert sorted(bugzoo.bug_of(start + i) for i in range(9)) == sorted(BUGS)
    assert [bugzoo.bug_of(i) for i in range(9)] != [bugzoo.bug_of(9 + i) for i in range(9)]


def test_texts_are_complete_in_both_languages() -> None:
    source = bugzoo.load()

    def check(text: dict[str, str]) -> None:
        assert set(text) == {"zh", "en"} and all(text.values())
        zh, en = ({n for n in NUMBER.findall(text[language]) if len(n) > 1} for language in LANGUAGES)
        assert zh == en, text

    for name in source["names"].values():
        check(name)
    for module in source["modules"].values():
        for row in module["shown"]:
            check({language: row[language] for language in LANGUAGES})
        assert len(module["curves"]) == 4
    used = set(BUGS)
    for bug in source["bugs"].values():
        for part in ("explain", "evidence", "fix"):
            check(bug[part])
        assert len(bug["wrong"]) == 4
        for name, why in bug["wrong"].items():
            check(why)
            used.add(name)
    assert used | {"answers_cut", "displacement"} >= set(source["names"]) and used <= set(source["names"])


def test_the_readmes_are_twins() -> None:
    zh, en = (
        (ROOT / "learning" / "bugzoo" / f"README{suffix}.md").read_text(encoding="utf-8") for suffix in ("", ".en")
    )
    for pattern in (r"^\| .*\|$", r"^#+ ", r"^- ", r"`\w+`", r"\]\("):
        assert len(re.findall(pattern, zh, re.M)) == len(re.findall(pattern, en, re.M)), pattern
    assert zh.count("| `") == len(BUGS)


# ---------------------------------------------------------------- the game, on stored runs


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(state.PLACE, str(tmp_path / "state.json"))
    return tmp_path


CHECK = {"observed": {}, "expected": "", "why_zh": "错在这里", "why_en": "the bug"}


def stored_runs(bug: str, to: Path) -> None:
    """A sealed pair of run directories with the values of the campaign."""
    module = BREAKAGES[bug].module
    source = bugzoo.load()["modules"][module]
    marks = RECORD[bug]["runs"]["0"]["telltales"]
    for side, name in enumerate(("healthy", "broken")):
        summary: dict[str, Any] = {
            "run_id": name, "module": module, "status": "ok" if name == "healthy" else "failed",
            "error": None if name == "healthy" else "checks failed: a.secret", "seed": 0, "metrics": {},
            "eval": {"before": {}, "after": {}, "ci95": {}},
            "model": {}, "samples": [{"prompt": "sort: 21", "reference": "12", "before": "", "after": f"{name}-answer"}],
            "checks": [{"id": "a.secret", "status": "pass" if side == 0 else "fail", **CHECK}],
        }  # fmt: skip
        for row in source["shown"]:
            put(summary, row["path"], 0.5)
        for mark, values in marks.items():
            put(summary, mark.split(" / "), values[side])
        rows = [{"step": step, **dict.fromkeys(source["curves"], step * (side + 1) / 10)} for step in range(1, 60)]
        (to / name).mkdir(parents=True)
        (to / name / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
        (to / name / "log_history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def put(summary: dict[str, Any], path: list[str], value: Any) -> None:
    head, *rest = path
    if head == "checks":
        check = next((c for c in summary["checks"] if c["id"] == rest[0]), None)
        if check is None:
            check = {"id": rest[0], "status": "pass", **CHECK, "observed": {}}
            summary["checks"].append(check)
        check["observed"][rest[-1]] = value
        return
    target = summary[head]
    for key in rest[:-1]:
        target = target.setdefault(key, {})
    target[rest[-1]] = value


def play(argv: list[str], typed: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    return cli.main(["bugzoo", *argv])


def right_letter(seed: int) -> str:
    order = list(range(5))
    random.Random(seed).shuffle(order)
    return "ABCDE"[order.index(0)]


@pytest.mark.parametrize("bug", BUGS)
def test_a_right_answer_is_graded_explained_and_kept(
    bug: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    seed = BUG_SEED[bug]
    stored_runs(bug, folder / "output" / "bugzoo" / str(seed) / ".sealed")
    assert play(["--seed", str(seed), "--lang", "en"], right_letter(seed) + "\n", monkeypatch) == 0
    out = capsys.readouterr().out
    asked, graded = out.split("What is wrong with the broken run?")
    source = bugzoo.load()["bugs"][bug]
    assert "secret" not in asked and source["explain"]["en"] not in asked and "healthy-answer" in asked
    for said in (
        "Right.",
        source["explain"]["en"],
        source["evidence"]["en"],
        source["fix"]["en"],
        "`a.secret`",
        "```diff",
    ):
        assert said in graded, said
    assert [(a["item"], a["right"]) for a in state.read()["answers"]] == [(f"bugzoo-{bug}", True)]
    case = folder / "output" / "bugzoo" / str(seed)
    assert {path.name for path in case.iterdir() if path.name != ".lock"} == {
        "answer.md", "broken.json", "evidence.md", "evidence.png", "healthy.json", "runs",
    }  # fmt: skip
    assert "secret" not in (case / "broken.json").read_text() + (case / "evidence.md").read_text()


def test_leaving_keeps_the_seal_and_a_wrong_answer_counts_as_wrong(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    sealed = folder / "output" / "bugzoo" / "0" / ".sealed"
    stored_runs(bugzoo.bug_of(0), sealed)
    assert play([], "q\n", monkeypatch) == 0
    assert sealed.is_dir() and state.read()["answers"] == []
    capsys.readouterr()
    wrong = next(letter for letter in "ABCDE" if letter != right_letter(0))
    assert play([], wrong, monkeypatch) == 0
    out = capsys.readouterr().out
    assert "不对。" in out and "证据：" in out and "怎样改：" in out and not sealed.exists()
    assert [a["right"] for a in state.read()["answers"]] == [False]
    assert bugzoo.next_seed() == 1
    stored_runs(bugzoo.bug_of(1), sealed.parent.parent / "1" / bugzoo.OPEN)  # answered before, under another state file
    assert bugzoo.next_seed() == 2
    assert cli.main(["bugzoo", "--list"]) == 0
    assert capsys.readouterr().out.count("答错过") == 1
    assert cli.main(["quiz", "--review"]) == 0  # the quiz leaves answers to cases alone


def test_a_case_whose_answer_is_open_is_not_kept_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Or the answer could be read after a wrong guess, and given."""
    stored_runs(bugzoo.bug_of(0), folder / "output" / "bugzoo" / "0" / ".sealed")
    wrong = next(letter for letter in "ABCDE" if letter != right_letter(0))
    assert play(["--seed", "0"], wrong, monkeypatch) == 0
    assert bugzoo.WORDS["known"]["zh"] not in capsys.readouterr().out
    assert play(["--seed", "0"], right_letter(0), monkeypatch) == 0
    assert bugzoo.WORDS["known"]["zh"] in capsys.readouterr().out
    assert [answer["right"] for answer in state.read()["answers"]] == [False]


@pytest.mark.parametrize("language", ["zh", "en"])
def test_whoever_leaves_is_told_how_to_come_back(
    language: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    stored_runs(bugzoo.bug_of(0), folder / "output" / "bugzoo" / "0" / ".sealed")
    command = "python scripts/bugzoo.py --seed 0" + (" --lang en" if language == "en" else "")
    for typed in ("", "q\n"):
        assert play(["--lang", language], typed, monkeypatch) == 0
        assert capsys.readouterr().out.endswith(bugzoo.WORDS["left"][language].format(command=command) + "\n")
    assert play(["--lang", language], "Z\n?\nAB\n", monkeypatch) == 0
    out = capsys.readouterr().out
    assert out.rstrip().endswith(command.replace("--seed 0", "--seed 1"))
    assert [answer["right"] for answer in state.read()["answers"]] == [False]


@pytest.mark.parametrize("file", ["summary.json", "log_history.jsonl"])
@pytest.mark.parametrize(("language", "said"), [("zh", "已损坏"), ("en", "is damaged")])
def test_damaged_runs_of_a_case_are_one_message(language: str, said: str, file: str, folder: Path, capsys: Any) -> None:
    sealed = folder / "output" / "bugzoo" / "0" / ".sealed"
    stored_runs(bugzoo.bug_of(0), sealed)
    (sealed / "broken" / file).write_text("{\n")
    assert cli.main(["bugzoo", "--seed", "0", "--lang", language]) == 1
    shown = capsys.readouterr().err
    with in_language_of(["--lang", language]):
        assert said in shown and bugzoo._made_again(sealed) in shown
    assert state.read()["answers"] == []


def test_runs_that_do_not_show_their_bug_are_not_asked_about(folder: Path, capsys: Any) -> None:
    sealed = folder / "output" / "bugzoo" / "0" / ".sealed"
    stored_runs(bugzoo.bug_of(0), sealed)
    shutil.rmtree(sealed / "broken")
    shutil.copytree(sealed / "healthy", sealed / "broken")
    assert cli.main(["bugzoo", "--seed", "0", "--lang", "en"]) == 1
    assert "take another --seed" in capsys.readouterr().err
    assert state.read()["answers"] == []


def test_runs_that_cannot_be_made_are_one_message(folder: Path) -> None:
    with pytest.raises(UserError, match="没有做成：KeyError"):
        bugzoo._make(folder, "no_such_bug", 0)
    assert not (folder / ".sealed").exists()


def test_an_interrupted_run_is_no_specimen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmcore_hf import run_dir
    from llmcore_hf.learning import specimens

    def stopped(module: Any, config: Any, argv: list[str]) -> int:
        stored_runs("kl_sign", tmp_path)
        file = tmp_path / "broken" / "summary.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "status": "interrupted"}))
        return 143

    monkeypatch.setattr(run_dir, "execute", stopped)
    with pytest.raises(KeyboardInterrupt):
        specimens.make("ppo", 0, tmp_path / "broken", "kl_sign")


def test_the_choices_are_shuffled_by_the_seed() -> None:
    assert len({right_letter(seed) for seed in range(40)}) == 5


def test_a_seed_out_of_range_is_one_message(capsys: Any) -> None:
    assert cli.main(["bugzoo", "--seed", "-1"]) == 2
    assert "--seed -1" in capsys.readouterr().err
    assert cli.main(["bugzoo", "--list", "--seed", "1"]) == 2
    assert "--list" in capsys.readouterr().err


def test_answers_share_the_state_with_the_quiz() -> None:
    assert not {item.id for item in items.all_items()} & {f"bugzoo-{bug}" for bug in BUGS}
    assert quiz.answered_right([{"item": "bugzoo-x", "right": True}]) == {"bugzoo-x"}


def test_the_list_imports_nothing_heavy(folder: Path) -> None:
    code = (
        f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); from llmcore_hf import cli; code = cli.main(['bugzoo', '--list']);"
        "print(code, sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)), time.process_time(), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=60)
    said, seconds = done.stderr.rsplit(" ", 1)
    assert said == "0 []" and float(seconds) < 0.5
