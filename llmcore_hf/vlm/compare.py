"""LLaVA, BLIP-2 and Flamingo side by side: the same data, the same budget, the same held-out questions.

    LLaVA      every patch becomes a token of the language model       simple, nothing is lost, the context grows with the image
    BLIP-2     a fixed number of queries, whatever the image           a short context, a bottleneck, a stage more
    Flamingo   the language model looks from the side, through gates   the context does not grow, new layers in the model

Each is a run of its module, in a directory of its own. The budget is the number of training rows, a question with its image; `--runs` compares runs that
are there already, which may have had budgets of their own, and the summary says so. What is compared is measured here, on
the models that the runs saved: accuracy beside the blind baselines, with intervals, and what it costs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, ClassVar

from llmcore_hf import lesson, registry, resume, stages
from llmcore_hf.alignment.training import quieten
from llmcore_hf.checks import Check
from llmcore_hf.config import Config, RunArguments, resolve_mapping
from llmcore_hf.errors import ConfigError, UserError
from llmcore_hf.run_dir import RunDirectory
from llmcore_hf.stats import paired_interval, share_interval
from llmcore_hf.vlm import costs
from llmcore_hf.vlm.costs import Counted, Parts
from llmcore_hf.vlm.evaluation import BLIND, HeldOut, generate

MODULES = ("llava", "blip2", "flamingo")
PARTS = {
    "llava": Parts(("vision_tower",), ("multi_modal_projector",)),
    "blip2": Parts(("vision_model",), ("qformer", "query_tokens", "language_projection")),
    "flamingo": Parts(("vision_model",), ("resampler", "cross_attentions")),
}
LATEST, NONE = "latest", "none"
N_TIMED = 64  # images in the batch that is counted and timed
N_TOKENS = 8  # of each answer that is timed
ROUNDING = 0.01  # another device or precision may decide a close answer otherwise
OTHERS = ("caption_accuracy", "caption_accuracy/shuffled", "hard/vqa_accuracy")  # shown where they were measured
TRAINED_HERE, FOUND = "trained in this run", "finished runs"


@dataclass
class CompareArguments(RunArguments):
    """What is compared, or the options of each training under the names that its module has for them.

    On the command line they are JSON mappings, as in `--budget '{"max_steps": 300}'`; what one does not name stays that of the recipe.
    """

    MERGED: ClassVar[tuple[str, ...]] = ("budget", *MODULES)

    runs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Train nothing: compare finished runs of llava, blip2 and flamingo, given as their folders. `latest` takes "
            "output/<module>/latest if all three have ended, and otherwise trains all three; `none` always trains."
        },
    )
    budget: dict | str | None = field(
        default=None, metadata={"help": "Options of all three trainings alike: data, steps, batch size."}
    )
    llava: dict | str | None = field(default=None, metadata={"help": "Further options of --module llava."})
    blip2: dict | str | None = field(default=None, metadata={"help": "Further options of --module blip2."})
    flamingo: dict | str | None = field(default=None, metadata={"help": "Further options of --module flamingo."})
    seed: int = field(default=42, metadata={"help": "Seed of all trainings."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Where the run writes; output/vlm/<run_id> when not given."}
    )
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "`last`: go on with the run in --output_dir, in the training that it was in."}
    )


def argument_classes() -> tuple[type, ...]:
    return (CompareArguments,)


def house_defaults(explicit: dict[str, Any]) -> dict[str, Any]:
    return {}


def check(config: Config) -> list[str]:
    """What is wrong with the options of any training, one sentence each, before the first one starts."""
    problems = lesson.launch_problems(config.module)
    if config.values["runs"] not in (None, [LATEST], [NONE]):
        return problems
    if not config.values["budget"]:
        return [*problems, "--budget is missing (or --toy for the offline recipe, or --runs to compare finished runs)"]
    for module in MODULES:
        try:
            training_config(module, config, Path(module))
        except ConfigError as error:
            problems += [p if p.startswith("stage ") else f"stage {module}: {p}" for p in error.problems]
    return problems


def training_config(module: str, config: Config, folder: Path) -> Config:
    """The config of one training. Its learning checks only warn: what must be learned at this budget is checked here.

    Raises:
        ConfigError: its options are wrong, or change what the budget fixes for all.
    """
    budget, own = config.values["budget"] or {}, config.values[module] or {}
    if both := sorted(budget.keys() & own.keys()):
        raise ConfigError([f"`{name}` is set for all three by `budget`" for name in both])
    given = {"output_dir": str(folder), "seed": config.values["seed"]}
    return resolve_mapping(registry.get(module), {**budget, **own}, f"stage {module}", given, toy=False)


def run(config: Config, run_dir: RunDirectory) -> None:
    """Train the three or find their runs, measure what they saved, and put the evidence together."""
    quieten()
    folders = find_runs(config, run_dir)
    source = FOUND if folders else TRAINED_HERE
    if not folders:
        folders = {module: run_dir.path / module for module in MODULES}
        for module, folder in folders.items():
            stages.run_stage(module, training_config(module, config, folder), folder, run_dir)
    contestants = measure([Contestant.load(module, folder) for module, folder in folders.items()])
    block = comparison(contestants, source)
    run_dir.summary["comparison"] = block
    run_dir.summary["eval"] = stages.merged_eval({c.name: c.summary for c in contestants})
    run_dir.summary["samples"] = [{"module": c.name, **sample} for c in contestants for sample in c.summary["samples"]]
    rows = stages.merged_history(folders)
    run_dir.history = rows
    run_dir.write("log_history.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    run_dir.checks += comparison_checks(contestants, block)
    run_dir.write("comparison.md", as_markdown(block))
    stages.say(as_markdown(block))
    run_dir.write("training_curves.png", draw(contestants, block))


# ------------------------------------------------------------ the runs


def find_runs(config: Config, run_dir: RunDirectory) -> dict[str, Path]:
    """Module -> folder of the finished run that stands for it; empty when all three are to be trained.

    Raises:
        UserError: `--runs` names something else than one finished run of each.
    """
    given = config.values["runs"]
    if given in (None, [NONE]) or run_dir.path.joinpath(MODULES[0]).exists():  # it had begun to train
        return {}
    if given == [LATEST]:
        return latest_runs()
    folders = {}
    for name in given:
        folder = Path(name).expanduser()
        if problem := unusable(folder):
            raise UserError(f"--runs {name}: {problem}")
        folders[stages.read_summary(folder)["module"]] = folder
    if sorted(folders) != sorted(MODULES) or len(given) != len(MODULES):
        raise UserError(f"--runs must name one run each of {', '.join(MODULES)}, not: {', '.join(folders)}")
    return {module: folders[module] for module in MODULES}


def latest_runs() -> dict[str, Path]:
    """The newest runs under `output/`, or nothing when one of them cannot be compared; says which way it went, and why."""
    folders = {module: Path("output") / module / LATEST for module in MODULES}
    problems = {module: problem for module, folder in folders.items() if (problem := unusable(folder))}
    if problems:
        why = "; ".join(f"{folders[module]}: {problem}" for module, problem in problems.items())
        stages.say(f"no finished runs to compare ({why}): all three are trained here")
        return {}
    stages.say(f"comparing the finished runs {', '.join(str(folder.resolve()) for folder in folders.values())}")
    return {module: folder.resolve() for module, folder in folders.items()}


def unusable(folder: Path) -> str | None:
    """Why a run cannot be compared; None when it can."""
    try:
        summary = stages.read_summary(folder)
    except FileNotFoundError:
        return "there is no finished run"
    except (OSError, ValueError):
        summary = None
    if not isinstance(summary, dict):
        return "its summary.json is damaged"
    if summary.get("module") not in MODULES:
        return f"it is a run of `{summary.get('module')}`, not of {', '.join(MODULES)}"
    if summary.get("status") != "ok" or not summary.get("eval"):
        return f"it has not come to its end (status {summary.get('status')}): take one with status ok"
    if missing := [name for name in ("resolved_config.yaml", "log_history.jsonl") if not (folder / name).exists()]:
        return f"it lacks {' and '.join(missing)}"
    if not (folder / "config.json").exists():
        return "it left no whole model (LoRA runs leave an adapter alone): train it without --use_peft"
    return None


@contextmanager
def only_errors() -> Iterator[None]:
    """Without the warnings of transformers."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


