"""The lessons that start processes, as a learner runs them: one toy run each, and what it leaves behind."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
from conftest import Run
from learning_runs import check_brief

from llmcore_hf.run_dir import validate_summary

pytestmark = pytest.mark.slow


def run_of(folder: Path, name: str) -> Path:
    return folder / "output" / name / "latest"


def summary_of(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((run_of(folder, name) / "summary.json").read_text(encoding="utf-8"))


def assert_a_good_run(
    result: subprocess.CompletedProcess[str],
    folder: Path,
    name: str,
    pictures: set[str],
    statuses: Collection[str] = ("pass",),
) -> None:
    assert result.returncode == 0, result.stdout + result.stderr
    summary = summary_of(folder, name)
    validate_summary(summary)
    assert (summary["module"], summary["status"], summary["error"], summary["toy"]) == (name, "ok", None, True)
    assert summary["checks"] and {check["status"] for check in summary["checks"]} <= {*statuses}
    assert all(check["why_zh"] and check["why_en"] and check["expected"] for check in summary["checks"])
    for picture in pictures:
        content = (run_of(folder, name) / picture).read_bytes()
        assert content.startswith(b"\x89PNG") and len(content) > 10_000, picture
    check_brief(name, run_of(folder, name))


def test_the_megatron_toy(llmcore: Run, tmp_path: Path) -> None:
    result = llmcore("--module", "megatron", "--toy", cwd=tmp_path, timeout=500)
    assert_a_good_run(result, tmp_path, "megatron", {"training_curves.png", "parallelism.png"})
    results = json.loads((run_of(tmp_path, "megatron") / "results.json").read_text(encoding="utf-8"))
    assert {len(entry["ranks"]) for name, entry in results["layouts"].items() if name != "one process"} == {2, 8}
    rows = [json.loads(line) for line in (run_of(tmp_path, "megatron") / "log_history.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 11)) and all(row["loss/3d"] for row in rows)


def test_the_deepspeed_toy(llmcore: Run, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    result = llmcore("--module", "deepspeed", "--toy", cwd=tmp_path, timeout=500)
    assert_a_good_run(result, tmp_path, "deepspeed", {"training_curves.png"})
    results = json.loads((run_of(tmp_path, "deepspeed") / "results.json").read_text(encoding="utf-8"))
    assert len(results["engines"]) == 12 and len(results["checkpoints"]) == 2


def test_the_mixed_precision_toy(llmcore: Run, tmp_path: Path) -> None:
    result = llmcore("--module", "mixed_precision", "--toy", cwd=tmp_path, timeout=500)
    assert_a_good_run(result, tmp_path, "mixed_precision", {"training_curves.png"}, {"pass", "skip"})
    found = {check["id"]: check for check in summary_of(tmp_path, "mixed_precision")["checks"]}
    skipped = [name for name, check in found.items() if check["status"] == "skip"]
    assert skipped in ([], ["mixed_precision.short_products_are_faster_on_a_gpu"])  # on a GPU, and without
    trace = found["mixed_precision.the_loss_scale_follows_its_rule"]["observed"]
    assert trace["overflows, left out"] > 0 and trace["doubled"] > 0
    results = json.loads((run_of(tmp_path, "mixed_precision") / "results.json").read_text(encoding="utf-8"))
    assert len(results["regimes"]) == 7 and results["regimes"]["bf16 weights"]["lost_updates"][-1] > 0.5


def test_the_elastic_toy(llmcore: Run, tmp_path: Path) -> None:
    result = llmcore("--module", "elastic", "--toy", cwd=tmp_path, timeout=500)
    assert_a_good_run(result, tmp_path, "elastic", {"training_curves.png"})
