"""Tiny vision-language checkpoints, made on this machine and cached: real `transformers` classes, width 64.

What stands ready before a lesson begins, as for the published models:

    a vision tower       trained to tell color and shape in each quarter of a picture, and where each patch is
    a language model     trained on text alone: to answer questions about a description it reads, and, without one, to
                         give an answer of the right kind, at random

Both have seen the training triples of `shapes` only. The lessons teach what lies between the two.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import random
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcore_hf.data import shapes
from llmcore_hf.models import tiny

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

IMAGE_TOKEN = "<image>"
CLS, DEC = "[CLS]", "[DEC]"  # what the text of a Q-Former begins with: to be understood, to be written
VOCAB_SIZE = 420
PATCH_SIZE = 8
N_PATCHES = (shapes.IMAGE_SIZE // PATCH_SIZE) ** 2
WIDTH, N_LAYERS, N_HEADS = 64, 2, 4
N_QUERIES = 8  # of the Q-Former: half as many tokens as patches
INIT_STD = 0.1  # of new layers; the 0.02 of large models starts too small at this width
RECIPE_VERSION = 1  # raise it when the code below would make other checkpoints than before

# ChatML. The content of a turn is text, or a list of parts: text and images.
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['content'] is string %}{{- message['content'] }}"
    "{%- else %}{%- for part in message['content'] %}"
    "{%- if part['type'] == 'image' %}{{- '<image>\\n' }}{%- else %}{{- part['text'] }}{%- endif %}"
    "{%- endfor %}{%- endif %}"
    "{{- '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def ensure(name: str) -> Path:
    """Folder of the checkpoint `name`, one of `TINY_VLMS`, made first when it is missing or damaged.

    Raises:
        UserError: the cache cannot be written.
    """
    return _cached(name, TINY_VLMS[name])


def ensure_tower(kind: str) -> Path:
    """Folder of the vision tower `kind` (`clip` or `blip2`)."""
    return _cached(f"tiny-{kind}-vision", partial(_make_tower, kind))


def ensure_language_model(few_shot: bool = False) -> Path:
    """Folder of the language model and its tokenizer; with `few_shot`, of one that has also learned to follow examples."""
    name = "tiny-few-shot-reader" if few_shot else "tiny-reader"
    return _cached(name, partial(_make_reader, few_shot=few_shot))


def _cached(name: str, make: Callable[[Path], None]) -> Path:
    def make_whole(folder: Path) -> None:
        with tiny.whole(folder) as build:
            make(build)

    return tiny.cached(f"{name}-{_fingerprint()}", make_whole)


def _fingerprint() -> str:
    """Everything that decides the bytes of the checkpoints: this file, the task, library versions."""
    from importlib.metadata import version

    parts = [
        RECIPE_VERSION,
        tiny.RECIPE_VERSION,
        *(inspect.getsource(module) for module in (sys.modules[__name__], shapes)),
    ]
    parts += [version(package).split("+")[0] for package in ("torch", "transformers", "tokenizers", "pillow")]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


# --- whole models ---------------------------------------------------------------------------------------------------


def _make_llava(folder: Path) -> None:
    """LLaVA of the ready parts; the projector alone is new."""
    from transformers import AutoConfig, CLIPVisionModel, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    tower, reader = ensure_tower("clip"), ensure_language_model()
    language_model, tokenizer = _language_model(reader)
    config = LlavaConfig(
        vision_config=AutoConfig.from_pretrained(tower),
        text_config=language_model.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        vision_feature_layer=-1,  # the default, the last but one, leaves out half of a tower of two layers
        image_seq_length=N_PATCHES,
        tie_word_embeddings=True,
    )
    model: Any = _new(LlavaForConditionalGeneration, config)
    model.model.vision_tower.load_state_dict(CLIPVisionModel.from_pretrained(tower).state_dict())
    model.model.language_model.load_state_dict(language_model.model.state_dict())
    model.tie_weights()
    model.generation_config = language_model.generation_config
    processor = LlavaProcessor(
        image_processor("clip"),
        tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,  # the class token, which `default` leaves out again
        chat_template=CHAT_TEMPLATE,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _make_blip2(folder: Path) -> None:
    """BLIP-2 of the ready parts; the Q-Former, its heads and the projection are new."""
    from transformers import AutoConfig, Blip2Config, Blip2Processor, Blip2QFormerConfig, Blip2VisionModel

    from llmcore_hf.vlm.blip2_model import Blip2ForTwoStages

    tower, reader = ensure_tower("blip2"), ensure_language_model()
    language_model, tokenizer = _language_model(reader)
    qformer = Blip2QFormerConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=N_HEADS,
        intermediate_size=2 * WIDTH,
        encoder_hidden_size=WIDTH,
        cross_attention_frequency=1,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        use_qformer_text_input=True,
        initializer_range=INIT_STD,
    )
    config = Blip2Config(
        vision_config=AutoConfig.from_pretrained(tower),
        qformer_config=qformer,
        text_config=language_model.config,
        num_query_tokens=N_QUERIES,
        image_text_hidden_size=WIDTH // 2,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        initializer_range=INIT_STD,
    )
    model: Any = _new(Blip2ForTwoStages, config)
    model.vision_model.load_state_dict(Blip2VisionModel.from_pretrained(tower).state_dict())
    model.language_model.load_state_dict(language_model.state_dict())
    model.generation_config = language_model.generation_config
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<image>\\n", "")  # the processor itself puts the image first
    processor = Blip2Processor(image_processor("blip2"), tokenizer, num_query_tokens=N_QUERIES)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _make_flamingo(folder: Path) -> None:
    """Flamingo of the ready parts; resampler and gated cross-attention are new. Its language model can follow examples."""
    from transformers import AutoConfig, CLIPVisionModel, LlavaProcessor

    from llmcore_hf.vlm.flamingo_model import FlamingoConfig, FlamingoForConditionalGeneration

    tower, reader = ensure_tower("clip"), ensure_language_model(few_shot=True)
    language_model, tokenizer = _language_model(reader)
    config = FlamingoConfig(
        vision_config=AutoConfig.from_pretrained(tower),
        text_config=language_model.config,
        num_latents=N_QUERIES,
        num_heads=N_HEADS,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
    )
    model: Any = _new(FlamingoForConditionalGeneration, config)
    model.vision_model.load_state_dict(CLIPVisionModel.from_pretrained(tower).state_dict())
    model.language_model.load_state_dict(language_model.state_dict())
    model.generation_config = language_model.generation_config
    processor = LlavaProcessor(  # a "patch" as large as the image: each image is one token of the text
        image_processor("clip"),
        tokenizer,
        patch_size=shapes.IMAGE_SIZE,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _language_model(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def _new(cls: Any, config: Any) -> PreTrainedModel:
    """A model with the same new weights every time."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return cls(config)