@dataclass
class Contestant:
    """One run, with the model it saved, the one it began with, and what is measured of it."""

    name: str
    title: str
    folder: Path
    summary: dict[str, Any]
    options: dict[str, Any]
    model: Any
    start: Any
    processor: Any
    held_out: HeldOut
    scores: dict[str, list[float]] = field(default_factory=dict)
    counted: Counted | None = None
    speed: dict[str, float] = field(default_factory=dict)

    @classmethod
    def load(cls, module: str, folder: Path) -> Contestant:
        """Raises `UserError` when a model cannot be loaded."""
        from transformers import AutoModelForImageTextToText, AutoProcessor

        from llmcore_hf.models import loading
        from llmcore_hf.vlm import tiny

        title = registry.get(module).load().LESSON.title  # loading it tells the Auto classes about Flamingo
        summary, options = stages.read_summary(folder), resume.options_of(folder)
        name = str(summary["model"]["name_or_path"])
        began = tiny.ensure(name) if name in tiny.TINY_VLMS else loading.resolve_name(name)
        try:
            model = AutoModelForImageTextToText.from_pretrained(folder)
            with only_errors():  # the checkpoint may have the heads of a first stage, which the saved model has not
                start = type(model).from_pretrained(began)
            processor = AutoProcessor.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise UserError(f"the model of {folder} cannot be loaded: {' '.join(str(error).split())}") from error
        processor.chat_template = processor.chat_template or processor.tokenizer.chat_template
        held_out = held_out_of(options)
        return cls(module, title, folder, summary, options, model, start, processor, held_out)

    def ask(self, rows: list[dict[str, Any]], accelerator: Any) -> Any:
        """Greedy answers to the rows."""
        n_tokens, batch_size = self.held_out.max_new_tokens, self.held_out.batch_size
        return generate(self.model, self.processor, rows, n_tokens, batch_size, accelerator)

    @property
    def steps(self) -> int:
        return max(row["step"] for row in self.history)

    @property
    def history(self) -> list[dict[str, Any]]:
        return stages.read_history(self.folder)

    @property
    def rows_per_step(self) -> int:
        names = ("per_device_train_batch_size", "gradient_accumulation_steps")
        return int(self.options[names[0]]) * int(self.options[names[1]]) * int(self.summary["env"]["world_size"])


