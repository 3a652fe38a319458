"""Flamingo's invariants: shut gates change nothing, a token sees its last image alone, frozen parts stay, the cache agrees."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from vision_lessons import Begun, begin

from llmcore_hf.data import shapes
from llmcore_hf.stats import unpaired_interval
from llmcore_hf.vlm import evaluation, flamingo, tiny
from llmcore_hf.vlm.data import answer_of
from llmcore_hf.vlm.evaluation import encode_prompts
from llmcore_hf.vlm.flamingo_model import (
    Attention,
    FlamingoForConditionalGeneration,
    GatedCrossAttention,
    PerceiverResampler,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def path() -> Path:
    return tiny.ensure("tiny-flamingo")


@pytest.fixture(scope="module")
def processor(path: Path) -> Any:
    return AutoProcessor.from_pretrained(path)


@pytest.fixture(scope="module")
def shut(path: Path) -> FlamingoForConditionalGeneration:
    return FlamingoForConditionalGeneration.from_pretrained(path).eval()


@pytest.fixture(scope="module")
def opened(shut: FlamingoForConditionalGeneration, path: Path) -> FlamingoForConditionalGeneration:
    model = FlamingoForConditionalGeneration.from_pretrained(path).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("_gate"):
            torch.nn.init.constant_(parameter, 0.7)
    return model


@pytest.fixture(scope="module")
def batch(processor: Any) -> Any:
    """Two rows with two examples each, one with none: 3 + 3 + 1 images."""
    rows = [*shapes.few_shot_rows("train", 2, [2]), *shapes.few_shot_rows("validation", 1, [0])]
    return encode_prompts(processor, rows)


@torch.no_grad()
def test_at_gate_zero_the_logits_are_those_of_the_language_model(shut, batch) -> None:
    text = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = shut(**batch).logits
    shut.seen = None
    assert torch.equal(logits, shut.language_model(**text).logits)


@torch.no_grad()
def test_open_gates_use_the_images(opened, batch) -> None:
    other = dict(batch, pixel_values=batch["pixel_values"].flip(0))
    assert not torch.allclose(opened(**batch).logits, opened(**other).logits)


@torch.no_grad()
def test_a_token_sees_its_last_image_and_no_other(opened, batch) -> None:
    """Weights on all other images are exactly 0; on the last, they sum to 1."""
    opened(**batch)
    index, n = opened.image_index(batch["input_ids"]), opened.config.num_latents
    for layer in opened.cross_attentions:
        weights = layer.attention.weights.unflatten(-1, (-1, n)).sum(dim=-1)  # (B, H, T, M)
        for number in range(weights.shape[-1]):
            own = (index == number + 1)[:, None].expand(-1, weights.shape[1], -1)
            assert weights[..., number][~own].abs().max() == 0
            assert torch.allclose(weights[..., number][own], torch.ones(int(own.sum())))
        before = (index == 0)[:, None].expand(-1, weights.shape[1], -1)
        assert before.any() and weights[before].abs().max() == 0, "a token before any image saw one"


@torch.no_grad()
def test_a_later_image_changes_nothing_before_it(opened, batch) -> None:
    pixels = batch["pixel_values"].clone()
    pixels[1] = 0.0  # the second image of the first row
    before, after = opened(**batch).logits, opened(**dict(batch, pixel_values=pixels)).logits
    second = (opened.image_index(batch["input_ids"])[0] == 2).nonzero()[0, 0]
    assert torch.equal(before[0, :second], after[0, :second])
    assert not torch.equal(before[0, second:], after[0, second:])
    assert torch.equal(before[1:], after[1:])


def test_at_the_start_gradients_reach_the_gates_alone_and_then_all_that_learns(path, batch) -> None:
    model = FlamingoForConditionalGeneration.from_pretrained(path)
    model.vision_model.requires_grad_(False)
    model.language_model.requires_grad_(False)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)

    def moved() -> set[str]:
        model.zero_grad()
        model(**batch, labels=labels).loss.backward()
        return {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}

    gates = {name for name, _ in model.named_parameters() if name.endswith("_gate")}
    assert moved() == gates
    for name, parameter in model.named_parameters():
        if name in gates:
            torch.nn.init.constant_(parameter, 0.5)
    learns = {n for n, _ in model.named_parameters() if n.startswith(("resampler", "cross_attentions"))}
    assert moved() == learns
    frozen = [p for n, p in model.named_parameters() if n not in learns]
    assert all(p.grad is None for p in frozen)


@torch.no_grad()
def test_generation_with_a_cache_is_that_without_and_of_a_plain_loop(opened, batch, processor) -> None:
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": processor.tokenizer.pad_token_id}
    cached = opened.generate(**batch, use_cache=True, **options)
    assert torch.equal(cached, opened.generate(**batch, use_cache=False, **options))
    row = {"input_ids": batch["input_ids"][:1], "attention_mask": batch["attention_mask"][:1]}
    keep = row["attention_mask"][0].bool()
    ids, pixels = row["input_ids"][:, keep], batch["pixel_values"][:3]
    for _ in range(3):
        ids = torch.cat([ids, opened(input_ids=ids, pixel_values=pixels).logits[:, -1:].argmax(-1)], dim=1)
    assert ids[0, -3:].tolist() == cached[0, batch["input_ids"].shape[1] :][:3].tolist()


@torch.no_grad()
def test_save_and_load_give_equal_logits(opened, batch, tmp_path: Path) -> None:
    opened.save_pretrained(tmp_path)
    assert torch.equal(
        AutoModelForImageTextToText.from_pretrained(tmp_path).eval()(**batch).logits, opened(**batch).logits
    )


def test_more_places_than_images_are_refused(opened, batch) -> None:
    with pytest.raises(ValueError, match="7 places for images, but there are 5 images"):
        opened(**dict(batch, pixel_values=batch["pixel_values"][:5]))


# --- gates and the lesson ---


@torch.no_grad()
@pytest.mark.parametrize(("a", "b"), [(0.7, 0.0), (0.0, -1.3), (2.5, 1.0)])
def test_a_layer_adds_attention_and_feed_forward_through_tanh_of_their_gates(a: float, b: float) -> None:
    torch.manual_seed(0)
    layer = GatedCrossAttention(16, 12, 4)
    layer.attention_gate.fill_(a)
    layer.feed_forward_gate.fill_(b)
    hidden, latents, may_see = torch.randn(2, 5, 16), torch.randn(2, 3, 12), torch.ones(2, 5, 3, dtype=torch.bool)
    y = hidden + math.tanh(a) * layer.attention(layer.norm(hidden), latents, may_see)
    y = y + math.tanh(b) * layer.feed_forward(y)
    assert torch.allclose(layer(hidden, latents, may_see), y, atol=1e-6)


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Begun:
    rates = ("--learning_rate", "1e-3", "--gate_learning_rate", "5e-2", "--max_steps", "2")
    return begin("flamingo", tmp_path_factory.mktemp("flamingo"), *rates)


def test_gates_have_a_learning_rate_of_their_own(begun: Begun) -> None:
    trainer = begun.trainer
    names = {id(parameter): name for name, parameter in begun.model.named_parameters()}
    groups = trainer.create_optimizer().param_groups
    rates = {names[id(p)]: group["lr"] for group in groups for p in group["params"]}
    assert len(rates) == sum(len(group["params"]) for group in groups), "a parameter stands in two groups"
    assert set(rates) == {name for name, p in begun.model.named_parameters() if p.requires_grad}
    assert all(rate == (5e-2 if name.endswith("_gate") else 1e-3) for name, rate in rates.items())


def test_the_run_notices_a_new_layer_that_adds_something_behind_shut_gates(begun: Begun) -> None:
    def check() -> Any:
        (found,) = begun.lesson.start_checks(begun.trainer, begun.job, begun.splits)
        return found.passed

    assert check() is True
    handle = begun.model.cross_attentions[0].register_forward_hook(lambda module, args, output: output + 0.01)
    assert check() is False
    handle.remove()
    gate = begun.model.cross_attentions[0].attention_gate
    with torch.no_grad():
        gate.fill_(0.1)
        assert check() is None, "open gates are no fault"
        gate.zero_()


def few_shot_splits() -> Any:
    return SimpleNamespace(source="toy-shapes-few-shot")


class Asked:
    """Stands for the held-out questions: notes what is asked, and lets `answer` say what comes back."""

    def __init__(self, answer: Any) -> None:
        self.answer, self.rows = answer, []

    def ask(self, rows: list[dict[str, Any]], trainer: Any, job: Any) -> Any:
        self.rows += rows
        return SimpleNamespace(texts=[self.answer(row) for row in rows])


def image_bytes(rows: list[dict[str, Any]]) -> set[bytes]:
    return {image.tobytes() for row in rows for image in row["images"]}


def test_few_shot_questions_are_held_out() -> None:
    asked = Asked(answer_of)
    measured = flamingo.LESSON.measure(None, None, few_shot_splits(), asked)
    assert all(set(measured[f"shots/{n}"]) == {1.0} and len(measured[f"shots/{n}"]) == 120 for n in (0, 1, 2, 4))
    held_out = [row for n in (0, 1, 2, 4) for row in shapes.few_shot_rows("test", 120, [n])]
    trained = shapes.few_shot_rows("train", 480, [0, 1, 2, 4])
    gray = bytes([128]) * 3 * shapes.IMAGE_SIZE**2
    assert image_bytes(asked.rows) == image_bytes(held_out) | {gray}
    assert not image_bytes(asked.rows) & image_bytes(trained)


def test_the_blind_get_the_same_examples_and_another_image_to_tell_about() -> None:
    rows = shapes.few_shot_rows("test", 30, [2])
    own = [row["images"][-1].tobytes() for row in rows]
    for how in ("shuffled", "blank"):
        asked = evaluation.blind_query(rows, how)
        assert [row["prompt"] for row in asked] == [row["prompt"] for row in rows]
        for row, other in zip(rows, asked, strict=True):
            assert len(other["images"]) == 3
            assert all(a is b for a, b in zip(row["images"][:-1], other["images"][:-1], strict=True))
        last = [row["images"][-1].tobytes() for row in asked]
        if how == "shuffled":
            assert sorted(last) == sorted(own) and sum(a == b for a, b in zip(own, last, strict=True)) < 4
        else:
            assert len(set(last)) == 1 and not set(last) & set(own)


def judged(answer: Any) -> dict[str, bool]:
    """What the checks say of someone who answers so."""
    after = flamingo.LESSON.measure(None, None, few_shot_splits(), Asked(answer))
    block = {"after": {name: sum(values) / len(values) for name, values in after.items()}}
    return {check.id.removeprefix("flamingo."): check.passed for check in flamingo.LESSON.end_checks(block, after)}


def test_who_guesses_from_the_examples_is_not_taken_for_seeing() -> None:
    """Someone who looks passes; someone who gets as many right whatever the image shows does not."""
    truth = {
        row["images"][-1].tobytes(): answer_of(row) for n in (1, 2, 4) for row in shapes.few_shot_rows("test", 120, [n])
    }

    def looks(row: dict[str, Any]) -> str:
        return truth.get(row["images"][-1].tobytes(), "nothing")

    def guesses(row: dict[str, Any]) -> str:
        return answer_of(row) if len(row["images"]) > 1 else "nothing"

    seen, guessed = judged(looks), judged(guesses)
    names = {"examples_help", "sees_with_examples_more_than_shuffled", "sees_with_examples_more_than_blank"}
    assert set(seen) == names and all(seen.values())
    assert guessed == {name: name == "examples_help" for name in names}


@torch.no_grad()
def test_attention_is_that_of_torch() -> None:
    torch.manual_seed(0)
    ours = Attention(16, 12, 4)
    theirs = torch.nn.MultiheadAttention(16, 4, bias=False, kdim=12, vdim=12, batch_first=True)
    for mine, name in ((ours.query, "q"), (ours.key, "k"), (ours.value, "v")):
        getattr(theirs, f"{name}_proj_weight").copy_(mine.weight)
    theirs.out_proj.weight.copy_(ours.output.weight)
    queries, keys = torch.randn(2, 5, 16), torch.randn(2, 7, 12)
    may_see = torch.rand(2, 5, 7) > 0.4
    may_see[..., 0] = True
    expected, weights = theirs(queries, keys, keys, attn_mask=(~may_see).repeat_interleave(4, dim=0))
    assert torch.allclose(ours(queries, keys, may_see), expected, atol=1e-6)
    assert torch.allclose(ours.weights.mean(dim=1), weights, atol=1e-6)
    may_see[0, 0] = False
    assert ours(queries, keys, may_see)[0, 0].abs().max() == 0


@torch.no_grad()
def test_the_resampler_gives_as_many_latents_for_any_image_and_knows_no_order() -> None:
    torch.manual_seed(0)
    resampler = PerceiverResampler(16, 3, 2, 4)
    features = torch.randn(2, 9, 16)
    assert resampler(features).shape == resampler(features[:, :4]).shape == (2, 3, 16)
    assert torch.allclose(resampler(features), resampler(features[:, torch.randperm(9)]), atol=1e-5)


def test_few_shot_rows_tell_what_is_meant_by_examples_alone() -> None:
    rows = shapes.few_shot_rows("test", 40, [0, 1, 2, 4])
    kinds = [list(shapes.COLORS), list(shapes.SHAPES), list(shapes.POSITIONS)]
    for i, row in enumerate(rows):
        answers = [
            turn["content"][0]["text"] for turn in row["prompt"] + row["completion"] if turn["role"] == "assistant"
        ]
        assert len(row["images"]) == len(answers) == (1, 2, 3, 5)[i % 4]
        assert any(set(answers) <= set(values) for values in kinds), "the examples name different attributes"
        assert all(a != b for a, b in itertools.pairwise(answers)), "copying the example would be right"
        questions = [turn["content"][1]["text"] for turn in row["prompt"] if turn["role"] == "user"]
        assert set(questions) == {"What is it?"}
    assert [row["images"][0].tobytes() for row in shapes.few_shot_rows("test", 4, [1])] == [
        row["images"][0].tobytes() for row in shapes.few_shot_rows("test", 4, [1])
    ]


def test_the_interval_of_two_shares() -> None:
    """Agresti & Caffo: (40 of 50) - (20 of 50) gives shares 41/52 and 21/52 and this interval."""
    low, high = unpaired_interval([1.0] * 20 + [0.0] * 30, [1.0] * 40 + [0.0] * 10)
    assert (low, high) == pytest.approx((0.21082, 0.55841), abs=2e-3)
    rng = random.Random(0)
    covered = 0
    for _ in range(400):  # the true difference is .3
        a, b = ([float(rng.random() < p) for _ in range(60)] for p in (0.4, 0.7))
        low, high = unpaired_interval(a, b)
        covered += low <= 0.3 <= high
    assert covered / 400 >= 0.93
    with pytest.raises(ValueError, match="not empty"):
        unpaired_interval([], [1.0])
