"""Flamingo (Alayrac et al. 2022, arXiv:2204.14198): a frozen language model that looks at images through new layers.

Between the blocks of the language model stand gated cross-attention layers (section 2.2, figure 4); what they look at is a fixed
number of latents per image, made by a Perceiver Resampler (section 2.1, figure 5). Vision tower and language model are those of
`transformers`, untouched: the new layers come in through hooks. Nothing here is in `transformers` under this name; its IDEFICS is a
descendant.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast


class FlamingoConfig(PreTrainedConfig):
    """Configuration.

    Args:
        vision_config: of the vision tower.
        text_config: of the language model.
        num_latents: visual tokens per image.
        resampler_depth: layers of the Perceiver Resampler.
        cross_attention_every: a gated cross-attention stands before every n-th block of the language model.
        num_heads: of all new attentions.
        image_token_id: the token that marks where an image stands.
    """

    model_type = "llmcore-flamingo"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}  # noqa: RUF012

    def __init__(
        self,
        vision_config: Any = None,
        text_config: Any = None,
        num_latents: int = 8,
        resampler_depth: int = 2,
        cross_attention_every: int = 1,
        num_heads: int = 4,
        image_token_id: int = 0,
        **options: Any,
    ) -> None:
        self.vision_config = _as_config(vision_config, "clip_vision_model")
        self.text_config = _as_config(text_config, "qwen3")
        self.num_latents, self.resampler_depth = num_latents, resampler_depth
        self.cross_attention_every, self.num_heads = cross_attention_every, num_heads
        self.image_token_id = image_token_id
        super().__init__(**options)


def _as_config(config: Any, default: str) -> Any:
    if isinstance(config, PreTrainedConfig):
        return config
    options = dict(config or {})
    return AutoConfig.for_model(options.pop("model_type", default), **options)


class Attention(nn.Module):
    """Multi-head attention whose keys and values may have another width than its queries; it keeps its weights."""

    def __init__(self, width: int, key_width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(key_width, width, bias=False)
        self.value = nn.Linear(key_width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.weights: torch.Tensor | None = None  # (B, H, T, S) of the last forward pass

    def forward(self, queries: torch.Tensor, keys: torch.Tensor, may_see: torch.Tensor | None = None) -> torch.Tensor:
        """(B, T, D) and (B, S, D') -> (B, T, D); `may_see` (B, T, S). A query that may see nothing gets zeros."""
        q, k, v = (
            layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, T or S, D / H)
            for layer, x in ((self.query, queries), (self.key, keys), (self.value, keys))
        )
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        if may_see is not None:
            scores = scores.masked_fill(~may_see[:, None], torch.finfo(scores.dtype).min)
        weights = scores.softmax(dim=-1)
        if may_see is not None:
            weights = weights * may_see[:, None]
        self.weights = weights.detach()
        return self.output((weights @ v).transpose(1, 2).flatten(2))


def feed_forward(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, 4 * width, bias=False), nn.GELU(), nn.Linear(4 * width, width, bias=False)
    )


