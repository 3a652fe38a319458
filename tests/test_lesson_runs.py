"""Every lesson in a single file as a learner runs it: one toy run each, without network, and what it leaves behind."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from learning_runs import check_brief

from llmcore_hf import registry
from llmcore_hf.run_dir import validate_summary

pytestmark = pytest.mark.slow

LESSONS = [module.name for module in registry.MODULES if not module.code]
MAX_MB = 1000
# Says at the end what a lesson must not import, refuses the network, and records who asked for it.
WATCH = """
import atexit, os, socket, sys

def refuse(*args, **kwargs):
    with open(os.environ["NETWORK_LOG"], "a") as file:
        file.write(repr(args) + "\\n")
    raise OSError("no network in tests")

socket.getaddrinfo = socket.socket.connect = refuse
HEAVY = ("transformers", "datasets", "accelerate", "peft")
atexit.register(lambda: open(os.environ["IMPORT_LOG"], "w").write(" ".join(n for n in HEAVY if n in sys.modules)))
"""


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory: pytest.TempPathFactory):
    """The finished process and the folder of a lesson's toy run; each lesson runs once."""
    done: dict[str, tuple[subprocess.CompletedProcess[str], Path]] = {}

    def run(name: str) -> tuple[subprocess.CompletedProcess[str], Path]:
        if name not in done:
            folder = tmp_path_factory.mktemp(name)
            (folder / "sitecustomize.py").write_text(WATCH)
            paths = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
            logs = {"NETWORK_LOG": str(folder / "network.log"), "IMPORT_LOG": str(folder / "imports.log")}
            command = [sys.executable, str(ROOT / "run.py"), "--module", name, "--toy"]
            environment = {**os.environ, **logs, "PYTHONPATH": paths}
            result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
            done[name] = result, folder
        return done[name]

    return run


def summary_of(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / "output" / name / "latest" / "summary.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", LESSONS)
def test_a_toy_run_succeeds_and_every_check_passes(toy_run, name: str) -> None:
    result, folder = toy_run(name)
    assert result.returncode == 0, result.stderr
    summary = summary_of(folder, name)
    validate_summary(summary)
    assert (summary["module"], summary["status"], summary["error"], summary["toy"]) == (name, "ok", None, True)
    assert summary["eval"] is None and summary["peak_rss_mb"] < MAX_MB
    assert summary["checks"] and {check["status"] for check in summary["checks"]} == {"pass"}
    assert all(check["why_zh"] and check["why_en"] and check["expected"] for check in summary["checks"])
    assert any(check["kind"] == "invariant" for check in summary["checks"])


@pytest.mark.parametrize("name", LESSONS)
def test_a_toy_run_leaves_curves_and_pictures(toy_run, name: str) -> None:
    _, folder = toy_run(name)
    run = folder / "output" / name / "latest"
    assert {"summary.json", "log_history.jsonl", "training_curves.png", "resolved_config.yaml"} <= {
        p.name for p in run.iterdir()
    }
    for picture in run.glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000, picture.name
    rows = [json.loads(line) for line in (run / "log_history.jsonl").read_text().splitlines()]
    assert len(rows) > 1 and all("step" in row for row in rows)


@pytest.mark.parametrize("name", LESSONS)
def test_a_toy_run_asks_nothing_of_the_network_and_imports_no_trainer(toy_run, name: str) -> None:
    _, folder = toy_run(name)
    assert not (folder / "network.log").exists()
    assert (folder / "imports.log").read_text() == ""


@pytest.mark.parametrize("name", LESSONS)
def test_the_file_says_what_it_shows_and_where_it_comes_from(name: str) -> None:
    text = (ROOT / "recipes" / name / f"{name}.py").read_text(encoding="utf-8")
    docstring = text.split('"""')[1]
    assert re.search(r"Sutton & Barto|arXiv|\(20\d\d\)", docstring), "where the equations come from"
    assert "differs" in docstring, "how the code differs from the textbook"
    assert 'if __name__ == "__main__":\n    lesson.main(__file__)' in text


@pytest.mark.parametrize("name", LESSONS)
def test_the_brief_of_a_toy_run_says_what_was_measured(toy_run, name: str) -> None:
    """The claims are written for these runs: all of them hold, and the spoken answer takes three minutes."""
    _, folder = toy_run(name)
    check_brief(name, folder / "output" / name / "latest")
