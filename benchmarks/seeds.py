"""Run the toy recipes with several seeds and tabulate what they learned: `make seeds`.

Every run is a process of its own, started as a user starts it. A figure that a seed misses makes the command fail. Lessons
without a dataset carry their figures in their checks: each must pass, whatever the seed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import tables

ROOT = Path(__file__).resolve().parent.parent
MAX_SECONDS, MAX_MB = 60, 2000
LESSON_SECONDS, LESSON_MB = 30, 1000


def held_out_exact_match(e: dict[str, Any]) -> bool:
    return e["before"]["exact_match"] < 0.1 and e["after"]["exact_match"] >= 0.8


def held_out_preference(e: dict[str, Any]) -> bool:
    return (
        0.4 <= e["before"]["preference_accuracy"] <= 0.6
        and e["after"]["preference_accuracy"] >= 0.9
        and e["delta"]["completions/match_chosen"] >= 0.30
        and e["delta"]["logps/chosen"] >= 0
    )


def sees(e: dict[str, Any]) -> bool:
    """Answers questions about held-out images, and not without looking."""
    blind = max(e["after"][f"vqa_accuracy/{how}"] for how in ("shuffled", "blank"))
    return e["after"]["vqa_accuracy"] >= max(0.7, blind + 0.4)


def all_see(e: dict[str, Any]) -> bool:
    """Each of the three architectures, with a third of the budget."""
    return all(
        e["after"][f"{name}/vqa_accuracy"]
        >= 0.2 + max(e["after"][f"{name}/vqa_accuracy/{how}"] for how in ("shuffled", "blank"))
        for name in ("llava", "blip2", "flamingo")
    )


SEES = "accuracy on held-out questions at least 0.7, and at least 0.4 above the blind baselines"
SIGHT = ("vqa_accuracy", "vqa_accuracy/shuffled", "hard/vqa_accuracy")


def ordered_pairs(least: float) -> Any:
    return lambda e: e["after"]["accuracy"] >= least and e["after"]["log_loss"] < e["before"]["log_loss"]


def rewarded(metric: str) -> Any:
    return lambda e: e["before"][metric] <= 0.55 and e["after"][metric] >= 0.8 and e["ci95"][metric][0] > 0


SCORES = ("accuracy", "log_loss", "calibration_error")
ANSWERS = ("reward", "sampled_reward", "objective/kl")
GROUPS = ("rewards/exact_match", "rewards/same_characters", "objective/kl")
RIGHT = "held-out share of right answers from about one half to at least 0.8"
# module, or the file of its recipe -> (metrics shown, the figure to reach, that figure in words)
CAMPAIGN = {
    "sft": (("exact_match", "perplexity"), held_out_exact_match, "exact match from under 0.1 to at least 0.8"),
    "dpo": (
        ("preference_accuracy", "completions/match_chosen", "logps/chosen"),
        held_out_preference,
        "preference accuracy from about 0.5 to at least 0.9, chosen behaviour up by at least 0.30, chosen not less likely",
    ),
    "llava": (SIGHT, sees, SEES),
    "recipes/llava/toy-digits.yaml": (
        ("vqa_accuracy", "vqa_accuracy/shuffled", "vqa_accuracy/blank"),
        lambda e: sees(e) and e["after"]["vqa_accuracy"] >= 0.85,
        "accuracy on held-out handwritten digits at least 0.85, and at least 0.4 above the blind baselines",
    ),
    "flamingo": (
        (*SIGHT, "shots/0", "shots/1", "shots/2", "shots/4"),
        lambda e: sees(e) and max(e["after"][f"shots/{n}"] for n in (1, 2, 4)) > e["after"]["shots/0"] + 0.15,
        f"{SEES}; the best number of examples above none by more than 0.15 (the interval is a check of the run)",
    ),
    "blip2": (
        (*SIGHT, "stage1/itm_accuracy", "frozen_lm/vqa_accuracy"),
        lambda e: sees(e) and e["after"]["stage1/itm_accuracy"] >= 0.7,
        f"{SEES}; matching pairs and hard negatives told apart in at least 0.7",
    ),
    "vlm": (
        tuple(f"{name}/vqa_accuracy" for name in ("llava", "blip2", "flamingo")),
        all_see,
        "each architecture, with a third of the budget, at least 0.2 above its blind baselines",
    ),
    "reward": (SCORES, ordered_pairs(0.9), "held-out accuracy at least 0.9, log loss lower than before"),
    "recipes/reward/toy-lora.yaml": (SCORES, ordered_pairs(0.85), "held-out accuracy at least 0.85, log loss lower"),
    "ppo": (ANSWERS, rewarded("reward"), RIGHT),
    "recipes/ppo/toy-lora.yaml": (ANSWERS, rewarded("reward"), RIGHT),
    "grpo": (GROUPS, rewarded("rewards/exact_match"), RIGHT),
    "recipes/grpo/toy-lora.yaml": (GROUPS, rewarded("rewards/exact_match"), RIGHT),
    "rlhf": (
        ("sft/exact_match", "reward/accuracy", "ppo/rewards/reward", "ppo/rewards/exact_match"),
        rewarded("ppo/rewards/exact_match"),
        f"{RIGHT}, measured by a gold reward that is not trained on",
    ),
}
ONLINE = ("reward", "ppo", "grpo")
VISION = ("llava", "recipes/llava/toy-digits.yaml", "blip2", "flamingo", "vlm")
SECONDS = {
    "rlhf": 120,
    **dict.fromkeys(ONLINE, 75),
    **{f"recipes/{module}/toy-lora.yaml": 75 for module in ONLINE},
    **dict.fromkeys(VISION, 90),
}  # `MAX_SECONDS` for the others
OPTIONS = {"vlm": ["--runs", "none"]}  # train, whatever runs there are

# lesson -> the check whose observed values are shown
LESSONS = {
    "mdp": "mdp.return",
    "td_learning": "td_learning.cliff_online_returns",
    "advantage": "advantage.variance_falls",
    "policy_gradient": "policy_gradient.greedy_return_reached_target",
    "gae": "gae.return_rose",
    "actor_critic": "actor_critic.greedy_return_reached_target",
    "cql": "cql.q_start_near_true_value",
    "bcq": "bcq.beats_imitation",
}


def run(module: str, seed: int, *options: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        toy = ["--config", str(ROOT / module)] if module.endswith(".yaml") else ["--module", module, "--toy"]
        toy += [*OPTIONS.get(module, []), *options]
        command = [sys.executable, str(ROOT / "run.py"), *toy, "--seed", str(seed), "--output_dir", f"{folder}/run"]
        subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
        return json.loads(Path(folder, "run", "summary.json").read_text(encoding="utf-8"))


def table(module: str, seeds: list[int]) -> tuple[str, bool]:
    """Markdown of all seeds of a module, and whether each reached the figure within time and memory."""
    metrics, reached, words = CAMPAIGN[module]
    seconds = SECONDS.get(module, MAX_SECONDS)
    lines = [
        f"**{module}**, to reach: {words}; within {seconds} s and {MAX_MB} MB.",
        "",
        f"| seed | status | {' | '.join(f'{m} before → after' for m in metrics)} | reached | wall s | peak MB |",
        "|" + "---|" * (5 + len(metrics)),
    ]
    all_reached = True
    for seed in seeds:
        summary = run(module, seed)
        block = summary["eval"]
        good = summary["status"] == "ok" and reached(block)
        good = good and summary["wall_seconds"] <= seconds and summary["peak_rss_mb"] <= MAX_MB
        all_reached &= good
        values = (
            [f"{block['before'][m]:.3f} → {block['after'][m]:.3f}" for m in metrics] if block else ["-"] * len(metrics)
        )
        lines.append(
            f"| {seed} | {summary['status']} | {' | '.join(values)} | {'yes' if good else 'NO'} "
            f"| {summary['wall_seconds']:.0f} | {summary['peak_rss_mb']:.0f} |"
        )
    return "\n".join(lines), all_reached


def lesson_table(module: str, seeds: list[int]) -> tuple[str, bool]:
    """The same for a lesson in a single file."""
    shown = LESSONS[module]
    lines = [
        f"**{module}**, to reach: every check passes; within {LESSON_SECONDS} s and {LESSON_MB} MB.",
        "",
        f"| seed | status | checks passed | `{shown}` | reached | wall s | peak MB |",
        "|---|---|---|---|---|---|---|",
    ]
    all_reached = True
    for seed in seeds:
        summary = run(module, seed)
        checks = {check["id"]: check for check in summary["checks"]}
        passed = sum(check["status"] == "pass" for check in checks.values())
        good = summary["status"] == "ok" and passed == len(checks) and shown in checks
        good = good and summary["wall_seconds"] <= LESSON_SECONDS and summary["peak_rss_mb"] <= LESSON_MB
        all_reached &= good
        lines.append(
            f"| {seed} | {summary['status']} | {passed} of {len(checks)} | {_shown(checks.get(shown))} "
            f"| {'yes' if good else 'NO'} | {summary['wall_seconds']:.0f} | {summary['peak_rss_mb']:.0f} |"
        )
    return "\n".join(lines), all_reached


def _shown(check: dict[str, Any] | None) -> str:
    """The numbers a check observed, short."""
    return _short(check["observed"]) if check else "-"


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_short(item)}" for key, item in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    modules = [*CAMPAIGN, *LESSONS]
    parser.add_argument("--modules", nargs="+", default=modules, choices=modules)
    args = parser.parse_args()
    for module in CAMPAIGN.keys() & set(args.modules):  # the cached checkpoints are made outside the measured runs
        run(module, args.seeds[0])
    results = {m: (table if m in CAMPAIGN else lesson_table)(m, args.seeds) for m in args.modules}
    former = {part.split("**")[0]: f"**{part}" for part in tables.current("seeds").split("\n\n**")[1:]}
    known = former | {module: text for module, (text, _) in results.items()}  # modules not run now keep their table
    shown = [known[module] for module in modules if module in known]
    tables.replace("seeds", "\n\n".join([f"Measured on {tables.machine()}.", *shown]))
    return 0 if all(good for _, good in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
