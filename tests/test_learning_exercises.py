"""Exercises: the reference solutions pass, wrong versions fail where they should, and the checker survives what it is given."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import ROOT
from exercise_bugs import BUGS

from llmcore_hf import cli, resources
from llmcore_hf.learning import exercise, grading, plan, progress, state
from llmcore_hf.learning.exercise import Exercise
from llmcore_hf.learning.grading import equal, show
from llmcore_hf.learning.texts import LANGUAGES, read_yaml

ALL = exercise.load_all()
PROMISED = [
    "value_iteration",
    "td",
    "gae",
    "kl_estimators",
    "dpo_loss",
    "ppo_clip_loss",
    "group_advantage",
    "cql_penalty",
    "bcq_filter",
    "lora_merge",
    "column_parallel",
    "zero_memory",
    "causal_attention",
    "rope",
]
BY_EXERCISE = [(name, *bug) for name, bugs in BUGS.items() for bug in bugs]

pytestmark = pytest.mark.usefixtures("one_thread")


@functools.cache
def checker(name: str) -> ModuleType:
    return grading.checker(name)


def graded(name: str, code: str) -> dict[str, grading.Row]:
    """Property -> what the checker says about this code, in this process."""
    Path("mine.py").write_text(code, encoding="utf-8")
    module = grading.load(Path("mine.py").resolve(), "learner")
    return {row["id"]: row for row in grading.grade(list(ALL[name].properties), checker(name), module)}


def solution(name: str) -> str:
    return ALL[name].file("solution.py").read_text(encoding="utf-8")


# ---------------------------------------------------------------- the exercises


def test_all_promised_exercises_are_there_and_count_for_a_level() -> None:
    assert sorted(ALL) == sorted(PROMISED) == sorted(BUGS)
    assert progress.exercises() == {name: found.level for name, found in ALL.items()}
    known = {day.module for day in plan.load().days} | {name for level in plan.load().levels for name in level.modules}
    assert {found.module for found in ALL.values()} <= known
    assert {found.level for found in ALL.values()} == {1, 2, 3, 4, 5}


@pytest.mark.parametrize("name", ALL)
def test_a_folder_holds_the_same_in_both_languages(name: str) -> None:
    source = read_yaml(ALL[name].file("exercise.yaml"))
    assert set(source) == {"level", "module", "title", "properties"}
    texts = [source["title"], *source["properties"].values()]
    assert all(set(text) == set(LANGUAGES) and all(text.values()) for text in texts)
    pages = [ALL[name].file(page).read_text(encoding="utf-8") for page in ("README.md", "README.en.md")]
    blocks, sources = ([re.findall(how, page, re.S) for page in pages] for how in (r"```text.*?```", r"arXiv:[\d.]+"))
    assert blocks[0] == blocks[1] and len(blocks[0]) == 1  # the same formulas
    assert sources[0] == sources[1] and (sources[0] or all("Sutton & Barto 2018" in page for page in pages))
    for page in pages:
        for link in re.findall(r"\]\(([^)]+)\)", page):
            assert ALL[name].file(link).is_file()
        assert "`task.py`" in page


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_page_lists_them_all(language: str) -> None:
    page = "README.md" if language == "zh" else f"README.{language}.md"
    text = (ROOT / "learning" / "exercises" / page).read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if re.match(r"\| \d", line)]
    assert rows == [
        f"| {found.level} | [{found.title[language]}]({name}/{page}) | `{name}` | `{found.module}` |"
        for name, found in ALL.items()
    ]


@pytest.mark.parametrize("name", ALL)
def test_every_property_of_the_checker_is_described(name: str) -> None:
    public = [key for key, value in vars(checker(name)).items() if getattr(value, "__module__", "") == f"check_{name}"]
    assert [key for key in public if not key.startswith("_")] == list(ALL[name].properties)
    assert len(ALL[name].properties) >= 5


@pytest.mark.parametrize("name", ALL)
def test_the_task_has_the_signatures_of_the_solution_and_is_empty(name: str) -> None:
    def signatures(code: str) -> list[str]:
        return [re.sub(r"\s+|,(?=\s*\))", "", text) for text in re.findall(r"^def (.*?):\n", code, re.S | re.M)]

    task = ALL[name].file("task.py").read_text(encoding="utf-8")
    assert signatures(task) == signatures(solution(name))
    assert {row["status"] for row in graded(name, task).values()} == {"empty"}


@pytest.mark.parametrize("name", ALL)
def test_the_reference_solution_passes(name: str) -> None:
    rows = graded(name, solution(name))
    assert {row["status"] for row in rows.values()} == {"pass"}, rows


@pytest.mark.parametrize(("name", "right", "wrong", "property"), BY_EXERCISE)
def test_a_wrong_version_fails_the_property_that_it_breaks(name: str, right: str, wrong: str, property: str) -> None:
    code = solution(name)
    assert code.count(right) == 1
    row = graded(name, code.replace(right, wrong))[property]
    assert row["status"] in ("fail", "error"), row
    if row["status"] == "fail":
        assert row["inputs"] and row["expected"] != row["got"]


@pytest.mark.parametrize("name", ALL)
def test_each_exercise_has_wrong_versions_and_each_property_one_that_breaks_it(name: str) -> None:
    assert len(BUGS[name]) >= 3
    assert {property for _, _, property in BUGS[name]} == set(ALL[name].properties)


# ---------------------------------------------------------------- comparing and showing


@pytest.mark.parametrize(
    ("got", "expected", "agree"),
    [
        (1.0, 1.00001, True),
        (1.0, 1.01, False),
        (True, 1.0, False),
        (None, 1.0, False),
        (float("nan"), 1.0, False),
        ([1.0, 2.0], [1.0, 2.0], True),
        ([1.0], [1.0, 2.0], False),
        ("1", 1.0, False),
    ],
)
def test_numbers_agree_up_to_the_tolerance(got: Any, expected: Any, agree: bool) -> None:
    if agree:
        equal(got, expected)
    else:
        with pytest.raises(grading.Mismatch):
            equal(got, expected)


def test_tensors_agree_in_shape_and_value_whatever_their_precision() -> None:
    import torch

    one = torch.ones(2)
    for got in (one, one.double(), one.long(), one.clone().requires_grad_()):
        equal(got, one)
    equal(torch.tensor([1.0]), 1.0)
    for got in (torch.ones(1, 2), torch.ones(1), torch.tensor(1.0), one * torch.nan, [1.0, 1.0], one + 0.1):
        with pytest.raises(grading.Mismatch):
            equal(got, one)
    with pytest.raises(grading.Mismatch):
        equal(one, 1.0)


def test_values_are_shown_as_they_can_be_typed() -> None:
    import torch

    assert show(torch.tensor([[0.1, -2.0]])) == "tensor([[0.1, -2.0]])"
    assert show([(0, 1.0, 2, True)]) == "[[0, 1.0, 2, True]]"
    assert show(torch.tensor(0.25)) == "0.25"
    long = show(torch.zeros(100, 100))
    assert len(long) < 700 and long.endswith("… shape (100, 100)")


# ---------------------------------------------------------------- the command


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(state.PLACE, str(tmp_path / "state.json"))
    return tmp_path


def write(folder: Path, code: str) -> str:
    (folder / "mine.py").write_text(code, encoding="utf-8")
    return "mine.py"


@pytest.mark.slow
def test_a_wrong_line_is_shown_with_input_expected_and_got(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = solution("gae").replace("next_values * ~terminated", "next_values * ~done")
    argv = ["exercise", "check", "gae", "--file", write(folder, code), "--lang", "en"]
    assert cli.main(argv) == 1
    out = capsys.readouterr().out
    failed = re.findall(r"^✗ (\w+): ", out, re.M)
    assert "truncation_bootstraps" in failed and "✓ termination_has_no_next_value" in out
    after = out[out.index("✗ truncation_bootstraps") :]
    for label in ("input  rewards = tensor([", "input  gamma = 0.9", "expected  ", "got  "):
        assert label in after
    assert state.read()["exercises"]["gae"]["passed"] is False
    write(folder, solution("gae") + "\n# mine")
    assert cli.main(argv) == 0
    assert "6 of 6 properties hold" in capsys.readouterr().out
    assert state.read()["exercises"]["gae"]["passed"] is True


LOOP = """
def gae(rewards, values, next_values, terminated, done, gamma, lam):
    while lam == 0:
        pass
    return rewards
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "said"),
    [
        (LOOP, ["✗ lambda_0_is_the_td_residual", "0.5 秒内没有结束", "（第 3 行：while lam == 0:）"]),
        ("while True: pass", ["✗ import", "0.5 秒内没有结束", "第 1 行"]),
        ("def gae(**more):\n    import os\n    os._exit(7)", ["中途退出（exit 7）"]),
        ("def gae(**more):\n    import os\n    os.kill(os.getpid(), 11)", ["中途退出（SIGSEGV）"]),
        ("def gae(**more):\n    raise SystemExit(0)", ["中途退出（exit 0）"]),
        ("def gae(**more:", ["✗ import", "SyntaxError", "第 1 行"]),
        ("import nothing_like_this", ["✗ import", "ModuleNotFoundError"]),
        ("def gea(**more): pass", ["还没有写：def gae(...)"]),
        ("def gae(**more):\n    return 1 / 0", ["ZeroDivisionError", "（第 2 行：return 1 / 0）"]),
        ("def gae(**more):\n    return None", ["得到  None"]),
        (
            "def gae(values, **more):\n    return values.long().softmax(0)",
            ["✗ truncation_bootstraps", "NotImplementedError: "],
        ),
        ("def gae(rewards, **more):\n    return rewards.add_(1)", ["`rewards` was changed in place"]),
    ],
)
def test_whatever_the_file_does_there_is_one_message(code: str, said: list[str], folder: Path, capfd: Any) -> None:
    file = write(folder, code)
    assert cli.main(["exercise", "check", "gae", "--file", file, "--seconds", "0.5"]) == 1
    out, err = capfd.readouterr()
    assert all(words in out for words in said), out
    assert "Traceback" not in out + err
    assert state.read()["exercises"]["gae"]["passed"] is False


