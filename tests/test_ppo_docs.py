"""docs/ppo.md and its Chinese twin name every option of `PPOConfig` and every metric that `PPOTrainer` logs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from llmcore_hf.models import tiny
from llmcore_hf.ppo import PPOConfig, PPOTrainer

DOCS = Path(__file__).parent.parent / "docs"
PAGES = {name: (DOCS / name).read_text(encoding="utf-8") for name in ("ppo.md", "ppo.zh-CN.md")}
SETTINGS = {"_VALID_DICT_FIELDS", "logging_steps"}  # of the Trainer, not of PPO


@pytest.mark.parametrize("page", PAGES)
def test_every_option_is_explained(page: str) -> None:
    missing = [name for name in set(PPOConfig.__annotations__) - SETTINGS if f"`{name}`" not in PAGES[page]]
    assert not missing


def number_of_characters(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(len(completion)) for completion in completions]


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_every_logged_metric_is_explained(tmp_path: Path) -> None:
    data = Dataset.from_dict({"prompt": ["a", "b", "c", "d"]})
    args = PPOConfig(
        str(tmp_path),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=4,
        max_steps=4,
        logging_steps=4,
        max_completion_length=4,
        entropy_coef=0.01,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = PPOTrainer(str(tiny.ensure("tiny-qwen")), number_of_characters, args, data, data)
    trainer.train()
    trainer.evaluate()
    logged = {name for row in trainer.state.log_history for name in row if not name.startswith("train_")}
    logged = {name.replace("eval_sampled_", "eval_") for name in logged} - {"step", "total_flos"}
    assert len(logged) > 25
    for text in PAGES.values():
        named = text.replace("<名字>", "<name>")
        missing = [name for name in logged if f"`{name.replace('number_of_characters', '<name>')}`" not in named]
        assert not missing
