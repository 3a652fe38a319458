"""What does checking every row cost? A million rows, prepared for training both ways: `make bench`.

The same file is made ready for TRL's SFTTrainer by this project (read, validated, converted, held-out rows set aside)
and by plain `load_dataset`. Measured are rows per second until the trainer stands, the peak memory of the process, and
the same again with the cache of the first time. Each measurement is a process of its own with a cache of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import tables

ROOT = Path(__file__).resolve().parent.parent
WORDS = ["data", "model", "answers", "what", "people", "ask", "in", "plain", "words", "数据", "模型", "答案"]


def write_rows(path: Path, n: int) -> None:
    """`n` different conversations of one turn, about 300 bytes each."""
    rng = random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        for i in range(n):
            question, answer = (
                " ".join(rng.choices(WORDS, k=rng.randint(low, high))) for low, high in ((5, 15), (10, 40))
            )
            turns = [{"role": "user", "content": f"{i}: {question}"}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")


def measure(way: str, path: str, num_proc: int) -> None:
    """Prepare the file and print what it took; runs in a process of its own."""
    import time

    from trl import SFTConfig, SFTTrainer

    from llmcore_hf.alignment import training
    from llmcore_hf.data.loading import DataArguments, load

    training.quieten()
    job = training.load_job("tiny-qwen")
    began = time.perf_counter()
    if way == "ours":
        from llmcore_hf.alignment.sft import prompt_limit_of

        limit = prompt_limit_of(job, 1024)
        splits = load(DataArguments(dataset_name=path, test_split_size=0.001), "sft", 0, num_proc, limit=limit)
        train = splits.train
    else:
        from datasets import load_dataset

        train = load_dataset("json", data_files=path)["train"].train_test_split(test_size=0.001, seed=0)["train"]
    loaded = time.perf_counter() - began
    options = {"max_length": 1024, "assistant_only_loss": True, "dataset_num_proc": num_proc}
    with training.stand_in(job, SFTConfig, **options) as parts:
        trainer = SFTTrainer(train_dataset=train, **parts)
    print(
        json.dumps(
            {"rows": len(trainer.train_dataset), "load": loaded, "all": time.perf_counter() - began, "mb": peak_mb()}
        )
    )


def peak_mb() -> float:
    """The largest resident set of this process and of its workers."""
    import resource

    from llmcore_hf.run_dir import peak_rss_mb

    return max(peak_rss_mb(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)


def run(way: str, path: Path, num_proc: int, cache: str) -> dict[str, Any]:
    env = {
        **os.environ,
        "HF_DATASETS_CACHE": cache,
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, __file__, "--measure", way, "--file", str(path), "--num_proc", str(num_proc)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    return json.loads(done.stdout.splitlines()[-1])


def compare(n: int, num_proc: int, repeats: int) -> list[str]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.jsonl")
        write_rows(path, n)
        size = path.stat().st_size / 2**20
        for i in range(repeats):
            found = {}
            for way in ("ours", "plain") if i % 2 else ("plain", "ours"):
                cache = str(Path(folder, f"cache-{way}-{i}"))
                first, again = run(way, path, num_proc, cache), run(way, path, num_proc, cache)
                found[way] = first, again
                subprocess.run(["rm", "-rf", cache], check=True)
            for way, (first, again) in found.items():
                rows.append(
                    f"| {way} | {n:,} ({size:.0f} MB) | {first['load']:.0f} | {first['all']:.0f} | {n / first['all']:,.0f} "
                    f"| {first['mb']:.0f} | {again['all']:.1f} |"
                )
            ratio = found["ours"][0]["all"] / found["plain"][0]["all"]
            memory = found["ours"][0]["mb"] / found["plain"][0]["mb"]
            rows.append(f"| ours / plain | | | {ratio:.2f} | | {memory:.2f} | |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--num_proc", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--measure", choices=["ours", "plain"], help=argparse.SUPPRESS)
    parser.add_argument("--file", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.measure, args.file, args.num_proc)
        return
    head = [
        f"Measured on {tables.machine()}, `--dataset_num_proc {args.num_proc}`.",
        "",
        "| way | rows | loaded, s | trainer ready, s | rows per s | peak MB | again, from the cache, s |",
        "|---|---|---|---|---|---|---|",
    ]
    tables.replace(
        "data", "\n".join([*head, *(row for n in args.rows for row in compare(n, args.num_proc, args.repeats))])
    )


if __name__ == "__main__":
    main()
