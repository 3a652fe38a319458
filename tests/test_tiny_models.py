"""Tiny checkpoints: a tokenizer for any text, real classes, the same bytes each time, a cache that mends itself."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmcore_hf.data import toy
from llmcore_hf.errors import UserError
from llmcore_hf.models import loading, tiny

RANDOM_INIT = {"tiny-qwen": "Qwen3ForCausalLM", "tiny-qwen2": "Qwen2ForCausalLM", "tiny-gpt2": "GPT2LMHeadModel"}
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "排序：31"},
    {"role": "assistant", "content": "13"},
    {"role": "user", "content": "Sort: 20"},
    {"role": "assistant", "content": "02"},
]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of its own with the three randomly initialised checkpoints."""
    folder = tmp_path_factory.mktemp("tiny-cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMCORE_HF_CACHE", str(folder))
        for name in RANDOM_INIT:
            tiny.ensure(name)
    return folder


@pytest.fixture
def ensure(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """`tiny.ensure` on a copy of that cache, which the test may damage."""
    shutil.copytree(cache, tmp_path / "cache")
    monkeypatch.setenv("LLMCORE_HF_CACHE", str(tmp_path / "cache"))
    return tiny.ensure


@pytest.fixture(scope="module")
def checkpoint(cache: Path) -> Callable[[str], Path]:
    return lambda name: next((cache / "models").glob(f"{name}-????????????"))


@pytest.fixture(scope="module")
def tokenizers(checkpoint: Callable[[str], Path]) -> dict[str, Any]:
    """As built, and as `AutoTokenizer` reads them from each checkpoint."""
    loaded = {name: AutoTokenizer.from_pretrained(checkpoint(name)) for name in RANDOM_INIT}
    return {"built": tiny.make_tokenizer(), **loaded}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- tokenizer ----------------------------------------------------------------------------------------------------


def round_trip(tokenizer: Any, text: str) -> str:
    return tokenizer.decode(tokenizer(text)["input_ids"])


@given(text=st.text())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_round_trips(tokenizers: dict[str, Any], text: str) -> None:
    for name in ("built", "tiny-qwen", "tiny-gpt2"):
        assert round_trip(tokenizers[name], text) == text
    # transformers reads every checkpoint of type `qwen2` with its Qwen2Tokenizer, which composes characters first (NFC)
    composed = unicodedata.normalize("NFC", text)
    assert round_trip(tokenizers["tiny-qwen2"], composed) == composed


@pytest.mark.parametrize("name", ["built", *RANDOM_INIT])
@pytest.mark.parametrize(
    "text",
    [
        "把这些数字排好：6604，谢谢！",
        "Sort: 6604 — it's \t two\n\n lines  ",
        "繁體字，全角ＡＢＣ１２３，表情😀👨‍👩‍👧",
        "<|im_start|>user\nquoted<|im_end|>",
        " leading and trailing ",
        "",
    ],
)
def test_chinese_and_english_round_trip(tokenizers: dict[str, Any], name: str, text: str) -> None:
    assert round_trip(tokenizers[name], text) == text


@pytest.mark.parametrize("name", ["built", *RANDOM_INIT])
def test_every_digit_is_a_token_of_its_own(tokenizers: dict[str, Any], name: str) -> None:
    tokenizer = tokenizers[name]
    for text in ("0123456789", "6604", "0000"):
        assert [tokenizer.decode([i]) for i in tokenizer(text)["input_ids"]] == list(text)
    assert not [t for t in tokenizer.get_vocab() if len(t) > 1 and any(c.isdigit() for c in t)]


@pytest.mark.parametrize("name", ["built", *RANDOM_INIT])
def test_padding_is_not_the_end_of_a_turn(tokenizers: dict[str, Any], name: str) -> None:
    tokenizer = tokenizers[name]
    assert tokenizer.pad_token_id is not None and tokenizer.eos_token_id is not None
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer(tokenizer.eos_token)["input_ids"] == [tokenizer.eos_token_id]


def test_all_tokenizers_agree(tokenizers: dict[str, Any]) -> None:
    text = "<|im_start|>user\nPut these digits in order: 9081<|im_end|>\n排序：31"
    assert len({tuple(tokenizer(text)["input_ids"]) for tokenizer in tokenizers.values()}) == 1


@pytest.mark.parametrize("name", ["built", *RANDOM_INIT])
def test_the_chat_template_marks_what_the_assistant_wrote(tokenizers: dict[str, Any], name: str) -> None:
    tokenizer = tokenizers[name]
    encoded = tokenizer.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = encoded["input_ids"], encoded["assistant_masks"]
    marked = tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m])
    assert marked == "13<|im_end|>02<|im_end|>"
    assert sum(mask) == 6  # four digits, two ends of turn