def held_out_of(options: dict[str, Any]) -> HeldOut:
    """The held-out rows of a run, from its options."""
    from llmcore_hf.data.loading import DataArguments
    from llmcore_hf.vlm.data import load_splits
    from llmcore_hf.vlm.lesson import hard_rows

    data = DataArguments(**{name: options[name] for name in DataArguments.__dataclass_fields__ if name in options})
    splits = load_splits(data, options["seed"], None, bool(options["load_best_model_at_end"]), None)
    n, n_tokens = options["max_generation_samples"], options["max_new_tokens"]
    return HeldOut.of(splits.test, hard_rows(data), n, n_tokens, options["per_device_eval_batch_size"])


# ------------------------------------------------------------ measuring


def measure(contestants: list[Contestant]) -> list[Contestant]:
    """Ask all the same questions, count what each costs, and time them in turn.

    Raises:
        UserError: they were held out on different rows.
    """
    from accelerate import Accelerator

    from llmcore_hf.vlm.data import answer_of, is_caption, question_of

    asked = {c.name: [(question_of(row), answer_of(row)) for row in c.held_out.rows] for c in contestants}
    if any(rows != asked[MODULES[0]] for rows in asked.values()):
        told = ", ".join(f"{c.name} on {len(asked[c.name])} of {c.summary['data']['source']}" for c in contestants)
        raise UserError(f"the runs were not tested on the same rows, so there is nothing to compare: {told}")
    accelerator = Accelerator()
    for c in contestants:
        questions = [row for row in c.held_out.rows if not is_caption(row)][:N_TIMED]
        c.model.to(accelerator.device)
        c.scores = c.held_out.measure_by(partial(c.ask, accelerator=accelerator))
        c.counted = costs.count(c.model, c.start.to(accelerator.device), c.processor, questions, PARTS[c.name])
        del c.start
    time_in_turn(contestants, questions)
    return contestants


