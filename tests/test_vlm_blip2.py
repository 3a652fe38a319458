"""BLIP-2's first stage: masks, losses against independent forms, what sees what, and what is frozen."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy
from transformers import AutoProcessor, Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval

from llmcore_hf.data import shapes
from llmcore_hf.vlm import blip2, tiny
from llmcore_hf.vlm.blip2_model import (
    Blip2ForTwoStages,
    contrastive_loss,
    hard_negatives,
    multimodal_causal_mask,
)
from llmcore_hf.vlm.evaluation import HeldOut

pytestmark = pytest.mark.usefixtures("one_thread")
N_TEXT = 4  # captions, of different length in tokens after padding


@pytest.fixture(scope="module")
def path() -> Path:
    return tiny.ensure("tiny-blip2")


@pytest.fixture(scope="module")
def model(path: Path) -> Blip2ForTwoStages:
    return Blip2ForTwoStages.from_pretrained(path).eval()


@pytest.fixture(scope="module")
def batch(path: Path, model: Blip2ForTwoStages) -> dict[str, Any]:
    processor = AutoProcessor.from_pretrained(path)
    pictures = shapes.pictures("train", N_TEXT)
    texts = [shapes.caption(triple) for _, triple in pictures]
    texts[1] = "a red circle"  # shorter: there is padding
    encoded = blip2.text_inputs(processor.tokenizer, texts)
    pixels = processor.image_processor([image for image, _ in pictures], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        images = model.vision_model(pixels).last_hidden_state
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    dec_id = processor.tokenizer.convert_tokens_to_ids(tiny.DEC)
    return {"pixels": pixels, "images": images, "ids": ids, "mask": mask, "dec_id": dec_id}


# --- masks ---


def test_the_mask_of_generation_entry_by_entry() -> None:
    mask = multimodal_causal_mask(2, torch.tensor([[1, 1, 0]]), torch.float32)
    assert mask.shape == (1, 1, 5, 5)
    #        q  q  t1 t2 pad
    seen = [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 0]]
    assert (mask[0, 0] == 0).int().tolist() == seen
    assert mask[0, 0].min() == torch.finfo(torch.float32).min


@torch.no_grad()
def test_in_generation_no_word_sees_a_later_one_and_no_query_sees_text(model: Blip2ForTwoStages, batch: dict) -> None:
    images, ids, mask = batch["images"], batch["ids"], batch["mask"]
    before = model.generation_logits(images, ids, mask)
    changed = ids.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 300
    after = model.generation_logits(images, changed, mask)
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:6], after[:, 4:6])


def self_attention(model: Blip2ForTwoStages, batch: dict, attention_mask: torch.Tensor) -> list[torch.Tensor]:
    """Weights of the Q-Former's self-attention, per layer (B, H, Q + T, Q + T), by its own code."""
    model.set_attn_implementation("eager")
    queries = model.query_tokens.expand(N_TEXT, -1, -1)
    joint = model.embeddings(input_ids=batch["ids"], query_embeds=queries)
    output = model.qformer(
        query_embeds=joint,
        query_length=queries.shape[1],
        attention_mask=attention_mask,
        encoder_hidden_states=batch["images"][:, 1:],
        output_attentions=True,
    )
    model.set_attn_implementation("sdpa")
    # transformers records cross-attention under `attentions`, too
    return [weights for weights in output.attentions if weights.shape[-1] == joint.shape[1]]


@torch.no_grad()
def test_attention_weights_follow_each_objective(model: Blip2ForTwoStages, batch: dict) -> None:
    n, mask = model.query_tokens.shape[1], batch["mask"]
    causal = self_attention(model, batch, multimodal_causal_mask(n, mask, torch.float32))
    assert len(causal) == tiny.N_LAYERS
    for weights in causal:
        assert weights[:, :, :n, n:].abs().max() == 0, "a query saw text"
        assert weights[:, :, n:, n:].triu(1).abs().max() == 0, "a word saw a later one"
        assert weights[:, :, n:, :n].min() > 0, "a word did not see the queries"
    both = self_attention(model, batch, torch.cat([mask.new_ones(N_TEXT, n), mask], dim=1))
    for weights in both:
        padding = (mask == 0)[:, None, None].expand(-1, weights.shape[1], weights.shape[2], -1)
        assert weights[..., n:][padding].abs().max() == 0, "padding was seen"
        assert weights[0, :, :n, n:].min() > 0 and weights[0, :, n:, n:].min() > 0, "matching is not bidirectional"


