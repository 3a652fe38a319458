"""Stages of a training, the blind baseline, generated answers, and questions to real checkpoints."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from test_toy_runs import losses, run_here

from llmcore_hf import cli
from llmcore_hf.data import shapes
from llmcore_hf.data.reading import toy_dataset
from llmcore_hf.vlm import evaluation, tiny
from llmcore_hf.vlm.data import answer_of
from llmcore_hf.vlm.training import Stage, StageSampler

pytestmark = pytest.mark.usefixtures("one_thread")
MODELS = ["llava", "blip2"]


def stages(*lengths: int) -> list[Stage]:
    rows = [range(0, 5), range(5, 12)]
    return [Stage(str(i), n, 0.1, lambda name: True, rows[i]) for i, n in enumerate(lengths)]


def test_every_stage_draws_from_its_rows_and_sees_all_before_any_again() -> None:
    sampler = StageSampler(stages(3, 4), batch_size=5, seed=1)
    drawn = list(sampler)
    assert len(drawn) == len(sampler) == 35
    assert Counter(drawn[:15]) == dict.fromkeys(range(5), 3)
    assert set(drawn[15:22]) == set(range(5, 12)) and set(drawn[15:]) == set(range(5, 12))
    assert drawn == list(sampler) and drawn != list(StageSampler(stages(3, 4), 5, 2))


def test_batches_are_of_similar_rows_where_lengths_differ_much() -> None:
    """The same rows as without, in other batches: every fourth row is long, and four batches in 16 are."""
    lengths = [1 + 9 * (i % 4 == 0) for i in range(64)]
    plain = Stage("a", 16, 0.1, lambda name: True, range(64))
    similar = dataclasses.replace(plain, lengths=lengths)
    drawn = list(StageSampler([similar], 8, 1))
    assert Counter(drawn) == Counter(StageSampler([plain], 8, 1)) == dict.fromkeys(range(64), 2)
    assert drawn == list(StageSampler([similar], 8, 1)), "a resumed run draws the same"
    batches = [[lengths[row] for row in drawn[i : i + 8]] for i in range(0, len(drawn), 8)]
    assert all(len(set(batch)) == 1 for batch in batches)
    assert batches != sorted(batches) and sum(map(max, batches)) == 4 * 10 + 12 * 1


def test_blind_rows_keep_their_questions() -> None:
    rows = [*toy_dataset("toy-shapes")["test"].select(range(40))]
    for how in evaluation.BLIND:
        changed = evaluation.blind(rows, how)
        assert [row["prompt"] for row in changed] == [row["prompt"] for row in rows]
    shuffled = evaluation.blind(rows, "shuffled")
    assert Counter(id(row["images"][0]) for row in shuffled) == Counter(id(row["images"][0]) for row in rows)
    assert not any(a["images"][0] is b["images"][0] for a, b in zip(rows, shuffled, strict=True))
    assert len({row["images"][0].tobytes() for row in evaluation.blind(rows, "blank")}) == 1


def test_blind_rows_keep_the_number_of_their_images() -> None:
    """Each image is dealt out once, and no row gets one of its own."""
    counts = [1, 3, 2, 1, 1, 2, 1]
    rows = [{"images": [(i, j) for j in range(n)], "prompt": i} for i, n in enumerate(counts)]
    shuffled = evaluation.blind(rows, "shuffled")
    assert [len(row["images"]) for row in shuffled] == counts and [row["prompt"] for row in shuffled] == list(range(7))
    assert sorted(image for row in shuffled for image in row["images"]) == sorted(i for r in rows for i in r["images"])
    assert all(owner != row["prompt"] for row in shuffled for owner, _ in row["images"])
    together = [{"images": [(i, 0), (i, 1)]} for i in range(5)]
    assert all(
        a == b
        for a, b in (zip(*row["images"], strict=True).__next__() for row in evaluation.blind(together, "shuffled"))
    )
    assert evaluation.blind([], "shuffled") == []


def test_padding_moves_to_one_side_and_nothing_else_changes() -> None:
    batch = {
        "input_ids": torch.tensor([[9, 9, 0, 0, 3, 4], [9, 9, 5, 6, 7, 8]]),
        "attention_mask": torch.tensor([[1, 1, 0, 0, 1, 1], [1] * 6]),
        "labels": torch.tensor([[-100, -100, -100, -100, 3, 4], [-100, -100, 5, 6, 7, 8]]),
    }
    right = evaluation.padded(dict(batch), "right")
    assert right["input_ids"].tolist() == [[9, 9, 3, 4, 0, 0], [9, 9, 5, 6, 7, 8]]
    assert right["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6]
    assert right["labels"][0].tolist() == [-100, -100, 3, 4, -100, -100]
    assert evaluation.padded(dict(batch), "left")["input_ids"][0].tolist() == [0, 0, 9, 9, 3, 4]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_answers_in_a_batch_are_those_one_by_one_and_of_a_plain_loop(name: str) -> None:
    """Padding changes nothing; and the share that greedy decoding gets right is known from one forward pass."""
    from accelerate import Accelerator
    from transformers import AutoModelForImageTextToText, AutoProcessor

    path = tiny.ensure(f"tiny-{name}")
    model = AutoModelForImageTextToText.from_pretrained(path).eval()
    processor = AutoProcessor.from_pretrained(path)
    processor.chat_template = processor.chat_template or processor.tokenizer.chat_template
    rows = [*toy_dataset("toy-shapes")["test"].select(range(8))]
    accelerator = Accelerator(cpu=True)
    together = evaluation.generate(model, processor, rows, 12, 8, accelerator)
    alone = evaluation.generate(model, processor, rows, 12, 1, accelerator)
    assert together == alone and any(together.texts)
    inputs = evaluation.encode_prompts(processor, rows[:1])
    ids, prompt = inputs["input_ids"], inputs["input_ids"].shape[1]
    with torch.no_grad():
        for _ in range(12):  # no cache, no padding
            logits = model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[:, -1]
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
            if ids[0, -1] == processor.tokenizer.eos_token_id:
                break
    assert processor.decode(ids[0, prompt:], skip_special_tokens=True) == together.texts[0]


SHORT = ("--toy", "--logging_steps", "1", "--eval_strategy", "no", "--per_device_train_batch_size", "8")
FEW = (
    "--max_train_samples",
    "160",
    "--max_eval_samples",
    "16",
    "--max_generation_samples",
    "12",
    "--warmup_steps",
    "0",
)
STAGES = {
    "llava": ("--stage1_steps", "2"),
    "blip2": ("--stage1_steps", "2", "--language_model_steps", "2"),
    "flamingo": ("--dataset_name", "toy-shapes"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_a_resumed_run_ends_as_one_that_was_never_interrupted(monkeypatch, tmp_path: Path, name: str) -> None:
    """From a checkpoint inside the first stage, and from one at its end. Cached features change nothing either."""
    command = ("--module", name, *SHORT, *FEW, *STAGES[name], "--max_steps", "6", "--lr_scheduler_type", "constant")
    (tmp_path / "whole").mkdir()
    run_here(monkeypatch, tmp_path / "whole", *command, "--save_strategy", "steps", "--save_steps", "1")
    whole = tmp_path / "whole" / "run"
    weights = (whole / "model.safetensors").read_bytes()
    history = losses(whole)
    former = json.loads((whole / "summary.json").read_text())["eval"]
    for step in (1, 2) if "--stage1_steps" in command else (2,):
        resume = ("--resume_from_checkpoint", f"run/checkpoint-{step}", "--save_strategy", "steps", "--save_steps", "1")
        _, summary = run_here(monkeypatch, tmp_path / "whole", *command, *resume)
        assert (whole / "model.safetensors").read_bytes() == weights, step
        assert losses(whole) == history
        assert summary["eval"] == former
    statuses = {check["id"]: check["status"] for check in summary["checks"]}
    assert statuses[f"{name}.frozen_parts_did_not_change"] == "pass"
    (tmp_path / "uncached").mkdir()
    run_here(monkeypatch, tmp_path / "uncached", *command, "--cache_vision_features", "false")
    assert (tmp_path / "uncached" / "run" / "model.safetensors").read_bytes() == weights
    assert losses(tmp_path / "uncached" / "run") == history


@pytest.mark.slow
def test_each_stage_trains_its_part(monkeypatch, tmp_path: Path) -> None:
    """Stage by stage: the projector alone, then the language model, too; never the tower."""
    from safetensors.torch import load_file

    options = ("--module", "llava", *SHORT, *FEW, "--max_steps", "4", "--stage1_steps", "2")
    run_here(monkeypatch, tmp_path, *options, "--save_strategy", "steps", "--save_steps", "1")
    start = load_file(tiny.ensure("tiny-llava") / "model.safetensors")
    states = {step: load_file(tmp_path / "run" / f"checkpoint-{step}" / "model.safetensors") for step in (2, 4)}

    def changed(step: int) -> set[str]:
        return {name for name, value in states[step].items() if not torch.equal(value, start[name])}

    assert changed(2) == {name for name in start if "projector" in name}
    assert changed(4) == {name for name in start if "vision" not in name}


def test_what_is_asked_before_and_after_is_never_trained_on(monkeypatch, tmp_path: Path) -> None:
    """The rows that `run` holds out, of a user's data and of the toy with its harder split."""
    from vision_lessons import pictures_of_shapes

    from llmcore_hf.vlm import lesson

    found: dict[str, Any] = {}

    def begun(trainer: Any, *args: Any) -> None:
        found["train"] = trainer.train_dataset

    def held_out(test: Any, hard: Any, *args: Any) -> None:
        found.update(test=test, hard=hard)
        raise RuntimeError("the run has come as far as the test wants")

    monkeypatch.setattr(lesson.text_training, "attach", begun)
    monkeypatch.setattr(lesson.HeldOut, "of", held_out)
    model = ("--module", "llava", "--model_name_or_path", "tiny-llava", "--use_cpu", "--max_steps", "1")

    def rows_of(dataset_name: str, folder: str, *more: str) -> dict[str, set[bytes]]:
        found.clear()
        assert cli.main([*model, "--dataset_name", dataset_name, "--output_dir", str(tmp_path / folder), *more]) == 1
        splits = {name: rows for name, rows in found.items() if rows is not None}
        return {name: {image.tobytes() for row in rows for image in row["images"]} for name, rows in splits.items()}

    mine = rows_of(pictures_of_shapes(tmp_path), "a", "--test_split_size", "0.25")
    assert len(mine["train"]) == 6 and len(mine["test"]) == 2 and not mine["train"] & mine["test"]
    toy = rows_of("toy-shapes", "b")
    assert set(toy) == {"train", "test", "hard"}
    assert not (toy["train"] & toy["test"] or toy["train"] & toy["hard"] or toy["test"] & toy["hard"])


