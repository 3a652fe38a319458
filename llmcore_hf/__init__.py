"""LLM-Core: a Hugging Face alignment library that is also a 14-day interview course.

Importing this package imports nothing heavy: torch and the trainers load when a module runs, or with the first look at
`llmcore_hf.PPOTrainer` or `llmcore_hf.PPOConfig`.
"""

TYPE_CHECKING = False  # type checkers take it for true; importing it from `typing` would cost more than this file
if TYPE_CHECKING:
    from llmcore_hf.ppo import PPOConfig, PPOTrainer

__all__ = ["PPOConfig", "PPOTrainer", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name in ("PPOConfig", "PPOTrainer"):
        from llmcore_hf import ppo

        value: object = getattr(ppo, name)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