def test_the_chat_template_is_chatml(tokenizers: dict[str, Any]) -> None:
    for tokenizer in tokenizers.values():
        text = tokenizer.apply_chat_template(CHAT[:2], add_generation_prompt=True, tokenize=False)
        assert text == (
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n排序：31<|im_end|>\n<|im_start|>assistant\n"
        )


def test_a_prompt_is_how_the_whole_conversation_begins(tokenizers: dict[str, Any]) -> None:
    """Or the border between prompt and completion could not be found in the ids."""
    tokenizer = tokenizers["built"]
    for n in (2, 4):
        prompt = tokenizer.apply_chat_template(CHAT[:n], add_generation_prompt=True, return_dict=True)["input_ids"]
        whole = tokenizer.apply_chat_template(CHAT[: n + 1], return_dict=True)["input_ids"]
        assert whole[: len(prompt)] == prompt


# --- checkpoints --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), RANDOM_INIT.items())
def test_a_checkpoint_is_loaded_by_transformers(checkpoint: Callable[[str], Path], name: str, kind: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint(name))
    tokenizer = AutoTokenizer.from_pretrained(checkpoint(name))
    assert type(model).__name__ == kind
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)
    assert sum(p.numel() for p in model.parameters()) < 300_000
    assert model.generation_config.eos_token_id == model.config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == model.config.pad_token_id == tokenizer.pad_token_id


@pytest.mark.parametrize("name", RANDOM_INIT)
def test_saving_and_loading_keeps_the_logits(checkpoint: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    tokenizer = tiny.make_tokenizer()
    built = tiny.make_model(tiny.TINY_MODELS[name].architecture, tokenizer, tiny.TINY_MODELS[name].seed).eval()
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint(name))
    loaded.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(checkpoint(name)).save_pretrained(tmp_path)
    again, tokenizer_again = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer_again.chat_template == tiny.CHAT_TEMPLATE
    inputs = tokenizer_again.apply_chat_template(CHAT, return_dict=True, return_tensors="pt")
    with torch.no_grad():
        logits = [model(**inputs).logits for model in (built, loaded, again)]
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[1], logits[2])


def test_the_weights_do_not_depend_on_the_global_seed_nor_change_it() -> None:
    tokenizer = tiny.make_tokenizer()
    torch.manual_seed(1)
    first = tiny.make_model("qwen3", tokenizer, 0).state_dict()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = tiny.make_model("qwen3", tokenizer, 0).state_dict()
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = tiny.make_model("qwen3", tokenizer, 1).state_dict()
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.slow
def test_a_warm_start_is_the_same_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiny.TINY_MODELS, "tiny-brief", tiny.TinyModel("qwen3", warm_start_steps=3, batch_size=4))
    made = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        monkeypatch.setenv("LLMCORE_HF_CACHE", str(tmp_path / str(seed)))
        made.append(contents(tiny.ensure("tiny-brief")))
    assert made[0] == made[1]


