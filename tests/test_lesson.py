"""A lesson in a single file: how it becomes a module, and what its options refuse."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from llmcore_hf import cli, lesson, registry, resources
from llmcore_hf.registry import Module

FILE = '''"""What it teaches."""

from dataclasses import dataclass, field

from llmcore_hf import lesson
from llmcore_hf.checks import Check


@dataclass
class Args(lesson.LessonArguments):
    gamma: float = field(default=0.9, metadata={"help": "Discount."})

    def problems(self):
        return [] if 0 <= self.gamma < 1 else [f"--gamma {self.gamma}: a discount is in [0, 1)"]


def run(args, run_dir):
    run_dir.log({"step": 1, "return": args.gamma})
    run_dir.checks.append(Check("fake.gamma", "invariant", args.gamma == 0.5, args.gamma, "0.5", "折扣", "discount"))


if __name__ == "__main__":
    lesson.main(__file__)
'''


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A lesson `fake` with a toy recipe; tests run in `tmp_path`."""
    folder = tmp_path / "recipes" / "fake"
    folder.mkdir(parents=True)
    (folder / "fake.py").write_text(FILE, encoding="utf-8")
    (folder / "toy.yaml").write_text("gamma: 0.5\n")
    shipped = resources.path
    monkeypatch.setattr(resources, "path", lambda name: tmp_path / name if "fake" in name else shipped(name))
    monkeypatch.setattr(registry, "MODULES", (Module("fake", 1, 1, "假", "Fake"),))
    monkeypatch.delitem(sys.modules, "llmcore_hf.lesson.fake", raising=False)
    monkeypatch.chdir(tmp_path)
    yield folder / "fake.py"
    sys.modules.pop("llmcore_hf.lesson.fake", None)


def test_a_lesson_runs_as_a_module(fake: Path) -> None:
    assert cli.main(["--module", "fake", "--toy"]) == 0
    assert Path("output/fake/latest/summary.json").is_file()


def test_a_failed_check_fails_the_run(fake: Path) -> None:
    assert cli.main(["--module", "fake", "--toy", "--gamma", "0.6"]) == 1


def test_its_problems_are_told_together_with_all_others(fake: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--module", "fake", "--gamma", "1", "--seed", "-1", "--gama", "2"]) == 2
    error = capsys.readouterr().err
    for words in ("--gamma 1.0: a discount is in [0, 1)", "--seed -1", "`--gama` (did you mean `--gamma`?)"):
        assert words in error
    assert not Path("output").exists()


def test_a_launcher_with_several_processes_is_refused(fake: Path, monkeypatch, capsys) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["--module", "fake", "--toy"]) == 2
    assert "runs in one process" in capsys.readouterr().err


def test_the_file_is_executed_once(fake: Path) -> None:
    assert lesson.load("fake").file is lesson.load("fake").file


def test_a_file_that_fails_is_not_half_loaded(fake: Path) -> None:
    fake.write_text("x = 1\nraise RuntimeError('broken')\n")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="broken"):
            lesson.load("fake")


def test_the_help_shows_its_options_and_its_docstring(fake: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--module", "fake", "--help"]) == 0
    out = capsys.readouterr().out
    assert "What it teaches." in out and "--gamma" in out and "(toy: 0.5)" in out


def test_the_file_runs_on_its_own(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[str]] = []
    monkeypatch.setattr(cli, "main", lambda argv: called.append(argv) or 3)
    monkeypatch.setattr(sys, "argv", [str(fake), "--toy"])
    with pytest.raises(SystemExit) as caught:
        lesson.main(str(fake))
    assert called == [["--module", "fake", "--toy"]] and caught.value.code == 3


def test_a_figure_becomes_a_png_and_is_closed() -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure = plt.figure()
    assert lesson.png(figure).startswith(b"\x89PNG")
    assert not plt.fignum_exists(figure.number)


def test_nothing_heavy_is_imported_for_a_lesson() -> None:
    code = "import sys, llmcore_hf.lesson; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_a_lesson_runs_in_one_thread(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    seen: list[int] = []
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        monkeypatch.setattr(lesson.load("fake").file, "run", lambda args, run_dir: seen.append(torch.get_num_threads()))
        cli.main(["--module", "fake", "--toy"])
        assert seen == [1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