def test_a_file_may_define_what_it_likes_and_nothing_is_left_beside_it(folder: Path) -> None:
    code = "from __future__ import annotations\nfrom dataclasses import dataclass\n\n@dataclass\nclass Own:\n    x: int\n\n"
    rows = graded("zero_memory", code + solution("zero_memory").split('"""', 2)[2])
    assert {row["status"] for row in rows.values()} == {"pass"}
    assert [path.name for path in folder.iterdir()] == ["mine.py"]


@pytest.mark.slow
def test_a_file_named_like_a_library_takes_no_ones_place(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    (folder / "torch.py").write_text(ALL["zero_memory"].file("solution.py").read_text(encoding="utf-8") + "\n")
    assert cli.main(["exercise", "check", "zero_memory", "--file", "torch.py"]) == 0
    assert "5/5" in capsys.readouterr().out


def test_the_solution_itself_is_not_kept_as_progress(
    folder: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed = [{"id": name, "status": "pass"} for name in ALL["gae"].properties]
    monkeypatch.setattr(exercise, "check", lambda *given: passed)
    shutil.copy(ALL["gae"].file("solution.py"), "mine.py")
    assert cli.main(["exercise", "check", "gae", "--file", "mine.py"]) == 0
    assert "参考答案本身" in capsys.readouterr().out and state.read()["exercises"] == {}


def test_the_list_says_what_was_done(capsys: pytest.CaptureFixture[str]) -> None:
    state.record_exercise("gae", True)
    state.record_exercise("rope", False)
    assert cli.main(["exercise", "list", "--lang", "en"]) == 0
    rows = {line.split("`")[1]: line for line in capsys.readouterr().out.splitlines() if line.startswith("| `")}
    assert list(rows) == list(ALL)
    assert rows["gae"].endswith("| passed |") and rows["rope"].endswith("| not passed yet |")
    assert rows["td"].endswith("| not tried |")


def test_show_gives_the_task_and_the_solution_only_when_asked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["exercise", "show", "dpo_loss", "--lang", "en"]) == 0
    out = capsys.readouterr().out
    assert "# Exercise: the DPO loss" in out and "raise NotImplementedError" in out and "logsigmoid" not in out
    assert "python scripts/exercise.py check dpo_loss" in out
    assert cli.main(["exercise", "show", "dpo_loss", "--solution"]) == 0
    assert capsys.readouterr().out == solution("dpo_loss")
    assert cli.main(["exercise", "show", "dpo_loss", "--save", "mine.py"]) == 0
    assert Path("mine.py").read_text(encoding="utf-8") == ALL["dpo_loss"].file("task.py").read_text(encoding="utf-8")
    assert cli.main(["exercise", "show", "dpo_loss", "--save", "mine.py"]) == 1
    assert "已经存在" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        ([], 2, "action"),
        (["chek", "gae"], 2, "chek"),
        (["check"], 2, "need the id"),
        (["list", "gae"], 2, "stands alone"),
        (["check", "gea"], 2, "Did you mean `gae`?"),
        (["check", "gae", "--file", "nowhere.py"], 1, "--save nowhere.py"),
        (["check", "gae", "--solution"], 2, "--solution is for `show`"),
        (["show", "gae", "--file", "x.py"], 2, "--file is for `check`"),
        (["check", "gae", "--seconds", "0"], 2, "greater than 0"),
    ],
)
def test_a_wrong_option_is_one_message(argv: list[str], code: int, said: str, folder: Path, capsys: Any) -> None:
    assert cli.main(["exercise", *argv, "--lang", "en"]) == code
    captured = capsys.readouterr()
    assert said in captured.err and captured.out == ""
    assert not list(folder.iterdir())


@pytest.mark.parametrize("command", ["exercise list", "exercise show gae"])
def test_listing_and_showing_import_nothing_heavy(command: str, folder: Path) -> None:
    code = (
        f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); from llmcore_hf import cli;"
        f"code = cli.main({command.split()!r});"
        "print(code, sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)), time.process_time(), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=60)
    said, seconds = done.stderr.rsplit(" ", 1)
    assert said == "0 []" and float(seconds) < 0.5


def test_the_script_is_the_command(folder: Path) -> None:
    script = [sys.executable, str(ROOT / "scripts" / "exercise.py"), "show", "gae", "--solution"]
    done = subprocess.run(script, cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout == solution("gae")


def test_exercises_are_among_the_resources_of_the_project() -> None:
    assert isinstance(ALL["gae"], Exercise) and resources.path("learning/exercises/gae/check.py").is_file()
