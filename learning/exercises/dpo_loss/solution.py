"""Reference solution of `dpo_loss`."""

from torch import Tensor
from torch.nn.functional import logsigmoid


def dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float,
) -> Tensor:
    chosen = chosen_logps - ref_chosen_logps
    rejected = rejected_logps - ref_rejected_logps
    return -logsigmoid(beta * (chosen - rejected)).mean()