@torch.no_grad()
def test_contrast_is_unimodal(model: Blip2ForTwoStages, batch: dict) -> None:
    """The text's feature depends on no image, the queries' on no text, and padding changes nothing."""
    ids, mask = batch["ids"], batch["mask"]
    features = model.text_features(ids, mask)
    padded = torch.cat([ids, torch.full((N_TEXT, 3), 5)], dim=1), torch.cat([mask, mask.new_zeros(N_TEXT, 3)], dim=1)
    assert torch.allclose(model.text_features(*padded), features, atol=1e-5)
    one = model.queries_of(batch["images"][:1])
    assert torch.allclose(model.queries_of(batch["images"])[:1], one, atol=1e-5)


@torch.no_grad()
def test_queries_see_the_image(model: Blip2ForTwoStages, batch: dict) -> None:
    seen, blind = model.queries_of(batch["images"]), model.queries_of(torch.zeros_like(batch["images"]))
    assert (seen - blind).abs().max() > 0.1
    assert (seen[0] - seen[2]).abs().max() > 0.1, "two images give the same queries"
    between = torch.pdist(seen[0])
    assert between.min() > 0.1, "two queries are alike"


# --- losses ---


def test_contrast_with_different_texts_is_the_loss_of_clip() -> None:
    logits = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    target = torch.arange(5)
    expected = (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
    assert torch.allclose(contrastive_loss(logits, torch.eye(5, dtype=torch.bool)), expected)


def test_equal_texts_are_no_negatives() -> None:
    """Two rows of one text: the least loss is the entropy of the two equal targets, not infinity."""
    same = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.bool)
    perfect = torch.where(same, 50.0, -50.0)
    expected = 2 / 3 * torch.log(torch.tensor(2.0))
    assert torch.allclose(contrastive_loss(perfect, same), expected)


def test_negatives_are_wrong_and_hard() -> None:
    torch.manual_seed(0)
    similarity = torch.tensor([[9.0, 8.0, 0.0], [0.0, 9.0, 0.0], [0.0, 0.0, 9.0]])
    same = torch.eye(3, dtype=torch.bool)
    drawn = torch.stack([hard_negatives(similarity, same)[0] for _ in range(300)])
    assert not (drawn == torch.arange(3)).any()
    assert (drawn[:, 0] == 1).float().mean() > 0.98, "the similar text is not drawn more often"
    assert 0.3 < (drawn[:, 1] == 0).float().mean() < 0.7


@torch.no_grad()
def test_similarity_and_matching_are_those_of_transformers(path: Path, model: Blip2ForTwoStages, batch: dict) -> None:
    """The same weights in `Blip2ForImageTextRetrieval`, whose processor puts the queries' places before the text."""
    reference = Blip2ForImageTextRetrieval.from_pretrained(path).eval()
    places = torch.full((N_TEXT, model.query_tokens.shape[1]), model.config.image_token_index)
    inputs = {
        "pixel_values": batch["pixels"],
        "input_ids": torch.cat([places, batch["ids"]], dim=1),
        "attention_mask": torch.cat([torch.ones_like(places), batch["mask"]], dim=1),
    }
    expected = reference(**inputs, use_image_text_matching_head=False).logits_per_image
    queries = model.queries_of(batch["images"])
    texts = model.text_features(batch["ids"], batch["mask"])
    assert torch.allclose(model.similarity(queries, texts), expected, atol=1e-5)
    expected = reference(**inputs, use_image_text_matching_head=True).logits_per_image
    assert torch.allclose(model.match(batch["images"], batch["ids"], batch["mask"]), expected, atol=1e-5)


