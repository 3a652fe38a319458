"""Checkpoints and images of one's own: questions, prompts as the checkpoint knows them, rows of several images.

Nothing here has learned anything.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import untrained_vlms
from PIL import Image
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from llmcore_hf import cli
from llmcore_hf.data import shapes
from llmcore_hf.vlm import blip2, costs, evaluation, llava, training
from llmcore_hf.vlm.data import question_of
from llmcore_hf.vlm.evaluation import PromptProcessor, encode_prompts

pytestmark = pytest.mark.usefixtures("one_thread")
BOS = "<|im_start|>"
PLAIN = (  # a template as LLaVA-1.5's: it leaves the first token to the tokenizer
    "{% for m in messages %}{{ m['role']|upper + ': ' }}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ c['text'] }}{% endif %}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return untrained_vlms.make(tmp_path_factory.mktemp("untrained"))


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, checkpoints: dict[str, Path]) -> Callable[..., int]:
    """Ask a module in an empty directory that holds the pictures a.png and b.png; its exit code."""
    monkeypatch.chdir(tmp_path)
    for name, (image, _) in zip("ab", shapes.pictures("test", 2), strict=True):
        image.save(f"{name}.png")

    def run(module: str, *options: str, model: Path | None = None) -> int:
        path = str(model or checkpoints[module])
        return cli.main(["--module", module, "--model_name_or_path", path, "--max_new_tokens", "4", *options])

    return run


def samples() -> list[dict[str, Any]]:
    """Of the only run that asked."""
    (file,) = Path("output").glob("*/asked/*/summary.json")
    found: list[dict[str, Any]] = json.loads(file.read_text())["samples"]
    return found


def rows(n: int, per_row: int = 1) -> list[dict[str, Any]]:
    pictures = shapes.pictures("test", n * per_row)
    return [
        {
            "images": [image for image, _ in pictures[i * per_row : (i + 1) * per_row]],
            "prompt": [{"role": "user", "content": "What " + "very " * i + "thing is it?"}],
            "completion": [{"role": "assistant", "content": "a thing"}],
        }
        for i in range(n)
    ]


# ---------------------------------------------------------------- what is asked


def test_an_ask_is_no_training_run(ask: Callable[..., int], checkpoints: dict[str, Path]) -> None:
    """The model of the newest run is asked through `latest`, and stays the newest run."""
    trained = Path("output/llava/20260101-000000-abcd")
    trained.parent.mkdir(parents=True)
    trained.symlink_to(checkpoints["llava"])
    Path("output/llava/latest").symlink_to(trained.name)
    assert ask("llava", "--image", "a.png", "--question", "What is it?", model=Path("output/llava/latest")) == 0
    assert Path("output/llava/latest").readlink() == Path(trained.name)
    assert len(samples()) == 1


BAD = {
    "two images": (
        "blip2",
        ("--image", "a.png", "b.png", "--question", "?"),
        "--image names 2 images, but this model takes 1",
    ),
    "too many marks": (
        "llava",
        ("--image", "a.png", "--question", "<image> or <image>?"),
        "--question has 2 times `<image>`, but --image names 1 image(s)",
    ),
    "too few marks": ("flamingo", ("--image", "a.png", "b.png", "--question", "<image>?"), "--question has 1 times"),
    "no question": ("llava", ("--image", "a.png"), "give both"),
    "an empty question": ("llava", ("--image", "a.png", "--question", ""), "--question is empty"),
    "a blank question": ("llava", ("--image", "a.png", "--question", " <image> "), "--question is empty"),
    "a dataset": (
        "llava",
        ("--image", "a.png", "--question", "?", "--dataset_name", "toy-shapes"),
        "--dataset_name would not be read",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_an_impossible_question_is_refused_before_anything_is_loaded(
    ask: Callable[..., int], capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    module, options, message = BAD[kind]
    assert ask(module, *options) == 2
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err + captured.out
    assert not Path("output").exists()


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("folder", "folder is a folder: name an image file in it"),
        ("http://example.org/a.png", "is an address, and nothing is fetched here"),
        ("c.png", "there is no file c.png: correct the path"),
    ],
)
def test_what_is_no_image_file_is_said_without_speaking_of_rows(
    ask: Callable[..., int], capsys: pytest.CaptureFixture[str], file: str, message: str
) -> None:
    Path("folder").mkdir()
    assert ask("llava", "--image", file, "--question", "What?") == 1
    error = capsys.readouterr().err
    assert message in error and "row" not in error


@pytest.mark.parametrize("module", ["llava", "flamingo"])
def test_text_and_images_may_alternate_in_a_question(
    ask: Callable[..., int], monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    seen: list[Any] = []
    generate = evaluation.generate
    monkeypatch.setattr(
        evaluation, "generate", lambda m, p, asked, *more: seen.append((p, *asked)) or generate(m, p, asked, *more)
    )
    question = "<image>red<image>What?"
    assert ask(module, "--image", "a.png", "b.png", "--question", question) == 0
    ((processor, row),) = seen
    text = processor.tokenizer.decode(encode_prompts(processor, [row])["input_ids"][0])
    before, between, after = (
        (text.split("<image>" * max(1, text.count("<image>") // 2))) if module == "llava" else text.split("<image>")
    )
    assert "red" in between and "What?" in after and "What?" not in before + between
    assert samples()[0]["prompt"] == question


def test_a_damaged_model_is_one_message(
    ask: Callable[..., int], checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = tmp_path / "cut"
    cut.mkdir()
    for file in checkpoints["llava"].iterdir():
        content = file.read_bytes()
        (cut / file.name).write_bytes(content[: len(content) // 2] if file.suffix == ".safetensors" else content)
    assert ask("llava", "--image", "a.png", "--question", "What?", model=cut) == 1
    captured = capsys.readouterr()
    assert f"the model {cut} cannot be loaded" in captured.err and "Is it whole?" in captured.err
    assert "Traceback" not in captured.err + captured.out


def test_a_run_without_held_out_answers_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--module", "llava", "--toy", "--max_generation_samples", "0"]) == 2
    assert "--max_generation_samples must be greater than 0" in capsys.readouterr().err


# ---------------------------------------------------------------- language models with an encoder


@pytest.fixture(scope="module")
def t5(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoTokenizer, T5Config

    tokenizer = AutoTokenizer.from_pretrained(checkpoints["blip2"])
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=1,
        initializer_factor=3.0,  # enough to say something
        num_heads=4,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    return untrained_vlms.with_language_model(checkpoints["blip2"], config, tmp_path_factory.mktemp("t5"))


def test_blip2_with_t5_answers_what_its_own_code_answers(ask: Callable[..., int], t5: Path) -> None:
    from transformers import AutoProcessor, Blip2ForConditionalGeneration

    assert ask("blip2", "--image", "a.png", "--question", "What is it?", model=t5) == 0
    model, processor = Blip2ForConditionalGeneration.from_pretrained(t5).eval(), AutoProcessor.from_pretrained(t5)
    inputs = processor(Image.open("a.png"), "Question: What is it? Answer:", return_tensors="pt")
    expected = processor.decode(
        model.generate(**inputs, max_new_tokens=4, do_sample=False)[0], skip_special_tokens=True
    )
    assert samples()[0]["after"] == expected != ""


def test_training_blip2_with_t5_is_refused(
    ask: Callable[..., int], t5: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mine.jsonl").write_text(
        "".join(json.dumps({"image": f"{i}.png", "prompt": f"What? {i}", "completion": i}) + "\n" for i in "ab")
    )
    assert ask("blip2", "--dataset_name", "mine.jsonl", "--max_steps", "1", model=t5) == 1
    assert "has a language model with encoder and decoder, which is not trained here" in capsys.readouterr().err


# ---------------------------------------------------------------- tokens that open a prompt


def processor_of(checkpoints: dict[str, Path], module: str, template: str) -> Any:
    from transformers import AutoProcessor

    processor = untrained_vlms.opens_with(AutoProcessor.from_pretrained(checkpoints[module]), BOS)
    processor.chat_template = processor.tokenizer.chat_template = template
    return processor


def prompt_of(processor: Any, row: dict[str, Any]) -> list[int]:
    """As the model card shows it."""
    turn = {
        "role": "user",
        "content": [{"type": "image", "image": row["images"][0]}, {"type": "text", "text": question_of(row)}],
    }
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    ids: list[int] = processor.apply_chat_template([turn], **options)["input_ids"][0].tolist()
    return ids


@pytest.mark.parametrize("template", [PLAIN, "{{ bos_token }}" + PLAIN])
def test_llava_prompts_open_as_the_checkpoint_knows_them(checkpoints: dict[str, Path], template: str) -> None:
    processor = processor_of(checkpoints, "llava", template)
    asked = rows(3)
    encoded = encode_prompts(processor, asked)
    bos = processor.tokenizer.convert_tokens_to_ids(BOS)
    for row, ids, mask in zip(asked, encoded["input_ids"], encoded["attention_mask"], strict=True):
        prompt = ids[mask == 1].tolist()
        assert prompt == prompt_of(processor, row) and prompt[0] == bos and prompt.count(bos) == 1


def test_blip2_prompts_open_as_the_checkpoint_knows_them(checkpoints: dict[str, Path]) -> None:
    processor = processor_of(checkpoints, "blip2", blip2.QUESTION_TEMPLATE)
    (row,) = rows(1)
    expected = processor(images=row["images"][0], text=f"Question: {question_of(row)} Answer:", return_tensors="pt")
    ids = encode_prompts(processor, [row])["input_ids"]
    assert ids.tolist() == expected["input_ids"].tolist()
    assert (ids == processor.tokenizer.convert_tokens_to_ids(BOS)).sum() == 1


@pytest.mark.parametrize("module", ["llava", "blip2"])
def test_training_and_asking_open_a_prompt_alike(checkpoints: dict[str, Path], module: str) -> None:
    processor = processor_of(checkpoints, module, PLAIN if module == "llava" else blip2.QUESTION_TEMPLATE)
    collator = DataCollatorForVisionLanguageModeling(processor, None, completion_only_loss=True)
    training.set_processor(collator, processor)
    asked = rows(3)
    trained = evaluation.padded(collator([dict(row) for row in asked]), "right")
    prompts = encode_prompts(processor, asked)
    counted = costs.training_batch(processor, asked)
    assert torch.equal(counted["input_ids"], trained["input_ids"])
    for i in range(3):
        prompt = prompts["input_ids"][i][prompts["attention_mask"][i] == 1].tolist()
        assert trained["input_ids"][i][: len(prompt)].tolist() == prompt
        assert (trained["labels"][i][: len(prompt)] == -100).all()
        answer = trained["labels"][i][trained["labels"][i] != -100].tolist()
        text = processor.tokenizer.decode(answer).removesuffix(processor.tokenizer.eos_token).strip()
        assert text == "a thing", "no opening token stands within the row"


def test_a_trainer_makes_its_prompts_so(checkpoints: dict[str, Path]) -> None:
    from types import SimpleNamespace

    collator = SimpleNamespace(collator=SimpleNamespace(processor=None))
    trainer: Any = training.StagedTrainer.__new__(training.StagedTrainer)
    trainer.model, trainer.data_collator, trainer.processing_class = torch.nn.Linear(1, 1), collator, "its processor"
    trainer.add_callback = lambda callback: None
    trainer.begin([])
    assert isinstance(collator.collator.processor, PromptProcessor)
    assert collator.collator.processor.processor == "its processor"


# ---------------------------------------------------------------- several images in a row


def test_llava_shows_where_it_looks_in_the_last_image_of_each_row(checkpoints: dict[str, Path]) -> None:
    """Rows of one, two and three images: the maps of a row are those of its own prompt, cut to its last image."""
    from types import SimpleNamespace

    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(checkpoints["llava"]).eval()
    processor = AutoProcessor.from_pretrained(checkpoints["llava"])
    job: Any = SimpleNamespace(processor=processor)
    asked = [rows(1, n)[0] for n in (1, 2, 3)]
    with torch.no_grad():
        names, maps = llava.LESSON.look(model, job, asked)
        assert maps.shape == (3, len(names), 4, 4)
        inputs = encode_prompts(processor, asked[2:])
        with training.eager_attention(model):
            attention = model(**inputs, output_attentions=True).attentions[0][0, :, -1].mean(dim=0)
    places = (inputs["input_ids"][0] == processor.image_token_id).nonzero().squeeze(1)
    assert len(places) == 3 * 16
    assert torch.allclose(torch.tensor(maps[2, 0]).flatten(), attention[places[-16:]], atol=1e-5)


def write_rows(counts: list[int], **question: str) -> str:
    """A dataset with so many images in its rows; its name."""
    pictures = iter(shapes.pictures("train", sum(counts)))
    lines = []
    for i, n in enumerate(counts):
        files = [f"{i}-{j}.png" for j in range(n)]
        for file in files:
            next(pictures)[0].save(file)
        lines.append({"images": files, "prompt": f"What? {i}", "completion": f"thing {i}", **question})
    Path("mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return "mine.jsonl"


SHORT = ("--max_steps", "2", "--per_device_train_batch_size", "2", "--test_split_size", "0.4", "--output_dir", "run")


@pytest.mark.parametrize("module", ["llava", "flamingo"])
def test_a_run_on_rows_of_several_images_comes_to_its_end(ask: Callable[..., int], module: str) -> None:
    assert ask(module, "--dataset_name", write_rows([1, 2, 3, 1, 2, 3, 1, 2, 3, 2]), *SHORT) == 0
    summary = json.loads(Path("run/summary.json").read_text())
    assert "vqa_accuracy/shuffled" in summary["eval"]["after"] and "attention.png" in summary["artifacts"]


def test_the_first_stage_of_blip2_is_measured_on_whatever_answers_there_are(ask: Callable[..., int]) -> None:
    """Data without a single `Describe the image.`: stage 1 trains on the answers, so it is judged by them."""
    assert ask("blip2", "--dataset_name", write_rows([1] * 10), *SHORT, "--stage1_steps", "1") == 0
    block = json.loads(Path("run/summary.json").read_text())["eval"]
    held_out = block["n"]["vqa_accuracy"]
    assert held_out >= 2 and block["n"]["stage1/itc_accuracy"] == held_out
    assert block["n"]["stage1/itm_accuracy"] == 2 * held_out
