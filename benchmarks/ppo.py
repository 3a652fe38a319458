"""`PPOTrainer` against TRL 1.12's, the last one TRL had, on the same work; and the memory of one backbone: `make bench-ppo`.

Both get the same GPT-2 with random weights, prompts, reward, batch, epochs and learning rate, each in processes of its own,
in turn. The reward is 5 for even token ids alone and -5 for odd ones alone, so that it costs nothing. Completions end by
chance: the embedding of the end token is set so that each token is the last one with a given probability; with 0 all have the
same length. Every repetition has a seed of its own, because the lengths that are drawn decide how much padding there is.
Counted are completion tokens per second of processor time, one thread, from the first rollout to the last: alone on a machine
that is the wall time, and beside other work it still compares the two. TRL's peer is installed into `build/trl`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tables

ROOT = Path(__file__).resolve().parent.parent
PEER = ROOT / "build" / "trl"
N_PROMPT = 16  # tokens, the same for all, so that neither side pads prompts
EPOCHS = 4
MIN_SPEEDUP, MAX_MEMORY = 1.5, 0.45


@dataclass
class Work:
    """Sizes of one comparison."""

    name: str
    hidden: int
    layers: int
    vocabulary: int
    batch: int
    micro_batch: int
    length: int
    end_probability: float
    learning_rate: float
    rollouts: int
    seed: int = 0


WORKS = (
    Work("toy size", 64, 2, 320, 64, 64, 8, 0.2, 1e-5, 30),
    Work("10 M parameters, lengths differ", 320, 6, 4096, 32, 4, 160, 1 / 80, 2e-6, 4),
    Work("10 M parameters, equal lengths", 320, 6, 4096, 32, 4, 128, 0.0, 2e-6, 3),
)
# The fewer sequences a forward pass has, the more of the memory is weights; the first row is the one with a figure to reach.
MEMORY = tuple(Work("124 M parameters", 768, 12, 50257, 8, n, 32, 0.0, 1e-5, 1) for n in (1, 2))


# ------------------------------------------------------------ one side, in a process of its own


def make_model(work: Work, tied: bool = False) -> Any:
    """GPT-2 whose end token (id 1) is the next one with `end_probability`, as long as it is untrained."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=work.hidden,
        n_layer=work.layers,
        n_head=work.hidden // 32,
        vocab_size=work.vocabulary,
        n_positions=N_PROMPT + work.length,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
        tie_word_embeddings=tied,
    )
    model = GPT2LMHeadModel(config)
    p = work.end_probability
    logit = math.log(p * work.vocabulary / (1 - p)) if p else -30.0
    weight = model.lm_head.weight
    with torch.no_grad():
        # ln_f adds its bias to every hidden state, and the end token's embedding reads it
        bias = model.transformer.ln_f.bias.normal_()
        if not tied:  # even ids have something in common, as words of one kind have: what one teaches holds for all
            kind = weight.std() * torch.randn(work.hidden)
            kind -= bias * kind.dot(bias) / bias.dot(bias)
            weight[::2] += kind
            weight[1::2] -= kind  # so that the end token becomes little rarer when even ids become more frequent
        weight[1] = logit * bias / bias.dot(bias)
        weight[0] = -30.0 * bias / bias.dot(bias)  # padding is never sampled
    return model


