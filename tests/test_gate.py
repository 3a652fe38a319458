"""The gate runs everything: a half-run suite that reports success would be worse than none."""

from __future__ import annotations

import re

from conftest import ROOT


def test_the_gate_stops_at_the_first_failure_and_runs_all_tests() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "set -euo pipefail" in script
    assert re.findall(r"^step (.*)$", script, re.MULTILINE) == ["make demo", "make lint", "make test"]


def test_make_test_leaves_nothing_out() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    recipe = re.search(r"^test: .*\n\t(.*)$", makefile, re.MULTILINE)
    assert recipe and recipe.group(1) == "$(PY) -m pytest -q $(PYTEST_ARGS)"
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert "not slow" not in re.search(r"^addopts = (.*)$", pyproject, re.MULTILINE).group(1)
