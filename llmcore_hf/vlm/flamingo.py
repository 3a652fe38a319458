"""Flamingo: a frozen language model looks at images through new, gated layers between its own, and learns from examples.

    x = Perceiver Resampler(features of an image)                     (L, D): as many latents for every image
    y <- y + tanh(a) attention(y, x of the last image before it)      before each block of the language model
    y <- y + tanh(b) feed-forward(y)                                  with a = b = 0 at first

(Alayrac et al. 2022, arXiv:2204.14198, section 2.) Vision tower and language model are frozen; resampler, cross-attention and gates
learn. At first the gates are shut and the model is exactly the language model. Images and text may alternate, so the model can be
shown examples (few-shot): in the toy, the question "What is it?" does not say which attribute is meant, only examples do.
Trainer: transformers' Trainer with TRL's collator for images.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from llmcore_hf.alignment.evaluation import GenerationArguments, evaluating
from llmcore_hf.alignment.training import ModelArguments
from llmcore_hf.checks import Check
from llmcore_hf.config import Config, RunArguments
from llmcore_hf.curves import HELD_OUT, TRAIN, Line, Panel
from llmcore_hf.data.loading import DataArguments, Splits
from llmcore_hf.data.shapes import SHOTS, few_shot_rows
from llmcore_hf.stats import paired_interval, unpaired_interval
from llmcore_hf.vlm import pictures, training
from llmcore_hf.vlm.evaluation import BLIND, HeldOut, blind_query, encode_prompts, scores
from llmcore_hf.vlm.flamingo_model import FlamingoConfig, FlamingoForConditionalGeneration
from llmcore_hf.vlm.lesson import USAGE, VisionLesson
from llmcore_hf.vlm.training import Stage, StagedTrainer, VisionArguments, VisionJob

if TYPE_CHECKING:
    import numpy as np
    from trl import SFTConfig

house_defaults, only_asks = training.house_defaults, training.only_asks
NEW = ("resampler", "cross_attentions")  # what learns
FROZEN = ("vision_model", "language_model")
N_SHOT_ROWS = 120  # held-out questions for each number of examples


@dataclass
class FlamingoArguments:
    """Options of Flamingo alone."""

    gate_learning_rate: float = field(
        default=3e-2,
        metadata={"help": "Learning rate of the gates: with that of the other layers they stay shut too long."},
    )


def argument_classes() -> tuple[type, ...]:
    from trl import SFTConfig

    return (
        RunArguments,
        FlamingoArguments,
        VisionArguments,
        DataArguments,
        GenerationArguments,
        ModelArguments,
        SFTConfig,
    )


def check(config: Config) -> list[str]:
    """Impossible combinations of options, one sentence each."""
    values, problems = config.values, training.check_options(config)
    if values["stage1_steps"]:
        problems.append("--stage1_steps: Flamingo is trained in one stage; leave it at 0")
    if values["use_peft"]:
        problems.append("--use_peft: Flamingo's language model stays frozen; its new layers are trained whole")
    if not values["gate_learning_rate"] > 0:
        problems.append(f"--gate_learning_rate must be greater than 0, not {values['gate_learning_rate']}")
    return problems


def learns(name: str) -> bool:
    return name.startswith(NEW)


class FlamingoTrainer(StagedTrainer):
    """transformers' Trainer, with a learning rate of their own for the gates, which it logs."""

    gate_learning_rate: float

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        gates = [parameter for name, parameter in self.trainable.items() if name.endswith("_gate")]
        ids = {id(gate) for gate in gates}
        if not any(group.get("gates") for group in optimizer.param_groups):
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) not in ids]
            optimizer.add_param_group(
                {"params": gates, "lr": self.gate_learning_rate, "weight_decay": 0.0, "gates": True}
            )
        return optimizer

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            layers = self.accelerator.unwrap_model(self.model).cross_attentions
            for kind in ("attention", "feed_forward"):
                gates = [getattr(layer, f"{kind}_gate").detach().tanh().abs() for layer in layers]
                logs[f"gates/{kind}"] = torch.stack(gates).mean().item()
        super().log(logs, *args, **kwargs)