def time_in_turn(contestants: list[Contestant], rows: list[dict[str, Any]]) -> None:
    from llmcore_hf.vlm.evaluation import encode_prompts

    works: dict[str, dict[str, Any]] = {"training": {}, "generation": {}}
    for c in contestants:
        batch = costs.training_batch(c.processor, rows).to(c.model.device)
        inputs = encode_prompts(c.processor, rows).to(c.model.device)
        works["training"][c.name] = costs.training_step(c.model, batch)
        pad = c.processor.tokenizer.pad_token_id
        works["generation"][c.name] = costs.answering(c.model, inputs, pad, N_TOKENS)
    for kind, by_name in works.items():
        speeds = costs.images_per_second(by_name, len(rows))
        for c in contestants:
            c.speed[kind] = speeds[c.name]


# ------------------------------------------------------------ what came out


def comparison(contestants: list[Contestant], source: str) -> dict[str, Any]:
    """The block `comparison` of the summary: one table, and the differences of accuracy on the same questions."""
    columns = {c.name: column(c) for c in contestants}
    return {
        "source": source,
        "equal_budget": len({c.steps * c.rows_per_step for c in contestants}) == 1,
        "runs": {c.name: str(c.folder) for c in contestants},
        "table": {row: {name: column[row] for name, column in columns.items()} for row in columns[MODULES[0]]},
        "differences": {
            f"{a.name} - {b.name}": {
                "vqa_accuracy": mean(a.scores["vqa_accuracy"]) - mean(b.scores["vqa_accuracy"]),
                "ci95": list(paired_interval(b.scores["vqa_accuracy"], a.scores["vqa_accuracy"])),
            }
            for a, b in combinations(contestants, 2)
        },
    }


def column(c: Contestant) -> dict[str, Any]:
    """What is said of one architecture, row by row."""
    assert c.counted is not None
    counted, accuracy = c.counted, c.scores["vqa_accuracy"]
    how = best_blind(c)
    return {
        "training_steps": c.steps,
        "training_rows": c.steps * c.rows_per_step,
        "parameters": sum(counted.parameters.values()),
        "parameters_trained": sum(counted.trained.values()),
        "parameters_frozen": sum(counted.parameters.values()) - sum(counted.trained.values()),
        **{f"parameters/{part}": n for part, n in counted.parameters.items()},
        "visual_tokens": counted.visual_tokens,
        "prompt_tokens": counted.prompt_tokens,
        "flops_per_image": sum(counted.flops.values()),
        **{f"flops/{part}": n for part, n in counted.flops.items()},
        "memory/weights_mb": counted.weight_bytes / 2**20,
        "memory/weights_gradients_adam_mb": counted.training_bytes / 2**20,
        "memory/activations_kb_per_image": counted.activation_bytes / 2**10,
        "memory/kv_cache_kb_per_image": counted.cache_bytes / 2**10,
        "images_per_second/training": c.speed["training"],
        "images_per_second/generation": c.speed["generation"],
        "vqa_accuracy": mean(accuracy),
        "vqa_accuracy/ci95": list(share_interval(mean(accuracy), len(accuracy))),
        **{f"vqa_accuracy/{blind}": mean(c.scores[f"vqa_accuracy/{blind}"]) for blind in BLIND},
        "above_blind": mean(accuracy) - mean(c.scores[how]),
        "above_blind/ci95": list(paired_interval(c.scores[how], accuracy)),
        **{name: mean(c.scores[name]) for name in OTHERS if name in c.scores},
    }


