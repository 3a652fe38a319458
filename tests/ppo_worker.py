"""Trains PPO on recorded completions in one process or several, for `test_ppo_processes.py`.

    python tests/ppo_worker.py record FOLDER CASE...                            # samples, and keeps what it sampled
    torchrun --nproc_per_node 2 tests/ppo_worker.py replay FOLDER CASE...       # the same completions again
    torchrun --nproc_per_node 2 tests/ppo_worker.py live FOLDER CASE...         # samples itself
    torchrun --nproc_per_node 2 tests/ppo_worker.py resume FOLDER CASE...       # live, whole and from a checkpoint

The word `resume` among the cases is the mode of those after it, so that processes start once.
Of each case, `FOLDER/<mode>-<case>-<rank>.json` holds the log and the evaluations, and `.safetensors` weights and gradients.
The trained models are saved in `FOLDER/saved-<mode>-<case>`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from ppo_toys import config, lora, policy, tokenizer
from safetensors.torch import save_file
from torch import Tensor
from transformers import TrainerCallback

from llmcore_hf.ppo import PPOTrainer
from llmcore_hf.ppo.rewards import Batch

ROWS, STEPS = 32, 12  # prompts per rollout over all processes, optimizer steps
ZERO_STAGE = "PPO_WORKER_ZERO_STAGE"  # environment variable: DeepSpeed's ZeRO instead of DDP
N_EVAL = 5  # held-out rows; two processes get three and two of them
COMMON: dict[str, Any] = {
    **{"max_completion_length": 6, "num_ppo_epochs": 2, "num_mini_batches": 2, "max_steps": STEPS, "logging_steps": 1},
    **{
        "learning_rate": 1e-3,
        "kl_coef": 0.1,
        "entropy_coef": 0.01,
        "vf_coef": 0.5,
        "temperature": 0.9,
        "eval_strategy": "no",
    },
}
CASES: dict[str, dict[str, Any]] = {
    "full": {"kl_target": 0.5, "kl_horizon": 300, "whiten_rewards": True, "gradient_accumulation_steps": 2},
    "bootstrap": {"truncated_completions": "bootstrap", "gamma": 0.97, "whiten_advantages": False},
    "stop": {"target_kl": 1e-3, "learning_rate": 3e-3, "lr_scheduler_type": "linear"},
    "one backbone": {"peft": True, "share_backbone": True, "gradient_accumulation_steps": 2},
    "two backbones": {"peft": True, "share_backbone": False},
    "checkpointing": {"activation_checkpointing": True},
}
LIVE = {f"one prompt, seed {seed}": {"seed": seed, "max_steps": 16, "num_mini_batches": 1} for seed in range(6)}


def few_threes(completion_ids: list[list[int]], log_metric: Any, **kwargs: Any) -> list[float]:
    log_metric("threes", sum(ids.count(3) for ids in completion_ids) / len(completion_ids))
    return [len(ids) / 6 - sum(token == 3 for token in ids) for ids in completion_ids]


def even_rows(completion_ids: list[list[int]], row: list[int], **kwargs: Any) -> list[float | None]:
    """Has nothing to say about odd rows."""
    return [None if i % 2 else float(ids[0] < 7) for ids, i in zip(completion_ids, row, strict=True)]


def fives(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [float(ids.count(5)) for ids in completion_ids]


def prompts(n: int, start: int = 0) -> Dataset:
    """Prompts of one to three words."""
    words = [[i % 14, 3 * i % 14, 5 * i % 14][: 1 + i % 3] for i in range(start, start + n)]
    return Dataset.from_dict({"prompt": [" ".join(f"t{w}" for w in row) for row in words], "row": list(range(n))})


def deepspeed_config(stage: int) -> dict[str, Any]:
    """ZeRO with torch's AdamW; stage 3 shards even the smallest weights."""
    return {
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        **{"zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True},
        **{
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
        },
    }


def make_trainer(folder: Path, case: str, world_size: int, **more: Any) -> PPOTrainer:
    options = {**COMMON, **(CASES | LIVE)[case], **more}
    peft = lora() if options.pop("peft", False) else None
    micro = options.get("gradient_accumulation_steps", 1) * options["num_mini_batches"] * world_size
    if stage := os.environ.get(ZERO_STAGE):
        options["deepspeed"] = deepspeed_config(int(stage))
    args = config(folder, per_device_train_batch_size=ROWS // micro, **options)
    data = {"train_dataset": prompts(3 * ROWS), "eval_dataset": prompts(N_EVAL, start=7)}
    model = folder / "model"
    if args.process_index == 0:
        policy(0, layers=2).save_pretrained(model)
    with args.main_process_first(local=False):
        pass
    rewards: list[Any] = [few_threes, even_rows]
    if case in LIVE:
        rewards = [fives]
        data["train_dataset"] = Dataset.from_dict({"prompt": ["t1"] * ROWS, "row": list(range(ROWS))})
    return PPOTrainer(str(model), rewards, args, **data, processing_class=tokenizer(), peft_config=peft)


class Completions:
    """What the policy answered, by rollout and row."""

    def __init__(self, trainer: PPOTrainer, file: Path, mode: str) -> None:
        self.trainer, self.file, self.mode = trainer, file, mode
        self.known: dict[str, list[int]] = json.loads(file.read_text()) if mode == "replay" else {}
        self.complete = trainer.complete
        trainer.complete = self

    def __call__(self, rows: list[dict[str, Any]], generation: Any, name: str) -> tuple[Batch, list[list[int]]]:
        keys = [f"{name}: {row['row']}" for row in rows]
        if self.mode == "replay" and generation.do_sample:
            batch, ids = self.complete(rows, self.trainer.greedy, name)  # for the prompts and columns
            return Batch(batch.prompts, batch.completions, [self.known[key] for key in keys], batch.columns, name), ids
        batch, ids = self.complete(rows, generation, name)
        if generation.do_sample:
            self.known |= dict(zip(keys, batch.completion_ids, strict=True))
        return batch, ids

    def save(self) -> None:
        if self.mode == "record":
            self.file.write_text(json.dumps(self.known))


class Gradients(TrainerCallback):
    """Gradients of the first optimizer step."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 0:
            named = {name.removeprefix("module."): p for name, p in model.named_parameters() if p.grad is not None}
            self.found = {name: parameter.grad.clone().contiguous() for name, parameter in named.items()}


def in_order(n: int, **kwargs: Any) -> Tensor:
    """Mini-batches of rows in their order: the same ones, however many processes share them."""
    return torch.arange(n)


def run(mode: str, folder: Path, case: str) -> None:
    trainer = make_trainer(folder / f"trainer-{mode}", case, int(os.environ.get("WORLD_SIZE", "1")))
    rank = trainer.args.process_index
    completions = Completions(trainer, folder / f"{case}.json", mode)
    gradients = Gradients()
    trainer.add_callback(gradients)
    before = trainer.evaluate()
    trainer.train()
    completions.save()
    trainer.complete = completions.complete
    few = trainer.evaluate(prompts(1, start=3), metric_key_prefix="few")
    found = {
        "world_size": trainer.args.world_size,
        "wrapper": type(trainer.model_wrapped).__name__,
        "log": [row for row in trainer.state.log_history if "loss" in row],
        "eval": [before, trainer.evaluate(), few],
        "sampled": completions.known,
    }
    name = f"{mode}-{case}-{rank}"
    (folder / f"{name}.json").write_text(json.dumps(found))
    gathered = {f"gradient {n}": g for n, g in gradients.found.items()} | weights(trainer)
    save_file(gathered, folder / f"{name}.safetensors")
    trainer.save_model(str(folder / f"saved-{mode}-{case}"))


def weights(trainer: PPOTrainer) -> dict[str, Tensor]:
    """What was trained, whole; under ZeRO-3 in process 0 alone."""
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped) or {}
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    return {f"weight {n}": w.detach().clone().contiguous() for n, w in state.items() if n in trained}


def resume(folder: Path, case: str) -> None:
    """An uninterrupted run, and one that goes on from the checkpoint it left after two of three rollouts."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    checkpoint = folder / f"trainer-{case}"
    for part in ("whole", "resumed"):
        trainer = make_trainer(checkpoint, case, processes, save_strategy="steps", save_steps=8)
        trainer.train(resume_from_checkpoint=str(checkpoint / "checkpoint-8") if part == "resumed" else None)
        log = [row for row in trainer.state.log_history if "loss" in row]
        name = f"{part}-{case}-{trainer.args.process_index}"
        (folder / f"{name}.json").write_text(json.dumps({"log": log, "wrapper": type(trainer.model_wrapped).__name__}))
        save_file(weights(trainer), folder / f"{name}.safetensors")


def main(mode: str, folder: str, *cases: str) -> None:
    torch.set_num_threads(1)
    if mode != "live":
        shuffled = torch.randperm
        torch.randperm = lambda n, **kwargs: shuffled(n, **kwargs) if kwargs else in_order(n)
    for case in cases:
        if case == "resume":
            mode = case
        elif mode == "resume":
            resume(Path(folder), case)
        else:
            run(mode, Path(folder), case)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # nobody leaves while another still waits for a message
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