@torch.no_grad()
def test_a_map_of_llava_is_what_the_last_token_attends_to() -> None:
    """Row by row, without padding; the first token sees nothing of the image."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from llmcore_hf.vlm import llava

    path = tiny.ensure("tiny-llava")
    model, processor = AutoModelForImageTextToText.from_pretrained(path).eval(), AutoProcessor.from_pretrained(path)
    rows = [*toy_dataset("toy-shapes")["test"].select(range(3))]
    names, maps = llava.LESSON.look(model, SimpleNamespace(processor=processor), rows)
    assert names == ["layer 1", "layer 2"] and maps.shape == (3, 2, 4, 4)
    model.set_attn_implementation("eager")
    for row, found in zip(rows, maps, strict=True):
        inputs = evaluation.encode_prompts(processor, [row])
        image = (inputs["input_ids"][0] == processor.image_token_id).nonzero()[:, 0]
        attentions = model(**inputs, output_attentions=True).attentions
        expected = torch.stack([weights[0, :, -1, image].mean(dim=0).view(4, 4) for weights in attentions])
        assert torch.allclose(torch.tensor(found), expected, atol=1e-5) and (expected > 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_lora_on_a_users_images(monkeypatch, tmp_path: Path, name: str) -> None:
    """The adapter trains on a user's file, the base does not move, and both load again."""
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    for i in range(12):
        Image.new("RGB", (40, 30), (20 * i, 0, 0)).save(tmp_path / f"{i}.png")
    rows = [
        {
            "image": f"{i}.png",
            "messages": [{"role": "user", "content": "How red?"}, {"role": "assistant", "content": str(i)}],
        }
        for i in range(12)
    ]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ("--dataset_name", str(tmp_path / "mine.jsonl"), "--model_name_or_path", str(tiny.ensure(f"tiny-{name}")))
    lora = ("--use_peft", "--lora_r", "4", "--learning_rate", "1e-2", "--max_steps", "2", "--logging_steps", "1")
    code, summary = run_here(monkeypatch, tmp_path, "--module", name, *data, *lora, "--max_new_tokens", "4")
    assert code == 0, summary["error"]
    assert summary["model"]["peft"] == "LoraConfig" and "adapter_model.safetensors" in summary["artifacts"]
    assert 0 < summary["model"]["n_trainable"] < summary["model"]["n_params"] / 4
    base = AutoModelForImageTextToText.from_pretrained(tiny.ensure(f"tiny-{name}"))
    loaded = PeftModel.from_pretrained(base, tmp_path / "run")
    trained = {n: v for n, v in loaded.state_dict().items() if "lora_B" in n and "language_model" in n}
    assert trained and all(value.abs().sum() > 0 for value in trained.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_question_about_a_file(monkeypatch, tmp_path: Path, capsys, name: str) -> None:
    shapes.pictures("test", 1)[0][0].save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    model = ("--module", name, "--model_name_or_path", str(tiny.ensure(f"tiny-{name}")), "--max_new_tokens", "8")
    asked = ("--image", "a.png", "--question", "What color is it?", "--output_dir", "run")
    assert cli.main([*model, *asked]) == 0
    sample = json.loads((tmp_path / "run" / "summary.json").read_text())["samples"][0]
    assert f"What color is it?\n{sample['after']}\n" in capsys.readouterr().out
    assert sample["reference"] is None and sample["before"] is None and sample["after"]


def answer_about(folder: Path, name: str, model: str, run: str) -> str:
    asked = ("--image", "0.png", "--question", "What color is it?", "--max_new_tokens", "8", "--output_dir", run)
    assert cli.main(["--module", name, "--model_name_or_path", model, *asked]) == 0
    return str(json.loads((folder / run / "summary.json").read_text())["samples"][0]["after"])


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_an_adapter_is_asked_as_it_was_trained_and_merged_as_its_message_says(
    monkeypatch, tmp_path: Path, capsys, name: str
) -> None:
    """What `--use_peft` leaves: `--image` takes the folder as it is, training from it names Python that works."""
    import re

    from vision_lessons import begin

    monkeypatch.chdir(tmp_path)
    lora = ("--use_peft", "--lora_r", "4", "--max_steps", "4", "--learning_rate", "5e-2")
    begun = begin(name, tmp_path, *lora)
    with torch.enable_grad():
        begun.trainer.train()
    begun.trainer.save_model(str(tmp_path / "adapter"))
    begun.job.processor.save_pretrained(tmp_path / "adapter")
    model = begun.model.eval()
    row = {"images": [Image.open("0.png")], "prompt": [{"role": "user", "content": "What color is it?"}]}
    inputs = evaluation.encode_prompts(begun.job.processor, [row])
    trained = model(**inputs).logits
    job = begun.lesson_job(str(tmp_path / "adapter"))
    assert job.adapter and torch.allclose(begun.load(job)(**inputs).logits, trained, atol=1e-4)
    with model.disable_adapter():
        assert not torch.allclose(model(**inputs).logits, trained, atol=0.1), "it learned nothing"
    answer = answer_about(tmp_path, name, "adapter", "asked")
    data = ("--dataset_name", "shapes.jsonl", "--max_steps", "1", "--output_dir", "again")
    assert cli.main(["--module", name, "--model_name_or_path", "adapter", *data]) == 2
    message = capsys.readouterr().err
    (code,) = re.findall(r"in Python: (.*); and start from `merged`", message)
    with torch.enable_grad():
        exec(code, {})  # our own words, from the message
    assert answer_about(tmp_path, name, "merged", "merged_asked") == answer
    shutil.rmtree("merged")
    config = json.loads(Path("adapter/adapter_config.json").read_text())
    Path("adapter/adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/gone/model"}))
    asked = ("--image", "0.png", "--question", "?", "--output_dir", "no_base")
    assert cli.main(["--module", name, "--model_name_or_path", "adapter", *asked]) == 1
    assert "was trained on /gone/model, which is not there" in capsys.readouterr().err