@torch.no_grad()
def test_the_loss_of_generation_word_by_word(model: Blip2ForTwoStages, batch: dict) -> None:
    ids, mask = batch["ids"].clone(), batch["mask"]
    ids[:, 0] = batch["dec_id"]
    total, n = 0.0, 0
    for row in range(N_TEXT):
        for t in range(1, int(mask[row].sum())):  # each word from what stands before it, nothing else given
            logits = model.generation_logits(
                batch["images"][row : row + 1], ids[row : row + 1, :t], mask[row : row + 1, :t]
            )
            total -= logits[0, -1].log_softmax(-1)[ids[row, t]].item()
            n += 1
    loss = model.generation_loss(batch["images"], batch["ids"], mask, batch["dec_id"])
    assert loss.item() == pytest.approx(total / n, rel=1e-4)


MATCHES, DIFFERS = torch.tensor([-9.0, 9.0]), torch.tensor([9.0, -9.0])  # logits of ITM


def numbers_in(rows: torch.Tensor, among: torch.Tensor) -> list[int]:
    """Which of the rows of `among` each row is."""
    return [next(i for i, other in enumerate(among) if torch.equal(row, other)) for row in rows]


@pytest.fixture
def different(model: Blip2ForTwoStages, batch: dict) -> dict[str, Any]:
    """The batch with texts that all differ, and images that do."""
    ids = batch["ids"].clone()
    ids[:, 1] = torch.arange(N_TEXT) + 40
    assert len(set(map(tuple, ids.tolist()))) == N_TEXT
    return {**batch, "ids": ids}


def match_by(verdict: Any, batch: dict, seen: list) -> Any:
    """A matching head that notes its pairs, (number of the image, number of the text), and says what `verdict` does."""

    def match(images: torch.Tensor, text_ids: torch.Tensor, text_mask: torch.Tensor) -> torch.Tensor:
        pairs = list(zip(numbers_in(images, batch["images"]), numbers_in(text_ids, batch["ids"]), strict=True))
        seen.append(pairs)
        return torch.stack([MATCHES if verdict(*pair) else DIFFERS for pair in pairs])

    return match


def stage1_of(model: Blip2ForTwoStages, batch: dict) -> Any:
    torch.manual_seed(0)
    return model(batch["pixels"], text_ids=batch["ids"], text_mask=batch["mask"], dec_id=batch["dec_id"])


@torch.no_grad()
def test_matching_is_trained_on_each_pair_and_its_hardest_wrong_ones(monkeypatch, model, different: dict) -> None:
    """The similar pairs here are image i and text i + 1: they are the negatives, in both directions."""
    successor = torch.eye(N_TEXT).roll(1, dims=1)
    monkeypatch.setattr(model, "similarity", lambda queries, texts: 3 * torch.eye(N_TEXT) + 2 * successor)
    seen: list[list[tuple[int, int]]] = []
    monkeypatch.setattr(model, "match", match_by(lambda image, text: image == text, different, seen))
    output = stage1_of(model, different)
    numbers = range(N_TEXT)
    right = [(i, i) for i in numbers]
    wrong_text = [(i, (i + 1) % N_TEXT) for i in numbers]
    wrong_image = [((i - 1) % N_TEXT, i) for i in numbers]
    assert seen == [right + wrong_text + wrong_image]
    assert output.itm < 1e-6 and output.itm_accuracy == 1, "the head that tells them right has no loss"


@torch.no_grad()
@pytest.mark.parametrize(
    ("verdict", "accuracy"),
    [(lambda i, t: i != t, 0.0), (lambda i, t: True, 0.5), (lambda i, t: False, 0.5)],
    ids=["the other way round", "always yes", "always no"],
)
def test_matching_wrongly_is_a_loss_and_guessing_half_right(monkeypatch, model, different, verdict, accuracy) -> None:
    monkeypatch.setattr(model, "match", match_by(verdict, different, []))
    output = stage1_of(model, different)
    assert output.itm > 5 and output.itm_accuracy == accuracy


