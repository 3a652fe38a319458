"""The scores of a saved reward model, by every way of loading it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmcore_hf.data import toy


def by_hand(model: Any, tokenizer: Any, rows: list[dict[str, Any]], side: str) -> list[float]:
    """The score of each answer, one by one."""
    import torch

    template = {"return_dict": True, "return_tensors": "pt"}
    with torch.no_grad():
        return [
            float(model.eval()(**tokenizer.apply_chat_template(row["prompt"] + row[side], **template)).logits[0, 0])
            for row in rows
        ]


def assert_loads_and_scores_as_told(run: Path, summary: dict[str, Any], adapter: bool) -> None:
    """What transformers, PEFT and the PPO trainer load gives the scores that the run's samples show."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from llmcore_hf.ppo import rewards

    rows = toy.toy_sort_preference()["test"].select(range(len(summary["samples"]))).to_list()
    tokenizer = AutoTokenizer.from_pretrained(run)
    # The labels of an adapter's base are those of a language model: two, unless something else is said.
    options = {"num_labels": 1} if adapter else {}
    model = AutoModelForSequenceClassification.from_pretrained(run, **options)
    found = {side: by_hand(model, tokenizer, rows, side) for side in ("chosen", "rejected")}
    for sample, row, chosen, rejected in zip(summary["samples"], rows, *found.values(), strict=True):
        assert sample["prompt"] == row["prompt"][0]["content"]
        assert sample["after"] == f"{chosen:+.2f} > {rejected:+.2f}"
    if adapter:
        from peft import AutoPeftModelForSequenceClassification

        adapted = AutoPeftModelForSequenceClassification.from_pretrained(run, num_labels=1)
        assert by_hand(adapted, tokenizer, rows, "chosen") == pytest.approx(found["chosen"], abs=1e-4)
    (scorer,) = rewards.make_scorers(str(run), None)
    for side, expected in found.items():
        texts = [[row[name] for row in rows] for name in ("prompt", side)]
        batch = rewards.Batch(*texts, [[0]] * len(rows), {}, "a batch")
        assert scorer(batch, 2).tolist() == pytest.approx(expected, abs=1e-4)
