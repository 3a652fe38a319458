"""Small policies, tokenizers, prompts and trainers for the tests of `llmcore_hf.ppo`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from llmcore_hf.models import tiny
from llmcore_hf.ppo import PPOConfig, PPOTrainer

V = 16  # words of the vocabulary


def tokenizer() -> PreTrainedTokenizerFast:
    vocab = {f"t{i}": i for i in range(V - 2)} | {"<pad>": V - 2, "<eos>": V - 1}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def policy(seed: int, layers: int = 1) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": layers, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": False}
    ends = {"pad_token_id": V - 2, "eos_token_id": V - 1, "bos_token_id": None}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=V, max_position_embeddings=64, **sizes, **heads, **ends))
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    return model.eval()


def config(folder: Path, **options: Any) -> PPOConfig:
    quiet = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    return PPOConfig(str(folder), **{**quiet, "lr_scheduler_type": "constant", "logging_steps": 4, **options})


def digits(n: int, seed: int) -> Dataset:
    from llmcore_hf.data import toy

    rows = toy.questions("train", n + 50 * seed)[-n:]
    return Dataset.from_list(
        [{"prompt": [{"role": "user", "content": p}], "answer": toy.ascending(d)} for p, d in rows]
    )


def correct(prompts, completions, answer, **kwargs):
    return [float(c[0]["content"].strip() == a) for c, a in zip(completions, answer, strict=True)]


def lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")


def small_trainer(folder: Path, peft: Any = None, base: str = "tiny-qwen-base", **options: Any) -> PPOTrainer:
    sizes = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 2, "num_mini_batches": 2}
    rates = {
        "num_ppo_epochs": 2,
        "learning_rate": 1e-3,
        "max_completion_length": 8,
        "kl_target": 0.5,
        "kl_horizon": 200,
    }
    args = config(folder, **{**sizes, **rates, "max_steps": 12, "save_strategy": "steps", "save_steps": 4, **options})
    return PPOTrainer(str(tiny.ensure(base)), correct, args, digits(150, 0), digits(20, 1), peft_config=peft)
