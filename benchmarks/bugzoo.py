"""Run every bug of the zoo and a healthy run beside it with several seeds: `make bugzoo`.

A mark of a bug (`telltale` in learning/bugzoo/bugs.yaml) that a pair of runs misses makes the command fail, as does a run of
more than 20 CPU seconds. The values go into `tests/bugzoo_runs.json`, where a test holds them against the bounds of today.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import tables

from llmcore_hf.cli import _quiet_defaults
from llmcore_hf.learning import bugzoo
from llmcore_hf.learning.breakages import BREAKAGES
from llmcore_hf.learning.evidence import Run

RECORD = Path(__file__).resolve().parent.parent / "tests" / "bugzoo_runs.json"
MAX_SECONDS = 20


def recipe_of(bug: str) -> str:
    """Changes when the edit of the code or the options of the runs change: the record is then out of date."""
    options = bugzoo.load()["modules"][BREAKAGES[bug].module]["options"]
    return hashlib.sha256(json.dumps([options, BREAKAGES[bug].diff()]).encode()).hexdigest()[:12]


def measured(module: str, seed: int, folder: Path, bug: str | None = None) -> tuple[Run, float]:
    """One run, and the CPU seconds it took, without the imports."""
    from llmcore_hf.learning import specimens

    began = time.process_time()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        run = specimens.make(module, seed, folder, bug)
    return run, time.process_time() - began


def campaign(seeds: list[int], bugs: list[str]) -> tuple[dict[str, Any], bool]:
    record: dict[str, Any] = {bug: {"recipe": recipe_of(bug), "runs": {}} for bug in bugs}
    good = True
    for module in dict.fromkeys(BREAKAGES[bug].module for bug in bugs):
        for seed in seeds:
            with tempfile.TemporaryDirectory() as scratch:
                healthy, _ = measured(module, seed, Path(scratch) / "healthy")
                for bug in (bug for bug in bugs if BREAKAGES[bug].module == module):
                    broken, seconds = measured(module, seed, Path(scratch) / bug, bug)
                    marks = bugzoo.telltales(bugzoo.Case(seed, Path(scratch), bug, healthy, broken))
                    good &= all(mark.holds for mark in marks) and seconds <= MAX_SECONDS
                    record[bug]["runs"][str(seed)] = {
                        "noticed": len(broken.with_status("fail") + broken.with_status("warn")),
                        "seconds": round(seconds, 1),
                        "telltales": {mark.name: [mark.healthy, mark.broken] for mark in marks},
                    }
                    held = [mark.holds for mark in marks]
                    print(bug, seed, round(seconds, 1), held, record[bug]["runs"][str(seed)]["telltales"], flush=True)
    return record, good


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Both records: runs of a bug that is still made in the same way are kept, unless they were repeated."""
    record = {}
    for bug in BREAKAGES:
        entries = [side[bug] for side in (old, new) if side.get(bug, {}).get("recipe") == recipe_of(bug)]
        if entries:
            runs = {seed: run for entry in entries for seed, run in entry["runs"].items()}
            record[bug] = {"recipe": recipe_of(bug), "runs": dict(sorted(runs.items(), key=lambda item: int(item[0])))}
    return record


def table(record: dict[str, Any]) -> str:
    """One row per mark: ranges over the seeds."""
    lines = ["| bug | mark | healthy | broken | checks that noticed | CPU s |", "|---|---|---|---|---|---|"]
    for bug, entry in record.items():
        runs = list(entry["runs"].values())
        noticed, seconds = ([run[name] for run in runs] for name in ("noticed", "seconds"))
        for i, mark in enumerate(runs[0]["telltales"]):
            healthy, broken = ([run["telltales"][mark][side] for run in runs] for side in (0, 1))
            last = [_range(noticed), _range(seconds)] if i == 0 else ["", ""]
            lines.append(
                f"| {bug if i == 0 else ''} | `{mark}` | {_range(healthy)} | {_range(broken)} | {' | '.join(last)} |"
            )
    return "\n".join(lines)


def _range(values: list[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--bugs", nargs="+", default=list(BREAKAGES), choices=list(BREAKAGES))
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # before torch is imported
    _quiet_defaults()
    found, good = campaign(args.seeds, args.bugs)
    record = merged(json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}, found)
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    seeds = sorted({seed for entry in record.values() for seed in entry["runs"]}, key=int)
    tables.replace("bugzoo", f"Seeds {', '.join(seeds)}; measured on {tables.machine()}.\n\n{table(record)}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
