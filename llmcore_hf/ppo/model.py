"""Policy and critic as one module, so that one optimizer (and one DeepSpeed engine) trains both.

`SeparateModels` holds two models. `SharedBackbone` holds one copy of the base weights with two LoRA adapters: the policy's
and the critic's; with both off it is the reference.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING
from transformers.modeling_layers import GenericForTokenClassification
from trl.trainer.utils import selective_log_softmax, selective_log_softmax_and_entropy

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel

HEADS = ("score", "classifier")  # names that token classifiers give their last layer
VALUE = "value"  # name of the critic's adapter
VALUE_FOLDER = "value_model"  # where the critic is saved, beside the policy
CHECKPOINT_WEIGHTS = "model.safetensors"  # where the Trainer looks when it resumes
POLICY_PREFIX = "policy."
ONE_PASS = (
    2**18
)  # logits, 1 MB; TRL's loop over sequences saves memory, and takes three times as long where there is none to save


class PolicyAndValue(nn.Module):
    """What both kinds share: `policy`, a causal language model, and what the Trainer asks of a model."""

    def __init__(self, policy: PreTrainedModel, temperature: float) -> None:
        super().__init__()
        self.policy = policy
        self.temperature = temperature
        self.keeps_logits = "logits_to_keep" in inspect.signature(_base(policy).forward).parameters
        self._keys_to_ignore_on_save: list[str] = []  # the Trainer asks for it when it resumes
        self.register_load_state_dict_pre_hook(_understand_checkpoint)

    @property
    def config(self) -> Any:
        return self.policy.config

    @property
    def generation_config(self) -> Any:
        return self.policy.generation_config

    def tie_weights(self) -> None:
        _base(self.policy).tie_weights()

    # TRL turns activation checkpointing off and on again around `generate`, by its old name.
    @property
    def is_gradient_checkpointing(self) -> bool:
        return self.policy.is_activation_checkpointing

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        for model in self.parts():
            model.activation_checkpointing_enable(**kwargs)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        self.activation_checkpointing_enable(activation_checkpointing_kwargs=gradient_checkpointing_kwargs)

    def gradient_checkpointing_disable(self) -> None:
        for model in self.parts():
            model.activation_checkpointing_disable()

    def parts(self) -> list[nn.Module]:
        """The models whose layers are trained."""
        return [self.policy]

    def mark_trainable(self) -> None:
        """Let exactly what is trained require a gradient, whoever has looked at the model in between."""

    @property
    def has_adapters(self) -> bool:
        return hasattr(self.policy, "peft_config")

    def in_checkpoint(self) -> set[str]:
        """Weights in the `model.safetensors` of a checkpoint: with adapters all that are trained, else the policy's."""
        if self.has_adapters:
            self.mark_trainable()
            return {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        return {name for name in self.state_dict() if name.startswith(POLICY_PREFIX)}

    def save(self, folder: Path, state: dict[str, Tensor], is_checkpoint: bool) -> None:
        """Write policy and critic, given the state dict of this module, so that `from_pretrained` loads them.

        A checkpoint also gets the `model.safetensors` that the Trainer looks for when it resumes.
        """
        self.save_parts(folder, state)
        if is_checkpoint and self.has_adapters:
            names = self.in_checkpoint()
            _save({name: tensor for name, tensor in state.items() if name in names}, folder / CHECKPOINT_WEIGHTS)

    def save_parts(self, folder: Path, state: dict[str, Tensor]) -> None:
        raise NotImplementedError

    def load_critic(self, folder: Path) -> None:
        """Bring back what the Trainer does not load from a checkpoint's `model.safetensors`."""
        if not self.has_adapters:
            weights = load_file(folder / VALUE_FOLDER / CHECKPOINT_WEIGHTS)
            self.value_model.load_state_dict(weights, strict=False)  # tied weights are saved once

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None, n_completion: int, with_entropy: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Log-probabilities of the completion tokens and values of the texts before them, in one call for DDP's sake.

        Args:
            input_ids: (B, P + T) prompts padded on the left, completions padded on the right.
            attention_mask: (B, P + T), or None where no prompt is padded: no token looks at what comes after it.
            n_completion: T.
            with_entropy: also the entropy of each token's distribution, with gradient.

        Returns:
            log-probabilities (B, T) at the sampling temperature, entropies (B, T) or None, values (B, T): `values[:, t]`
            belongs to the text before token t.
        """
        logprobs, entropies = self.logprobs(input_ids, attention_mask, n_completion, with_entropy)
        return logprobs, entropies, self.values(*_without_last(input_ids, attention_mask), n_completion - 1)

    def logprobs(
        self, input_ids: Tensor, attention_mask: Tensor | None, n_completion: int, with_entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities (B, T) of the policy, and entropies (B, T) or None."""
        return completion_logprobs(
            self.policy,
            input_ids,
            attention_mask,
            n_completion,
            temperature=self.temperature,
            keeps_logits=self.keeps_logits,
            with_entropy=with_entropy,
        )

    def values(self, input_ids: Tensor, attention_mask: Tensor | None, n_completion: int) -> Tensor:
        """(B, T + 1) in float32: of the texts before each completion token, and of the whole one."""
        raise NotImplementedError


class SeparateModels(PolicyAndValue):
    """A policy and a critic, `AutoModelForTokenClassification` with one label: a value for the text up to each token."""

    def __init__(self, policy: PreTrainedModel, value_model: PreTrainedModel, temperature: float) -> None:
        super().__init__(policy, temperature)
        self.value_model = value_model

    def parts(self) -> list[nn.Module]:
        return [self.policy, self.value_model]

    def values(self, input_ids: Tensor, attention_mask: Tensor | None, n_completion: int) -> Tensor:
        logits = self.value_model(**_inputs(input_ids, attention_mask)).logits  # (B, P + T, 1)
        return logits[:, -n_completion - 1 :, 0].float()

    def save_parts(self, folder: Path, state: dict[str, Tensor]) -> None:
        """The policy into `folder` and the critic into `folder/value_model`, both as `save_pretrained` does."""
        for model, name, target in (
            (self.policy, POLICY_PREFIX, folder),
            (self.value_model, "value_model.", folder / VALUE_FOLDER),
        ):
            own = {key.removeprefix(name): tensor for key, tensor in state.items() if key.startswith(name)}
            model.save_pretrained(target, state_dict=own)


class SharedBackbone(PolicyAndValue):
    """One base model under LoRA: adapter `default` is the policy, adapter `value` with a linear head the critic."""

    def __init__(self, policy: Any, peft_config: PeftConfig, temperature: float) -> None:
        super().__init__(policy, temperature)
        self.head_name = name_of_head(policy.config)
        value_config = copy.deepcopy(peft_config)
        policy.add_adapter(VALUE, value_config)
        weight = policy.get_output_embeddings().weight
        self.value_head = nn.Linear(policy.config.get_text_config().hidden_size, 1, device=weight.device)
        for parameter in self.value_head.parameters():
            nn.init.zeros_(parameter)  # every value is 0 before the first update
        self.mark_trainable()

    def mark_trainable(self) -> None:
        # PEFT freezes an adapter that is not active, also when `disable_adapter` puts the active one back
        self.policy.set_requires_grad(["default", VALUE], True)

    @contextmanager
    def value_adapter(self) -> Iterator[None]:
        self.policy.set_adapter(VALUE)
        try:
            yield
        finally:
            self.policy.set_adapter("default")
            self.mark_trainable()

    def values(self, input_ids: Tensor, attention_mask: Tensor | None, n_completion: int) -> Tensor:
        with self.value_adapter():
            backbone = _base(self.policy).base_model
            hidden = backbone(**_inputs(input_ids, attention_mask)).last_hidden_state  # (B, P + T, hidden)
        return self.value_head(hidden[:, -n_completion - 1 :].float()).squeeze(-1)

    def save_parts(self, folder: Path, state: dict[str, Tensor]) -> None:
        """The policy's adapter into `folder`; the critic's into `folder/value_model`, as one for token classification."""
        from peft import get_peft_model_state_dict

        own = {k.removeprefix(POLICY_PREFIX): v for k, v in state.items() if k.startswith(POLICY_PREFIX)}
        self.policy.save_pretrained(folder, selected_adapters=["default"], state_dict=own)
        adapter = get_peft_model_state_dict(self.policy, state_dict=own, adapter_name=VALUE)
        head = self.head_name
        for name in ("weight", "bias"):
            adapter[f"base_model.model.{head}.{name}"] = state[f"value_head.{name}"]
        config = copy.deepcopy(self.policy.peft_config[VALUE])
        config.task_type, config.inference_mode = "TOKEN_CLS", True
        config.base_model_name_or_path = self.policy.peft_config["default"].base_model_name_or_path
        config.modules_to_save = sorted({*(config.modules_to_save or ()), head})
        target = folder / VALUE_FOLDER
        config.save_pretrained(target)
        _save(adapter, target / "adapter_model.safetensors")


def completion_logprobs(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    n_completion: int,
    *,
    temperature: float,
    keeps_logits: bool,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities (B, T) of the last T tokens under a causal language model, and entropies (B, T) or None.

    The vocabulary is projected for the completion's positions alone where the model can (`logits_to_keep`).
    """
    more = {"logits_to_keep": n_completion} if keeps_logits else {}
    inputs = _inputs(*_without_last(input_ids, attention_mask))
    logits = model(**inputs, **more).logits[:, -n_completion:]  # (B, T, V)
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()  # in half precision the two functions below differ
    tokens = input_ids[:, -n_completion:]
    if with_entropy:
        return selective_log_softmax_and_entropy(logits, tokens, temperature=temperature)
    if logits.numel() <= ONE_PASS:
        flat = selective_log_softmax(logits.flatten(0, 1)[None], tokens.flatten()[None], temperature=temperature)
        return flat.view_as(tokens), None
    return selective_log_softmax(logits, tokens, temperature=temperature), None


def _without_last(input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What the last token is predicted from."""
    return input_ids[:, :-1], None if attention_mask is None else attention_mask[:, :-1]


def _inputs(input_ids: Tensor, attention_mask: Tensor | None) -> dict[str, Any]:
    """Without a mask the positions are the model's own, and attention can take its faster, purely causal form."""
    inputs = {"input_ids": input_ids, "use_cache": False}
    if attention_mask is not None:
        inputs |= {"attention_mask": attention_mask, "position_ids": position_ids(attention_mask)}
    return inputs


def position_ids(attention_mask: Tensor) -> Tensor:
    """(B, S) positions that count real tokens only, as `generate` gives them."""
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)


def name_of_head(config: Any) -> str:
    """What the token classifier of this architecture calls its last layer, told without building one.

    Under ZeRO-3 building a model is a matter for all processes, and saving one is not.

    Raises:
        ValueError: transformers has no token classifier of this architecture, so no critic could be loaded.
    """
    if type(config) not in MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING:
        raise ValueError(
            f"transformers has no token classifier for {type(config).__name__}, which the critic would be: give a "
            "value_model of another architecture"
        )
    kind = MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING[type(config)]
    return "score" if issubclass(kind, GenericForTokenClassification) else "classifier"


def _save(state: dict[str, Tensor], file: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, file, {"format": "pt"})


def _base(model: Any) -> Any:
    """The transformers model inside PEFT's wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def _understand_checkpoint(module: PolicyAndValue, state: dict[str, Tensor], *args: Any) -> None:
    """Before loading: give the policy's weights their prefix again, and note which ones are rightly missing."""
    own = tuple(name for name, _ in module.named_children())
    for key in [key for key in state if key.split(".")[0] not in own]:
        state[POLICY_PREFIX + key] = state.pop(key)
    weights, expected = module.state_dict(), module.in_checkpoint()
    loaded = {weights[key].data_ptr() for key in state if key in weights}
    module._keys_to_ignore_on_save = [
        key
        for key, weight in weights.items()
        if key not in state and (weight.data_ptr() in loaded or key not in expected)  # tied, or elsewhere
    ]
