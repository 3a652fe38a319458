"""Reference solution of `bcq_filter`."""

import math

from torch import Tensor


def bcq_actions(q_values: Tensor, behaviour_logits: Tensor, threshold: float) -> Tensor:
    ratio = (behaviour_logits - behaviour_logits.amax(1, keepdim=True)).exp()
    return q_values.masked_fill(ratio < threshold, -math.inf).argmax(1)
