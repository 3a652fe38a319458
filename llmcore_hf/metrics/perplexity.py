from __future__ import annotations

import math
from typing import Any

import datasets
import evaluate


class Perplexity(evaluate.Metric):
    """Perplexity per token over a corpus: exp of the negative log-likelihood divided by the number of tokens.

    Tokens are pooled over all texts, so long texts weigh more; the mean of per-text perplexities would not be the
    perplexity of the corpus (Jurafsky & Martin, *Speech and Language Processing*, 3rd ed., section 3.3).

    Inputs: `predictions`, the log-likelihood of each of N texts in nats; `references`, their token counts.
    Output: `perplexity`, a float >= 1, and `nll`, nats per token.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=str(self.__doc__),
            citation="",
            inputs_description="`predictions`: log-likelihoods in nats; `references`: token counts",
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: list[float], references: list[int]) -> dict[str, Any]:
        nll = -math.fsum(predictions) / sum(references)
        return {"perplexity": math.exp(nll) if nll < 700 else math.inf, "nll": nll}