def best_blind(c: Contestant) -> str:
    """The blind baseline that is harder to beat."""
    return max((f"vqa_accuracy/{how}" for how in BLIND), key=lambda name: sum(c.scores[name]))


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def comparison_checks(contestants: list[Contestant], block: dict[str, Any]) -> list[Check]:
    table, trained_here = block["table"], block["source"] == TRAINED_HERE
    apart = {c.name: apart_from_its_run(c) for c in contestants}
    tower = {c.name: c.counted.trained[costs.TOWER] for c in contestants if c.counted}
    return [
        Check(
            "vlm.equal_budget",
            "invariant",
            block["equal_budget"] if trained_here else block["equal_budget"] or None,
            table["training_rows"],
            "the same number of training rows for each; runs that were there already may have had budgets of their own",
            "预算不同，准确率就不能直接比。跳过：比较的是已有的运行，各有各的预算；--runs none 会让三者按同样的预算重新训练。",
            "With different budgets, accuracies do not compare. Skipped: these are runs that were there already, each with a "
            "budget of its own; `--runs none` trains all three alike.",
        ),
        Check(
            "vlm.same_answers_as_in_the_runs",
            "invariant",
            all(value <= ROUNDING for value in apart.values()),
            apart,
            f"accuracies of the saved models, measured again, lie within {ROUNDING} of those in the summaries of their runs",
            "重新加载保存的模型、重新提问，准确率必须与各次运行自己报告的一致；同一台机器上完全相同。",
            "The saved models, loaded and asked again, must be as right as their runs said they were; on one machine, exactly.",
        ),
        Check(
            "vlm.vision_towers_frozen",
            "invariant",
            not any(tower.values()),
            tower,
            "0 parameters of any vision tower differ from the checkpoint that the run began with",
            "三者的视觉塔都冻结：比较的是连接方式，不是视觉塔。",
            "All vision towers are frozen: what is compared is the way to connect them, not the tower.",
        ),
        *(
            Check(
                f"vlm.{c.name}_sees",
                "learning",
                table["above_blind/ci95"][c.name][0] > 0,
                {
                    "accuracy": table["vqa_accuracy"][c.name],
                    "above_blind": table["above_blind"][c.name],
                    "from": table["above_blind/ci95"][c.name][0],
                },
                "95 % interval of what the accuracy exceeds the better blind baseline by lies above 0",
                "准确率只有超出盲基线的部分才算看懂了图。",
                "Accuracy counts only as far as it exceeds the blind baseline.",
            )
            for c in contestants
        ),
    ]


def apart_from_its_run(c: Contestant) -> float:
    """The largest difference between what is measured here and what the run reported."""
    reported = c.summary["eval"]["after"]
    return max(abs(mean(values) - reported[name]) for name, values in c.scores.items())


def as_markdown(block: dict[str, Any]) -> str:
    """The table, for people."""
    titles = {name: registry.get(name).load().LESSON.title for name in MODULES}
    lines = [f"| {block['source']} | {' | '.join(titles.values())} |", "|---|---|---|---|"]
    lines += [
        f"| {row} | {' | '.join(shown(values[name]) for name in MODULES)} |" for row, values in block["table"].items()
    ]
    budget = "equal" if block["equal_budget"] else "NOT equal: each run had its own"
    lines += ["", f"Budget (training rows): {budget}.", ""]
    lines += [
        f"- {pair}: {found['vqa_accuracy']:+.3f} {shown(found['ci95'])}" for pair, found in block["differences"].items()
    ]
    return "\n".join(lines) + "\n"


def shown(value: Any) -> str:
    if isinstance(value, list):
        return f"[{value[0]:.3f}, {value[1]:.3f}]"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3f}" if value < 10 else f"{value:,.0f}"


def draw(contestants: list[Contestant], block: dict[str, Any]) -> bytes:
    from llmcore_hf.vlm import pictures

    curves = {
        c.title: [
            (row["step"] * c.rows_per_step, row["eval_vqa_accuracy"], row["eval_vqa_accuracy_blind"])
            for row in c.history
            if "eval_vqa_accuracy" in row
        ]
        for c in contestants
    }
    table = {row: {c.title: values[c.name] for c in contestants} for row, values in block["table"].items()}
    title = f"Three ways to connect an image to a language model ({block['source']})"
    if not block["equal_budget"]:
        budgets = ", ".join(f"{name} {rows:,}" for name, rows in table["training_rows"].items())
        title += f"\nbudgets NOT equal, accuracies do not compare: {budgets} training rows"
    return pictures.comparison(title, curves, table)