def make_tokenizer() -> Any:
    """Words `t2 t3 ...` are the ids 2, 3, ...; 0 is padding, 1 the end."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<end>": 1, **{f"t{i}": i for i in range(2, 320)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", padding_side="left"
    )


def prompts(n: int) -> list[str]:
    import random

    rng = random.Random(0)
    return [" ".join(f"t{rng.randrange(2, 320)}" for _ in range(N_PROMPT)) for _ in range(n)]


class Clock:
    """The processor time at which each rollout was scored, its completion tokens and mean reward."""

    def __init__(self, batch: int) -> None:
        self.batch, self.seen = batch, 0
        self.times: list[float] = []
        self.tokens: list[int] = []
        self.rewards: list[float] = []

    def rewards_of(self, completions: list[list[int]]) -> list[float]:
        if self.seen % self.batch == 0:
            self.times.append(time.process_time())
            self.tokens.append(0)
            self.rewards.append(0.0)
        self.seen += len(completions)
        found = [5 * sum(1 - 2 * (i % 2) for i in ids if i > 1) / len(ids) for ids in completions]
        self.tokens[-1] += sum(map(len, completions))
        self.rewards[-1] += sum(found) / self.batch
        return found

    def result(self) -> dict[str, Any]:
        seconds = self.times[-1] - self.times[0]
        lengths = [n / self.batch for n in self.tokens]
        fifth = max(len(self.rewards) // 5, 1)
        return {
            "tokens_per_second": sum(self.tokens[1:]) / seconds,
            "mean_length": statistics.fmean(lengths),
            "reward": [statistics.fmean(self.rewards[:fifth]), statistics.fmean(self.rewards[-fifth:])],
            "reward_per_second": (statistics.fmean(self.rewards[-fifth:]) - self.rewards[0]) / seconds,
        }


def common(work: Work, folder: str) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "per_device_train_batch_size": work.micro_batch,
        "gradient_accumulation_steps": work.batch // work.micro_batch,
        "num_ppo_epochs": EPOCHS,
        "num_mini_batches": 1,
        "total_episodes": work.batch * work.rollouts,
        "learning_rate": work.learning_rate,
        "lam": 1.0,  # all tokens count alike in the reward, so it must reach the first one undiminished
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,  # TRL's loop does not clip gradients
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1000,
        "seed": work.seed,
    }


def run_ours(work: Work, folder: str) -> dict[str, Any]:
    from datasets import Dataset

    from llmcore_hf import PPOConfig, PPOTrainer

    clock = Clock(work.batch)
    args = PPOConfig(
        **common(work, folder),
        max_completion_length=work.length,
        local_rollout_forward_batch_size=work.batch,
        truncated_completions="score",
    )
    PPOTrainer(
        make_model(work),
        lambda completion_ids, **kwargs: clock.rewards_of(completion_ids),
        args,
        Dataset.from_dict({"prompt": prompts(work.batch * work.rollouts)}),
        processing_class=make_tokenizer(),
    ).train()
    return clock.result()


def run_trl(work: Work, folder: str, rollout_batch: int, stub_gc: bool) -> dict[str, Any]:
    """TRL's trainer takes token ids, and a reward model in the form of a transformer with a score head."""
    sys.path.insert(0, str(PEER))
    import torch
    from datasets import Dataset
    from torch import nn
    from transformers import AutoModelForSequenceClassification
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    if stub_gc:
        ppo_trainer.gc = SimpleNamespace(collect=lambda: 0)
    clock = Clock(work.batch)

    class Reward(nn.Module):
        base_model_prefix = "backbone"

        def backbone(self, input_ids: Any, attention_mask: Any, **kwargs: Any) -> Any:
            rows = zip(input_ids[:, N_PROMPT:].tolist(), attention_mask[:, N_PROMPT:].tolist(), strict=True)
            found = clock.rewards_of([[i for i, kept in zip(*row, strict=True) if kept] for row in rows])
            return SimpleNamespace(hidden_states=[torch.tensor(found)[:, None, None].expand(-1, input_ids.shape[1], 1)])

        def score(self, hidden: Any) -> Any:
            return hidden

    args = PPOConfig(
        **common(work, folder),
        response_length=work.length,
        local_rollout_forward_batch_size=rollout_batch,
        stop_token_id=1,
        num_sample_generations=0,
        temperature=1.0,
    )
    model, tokenizer = make_model(work), make_tokenizer()
    with tempfile.TemporaryDirectory() as saved:
        model.save_pretrained(saved)
        value_model = AutoModelForSequenceClassification.from_pretrained(saved, num_labels=1)
    dataset = Dataset.from_dict({"input_ids": tokenizer(prompts(work.batch * work.rollouts))["input_ids"]})
    PPOTrainer(
        args,
        tokenizer,
        model,
        ref_model=None,
        reward_model=Reward(),
        train_dataset=dataset,
        value_model=value_model,
        eval_dataset=dataset.select(range(work.batch)),
    ).train()
    return clock.result()


