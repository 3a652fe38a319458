"""What learns in each stage of each vision module, against a list written down here, and what stays bit by bit as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from vision_lessons import Begun, begin

from llmcore_hf.vlm import blip2, flamingo, llava, training
from llmcore_hf.vlm.training import Stage

pytestmark = pytest.mark.usefixtures("one_thread")

# Where the parts lie in the models: how their parameters' names begin.
PARTS = {
    "llava": {
        "tower": ("model.vision_tower.",),
        "projector": ("model.multi_modal_projector.",),
        "language model": ("model.language_model.", "lm_head."),
    },
    "blip2": {
        "tower": ("vision_model.",),
        "Q-Former": ("qformer.", "query_tokens"),
        "projector": ("language_projection.",),
        "language model": ("language_model.",),
        "heads of stage 1": (
            "embeddings.",
            "vision_projection.",
            "text_projection.",
            "itm_head.",
            "itg_head.",
            "temperature",
        ),
    },
    "flamingo": {
        "tower": ("vision_model.",),
        "resampler": ("resampler.",),
        "gated layers": ("cross_attentions.",),
        "language model": ("language_model.",),
    },
}
# The papers' tables of what is trained: LLaVA section 4.2, BLIP-2 sections 3.2 and 3.3, Flamingo section 2.
LEARN = {
    "llava": [{"projector"}, {"projector", "language model"}],
    "blip2": [
        {"Q-Former", "heads of stage 1"},
        {"Q-Former", "projector"},
        {"Q-Former", "projector", "language model"},
    ],
    "flamingo": [{"resampler", "gated layers"}],
}
STEPS = {
    "llava": ("--stage1_steps", "1", "--max_steps", "2"),
    "blip2": ("--stage1_steps", "1", "--language_model_steps", "1", "--max_steps", "3"),
    "flamingo": ("--max_steps", "2"),  # the first opens the gates
}


def part_of(module: str, name: str) -> str:
    found = [part for part, starts in PARTS[module].items() if name.startswith(starts)]
    assert len(found) == 1, f"{name} belongs to {found}"
    return found[0]


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def train(begun: Begun) -> list[tuple[set[str], dict[str, torch.Tensor]]]:
    """For each stage the names that required a gradient in it, and the weights at its end."""
    stages: list[Any] = []
    trainer = begun.trainer

    def note(stage: Stage | None = None) -> None:
        wanted = {name for name, p in begun.model.named_parameters() if p.requires_grad}
        stages.append((wanted, weights(begun.model)))

    trainer.at_end_of = note
    release = trainer.stage_callback.on_train_end

    def at_the_end(*args: Any, **kwargs: Any) -> None:
        note()
        release(*args, **kwargs)

    trainer.stage_callback.on_train_end = at_the_end
    trainer.train()
    return stages


@pytest.mark.parametrize("module", LEARN)
def test_each_stage_trains_its_parts_and_leaves_the_others_bit_by_bit(tmp_path: Path, module: str) -> None:
    begun = begin(module, tmp_path, *STEPS[module])
    before = weights(begun.model)
    stages = train(begun)
    assert len(stages) == len(LEARN[module])
    for learn, (wanted, after) in zip(LEARN[module], stages, strict=True):
        assert {part_of(module, name) for name in wanted} == learn
        assert wanted == {name for name in after if part_of(module, name) in learn}, "a part learns in part"
        moved = {name for name in after if not torch.equal(after[name], before[name])}
        assert {part_of(module, name) for name in moved} == learn
        before = after
    assert all(check.passed for check in training.stage_checks(module, begun.trainer))


WRONG_LISTS = {
    "the language model in BLIP-2's frozen stage": ("blip2", blip2, "GENERATES", ("language_model",)),
    "the tower in BLIP-2's first stage": ("blip2", blip2, "REPRESENTS", ("vision_model",)),
    "the language model of Flamingo": ("flamingo", flamingo, "NEW", ("language_model",)),
}


@pytest.mark.parametrize("wrong", WRONG_LISTS)
def test_a_run_notices_a_part_that_learns_and_must_not(monkeypatch, tmp_path: Path, wrong: str) -> None:
    """The check has its own list of what is frozen, so it does not believe the list of what learns."""
    module, code, name, more = WRONG_LISTS[wrong]
    monkeypatch.setattr(code, name, (*getattr(code, name), *more))
    begun = begin(module, tmp_path, *STEPS[module])
    begun.trainer.train()
    (check,) = training.stage_checks(module, begun.trainer)
    assert not check.passed and check.observed["changed"] and check.observed["with_gradient"]


def test_a_run_notices_a_language_model_that_learns_while_the_projector_is_aligned(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(llava, "PROJECTOR", "m")  # every name has one
    begun = begin("llava", tmp_path, *STEPS["llava"])
    begun.trainer.train()
    (check,) = training.stage_checks("llava", begun.trainer)
    assert not check.passed


LORA = {  # what learns with --use_peft: LoRA on the language model, and the connector whole
    "llava": ("language_model", ("multi_modal_projector",)),
    "blip2": ("language_model", ("language_projection",)),
}


@pytest.mark.parametrize("module", LORA)
def test_lora_trains_adapters_of_the_language_model_and_the_connector(tmp_path: Path, module: str) -> None:
    begun = begin(module, tmp_path, "--use_peft", "--lora_r", "2", "--max_steps", "1")
    adapted, whole = LORA[module]
    before = weights(begun.model)
    ((wanted, after),) = train(begun)
    for name in before:
        parts = name.split(".")
        adapter = ("lora_A" in parts or "lora_B" in parts) and adapted in parts
        saved = "modules_to_save" in parts and any(part in parts for part in whole)
        assert (name in wanted) == (adapter or saved), name
        assert name in wanted or torch.equal(after[name], before[name]), f"{name} moved"
    assert any("lora_B" in name and not torch.equal(after[name], before[name]) for name in wanted)
