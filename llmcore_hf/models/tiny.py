"""Tiny checkpoints, made on this machine: real `transformers` classes, about 100 thousand parameters.

A checkpoint is made once, deterministically, and kept in `~/.cache/llmcore_hf` (or `$LLMCORE_HF_CACHE`).
`manifest.json` holds the SHA-256 of every file; a checkpoint whose files do not match is made again.

Random initialisation (`tiny-qwen`, `tiny-qwen2`, `tiny-gpt2`) is where the SFT lesson starts. The `-base`
variants are warm-started: a short training on the toy corpus with answers in either order, so that the
model can sort but prefers neither order. The preference and RL lessons start from them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

from llmcore_hf.data import toy
from llmcore_hf.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

PAD, USER_START, EOS = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VOCAB_SIZE = 320  # 256 bytes, 3 special tokens, the rest merges
CONTEXT = 2048
RECIPE_VERSION = 4  # raise it when the code below would make other checkpoints than before

# ChatML, with tools and tool calls as Qwen writes them. The markers tell `assistant_only_loss` what the assistant wrote,
# its end-of-turn token included.
CHAT_TEMPLATE = (
    "{%- if tools %}"
    "{{- '<|im_start|>system\\n# Tools\\n<tools>' }}"
    "{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}"
    "{{- '\\n</tools><|im_end|>\\n' }}"
    "{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['role'] == 'assistant' %}"
    "{%- generation %}{{- message['content'] or '' }}"
    "{%- for call in message['tool_calls'] or [] %}"
    "{{- '\\n<tool_call>\\n' + (call['function'] | tojson) + '\\n</tool_call>' }}"
    "{%- endfor %}"
    "{{- '<|im_end|>' }}{%- endgeneration %}"
    "{%- else %}{{- message['content'] + '<|im_end|>' }}{%- endif %}"
    "{{- '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


@dataclass(frozen=True)
class TinyModel:
    """How to make one tiny checkpoint. Any change here changes the cache key."""

    architecture: str  # a key of `_CONFIGS`
    warm_start_steps: int = 0
    batch_size: int = 64
    learning_rate: float = 4e-3
    seed: int = 0


TINY_MODELS = {
    "tiny-qwen": TinyModel("qwen3"),
    "tiny-qwen2": TinyModel("qwen2"),
    "tiny-gpt2": TinyModel("gpt2"),
    "tiny-qwen-base": TinyModel("qwen3", warm_start_steps=500),
    "tiny-qwen2-base": TinyModel("qwen2", warm_start_steps=500),
    "tiny-gpt2-base": TinyModel("gpt2", warm_start_steps=500),
}


def cache_dir() -> Path:
    """`$LLMCORE_HF_CACHE`, else `~/.cache/llmcore_hf`."""
    return Path(os.environ.get("LLMCORE_HF_CACHE") or Path.home() / ".cache" / "llmcore_hf").expanduser()


def ensure(name: str) -> Path:
    """Folder of the tiny checkpoint `name`, made first when it is missing or damaged.

    Raises:
        KeyError: `name` is not in `TINY_MODELS`.
        UserError: the cache cannot be written.
    """
    spec = TINY_MODELS[name]
    return cached(f"{name}-{_fingerprint(spec)}", lambda folder: _make(name, spec, folder))


def cached(name: str, make: Callable[[Path], None]) -> Path:
    """Folder `name` of the cache, whole; `make(folder)` makes it when it is missing or damaged.

    Safe against a kill (the folder appears by one rename, see `whole`) and against two processes at once (a file lock).

    Raises:
        UserError: the cache cannot be written.
    """
    from filelock import FileLock

    folder = cache_dir() / "models" / name
    if _is_intact(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{folder}.lock")
        lock.acquire()
    except OSError as error:
        raise UserError(
            f"the cache {cache_dir()} cannot be written ({error}): name another in LLMCORE_HF_CACHE"
        ) from None
    with lock:
        if _is_intact(folder):  # another process made it while this one waited
            return folder
        if folder.exists():
            print(f"The cached checkpoint {folder} is damaged; making it again.", file=sys.stderr)
            shutil.rmtree(folder)
        with _saving_on_any_rank():
            make(folder)
    return folder


@contextmanager
def _saving_on_any_rank() -> Iterator[None]:
    """`save_pretrained` writes on rank 0 alone, and nothing elsewhere; but every machine of a job has its own cache."""
    import torch

    with mock.patch.object(torch.distributed, "is_initialized", return_value=False):
        yield


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """A temporary folder to build a checkpoint in; at the end it gets its manifest and is renamed to `folder`."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        build = Path(scratch) / "checkpoint"
        yield build
        (build / "manifest.json").write_text(json.dumps(_digests(build), indent=1))
        os.replace(build, folder)


