"""The toy recipes as a plain TRL script, without this project's trainer code: the peer of `wrapper_overhead.py`.

python benchmarks/plain_trl.py dpo 42      # prints one JSON line: losses per log step, training seconds
"""

from __future__ import annotations

import json
import sys
import warnings

from transformers import AutoTokenizer, PrinterCallback, set_seed
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from llmcore_hf.data import toy
from llmcore_hf.models import tiny

COMMON = {
    "output_dir": "unused",
    "use_cpu": True,
    "bf16": False,
    "activation_checkpointing": False,
    "gradient_checkpointing": False,
    "dataloader_pin_memory": False,
    "disable_tqdm": True,
    "save_strategy": "no",
    "max_length": 64,
    "per_device_train_batch_size": 32,
    "lr_scheduler_type": "cosine",
    "logging_nan_inf_filter": False,
}
SFT = {"max_steps": 200, "learning_rate": 4e-3, "warmup_steps": 10, "logging_steps": 5}
DPO = {
    "max_steps": 80,
    "learning_rate": 5e-4,
    "warmup_steps": 5,
    "logging_steps": 2,
    "loss_type": ["sigmoid", "sft"],
    "beta": 0.1,
}


def make_trainer(module: str, seed: int) -> SFTTrainer | DPOTrainer:
    if module == "sft":
        path, config, trainer, data = (
            tiny.ensure("tiny-qwen"),
            SFTConfig(seed=seed, **COMMON, **SFT),
            SFTTrainer,
            toy.toy_sort,
        )
    else:
        path, config, trainer = tiny.ensure("tiny-qwen-base"), DPOConfig(seed=seed, **COMMON, **DPO), DPOTrainer
        data = toy.toy_sort_preference
    tokenizer = AutoTokenizer.from_pretrained(path)
    return trainer(model=str(path), args=config, train_dataset=data()["train"], processing_class=tokenizer)


def main() -> None:
    module, seed = sys.argv[1], int(sys.argv[2])
    warnings.filterwarnings("ignore", category=FutureWarning)
    set_seed(seed)
    trainer = make_trainer(module, seed)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    rows = trainer.state.log_history
    result = {
        "losses": [row["loss"] for row in rows if "loss" in row],
        "train_seconds": next(row["train_runtime"] for row in rows if "train_runtime" in row),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
