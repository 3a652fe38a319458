"""Proximal policy optimization of language models, for current TRL: `PPOTrainer` and `PPOConfig`."""

from llmcore_hf.ppo.config import PPOConfig
from llmcore_hf.ppo.trainer import PPOTrainer

__all__ = ["PPOConfig", "PPOTrainer"]
