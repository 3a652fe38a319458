"""Checkpoints of the three architectures on disk with weights that nobody trained: made in a second, for tests of everything
but what a model has learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llmcore_hf.vlm import tiny

MODULES = ("llava", "blip2", "flamingo")


def make(folder: Path) -> dict[str, Path]:
    """Module -> its checkpoint below `folder`, made as the tiny ones are, of parts that took one step."""
    parts = {kind: folder / f"part-{kind}" for kind in ("clip", "blip2", "reader")}
    for part in parts.values():
        part.mkdir()
    for kind in ("clip", "blip2"):
        tiny._make_tower(kind, parts[kind], n_images=4, n_steps=1)
    tiny._make_reader(parts["reader"], n_rows=4, n_steps=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "ensure_tower", lambda kind: parts[kind])
        patch.setattr(tiny, "ensure_language_model", lambda few_shot=False: parts["reader"])
        for module in MODULES:
            (folder / module).mkdir()
            getattr(tiny, f"_make_{module}")(folder / module)
    return {module: folder / module for module in MODULES}


def with_language_model(blip2: Path, text_config: Any, folder: Path) -> Path:
    """BLIP-2 as published: with another language model, no text in its Q-Former, and no chat template."""
    from transformers import AutoConfig, AutoProcessor, Blip2Config, Blip2ForConditionalGeneration

    config, processor = AutoConfig.from_pretrained(blip2), AutoProcessor.from_pretrained(blip2)
    config.qformer_config.use_qformer_text_input = False
    made = Blip2Config(
        vision_config=config.vision_config,
        qformer_config=config.qformer_config,
        text_config=text_config,
        num_query_tokens=config.num_query_tokens,
        image_token_index=config.image_token_index,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    model = Blip2ForConditionalGeneration(made)
    torch.nn.init.normal_(model.query_tokens, std=0.5)
    model.save_pretrained(folder)
    processor.chat_template = processor.tokenizer.chat_template = None
    processor.save_pretrained(folder)
    return folder


def opens_with(processor: Any, token: str) -> Any:
    """The processor with a tokenizer that puts `token` before every text, as those of Llama and OPT do."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = processor.tokenizer
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single=f"{token} $A", special_tokens=[(token, tokenizer.convert_tokens_to_ids(token))]
    )
    tokenizer.bos_token = token
    return processor