def test_the_base_checkpoint_sorts_but_prefers_neither_order() -> None:
    """Where the preference lessons start: on held-out digits, about half its answers go either way."""
    from accelerate import Accelerator

    from llmcore_hf.alignment.evaluation import generate

    folder = tiny.ensure("tiny-qwen-base")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    asked = toy.questions("test", 200)
    prompts = [[{"role": "user", "content": prompt}] for prompt, _ in asked]
    found = generate(model, tokenizer, prompts, 8, 100, Accelerator(cpu=True)).texts
    up = sum(answer == toy.ascending(digits) for answer, (_, digits) in zip(found, asked, strict=True))
    down = sum(answer == toy.descending(digits) for answer, (_, digits) in zip(found, asked, strict=True))
    assert (up + down) / len(asked) > 0.8
    assert 0.2 < up / (up + down) < 0.8


# --- cache --------------------------------------------------------------------------------------------------------


def test_the_cache_is_where_the_variable_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMCORE_HF_CACHE", str(tmp_path / "elsewhere"))
    assert tiny.ensure("tiny-gpt2").is_relative_to(tmp_path / "elsewhere")
    monkeypatch.delenv("LLMCORE_HF_CACHE")
    assert tiny.cache_dir() == Path.home() / ".cache" / "llmcore_hf"


def test_an_intact_checkpoint_is_not_made_again(ensure: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "_make", lambda *args: pytest.fail("made again"))
    assert ensure("tiny-qwen") == ensure("tiny-qwen")