class Flamingo(VisionLesson):
    usage = f"import llmcore_hf.vlm.flamingo_model  # tells the Auto classes about Flamingo\n{USAGE}"
    name, title, kinds, tower = "flamingo", "Flamingo", (FlamingoConfig.model_type,), "vision_model"
    panels = (
        Panel(
            "Gates: mean |tanh|",
            (Line("gates/attention", "cross-attention", HELD_OUT), Line("gates/feed_forward", "feed-forward", TRAIN)),
        ),
    )

    def make_trainer(self, config: Config, job: VisionJob, splits: Splits, args: SFTConfig) -> FlamingoTrainer:
        model = FlamingoForConditionalGeneration.from_pretrained(job.path, **(args.model_init_kwargs or {}))
        args.remove_unused_columns = False  # the collator wants images and turns, which the model does not know
        _, n_steps = training.stage_lengths(args, 0, len(splits.train))
        trainer = FlamingoTrainer(
            model=model,
            args=args,
            train_dataset=splits.train,
            eval_dataset=splits.validation,
            processing_class=job.processor,
            data_collator=DataCollatorForVisionLanguageModeling(
                job.processor, args.max_length, completion_only_loss=True
            ),
        )
        trainer.gate_learning_rate = config.part(FlamingoArguments).gate_learning_rate
        rows = splits.train
        n_turns = [len(row["prompt"]) for row in rows.select_columns(["prompt"])]  # rows with examples are much longer
        stage = Stage("training", n_steps, args.learning_rate, learns, range(len(rows)), FROZEN, n_turns)
        trainer.begin([stage])
        return trainer

    def measure(
        self, trainer: StagedTrainer, job: VisionJob, splits: Splits, held_out: HeldOut
    ) -> dict[str, list[float]]:
        """Accuracy with 0, 1, 2 and 4 examples, and beside it that of the blind, who get the same examples and another
        image to tell about, or a blank one. The questions differ, for each number has its own examples."""
        if splits.source != "toy-shapes-few-shot":
            return {}
        measured = {}
        for n in SHOTS:
            rows = few_shot_rows("test", N_SHOT_ROWS, [n])
            shown = {"": rows} | {f"/{how}": blind_query(rows, how) for how in BLIND}
            for suffix, asked in shown.items():
                measured[f"shots/{n}{suffix}"] = scores(rows, held_out.ask(asked, trainer, job).texts)
        return measured

    def start_checks(self, trainer: StagedTrainer, job: VisionJob, splits: Splits) -> list[Check]:
        """With its gates shut, the model is its language model."""
        model = trainer.accelerator.unwrap_model(trainer.model)
        shut = all(gate.item() == 0 for name, gate in model.named_parameters() if name.endswith("_gate"))
        equal = None
        if shut:
            inputs = encode_prompts(
                job.processor, [splits.validation[i] for i in range(min(4, len(splits.validation)))]
            )
            inputs = inputs.to(model.device)
            text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            with evaluating(model):
                seen, model.seen = model(**inputs).logits, None
                equal = torch.equal(seen, model.language_model(**text).logits)
        return [
            Check(
                "flamingo.shut_gates_leave_the_language_model",
                "invariant",
                equal,
                {"equal_logits": equal},
                "logits with images equal to those of the language model alone, bit by bit; skipped once the gates are open",
                "门初始为 0，tanh(0)=0：插入新层不改变语言模型，训练从它原来的能力出发。",
                "At gate 0 the new layers add nothing: training starts from what the language model could do.",
            )
        ]

    def end_checks(self, block: dict[str, Any], after: dict[str, list[float]]) -> list[Check]:
        if "shots/0" not in after:
            return []
        best = max(SHOTS[1:], key=lambda n: sum(after[f"shots/{n}"]))
        low, high = unpaired_interval(after["shots/0"], after[f"shots/{best}"])
        return [
            Check(
                "flamingo.examples_help",
                "learning",
                low > 0,
                {"best": best, **{str(n): block["after"][f"shots/{n}"] for n in SHOTS}, "from": low, "to": high},
                "95 % interval of what the best number of examples adds over none lies above 0",
                "问题没说问什么，只有示例说了：有示例不比没有好，说明没有从上下文学习。",
                "The question does not say what is meant, only examples do: if they do not help, nothing is learned in context.",
            ),
            *(_sees_with_examples(best, how, block, after) for how in BLIND),
        ]

    def own_panels(self, block: dict[str, Any]) -> list[Callable[[Any], None]]:
        """Accuracy over the number of examples, beside the blind."""
        names = [f"shots/{n}" for n in SHOTS]
        if names[0] not in block["after"]:
            return []
        series = {"": "after training", "/shuffled": "blind: another image", "/blank": "blind: a blank image"}
        lines = {label: [block["after"][f"{name}{suffix}"] for name in names] for suffix, label in series.items()}
        lines["before training"] = [block["before"][name] for name in names]
        return [functools.partial(pictures.draw_shots, shots=SHOTS, lines=lines)]

    def look(self, model: Any, job: VisionJob, rows: list[dict[str, Any]]) -> tuple[list[str], np.ndarray]:
        """What the last token of the prompt sees: weights of cross-attention over latents times the resampler's over patches."""
        inputs = encode_prompts(job.processor, rows).to(model.device)
        model(**inputs)
        n_patches = (model.config.vision_config.image_size // model.config.vision_config.patch_size) ** 2
        resampled = model.resampler.layers[-1]["attention"].weights.mean(dim=1)[
            :, :, 1 : n_patches + 1
        ]  # (N, L, patches)
        last = [sum(len(row["images"]) for row in rows[: i + 1]) - 1 for i in range(len(rows))]  # each row's last image
        maps = {}
        for i, layer in enumerate(model.cross_attentions):
            weights = layer.attention.weights.mean(dim=1)[:, -1]  # (B, M * L), zero but for the last image
            latents = weights.unflatten(-1, (-1, model.config.num_latents)).sum(dim=1)  # (B, L)
            maps[f"layer {i + 1}"] = torch.einsum("bl,blp->bp", latents, resampled[last])
        return training.as_grids(maps)


def _sees_with_examples(best: int, how: str, block: dict[str, Any], after: dict[str, list[float]]) -> Check:
    """Examples may teach which answers are possible; the image must tell which is right."""
    name = f"shots/{best}"
    low, high = paired_interval(after[f"{name}/{how}"], after[name])
    return Check(
        f"flamingo.sees_with_examples_more_than_{how}",
        "learning",
        low > 0,
        {
            "examples": best,
            "accuracy": block["after"][name],
            how: block["after"][f"{name}/{how}"],
            "from": low,
            "to": high,
        },
        "95 % interval of what the accuracy with examples exceeds the blind baseline by, who has the same examples, lies above 0",
        "示例会告诉模型可能的答案有哪些；换掉或抹掉要问的图，如果还答得一样好，那是照着示例猜，没有看图。",
        "Examples tell which answers are possible: who answers as well with the image in question exchanged or blank "
        "guesses from them and does not look.",
    )


LESSON = Flamingo()
run = LESSON.run
