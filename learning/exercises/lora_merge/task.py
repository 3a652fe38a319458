"""Merging LoRA. Fill in the function; then: python scripts/exercise.py check lora_merge"""

from torch import Tensor


def lora_merge(weight: Tensor, lora_A: Tensor, lora_B: Tensor, lora_alpha: float) -> Tensor:
    """The merged weight (out, in), a new tensor.

    Args:
        weight: (out, in) of the base.
        lora_A: (r, in).
        lora_B: (out, r).
        lora_alpha: alpha.
    """
    raise NotImplementedError("lora_merge")