MATCHERS = {
    "knows": (lambda image, text: image == text, 1.0),
    "always yes": (lambda image, text: True, 0.5),
    "always no": (lambda image, text: False, 0.5),
    "the other way round": (lambda image, text: image != text, 0.0),
}


@torch.no_grad()
@pytest.mark.parametrize("matcher", MATCHERS)
def test_measured_matching_is_half_on_pairs_that_do_not_match(monkeypatch, model, path: Path, matcher: str) -> None:
    verdict, accuracy = MATCHERS[matcher]
    processor = AutoProcessor.from_pretrained(path)
    rows = [
        {
            "images": [image],
            "prompt": [{"role": "user", "content": shapes.DESCRIBE}],
            "completion": [{"role": "assistant", "content": shapes.caption(triple)}],
        }
        for image, triple in shapes.pictures("test", 8)
    ]
    pixels = processor.image_processor([row["images"][0] for row in rows], return_tensors="pt")["pixel_values"]
    texts = blip2.text_inputs(processor.tokenizer, [row["completion"][0]["content"] for row in rows])
    known = {"images": model.vision_model(pixels).last_hidden_state, "ids": texts["input_ids"]}
    monkeypatch.setattr(model, "match", match_by(verdict, known, []))
    trainer = SimpleNamespace(accelerator=Accelerator(cpu=True), model=model)
    job = SimpleNamespace(tokenizer=processor.tokenizer, processor=processor)
    measured = blip2.measure_stage1(trainer, job, HeldOut(rows, [], 4, 8))["stage1/itm_accuracy"]
    assert len(measured) == 2 * len(rows) and sum(measured) / len(measured) == accuracy


@pytest.mark.parametrize(("accuracy", "passed"), [(0.5, False), (0.56, False), (0.6, True), (0.2, False)])
def test_matching_no_better_than_chance_does_not_pass(accuracy: float, passed: bool) -> None:
    """200 guesses: the 95 % half-width is .069."""
    block = {"after": {"stage1/itm_accuracy": accuracy}, "n": {"stage1/itm_accuracy": 200}}
    (check,) = blip2.LESSON.end_checks(block, {})
    assert check.id == "blip2.itm_above_chance" and check.passed is passed


def test_the_first_stage_reaches_what_it_trains_and_nothing_else(path: Path, batch: dict) -> None:
    model = Blip2ForTwoStages.from_pretrained(path)
    trains = blip2.starts_with(blip2.REPRESENTS)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trains(name))
    torch.manual_seed(0)
    output = model(batch["pixels"], text_ids=batch["ids"], text_mask=batch["mask"], dec_id=batch["dec_id"])
    assert torch.allclose(output.loss, output.itc + output.itm + output.itg)
    output.loss.backward()
    without = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert without == {name for name, _ in model.named_parameters() if not trains(name)}


@torch.no_grad()
def test_export_gives_equal_logits(path: Path, model: Blip2ForTwoStages, batch: dict, tmp_path: Path) -> None:
    blip2.export(model, model.state_dict(), Blip2ForConditionalGeneration, str(tmp_path))
    loaded = Blip2ForConditionalGeneration.from_pretrained(tmp_path).eval()
    places = torch.full((N_TEXT, model.query_tokens.shape[1]), model.config.image_token_index)
    inputs = {"pixel_values": batch["pixels"], "input_ids": torch.cat([places, batch["ids"]], dim=1)}
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    assert not [name for name in loaded.state_dict() if name.startswith(blip2.STAGE1_HEADS)]


def test_published_checkpoints_without_a_chat_template_get_the_prompt_of_the_paper(path: Path) -> None:
    processor = AutoProcessor.from_pretrained(path)
    processor.chat_template = blip2.QUESTION_TEMPLATE
    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    answer = [{"role": "assistant", "content": "a cat"}]
    eos = processor.tokenizer.eos_token
    assert processor.apply_chat_template(question, add_generation_prompt=True) == "Question: What is it? Answer:"
    assert processor.apply_chat_template(question + answer) == f"Question: What is it? Answer: a cat{eos}"