class PerceiverResampler(nn.Module):
    """However many features of an image -> a fixed number of latents (figure 5; its keys are features and latents)."""

    def __init__(self, width: int, num_latents: int, depth: int, num_heads: int) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(num_latents, width) * 0.5)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm_features": nn.LayerNorm(width),
                    "norm_latents": nn.LayerNorm(width),
                    "attention": Attention(width, width, num_heads),
                    "feed_forward": feed_forward(width),
                }
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(N, P, D) -> (N, L, D)."""
        latents = self.latents.expand(len(features), -1, -1)
        for layer in self.layers:
            queries = layer["norm_latents"](latents)
            keys = torch.cat([layer["norm_features"](features), queries], dim=1)
            latents = latents + layer["attention"](queries, keys)
            latents = latents + layer["feed_forward"](latents)
        return self.norm(latents)


class GatedCrossAttention(nn.Module):
    """y + tanh(a) * attention(y, latents), then y + tanh(b) * feed-forward(y), with a = b = 0 at first (figure 4).

    So at first the language model is exactly what it was, and the gates open as far as the images help.
    """

    def __init__(self, width: int, key_width: int, num_heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, key_width, num_heads)
        self.feed_forward = feed_forward(width)
        self.attention_gate = nn.Parameter(torch.zeros(1))
        self.feed_forward_gate = nn.Parameter(torch.zeros(1))

    def forward(self, hidden: torch.Tensor, latents: torch.Tensor, may_see: torch.Tensor) -> torch.Tensor:
        """(B, T, D), (B, S, D') and (B, T, S) -> (B, T, D)."""
        hidden = hidden + self.attention_gate.tanh() * self.attention(self.norm(hidden), latents, may_see)
        return hidden + self.feed_forward_gate.tanh() * self.feed_forward(hidden)


class FlamingoForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """The whole model. Texts say with `<image>` where each image stands; a token sees only the last image before it."""

    config: FlamingoConfig
    config_class = FlamingoConfig
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["GatedCrossAttention"]  # noqa: RUF012

    def __init__(self, config: FlamingoConfig) -> None:
        super().__init__(config)
        vision, text = config.vision_config, config.text_config
        self.vision_model = AutoModel.from_config(vision)
        self.resampler = PerceiverResampler(
            vision.hidden_size, config.num_latents, config.resampler_depth, config.num_heads
        )
        self.language_model = AutoModelForCausalLM.from_config(text)
        blocks = self.language_model.model.layers[:: config.cross_attention_every]
        self.cross_attentions = nn.ModuleList(
            GatedCrossAttention(text.hidden_size, vision.hidden_size, config.num_heads) for _ in blocks
        )
        for block, cross_attention in zip(blocks, self.cross_attentions, strict=True):
            block.register_forward_pre_hook(functools.partial(self._look, cross_attention), with_kwargs=True)
        self.seen: tuple[torch.Tensor, torch.Tensor] | None = None  # latents (B, S, D) and may_see (B, T, S)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """New layers keep torch's own initialisation; tower and language model have theirs."""

    def _look(self, cross_attention: GatedCrossAttention, block: nn.Module, args: Any, kwargs: Any) -> Any:
        """Before a block of the language model: let its input look at the images."""
        if self.seen is None:
            return None
        if args:
            return (cross_attention(args[0], *self.seen), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": cross_attention(kwargs["hidden_states"], *self.seen)}

    def set_attn_implementation(self, attn_implementation: Any, **options: Any) -> None:
        """Of tower and language model; the new layers have one of their own."""
        for part in (self.vision_model, self.language_model):
            part.set_attn_implementation(attn_implementation, **options)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def encode_images(self, pixel_values: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """Images of all rows in order, (N, 3, H, W), and their texts, (B, T) -> latents (B, M, L, D), M the most of a row.

        Raises:
            ValueError: the texts have more or fewer places for images than there are images.
        """
        counts = (input_ids == self.config.image_token_id).sum(dim=1)  # (B,)
        if int(counts.sum()) != len(pixel_values):
            raise ValueError(
                f"the texts have {int(counts.sum())} places for images, but there are {len(pixel_values)} images"
            )
        latents = self.resampler(self.vision_model(pixel_values).last_hidden_state)  # (N, L, D)
        padded = latents.new_zeros(len(counts), max(1, int(counts.max())), *latents.shape[1:])
        filled = torch.arange(padded.shape[1], device=counts.device) < counts[:, None]
        padded[filled] = latents
        return padded

    def image_index(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(B, T) -> (B, T), the number of the last image before or at each token, from 1; 0 before the first."""
        return (input_ids == self.config.image_token_id).cumsum(dim=1)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        image_latents: torch.Tensor | None = None,
        image_index: torch.Tensor | None = None,
        **inputs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the next tokens, and their loss where there are `labels`, (B, T).

        `image_latents` (B, M, L, D) and `image_index` (B, T) take the place of `pixel_values` when a text is continued.
        """
        if image_latents is None and pixel_values is not None:
            image_latents = self.encode_images(pixel_values, input_ids)
        self.seen = None
        if image_latents is not None:
            index = self.image_index(input_ids) if image_index is None else image_index
            numbers = torch.arange(1, image_latents.shape[1] + 1, device=index.device)
            numbers = numbers.repeat_interleave(image_latents.shape[2])  # (S,), the image of each latent
            self.seen = image_latents.flatten(1, 2), index[:, :, None] == numbers
        return self.language_model(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **inputs)

    @torch.no_grad()
    def generate(self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None = None, **options: Any) -> Any:
        """As in `transformers`, with a KV cache; images are encoded once."""
        if pixel_values is not None:
            options["image_latents"] = self.encode_images(pixel_values, input_ids)
        return super().generate(input_ids=input_ids, **options)

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
        """What the next forward pass gets; with a cache, the last token alone, which still knows its image."""
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        if kwargs.get("image_latents") is not None:
            n_new = inputs["input_ids"].shape[1]
            inputs["image_index"] = self.image_index(input_ids)[:, -n_new:]
        return inputs


AutoConfig.register(FlamingoConfig.model_type, FlamingoConfig)
AutoModelForImageTextToText.register(FlamingoConfig, FlamingoForConditionalGeneration)
