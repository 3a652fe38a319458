"""Runs for the bug zoo: the toy run of a module, healthy or with a breakage in force.

`python -m llmcore_hf.learning.specimens BUG SEED FOLDER` makes `FOLDER/healthy` and `FOLDER/broken` in a process of its own.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

from llmcore_hf import config, registry, run_dir
from llmcore_hf.learning import bugzoo, evidence
from llmcore_hf.learning.breakages import BREAKAGES
from llmcore_hf.learning.evidence import Run


def make(module: str, seed: int, folder: Path, bug: str | None = None) -> Run:
    """The zoo's toy run of a module into `folder`, broken by `bug` if one is given.

    Whether its checks pass does not matter: those of a broken run may well fail.
    """
    options = bugzoo.load()["modules"][module]["options"]
    argv = ["--module", module, "--toy", *options, "--seed", str(seed), "--output_dir", str(folder)]
    row = registry.get(module)
    with BREAKAGES[bug].applied() if bug else contextlib.nullcontext():
        run_dir.execute(row, config.resolve(row, config.read_request(argv)), argv)
    run = evidence.read(folder, module)
    if run.summary["status"] == "interrupted":
        raise KeyboardInterrupt
    return run


def main(argv: list[str]) -> int:
    from llmcore_hf.cli import _quiet_defaults

    bug, seed, folder = argv
    _quiet_defaults()
    module = BREAKAGES[bug].module
    for name, broken_by in (("healthy", None), ("broken", bug)):
        run = make(module, int(seed), Path(folder) / name, broken_by)
        print(name, run.summary["status"], run.summary["error"])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