def test_any_rank_makes_a_whole_checkpoint(
    ensure: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On a second machine rank 1 makes the cache; and `save_pretrained` by itself writes nothing there."""
    alone = contents(ensure("tiny-gpt2"))
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda *args: 1)
    tiny.make_model("gpt2", tiny.make_tokenizer(), seed=0).save_pretrained(tmp_path / "by itself")
    assert not list((tmp_path / "by itself").glob("*"))
    assert contents(ensure("tiny-gpt2")) == alone


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip_a_byte, Path.unlink], ids=["truncated", "flipped bit", "deleted"])
@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json", "chat_template.jinja"])
def test_a_damaged_file_is_noticed_and_made_again(
    ensure: Callable[[str], Path], capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None], file: str
) -> None:
    folder = ensure("tiny-qwen")
    intact = contents(folder)
    damage(folder / file)
    assert contents(folder) != intact
    assert ensure("tiny-qwen") == folder
    assert contents(folder) == intact
    assert "damaged" in capsys.readouterr().err


@pytest.mark.parametrize("manifest", [None, "", "{", "[]", "{}"])
def test_a_damaged_manifest_is_noticed(ensure: Callable[[str], Path], manifest: str | None) -> None:
    folder = ensure("tiny-gpt2")
    intact = contents(folder)
    (folder / "manifest.json").unlink()
    if manifest is not None:
        (folder / "manifest.json").write_text(manifest)
    assert contents(ensure("tiny-gpt2")) == intact


def test_a_half_written_folder_is_made_again(ensure: Callable[[str], Path]) -> None:
    folder = ensure("tiny-gpt2")
    intact = contents(folder)
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "config.json").write_bytes(intact["config.json"])
    assert contents(ensure("tiny-gpt2")) == intact


def test_a_build_that_breaks_off_leaves_nothing_that_looks_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMCORE_HF_CACHE", str(tmp_path))

    def break_off(folder: Path) -> dict[str, str]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tiny, "_digests", break_off)  # after all files are written, before the rename
        with pytest.raises(KeyboardInterrupt):
            tiny.ensure("tiny-gpt2")
    assert not [path for path in (tmp_path / "models").iterdir() if path.is_dir()]
    AutoModelForCausalLM.from_pretrained(tiny.ensure("tiny-gpt2"))


def test_the_manifest_covers_every_file(checkpoint: Callable[[str], Path]) -> None:
    for name in RANDOM_INIT:
        listed = json.loads((checkpoint(name) / "manifest.json").read_text())
        assert set(listed) == {path.name for path in checkpoint(name).iterdir()} - {"manifest.json"}


def test_another_recipe_is_another_folder(
    ensure: Callable[[str], Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = ensure("tiny-gpt2")
    monkeypatch.setitem(tiny.TINY_MODELS, "tiny-gpt2", tiny.TinyModel("gpt2", seed=1))
    assert ensure("tiny-gpt2") != before
    assert contents(ensure("tiny-gpt2"))["model.safetensors"] != contents(before)["model.safetensors"]


TWO_AT_ONCE = """
import sys, time
from pathlib import Path
from llmcore_hf.models import tiny
import transformers, tokenizers, torch

me, other, make = Path(sys.argv[1]), Path(sys.argv[2]), tiny._make
def slow_make(*args):
    print("makes it")
    time.sleep(1)
    make(*args)
tiny._make = slow_make
me.touch()
while not other.exists():
    time.sleep(0.01)
print(f"folder {tiny.ensure('tiny-qwen')}")
"""


@pytest.mark.slow
def test_two_processes_at_once_make_one_checkpoint(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """And the bytes are those this process made: nothing depends on hashing or on who builds."""
    ready = [tmp_path / "a", tmp_path / "b"]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_AT_ONCE, str(me), str(other)],
            env={**os.environ, "LLMCORE_HF_CACHE": str(tmp_path / "cache"), "PYTHONHASHSEED": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i, (me, other) in enumerate([ready, ready[::-1]])
    ]
    results = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    lines = [line for out, _ in results for line in out.splitlines()]
    assert lines.count("makes it") == 1
    (folder,) = {Path(line.removeprefix("folder ")) for line in lines if line.startswith("folder ")}
    assert contents(folder) == contents(checkpoint("tiny-qwen"))
    assert [path for path in (tmp_path / "cache" / "models").iterdir() if path.is_dir()] == [folder]


# --- names --------------------------------------------------------------------------------------------------------


def test_a_tiny_name_leads_to_its_checkpoint(ensure: Callable[[str], Path]) -> None:
    assert loading.resolve_name("tiny-qwen") == str(ensure("tiny-qwen"))


def test_a_folder_and_a_hub_id_lead_to_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert loading.resolve_name(str(tmp_path / "model")) == str(tmp_path / "model")
    assert loading.resolve_name("~/model") == str(tmp_path / "model")
    assert loading.resolve_name("Qwen/Qwen2.5-0.5B-Instruct") == "Qwen/Qwen2.5-0.5B-Instruct"


def test_the_help_names_the_tiny_checkpoints() -> None:
    from llmcore_hf.alignment.training import ModelArguments

    helps = {f.name: f.metadata.get("help", "") for f in fields(ModelArguments)}
    assert all(name in helps["model_name_or_path"] for name in ("tiny-gpt2", "tiny-qwen", "tiny-qwen-base"))


def test_a_model_that_is_not_there_is_refused_in_words(tmp_path: Path) -> None:
    for name in (str(tmp_path), "nobody/nothing"):
        with pytest.raises(UserError) as caught:
            loading.load_tokenizer(name, "main", False)
        assert name in str(caught.value) and "tiny-qwen" in str(caught.value)


def test_revision_and_trust_reach_the_hub_code(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def words(text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [1]}

    for kind in ("AutoConfig", "AutoTokenizer"):
        monkeypatch.setattr(
            f"transformers.{kind}.from_pretrained", lambda name, **kw: calls.append((name, kw)) or words
        )
    loading.load_tokenizer("org/model", "v1.1", False)
    assert calls == [("org/model", {"revision": "v1.1", "trust_remote_code": False})] * 2


def test_a_folder_without_tokenizer_files_is_refused(tmp_path: Path) -> None:
    import shutil

    source = tiny.ensure("tiny-qwen")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(source / name, tmp_path)
    with pytest.raises(UserError, match="tokenizer"):
        loading.load_tokenizer(str(tmp_path), "main", False)


def test_model_options_reach_from_pretrained() -> None:
    from trl import ModelConfig

    options = ModelConfig(model_revision="v1", dtype="bfloat16", attn_implementation="sdpa")
    assert loading.init_kwargs(options, None) == {
        "revision": "v1",
        "dtype": "bfloat16",
        "attn_implementation": "sdpa",
    }
    assert loading.init_kwargs(options, {"dtype": "float16", "use_cache": False})["dtype"] == "float16"