# --- vision tower ---------------------------------------------------------------------------------------------------


def tower_config(kind: str) -> Any:
    """Configuration of a small tower: 32 x 32 pixels in 16 patches."""
    from transformers import Blip2VisionConfig, CLIPVisionConfig

    options = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": N_LAYERS,
        "num_attention_heads": N_HEADS,
        "image_size": shapes.IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
    }
    # The default of BLIP-2, 1e-10, is there to be overwritten by a checkpoint: training from it goes nowhere.
    if kind == "blip2":
        return Blip2VisionConfig(initializer_range=INIT_STD, **options)
    return CLIPVisionConfig(initializer_range=3 * INIT_STD, **options)  # of the embeddings; the layers scale by width


def image_processor(kind: str) -> Any:
    """The image processor of a tower, in the version that needs no torchvision."""
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    size = shapes.IMAGE_SIZE
    if kind == "blip2":
        return BlipImageProcessorPil(size={"height": size, "width": size})
    return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def _make_tower(kind: str, folder: Path, n_images: int = 3000, n_steps: int = 500) -> None:
    """Train a tower to tell what its patches show.

    From the mean of the patches of a quarter: color and shape of what is there, or that nothing is; from each patch: which
    one it is. Without the last, positions are hardly found in the features later.
    """
    import torch
    from torch import nn
    from torch.nn.functional import cross_entropy
    from transformers import Blip2VisionModel, CLIPVisionModel

    pixels, colors, forms = _labelled_pictures(kind, n_images)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tower: Any = (Blip2VisionModel if kind == "blip2" else CLIPVisionModel)(tower_config(kind))
        heads = nn.ModuleList(nn.Linear(WIDTH, n) for n in (len(shapes.COLORS) + 1, len(shapes.SHAPES) + 1, N_PATCHES))
        generator = torch.Generator().manual_seed(0)
        parameters = [*tower.parameters(), *heads.parameters()]
        which_patch = torch.arange(N_PATCHES)
        for optimizer in _steps(parameters, n_steps, 4e-3, f"Making tiny-{kind}-vision (once, cached)"):
            rows = torch.randint(n_images, (64,), generator=generator)
            patches = tower(pixels[rows]).last_hidden_state[:, 1:]  # (B, 16, D)
            side = shapes.IMAGE_SIZE // PATCH_SIZE
            grid = patches.view(-1, 2, side // 2, 2, side // 2, WIDTH)  # row and column of the quarter, and within it
            quarters = grid.mean(dim=(2, 4)).flatten(1, 2)  # (B, 4, D)
            loss = cross_entropy(heads[0](quarters).flatten(0, 1), colors[rows].flatten())
            loss = loss + cross_entropy(heads[1](quarters).flatten(0, 1), forms[rows].flatten())
            loss = loss + cross_entropy(heads[2](patches).flatten(0, 1), which_patch.repeat(len(rows)))
            loss.backward()
            optimizer.step()
    tower.save_pretrained(folder)
    image_processor(kind).save_pretrained(folder)


def _labelled_pictures(kind: str, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pixels (N, 3, 32, 32), and for each quarter its color and shape, (N, 4); 0 stands for none."""
    import torch

    rng = random.Random(shapes.DATA_SEED)
    by_position = [[t for t in shapes.split_triples()["train"] if t[2] == position] for position in shapes.POSITIONS]
    images, colors, forms = [], [], []
    for _ in range(n):
        objects = [rng.choice(triples) if rng.random() < 0.6 else None for triples in by_position]
        images.append(shapes.render([triple for triple in objects if triple], rng))
        colors.append([list(shapes.COLORS).index(t[0]) + 1 if t else 0 for t in objects])
        forms.append([shapes.SHAPES.index(t[1]) + 1 if t else 0 for t in objects])
    pixels = image_processor(kind)(images, return_tensors="pt")["pixel_values"]
    return pixels, torch.tensor(colors), torch.tensor(forms)


# --- language model -------------------------------------------------------------------------------------------------


def _make_reader(folder: Path, few_shot: bool = False, n_rows: int = 12000, n_steps: int = 400) -> None:
    """Train a language model on text alone, with the loss on the answers; with `few_shot`, every second batch has examples."""
    import torch
    from torch.nn.functional import cross_entropy

    tokenizer = make_tokenizer()
    model: Any = tiny.make_model("qwen3", tokenizer, seed=0)
    corpora = [tiny.encode_pairs(reading_corpus(n_rows), tokenizer)]
    if few_shot:
        corpora.append(tiny.encode_pairs(few_shot_corpus(n_rows), tokenizer))
    generator = torch.Generator().manual_seed(0)
    label = f"Making {folder.parent.name} (once, cached)"
    for i, optimizer in enumerate(_steps(list(model.parameters()), n_steps * len(corpora), 4e-3, label)):
        input_ids, labels = corpora[i % len(corpora)]
        rows = torch.randint(
            n_rows, (64 // (1 + i % len(corpora)),), generator=generator
        )  # texts with examples are long
        ids = input_ids[rows]  # (B, T)
        logits = model(ids, attention_mask=ids.ne(tokenizer.pad_token_id)).logits[:, :-1]  # (B, T-1, V)
        cross_entropy(logits.flatten(0, 1), labels[rows][:, 1:].flatten(), ignore_index=-100).backward()
        optimizer.step()
    model.eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def few_shot_corpus(n: int) -> list[tuple[str, str]]:
    """Pairs (prompt, answer) whose question does not say what is asked; one or two examples before it do."""
    rng = random.Random(shapes.DATA_SEED)
    pairs = []
    for _ in range(n):
        kind, *shown = shapes.few_shot(rng, "train", rng.choice((1, 1, 2)))
        turns = [f"{shapes.caption(triple)}\n{shapes.WHAT}" for triple in shown]
        answers = [shapes.answer(triple, kind) for triple in shown]
        between = [
            f"{turn}<|im_end|>\n<|im_start|>assistant\n{a}<|im_end|>\n<|im_start|>user\n"
            for turn, a in zip(turns, answers, strict=True)
        ]
        pairs.append(("".join(between[:-1]) + turns[-1], answers[-1]))
    return pairs


def make_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of the tiny language model; it knows `<image>`."""
    texts = [text for prompt, answer in reading_corpus(4000) for text in (f"user\n{prompt}", f"assistant\n{answer}")]
    return tiny.make_tokenizer(texts, VOCAB_SIZE, (IMAGE_TOKEN, CLS, DEC), CHAT_TEMPLATE)


def reading_corpus(n: int) -> list[tuple[str, str]]:
    """Pairs (prompt, answer): three in four with a description to read, the others without."""
    rng = random.Random(shapes.DATA_SEED)
    triples = shapes.split_triples()["train"]
    pairs = []
    for _ in range(n):
        triple = rng.choice(triples)
        question, answer = rng.choice(list(shapes.questions(triple).values()))
        pairs.append((f"{shapes.caption(triple)}\n{question}" if rng.random() < 0.75 else question, answer))
    return pairs


def _steps(parameters: list[Any], n_steps: int, learning_rate: float, label: str) -> Iterator[torch.optim.Optimizer]:
    """AdamW with a cosine schedule; the caller makes the gradients and steps. Made the same in every process, so a plain loop."""
    import torch
    from tqdm import tqdm

    optimizer = torch.optim.AdamW(parameters, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=n_steps, pct_start=0.05)
    for _ in tqdm(range(n_steps), desc=label, disable=not sys.stderr.isatty()):
        optimizer.zero_grad()
        yield optimizer
        schedule.step()


TINY_VLMS = {"tiny-llava": _make_llava, "tiny-blip2": _make_blip2, "tiny-flamingo": _make_flamingo}
