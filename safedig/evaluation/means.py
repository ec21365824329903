"""The mean of a number measured on each image, with an interval that respects how images share prompts."""

from collections.abc import Hashable, Sequence
from typing import TypedDict

import numpy as np

from safedig.config import UsageError
from safedig.evaluation.resampling import DRAWS, bounds, numbered, redrawn


class Mean(TypedDict):
    """Mean of n numbers with its 95 % bounds; `worst` is the least of them."""

    mean: float
    lo: float
    hi: float
    worst: float
    n: int
    clusters: int


def clustered_mean(values: Sequence[float], clusters: Sequence[Hashable], draws: int = DRAWS, seed: int = 0) -> Mean:
    """The mean over images; whole prompts are resampled. Of a single prompt there are no bounds: they are NaN."""
    if len(values) != len(clusters) or not len(values):
        raise UsageError(f"{len(values)} numbers and {len(clusters)} prompts: expected one prompt for each number.")
    x, index = np.asarray(values, dtype=float), numbered(clusters)
    if not np.isfinite(x).all():
        raise UsageError(f"Number {int((~np.isfinite(x)).argmax()) + 1} of {len(x)} is not finite: look at its image.")
    sums, sizes = np.bincount(index, weights=x), np.bincount(index)
    lo = hi = float("nan")
    if len(sizes) > 1:
        picked = redrawn(len(sizes), draws, seed)
        lo, hi = bounds((picked @ sums) / (picked @ sizes))
    return Mean(mean=float(x.mean()), lo=lo, hi=hi, worst=float(x.min()), n=len(x), clusters=len(sizes))