TEXT_MODULES = {
    "sft": {"prompt": "What is it?", "completion": "a cat"},
    "dpo": {"prompt": "What is it?", "chosen": "a cat", "rejected": "a dog"},
    "reward": {"prompt": "What is it?", "chosen": "a cat", "rejected": "a dog"},
    "grpo": {"prompt": "What is it?", "answer": "a cat"},
    "ppo": {"prompt": "What is it?", "answer": "a cat"},
}


@pytest.mark.parametrize("model", ["tiny-llava", "tiny-qwen"])
@pytest.mark.parametrize("module", TEXT_MODULES)
def test_a_text_module_names_the_modules_for_images_before_it_loads_a_model(
    monkeypatch, tmp_path: Path, capsys, module: str, model: str
) -> None:
    """A vision-language model is known by its config, data with images by their column."""
    import trl

    for trainer in ("SFTTrainer", "DPOTrainer", "RewardTrainer", "GRPOTrainer"):
        monkeypatch.setattr(
            getattr(trl, trainer), "__init__", lambda *args, **kwargs: pytest.fail("a model was loaded")
        )
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("a.png")
    rows = [{**TEXT_MODULES[module], "prompt": f"What {i}?", "image": "a.png"} for i in range(4)]
    Path("mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = str(tiny.ensure(model)) if model in tiny.TINY_VLMS else model
    rewards = ("--reward_funcs", "exact_match") if module in ("grpo", "ppo") else ()
    data = ("--dataset_name", "mine.jsonl", "--max_steps", "1", "--use_cpu", "--output_dir", "run", *rewards)
    assert cli.main(["--module", module, "--model_name_or_path", path, *data]) == 1
    captured = capsys.readouterr()
    what = (
        "is a vision-language model of type `llava`"
        if model == "tiny-llava"
        else "mine.jsonl holds images (column `image`)"
    )
    assert what in captured.err and "--module llava, blip2 and flamingo" in captured.err
    assert "Traceback" not in captured.err + captured.out


BAD: dict[str, tuple[tuple[str, ...], int, str]] = {
    "missing": (("--image", "b.png", "--question", "?"), 1, "there is no file b.png"),
    "no image": (("--image", "text.png", "--question", "?"), 1, "text.png is not an image"),
    "no question": (("--image", "a.png"), 2, "--image and --question belong together"),
    "stages": (("--dataset_name", "toy-shapes", "--max_steps", "5", "--stage1_steps", "5"), 2, "must leave steps"),
    "schedule": (
        ("--dataset_name", "toy-shapes", "--lr_scheduler_type", "reduce_lr_on_plateau"),
        2,
        "cannot be repeated for each stage",
    ),
    "packing": (("--dataset_name", "toy-shapes", "--packing"), 2, "--packing is not available with images"),
    "another kind": (
        ("--model_name_or_path", "tiny-blip2", "--dataset_name", "toy-shapes"),
        1,
        "tiny-blip2 is a model of type `blip-2`; module `llava` takes llava",
    ),
    "a misspelt toy": (("--model_name_or_path", "tiny-lava", "--dataset_name", "toy-shapes"), 2, "did you mean"),
    "no images": (("--dataset_name", "toy-sort"), 1, "has no column `image` or `images`"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_clear_message(monkeypatch, tmp_path: Path, capsys, kind: str) -> None:
    options, code, message = BAD[kind]
    (tmp_path / "text.png").write_text("no image at all")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    model = () if "--model_name_or_path" in options else ("--model_name_or_path", "tiny-llava")
    assert cli.main(["--module", "llava", *model, *options, "--output_dir", "run"]) == code
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err


def spoil(folder: Path) -> dict[str, str]:
    """Files that are no usable images -> what is said of each."""
    from test_vlm_data import huge_png, png

    (folder / "text.png").write_text("no image at all")
    (folder / "cut.png").write_bytes(png((64, 64))[:60])
    (folder / "huge.png").write_bytes(huge_png())
    return {
        "nowhere.png": "there is no file",
        "text.png": "is not an image",
        "cut.png": "is damaged or cut off",
        "huge.png": "scale it down",
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_every_bad_image_of_a_dataset_is_told_with_its_row_before_anything_is_trained(
    monkeypatch, tmp_path: Path, capsys, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    told = spoil(tmp_path)
    Image.new("RGB", (8, 8)).save("good.png")
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "x"}]
    rows = [{"image": file, "messages": turns} for file in ("good.png", *told)]
    marks = [{"role": "user", "content": "<image> or <image>?"}, turns[1]]
    rows += [{"image": "good.png", "messages": marks}]
    Path("mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = ("--model_name_or_path", str(tiny.ensure(f"tiny-{name}")), "--max_steps", "1")
    assert cli.main(["--module", name, *model, "--dataset_name", "mine.jsonl", "--output_dir", "run"]) == 1
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err + captured.out
    for number, reason in enumerate(told.values(), start=2):
        assert any(f"line {number}: `image`" in line and reason in line for line in captured.err.split("\n")), reason
    assert any("line 6:" in line and "name 2 images, but the row has 1" in line for line in captured.err.split("\n"))
    assert "line 1:" not in captured.err
    assert not Path("run/model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_a_bad_image_to_ask_about_is_one_message(monkeypatch, tmp_path: Path, capsys, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    model = ("--module", name, "--model_name_or_path", str(tiny.ensure(f"tiny-{name}")))
    for i, (file, reason) in enumerate(spoil(tmp_path).items()):
        assert cli.main([*model, "--image", file, "--question", "What?", "--output_dir", f"run{i}"]) == 1
        captured = capsys.readouterr()
        assert reason in captured.err and file in captured.err and "Traceback" not in captured.err + captured.out


@pytest.mark.slow
def test_data_of_descriptions_alone_are_judged_by_them(monkeypatch, tmp_path: Path) -> None:
    for i in range(12):
        Image.new("RGB", (32, 32), (20 * i, 0, 0)).save(tmp_path / f"{i}.png")
    rows = [{"image": f"{i}.png", "prompt": shapes.DESCRIBE, "completion": f"red {i}"} for i in range(12)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ("--dataset_name", str(tmp_path / "mine.jsonl"), "--model_name_or_path", str(tiny.ensure("tiny-llava")))
    code, summary = run_here(
        monkeypatch, tmp_path, "--module", "llava", *data, "--max_steps", "1", "--max_new_tokens", "4"
    )
    assert code == 0, summary["error"]
    after = summary["eval"]["after"]
    assert {"caption_accuracy", "caption_accuracy/shuffled"} <= set(after) and "vqa_accuracy" not in after


def test_answers_are_compared_as_texts() -> None:
    rows: list[dict[str, Any]] = [*toy_dataset("toy-shapes")["test"].select(range(4))]
    truth = [answer_of(row) for row in rows]
    assert evaluation.scores(rows, truth) == [1.0] * 4
    assert evaluation.scores(rows, [truth[0] + " ", "nothing", *truth[2:]]) == [1.0, 0.0, 1.0, 1.0]
