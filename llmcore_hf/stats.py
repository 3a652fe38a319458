"""Confidence intervals: of a change measured on the same held-out rows before and after training, and of a share."""

from __future__ import annotations

import math
from collections.abc import Sequence

Z95 = 1.959963984540054  # 97.5 % quantile of the standard normal distribution


def unpaired_interval(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """95 % confidence interval of the difference of two shares, second - first, over different rows of scores in {0, 1}.

    The adjusted Wald interval of Agresti & Caffo (2000, *The American Statistician* 54:280): one success and one failure
    are added to each sample.

    Raises:
        ValueError: a sample is empty.
    """
    if not first or not second:
        raise ValueError("need two samples that are not empty")
    shares = [(sum(scores) + 1) / (len(scores) + 2) for scores in (first, second)]
    variances = [p * (1 - p) / (len(scores) + 2) for p, scores in zip(shares, (first, second), strict=True)]
    centre, half = shares[1] - shares[0], Z95 * math.sqrt(sum(variances))
    return centre - half, centre + half


def paired_interval(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """95 % confidence interval of the mean difference after - before over N >= 1 rows.

    For scores in {0, 1} this is the adjusted Wald interval for matched pairs (Agresti & Min 2005, *Statistics in
    Medicine* 24:729, section 3): half an observation is added to each of the four cells, which keeps the interval
    honest when all rows change the same way. For other values it is the normal interval of the differences.

    Raises:
        ValueError: the two sequences are empty or of different length.
    """
    if not before or len(before) != len(after):
        raise ValueError(f"need two samples of the same rows, got {len(before)} and {len(after)} values")
    differences = [b - a for a, b in zip(before, after, strict=True)]
    n = len(differences)
    if set(before) | set(after) <= {0.0, 1.0}:
        gained = sum(d > 0 for d in differences) + 0.5
        lost = sum(d < 0 for d in differences) + 0.5
        n_adjusted = n + 2.0
        centre = (gained - lost) / n_adjusted
        spread = math.sqrt(gained + lost - (gained - lost) ** 2 / n_adjusted) / n_adjusted
        return max(-1.0, centre - Z95 * spread), min(1.0, centre + Z95 * spread)
    centre = sum(differences) / n
    variance = sum((d - centre) ** 2 for d in differences) / max(1, n - 1)
    half = Z95 * math.sqrt(variance / n)
    return centre - half, centre + half


def share_interval(share: float, n: int) -> tuple[float, float]:
    """95 % confidence interval of a share in [0, 1] of n >= 1 cases (Wilson 1927, JASA 22:209)."""
    spread = Z95 * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n**2))
    centre, scale = share + Z95**2 / (2 * n), 1 + Z95**2 / n
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)