def run_memory(work: Work, folder: str, share: bool) -> dict[str, Any]:
    """Peak memory above that after the imports, of one rollout and the updates on it, with LoRA."""
    import psutil
    from datasets import Dataset
    from peft import LoraConfig

    from llmcore_hf import PPOConfig, PPOTrainer
    from llmcore_hf.run_dir import peak_rss_mb

    model = make_model(Work("", 32, 1, 320, 1, 1, 8, 0.0, 0.0, 1))  # whatever is imported late
    baseline = psutil.Process().memory_info().rss
    model = make_model(work, tied=True)
    args = PPOConfig(
        **common(work, folder),
        max_completion_length=work.length,
        local_rollout_forward_batch_size=work.micro_batch,
        share_backbone=share,
    )
    PPOTrainer(
        model,
        lambda completion_ids, **kwargs: [float(len(ids)) for ids in completion_ids],
        args,
        Dataset.from_dict({"prompt": prompts(work.batch)}),
        processing_class=make_tokenizer(),
        peft_config=LoraConfig(r=16, target_modules=["c_attn"], fan_in_fan_out=True),
        ref_model=None if share else make_model(work, tied=True),
    ).train()
    return {
        "megabytes": (peak_rss_mb() * 2**20 - baseline) / 1e6,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


# ------------------------------------------------------------ both sides in turn


def in_process(kind: str, work: Work, *more: str) -> dict[str, Any]:
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }
    command = [sys.executable, __file__, "--worker", kind, json.dumps(asdict(work)), *more]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def worker(kind: str, work: Work, more: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        if kind == "ours":
            return run_ours(work, folder)
        if kind == "memory":
            return run_memory(work, folder, more[0] == "shared")
        return run_trl(work, folder, int(more[0]), more[1] == "stubbed")


def compare(work: Work, repeats: int) -> tuple[list[str], bool]:
    """Rows of the table: ours, TRL tuned (its rollout batch at its best, garbage collections stubbed), TRL untouched."""
    sizes = sorted({work.micro_batch, work.batch})
    best = max(sizes, key=lambda size: in_process("trl", work, str(size), "stubbed")["tokens_per_second"])
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], "TRL 1.12, tuned": [], "TRL 1.12": []}
    for seed in range(repeats):
        drawn = replace(work, seed=seed)
        runs["ours"].append(in_process("ours", drawn))
        runs["TRL 1.12, tuned"].append(in_process("trl", drawn, str(best), "stubbed"))
        own, other = (runs[name][-1]["tokens_per_second"] for name in ("ours", "TRL 1.12, tuned"))
        print(f"{work.name}: {own:.0f} tokens per second, TRL tuned {other:.0f}", file=sys.stderr)
    runs["TRL 1.12"].append(in_process("trl", work, str(best), "untouched"))
    speeds = {name: [run["tokens_per_second"] for run in found] for name, found in runs.items()}
    rows = []
    for name, found in runs.items():
        ratios = [own / other for own, other in zip(speeds["ours"], speeds[name], strict=False)]
        first, last = (statistics.fmean(run["reward"][i] for run in found) for i in (0, 1))
        rows.append(
            f"| {work.name} | {name} | {statistics.median(speeds[name]):.0f} | {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} - {max(ratios):.2f}) | {statistics.fmean(run['mean_length'] for run in found):.1f} "
            f"| {first:.3f} → {last:.3f} | {60 * statistics.fmean(run['reward_per_second'] for run in found):.2f} |"
        )
    ratio = statistics.median(own / other for own, other in zip(speeds["ours"], speeds["TRL 1.12, tuned"], strict=True))
    gains = {name: statistics.fmean(run["reward_per_second"] for run in found) for name, found in runs.items()}
    needed = 1.0 if "toy" in work.name else MIN_SPEEDUP if work.end_probability else 0.0
    learns = work.end_probability == 0 or gains["ours"] >= gains["TRL 1.12, tuned"] > 0
    return rows, ratio >= needed and learns


def memory(work: Work) -> tuple[str, bool]:
    """Row of the table: policy, critic and reference on one backbone, and as three models."""
    shared, separate = (in_process("memory", work, how)["megabytes"] for how in ("shared", "separate"))
    row = f"| {work.name} | {work.micro_batch} | {shared:.0f} MB | {separate:.0f} MB | {shared / separate:.2f} |"
    return row, shared / separate <= MAX_MEMORY


def install_peer() -> None:
    if not PEER.is_dir():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(PEER), "trl==1.12.0"]
        subprocess.run(command, check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        kind, work, *more = args.worker
        print(json.dumps(worker(kind, Work(**json.loads(work)), more)))
        return 0
    install_peer()
    results = [compare(work, args.repeats) for work in WORKS]
    used = [memory(work) for work in MEMORY]
    tables.replace(
        "ppo",
        "\n".join(
            [
                f"Measured on {tables.machine()}. {EPOCHS} epochs on each rollout. To reach: not slower at toy size, at least "
                f"{MIN_SPEEDUP} times where lengths differ.",
                "",
                "| work | trainer | completion tokens per second of processor time | ours / this | mean length | reward, first → last fifth "
                "| gained per minute |",
                "|---|---|---|---|---|---|---|",
                *(row for rows, _ in results for row in rows),
                "",
                "Peak memory above the imports, LoRA r = 16, a batch of 8 sequences of 48 tokens: policy, critic and "
                f"reference on one backbone, or as three models. To reach: at most {MAX_MEMORY} in the first row.",
                "",
                "| parameters | sequences per forward pass | one backbone | three models | ratio |",
                "|---|---|---|---|---|",
                *(row for row, _ in used),
            ]
        ),
    )
    return 0 if all(good for _, good in [*results, used[0]]) else 1


if __name__ == "__main__":
    sys.exit(main())
