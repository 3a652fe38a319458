"""Where a model name leads: a tiny checkpoint, a local folder, a hub id."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcore_hf.errors import UserError
from llmcore_hf.models import tiny

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from trl import ModelConfig


def resolve_name(name: str) -> str:
    """The path or hub id behind `name`; a tiny checkpoint is made first when it is not in the cache."""
    return (
        str(tiny.ensure(name)) if name in tiny.TINY_MODELS else str(Path(name).expanduser() if is_local(name) else name)
    )


def is_local(name: str) -> bool:
    return Path(name).expanduser().is_dir()


def is_adapter(name: str) -> bool:
    """Whether `name` is a folder with a LoRA adapter and no whole model."""
    folder = Path(name).expanduser()
    return (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()


def base_of(adapter: str) -> str:
    """The model that the adapter in a folder was trained on: a local folder, or a hub id.

    Raises:
        UserError: the adapter does not say, or the folder is gone.
    """
    from peft import PeftConfig

    try:
        base = PeftConfig.from_pretrained(adapter).base_model_name_or_path
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"the adapter {adapter} cannot be read: {' '.join(str(error).split())}") from error
    if not base or (Path(base).is_absolute() and not is_local(base)):
        raise UserError(
            f"the adapter {adapter} was trained on {base or 'a model that it does not name'}, which is not there: correct "
            "`base_model_name_or_path` in its adapter_config.json"
        )
    return str(base)


def init_kwargs(model_args: ModelConfig, extra: dict[str, Any] | None) -> dict[str, Any]:
    """Keyword arguments for `from_pretrained`, from TRL's `ModelConfig` and `--model_init_kwargs`."""
    return {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(extra or {}),
    }


def load_tokenizer(name: str, revision: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint, after its config has been read: the cheap part fails first.

    Raises:
        UserError: there is no such checkpoint, it cannot be reached, or it is of an unknown kind.
    """
    from transformers import AutoConfig, AutoTokenizer

    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        AutoConfig.from_pretrained(name, **options)
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"the model `{name}` cannot be loaded. It is none of the tiny checkpoints "
            f"({', '.join(tiny.TINY_MODELS)}), so it must be a local folder or a hub id that can be reached: {reason}"
        ) from error
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:
        raise UserError(f"the model `{name}` has no tokenizer files: its tokenizer turns every text into nothing")
    return tokenizer


def context_length(name: str, revision: str, trust_remote_code: bool) -> int | None:
    """Positions the model was made for, in tokens; None when its config does not say."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def stop_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a generation: those of the model's generation config and the tokenizer's own."""
    configured = model.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return [i for i in dict.fromkeys([*ids, tokenizer.eos_token_id]) if i is not None]
