from __future__ import annotations

from typing import Any

import datasets
import evaluate


class Preference(evaluate.Metric):
    """Share of pairs in which the chosen answer scores higher than the rejected one; a tie counts half.

    Scores are sequence log-probabilities (accuracy of the policy itself) or implicit rewards
    beta * log(pi / pi_ref) (DPO, Rafailov et al. 2023, arXiv:2305.18290, section 5). Before training, policy and
    reference agree and every implicit reward is zero, so only the first kind says something there.

    Inputs: `predictions`, N scores of chosen answers; `references`, N scores of rejected answers.
    Output: `accuracy` in [0, 1]; `margin`, the mean difference; `scores`, N values 0, 0.5 or 1.
    """

    def _info(self) -> evaluate.MetricInfo:
        number = datasets.Value("float64")
        return evaluate.MetricInfo(
            description=str(self.__doc__),
            citation="",
            inputs_description="`predictions`: scores of chosen answers; `references`: scores of rejected answers",
            features=datasets.Features({"predictions": number, "references": number}),
        )

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, Any]:
        pairs = list(zip(predictions, references, strict=True))
        scores = [1.0 if chosen > rejected else 0.5 if chosen == rejected else 0.0 for chosen, rejected in pairs]
        margin = sum(chosen - rejected for chosen, rejected in pairs) / len(pairs)
        return {"accuracy": sum(scores) / len(scores), "margin": margin, "scores": scores}
