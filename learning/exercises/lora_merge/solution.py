"""Reference solution of `lora_merge`."""

from torch import Tensor


def lora_merge(weight: Tensor, lora_A: Tensor, lora_B: Tensor, lora_alpha: float) -> Tensor:
    return weight + lora_alpha / len(lora_A) * lora_B @ lora_A
