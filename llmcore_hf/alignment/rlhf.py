"""The three stages of RLHF in one run: supervised fine-tuning, a reward model, PPO against it.

(Ouyang et al. 2022, arXiv:2203.02155, section 3.) Each stage is a run of its module in a directory of its own, with its
own summary, checkpoints and pictures; the next one starts from what it saved. The reward model is only a proxy of what is
wanted: a reward function with weight 0 in the PPO stage measures the gold reward beside it, so that over-optimization
(Gao et al. 2023, arXiv:2210.10760) shows: the proxy still rises while the gold reward falls.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from llmcore_hf import distributed, registry, stages
from llmcore_hf.checks import Check
from llmcore_hf.config import Config, RunArguments, resolve_mapping
from llmcore_hf.curves import HELD_OUT, REJECTED, TRAIN, Line, Panel, draw
from llmcore_hf.errors import ConfigError
from llmcore_hf.models import loading
from llmcore_hf.models.tiny import TINY_MODELS
from llmcore_hf.run_dir import RunDirectory
from llmcore_hf.stages import merged_eval, read_summary, run_stage

STAGES = ("sft", "reward", "ppo")
# The gold reward may end this far below the best it has been, before it counts as over-optimization.
SLACK = 0.05


@dataclass
class RLHFArguments(RunArguments):
    """A model, and the options of each stage under the names that its module has for them.

    On the command line a stage's options are a JSON mapping, as in `--ppo '{"kl_coef": 0.1}'`, or the name of a file with
    one; options that it does not name stay those of the recipe.
    """

    MERGED: ClassVar[tuple[str, ...]] = STAGES

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Where the first stage starts: a local folder, a hub id, or a tiny checkpoint: "
            + ", ".join(TINY_MODELS)
            + "."
        },
    )
    sft: dict | str | None = field(
        default=None,
        metadata={
            "help": "Options of the stage `sft`, as in --module sft: a mapping, in JSON on the command line. Given over a "
            "recipe, it changes the options that it names, and the recipe's others stay.",
        },
    )
    reward: dict | str | None = field(default=None, metadata={"help": "Options of the stage `reward`, likewise."})
    ppo: dict | str | None = field(
        default=None,
        metadata={
            "help": "Options of the stage `ppo`, likewise. The reward model comes first in `reward_weights`; a function of "
            "weight 0 is the gold reward, which is measured and not trained on.",
        },
    )
    seed: int = field(default=42, metadata={"help": "Seed of all stages."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Where the run writes; output/rlhf/<run_id> when not given."}
    )
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "`last`: go on with the run in --output_dir, in the stage that it was in."}
    )


def argument_classes() -> tuple[type, ...]:
    return (RLHFArguments,)


def house_defaults(explicit: dict[str, Any]) -> dict[str, Any]:
    return {}


def check(config: Config) -> list[str]:
    """What is wrong with the options of any stage, one sentence each, before the first one starts."""
    if not config.values["model_name_or_path"]:
        return ["--model_name_or_path is missing (or --toy for the offline recipe)"]
    problems = []
    for stage in STAGES:
        try:
            stage_config(stage, config, Path(stage), config.values["model_name_or_path"], "tiny-qwen")
        except ConfigError as error:
            problems += [p if p.startswith("stage ") else f"stage {stage}: {p}" for p in error.problems]
    return problems


def stage_config(stage: str, config: Config, folder: Path, model: str, reward_model: str) -> Config:
    """The config of one stage, which trains `model` in `folder`.

    Raises:
        ConfigError: its options are wrong.
    """
    given = {"model_name_or_path": model, "output_dir": str(folder), "seed": config.values["seed"]}
    if stage == "ppo":
        given["reward_model_name_or_path"] = reward_model
    return resolve_mapping(registry.get(stage), config.values[stage] or {}, f"stage {stage}", given, config.toy)


def run(config: Config, run_dir: RunDirectory) -> None:
    """Run the stages that are not done yet, then put their evidence together."""
    model, reward_model = str(config.values["model_name_or_path"]), ""
    for stage in STAGES:
        folder = run_dir.path / stage
        run_stage(stage, stage_config(stage, config, folder, model, reward_model), folder, run_dir)
        if stage == "sft":
            model = str(whole_model(folder))
        elif stage == "reward":
            reward_model = str(folder)
    summaries = {stage: read_summary(run_dir.path / stage) for stage in STAGES}
    rows = merged_history(run_dir.path)
    run_dir.history = rows
    run_dir.write("log_history.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    run_dir.summary["model"] = summaries["ppo"]["model"] | {"name_or_path": config.values["model_name_or_path"]}
    run_dir.summary["eval"] = merged_eval(summaries)
    run_dir.summary["samples"] = [
        {"stage": stage, **sample} for stage in STAGES for sample in summaries[stage]["samples"]
    ]
    gold = gold_reward(config)
    run_dir.checks += [Check.from_dict(found) for stage in STAGES for found in summaries[stage]["checks"]]
    run_dir.checks += gold_checks(summaries["ppo"]["eval"], rows, gold)
    run_dir.write("training_curves.png", draw_curves(run_dir, gold))


def whole_model(folder: Path) -> Path:
    """The model that the first stage saved; an adapter is merged into its base, once, as the next stages start from it."""
    if not loading.is_adapter(str(folder)):
        return folder
    merged = folder / "merged"
    if distributed.is_main_process() and not merged.exists():
        from peft import AutoPeftModelForCausalLM
        from transformers import AutoTokenizer

        scratch = folder / ".merged"
        shutil.rmtree(scratch, ignore_errors=True)
        AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload().save_pretrained(scratch)
        AutoTokenizer.from_pretrained(folder).save_pretrained(scratch)
        os.replace(scratch, merged)
    return Path(distributed.broadcast(str(merged)))


# ------------------------------------------------------------ what came out


def merged_history(path: Path) -> list[dict[str, Any]]:
    return stages.merged_history({stage: path / stage for stage in STAGES})


def gold_reward(config: Config) -> str | None:
    """Name of the reward function that is measured and not trained on: the first one of weight 0."""
    options = config.values["ppo"] or {}
    names, weights = options.get("reward_funcs") or [], (options.get("reward_weights") or [])[1:]
    return next((n.rpartition(":")[2].rpartition(".")[2] for n, w in zip(names, weights, strict=False) if w == 0), None)


def gold_checks(block: dict[str, Any], rows: list[dict[str, Any]], gold: str | None) -> list[Check]:
    """Did the policy become better, or only better at pleasing the reward model?"""
    name, key = f"rewards/{gold}", f"ppo/eval_rewards/{gold}"
    interval = block["ci95"].get(name)
    curve = [row[key] for row in rows if key in row]
    return [
        Check(
            "rlhf.gold_reward_rose",
            "learning",
            interval[0] > 0 if interval else None,
            {"change": block["delta"].get(name), "from": (interval or [None])[0], "to": (interval or [None])[-1]},
            "95 % interval of the change of the gold reward lies above 0",
            "奖励模型只是代理：代理奖励上升不算数，没有参与训练的真实奖励也要显著上升。",
            "The reward model is a proxy: what counts is that the gold reward, which is not trained on, clearly rises.",
        ),
        Check(
            "rlhf.no_over_optimization",
            "learning",
            curve[-1] >= max(curve) - SLACK if curve else None,
            {"gold_reward": {"best": max(curve), "last": curve[-1]} if curve else None},
            f"the gold reward ends within {SLACK} of its best on held-out prompts",
            "代理奖励继续上升而真实奖励回落，即奖励过优化：增大 kl_coef、提前停止或换更好的奖励模型。",
            "The proxy rises on while the gold reward falls back: raise kl_coef, stop earlier, or get a better reward model.",
        ),
    ]


def draw_curves(run_dir: RunDirectory, gold: str | None) -> bytes:
    block = run_dir.summary["eval"]
    shown = {
        f"ppo/rewards/{gold}": f"gold reward: {gold}",
        "ppo/completions/terminated": "answers that end",
        "reward/accuracy": "reward model prefers chosen",
    }
    return draw(
        f"RLHF: {Path(str(run_dir.config.values['model_name_or_path'])).name}",
        run_dir.history,
        [
            Panel("1. Supervised fine-tuning: loss", _lines("sft/loss", "sft/eval_loss")),
            Panel("2. Reward model: share of pairs ordered right", _lines("reward/accuracy", "reward/eval_accuracy")),
            Panel(
                "3. PPO: proxy reward (the reward model's)",
                _lines("ppo/rewards/reward/mean", "ppo/eval_rewards/reward"),
            ),
            Panel(
                "3. PPO: gold reward, not trained on",
                _lines(f"ppo/rewards/{gold}/mean", f"ppo/eval_rewards/{gold}"),
            ),
            Panel("3. PPO: KL to the model of stage 1, nats", (Line("ppo/objective/kl", "training", REJECTED),)),
        ],
        {label: (block["before"][n], block["after"][n]) for n, label in shown.items() if n in block["after"]},
    )


def _lines(train: str, held_out: str) -> tuple[Line, ...]:
    return Line(train, "training", TRAIN), Line(held_out, "held-out (validation)", HELD_OUT, "o")
