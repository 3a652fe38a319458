"""Reference solution of `cql_penalty`."""

from torch import Tensor


def cql_penalty(q_values: Tensor, actions: Tensor) -> Tensor:
    of_data = q_values.gather(1, actions.unsqueeze(1)).squeeze(1)
    return (q_values.logsumexp(1) - of_data).mean()
