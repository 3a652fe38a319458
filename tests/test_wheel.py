"""The installed wheel does what a checkout does, from an empty directory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", *options, str(ROOT)], check=True, timeout=300)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    site = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--target",
        str(site),
        str(wheel),
    ]
    subprocess.run(command, check=True, timeout=300)
    return site


def test_wheel_adds_one_top_level_name_and_carries_the_resources(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"llmcore_hf"}
    for name in ("recipes/dpo/toy.yaml", "accelerate_configs/cpu_2.yaml", "learning/README.md"):
        assert f"llmcore_hf/_resources/{name}" in names
    assert {"llmcore_hf/py.typed", "llmcore_hf/schema/summary.schema.json"} <= set(names)


def test_console_command_of_the_wheel_trains_in_an_empty_directory(installed: Path, tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(installed)}
    where = subprocess.run(
        [sys.executable, "-c", "import llmcore_hf; print(llmcore_hf.__file__)"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert where.startswith(str(installed)), "the test would run the checkout, not the wheel"
    script = installed / "bin" / "llmcore"
    result = subprocess.run(
        [sys.executable, str(script), "--module", "dpo", "--toy"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "output/dpo/latest/summary.json").read_text(encoding="utf-8"))
    assert summary["status"] == "ok"
    assert summary["eval"]["after"]["preference_accuracy"] >= 0.9
