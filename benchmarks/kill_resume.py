"""Kill runs at random moments, resume them, and compare with a run that was left alone: `make torture`.

Each run is a process of its own, started as a user starts it, killed with SIGKILL after a random time (in the middle of
a step, an evaluation, a checkpoint), resumed, killed again, until it comes to its end. Then its weights must be the
bytes of the uninterrupted run, its logged losses and its held-out results the same numbers.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tables

ROOT = Path(__file__).resolve().parent.parent
SAVE_STEPS = 5
OPTIONS = (
    *("--max_steps", "30", "--eval_steps", "10", "--save_strategy", "steps", "--save_steps", str(SAVE_STEPS)),
    *("--save_total_limit", "2", "--logging_steps", "1", "--max_train_samples", "1000", "--max_eval_samples", "50"),
    *("--max_generation_samples", "10"),
)
LORA = ("--use_peft", "--lora_r", "8", "--lora_target_modules", "all-linear", "--lora_dropout", "0.1")
VARIANTS = {"full": (), "LoRA, dropout 0.1": LORA}


@dataclass
class Outcome:
    """What a run that was killed came to."""

    kills: int
    resumed_from: list[int]
    lost_steps: list[int]  # of each kill: steps done since the checkpoint that the next run went on from
    same_weights: bool
    same_losses: bool
    same_evaluation: bool

    @property
    def good(self) -> bool:
        return (
            self.same_weights
            and self.same_losses
            and self.same_evaluation
            and max(self.lost_steps, default=0) <= SAVE_STEPS
        )


def command(module: str, variant: str, run: Path, *more: str) -> list[str]:
    base = [sys.executable, str(ROOT / "run.py"), "--module", module, "--toy", "--output_dir", str(run)]
    # a toy run so short need not learn: the learning checks may fail, the comparison may not
    return [*base, *OPTIONS, *VARIANTS[variant], *more]


def start(arguments: list[str]) -> subprocess.Popen[bytes]:
    with open(Path(tempfile.gettempdir(), "kill_resume.log"), "ab") as log:  # what a run says that fails by itself
        return subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=log)


def rows(run: Path) -> list[dict[str, float]]:
    """The log history without what depends on the clock; of a line that a kill cut short, nothing."""
    found = []
    for line in (
        (run / "log_history.jsonl").read_text(encoding="utf-8").splitlines()
        if (run / "log_history.jsonl").exists()
        else []
    ):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if "train_runtime" in row:
            continue  # says how long the last process trained, and a run may be killed behind it
        found.append({k: v for k, v in row.items() if not k.endswith(("runtime", "_per_second")) and k != "train_loss"})
    return found


def weights(run: Path) -> bytes:
    return next(run.glob("*model.safetensors")).read_bytes()


def summary(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text(encoding="utf-8"))


def torture(module: str, variant: str, reference: Path, run: Path, rng: random.Random) -> Outcome:
    kills, resumed_from, lost = 0, [], []
    resume: tuple[str, ...] = ()
    while True:
        process = start(command(module, variant, run, *resume))
        before = last_step(run)
        # from the first step on, so that the kill falls into the training and not into the imports
        while process.poll() is None and last_step(run) == before and kills < 8:
            time.sleep(0.01)
        patience = rng.uniform(0, 1.0) if kills < 8 else None
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.returncode >= 0:
            break
        kills += 1
        done, saved = last_step(run), newest_complete(run)
        resumed_from.append(saved)
        lost.append(done - saved)
        resume = ("--resume_from_checkpoint", "last") if saved else ("--overwrite_output_dir",)
    return Outcome(
        kills,
        resumed_from,
        lost,
        weights(run) == weights(reference),
        rows(run) == rows(reference),
        summary(run)["eval"] == summary(reference)["eval"],
    )


def last_step(run: Path) -> int:
    found = rows(run)
    return int(found[-1]["step"]) if found else 0


def newest_complete(run: Path) -> int:
    from llmcore_hf.durability import last_complete

    checkpoint, _ = last_complete(run)
    return int(checkpoint.name.removeprefix("checkpoint-")) if checkpoint else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5, help="killed runs per variant")
    parser.add_argument("--modules", nargs="+", default=["sft", "dpo"])
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    head = [
        f"Measured on {tables.machine()}: 30 steps, a checkpoint every {SAVE_STEPS}, at most 2 kept.",
        "",
        "| module | weights | runs | kills | most steps lost by a kill | same weights | same losses | same evaluation |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines, all_good = [], True
    for module in args.modules:
        for variant in VARIANTS:
            with tempfile.TemporaryDirectory() as folder:
                reference = Path(folder, "reference")
                start(command(module, variant, reference)).wait()
                rng = random.Random(f"{module} {variant}")
                found = [torture(module, variant, reference, Path(folder, str(i)), rng) for i in range(args.runs)]
            good = {
                name: sum(getattr(o, name) for o in found)
                for name in ("same_weights", "same_losses", "same_evaluation")
            }
            all_good &= all(outcome.good for outcome in found)
            lost = max((n for outcome in found for n in outcome.lost_steps), default=0)
            shares = " | ".join(f"{n} of {args.runs}" for n in good.values())
            lines.append(f"| {module} | {variant} | {args.runs} | {sum(o.kills for o in found)} | {lost} | {shares} |")
    tables.replace("kills", "\n".join([*head, *lines]))
    return 0 if all_good else 1


if __name__ == "__main__":
    sys.exit(main())
