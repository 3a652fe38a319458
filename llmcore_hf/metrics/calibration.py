from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np

N_BINS = 20


class Calibration(evaluate.Metric):
    """Do events that are given probability p happen in a share p of the cases?

    Expected calibration error: the probabilities fall into 20 bins of equal width, and the distance between mean
    probability and observed share of each bin is averaged, weighted by its number of cases (Naeini et al. 2015; Guo et al.
    2017, arXiv:1706.04599, equation 3). Even a perfect forecaster has an error of about 0.4 / sqrt(cases in a bin) by
    chance, so small samples look worse than they are.

    Inputs: `predictions`, N probabilities in [0, 1]; `references`, N outcomes, 1 when the event happened, else 0 (0.5 for
    half an event).
    Output: `expected_calibration_error` in [0, 1]; `probabilities`, `shares` and `counts`, of each bin that is not empty:
    mean probability, observed share, number of cases.
    """

    def _info(self) -> evaluate.MetricInfo:
        number = datasets.Value("float64")
        return evaluate.MetricInfo(
            description=str(self.__doc__),
            citation="",
            inputs_description="`predictions`: probabilities; `references`: outcomes, 0 or 1",
            features=datasets.Features({"predictions": number, "references": number}),
        )

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, Any]:
        forecast, outcome = np.asarray(predictions), np.asarray(references)  # (N,) each
        bins = np.minimum((forecast * N_BINS).astype(int), N_BINS - 1)  # probability 1 belongs to the last one
        counts = np.bincount(bins, minlength=N_BINS)
        filled = counts > 0
        probabilities, shares = (
            np.bincount(bins, weights=values, minlength=N_BINS)[filled] / counts[filled]
            for values in (forecast, outcome)
        )
        error = np.average(np.abs(probabilities - shares), weights=counts[filled])
        return {
            "expected_calibration_error": float(error),
            "probabilities": probabilities.tolist(),
            "shares": shares.tolist(),
            "counts": counts[filled].tolist(),
        }