def _fingerprint(spec: TinyModel) -> str:
    """Everything that decides the bytes of the checkpoint: recipe, corpus, library versions."""
    from importlib.metadata import version

    parts = {
        "spec": asdict(spec),
        "template": CHAT_TEMPLATE,
        "vocab": VOCAB_SIZE,
        "recipe": RECIPE_VERSION,
        "toy": [toy.N_DIGITS, toy.DATA_SEED, toy.PROMPTS, toy.SPLIT_FRACTIONS],
        "versions": [version(p).split("+")[0] for p in ("torch", "transformers", "tokenizers")],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def _make(name: str, spec: TinyModel, folder: Path) -> None:
    with whole(folder) as build:
        tokenizer = make_tokenizer()
        model = make_model(spec.architecture, tokenizer, spec.seed)
        if spec.warm_start_steps:
            _warm_start(name, spec, model, tokenizer)
        model.save_pretrained(build)
        tokenizer.save_pretrained(build)


def _digests(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.name != "manifest.json"
    }


def _is_intact(folder: Path) -> bool:
    try:
        return json.loads((folder / "manifest.json").read_text()) == _digests(folder)
    except (OSError, ValueError):
        return False


def make_tokenizer(
    corpus: Iterable[str] | None = None,
    vocab_size: int = VOCAB_SIZE,
    more_special: tuple[str, ...] = (),
    chat_template: str = CHAT_TEMPLATE,
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, trained here on `corpus` (the toy prompts); any text round-trips.

    Digits are never merged: the task works on single digits. Pad and end-of-turn are different tokens, so
    masking the padding never masks the end of a turn.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, USER_START, EOS, *more_special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(toy.tokenizer_corpus() if corpus is None else corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        additional_special_tokens=[USER_START, *more_special],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=chat_template,
    )


def make_model(architecture: str, tokenizer: PreTrainedTokenizerFast, seed: int) -> PreTrainedModel:
    """A randomly initialised causal language model: width 64, 2 layers, 4 heads, tied embeddings."""
    import torch
    from transformers import (
        AutoModelForCausalLM,
        GenerationConfig,
        GPT2Config,
        PretrainedConfig,
        Qwen2Config,
        Qwen3Config,
    )

    special = {
        "vocab_size": len(tokenizer),
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config: PretrainedConfig
    if architecture == "gpt2":
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        config = GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=CONTEXT, **dropout, **special)
    else:
        qwen = {
            "hidden_size": 64,
            "intermediate_size": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": CONTEXT,
            "tie_word_embeddings": True,
        }
        if architecture == "qwen2":
            config = Qwen2Config(**qwen, **special)
        else:
            config = Qwen3Config(head_dim=16, **qwen, **special)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return model


def _warm_start(name: str, spec: TinyModel, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Next-token training on the undecided corpus; the loss covers the answer only.

    A plain loop and not a trainer: it must run the same in one rank of a distributed job.
    """
    import torch
    from torch.nn.functional import cross_entropy
    from tqdm import tqdm

    n_prompts = spec.batch_size * 50
    pairs = toy.undecided_corpus(n_prompts)
    input_ids, labels = encode_pairs(pairs, tokenizer)
    generator = torch.Generator().manual_seed(spec.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=spec.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, spec.warm_start_steps)
    model.train()
    label = f"Making {name} (once, cached)"
    for _ in tqdm(range(spec.warm_start_steps), desc=label, disable=not sys.stderr.isatty()):
        prompts = torch.randint(n_prompts, (spec.batch_size // 2,), generator=generator)
        rows = torch.cat([2 * prompts, 2 * prompts + 1])  # both answers of each prompt: neither is favoured
        ids = input_ids[rows]  # (B, T)
        logits = model(ids, attention_mask=ids.ne(tokenizer.pad_token_id)).logits[:, :-1]  # (B, T-1, V)
        loss = cross_entropy(logits.flatten(0, 1), labels[rows][:, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def encode_pairs(pairs: list[tuple[str, str]], tokenizer: PreTrainedTokenizerFast):
    """Token ids and labels of the pairs, both `(N, T)`; prompt and padding are -100 in the labels.

    Padding stands on the right: GPT-2 counts positions from the left, padding included.
    """
    import torch

    rows = []
    for prompt, answer in pairs:
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        full = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
        start = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=True)
        rows.append((full, len(start["input_ids"])))
    width = max(len(full) for full, _ in rows)
    input_ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    labels = torch.full((len(rows), width), -100)
    for i, (full, n_prompt) in enumerate(rows):
        ids = torch.tensor(full)
        input_ids[i, : len(full)] = ids
        labels[i, n_prompt : len(full)] = ids[n_prompt:]
    return input_ids, labels
