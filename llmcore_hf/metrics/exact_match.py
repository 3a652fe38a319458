from __future__ import annotations

from typing import Any

import datasets
import evaluate


class ExactMatch(evaluate.Metric):
    """Share of answers equal to their reference, surrounding white space aside.

    Inputs: `predictions` and `references`, both lists of N texts.
    Output: `exact_match`, a float in [0, 1], and `scores`, N values 0.0 or 1.0 for interval estimates.
    """

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=str(self.__doc__),
            citation="",
            inputs_description="`predictions` and `references`: lists of texts of equal length",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, Any]:
        scores = [float(p.strip() == r.strip()) for p, r in zip(predictions, references, strict=True)]
        return {"exact_match": sum(scores) / len(scores), "scores": scores}
