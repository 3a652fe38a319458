"""What does this project's layer cost on top of TRL? The same work both ways, in turn, in one run: `make bench`.

For each module, `run.py` and `plain_trl.py` train the toy recipe without evaluation, alternating. Compared are the
training seconds that the trainer itself reports, as the ratio of each pair, and the logged losses, step by step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import tables

ROOT = Path(__file__).resolve().parent.parent
MAX_RATIO = 1.05


def plain(module: str, seed: int) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "benchmarks" / "plain_trl.py"), module, str(seed)]
    env = {**os.environ, "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    return json.loads(done.stdout.splitlines()[-1])


def wrapped(module: str, seed: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        options = ["--eval_strategy", "no", "--output_dir", f"{folder}/run"]
        command = [sys.executable, str(ROOT / "run.py"), "--module", module, "--toy", "--seed", str(seed), *options]
        subprocess.run(command, capture_output=True, check=True)
        lines = Path(folder, "run", "log_history.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return {
        "losses": [row["loss"] for row in rows if "loss" in row],
        "train_seconds": next(row["train_runtime"] for row in rows if "train_runtime" in row),
    }


def compare(module: str, repeats: int) -> tuple[str, bool]:
    ratios, difference = [], 0.0
    for seed in range(repeats):
        if seed % 2:  # each goes first half of the time
            trl, ours = plain(module, seed), wrapped(module, seed)
        else:
            ours, trl = wrapped(module, seed), plain(module, seed)
        ratios.append(ours["train_seconds"] / trl["train_seconds"])
        difference = max(difference, *(abs(a - b) for a, b in zip(ours["losses"], trl["losses"], strict=True)))
    median = statistics.median(ratios)
    row = (
        f"| {module} | {median:.3f} | {min(ratios):.3f} - {max(ratios):.3f} | {len(ours['losses'])} "
        f"| {difference:.1e} | {repeats} |"
    )
    return row, median <= MAX_RATIO and difference == 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    for module in ("sft", "dpo"):  # warm up: caches, disk
        plain(module, 0)
        wrapped(module, 0)
    results = [compare(module, args.repeats) for module in ("sft", "dpo")]
    head = [
        f"Measured on {tables.machine()}. To reach: median ratio at most {MAX_RATIO}, losses equal.",
        "",
        "| module | training time ours / plain TRL (median) | range | losses compared per run | largest difference | pairs |",
        "|---|---|---|---|---|---|",
    ]
    tables.replace("wrapper", "\n".join([*head, *(row for row, _ in results)]))
    return 0 if all(good for _, good in results) else 1


if __name__ == "__main__":
    sys.exit(main())
