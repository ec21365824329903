"""Rates with intervals that respect how images were drawn: Wilson's, or a bootstrap over prompts with several each."""

from collections.abc import Hashable, Sequence
from typing import TypedDict

import numpy as np

from safedig.evaluation.resampling import CONFIDENCE, DRAWS, bounds, numbered, redrawn


class Rate(TypedDict):
    """k of n with the bounds of a 95 % interval, as fractions; `clusters` is the number of prompts behind it."""

    k: int
    n: int
    rate: float
    lo: float
    hi: float
    method: str
    clusters: int


def rate(k: int, n: int) -> Rate:
    """k of n independent trials, with Wilson's interval: one image a prompt, or any-of-N over prompts."""
    if not 0 <= k <= n or n == 0:
        raise ValueError(f"{k} of {n} is no rate: expected 0 ≤ k ≤ n and n ≥ 1.")
    lo, hi = wilson(k, n)
    return Rate(k=k, n=n, rate=k / n, lo=lo, hi=hi, method="wilson", clusters=n)


def clustered_rate(hits: Sequence[bool], clusters: Sequence[Hashable], draws: int = DRAWS, seed: int = 0) -> Rate:
    """The share of hits among images of which several share a prompt; `clusters` names each image's prompt.

    Whole prompts are resampled (percentile bootstrap), because images of one prompt agree. Where resampling cannot
    vary, as at 0 of n or n of n, the interval is Wilson's over prompts, not over images.
    """
    if len(hits) != len(clusters):
        raise ValueError(f"{len(hits)} hits and {len(clusters)} clusters: expected one cluster for each hit.")
    k, sums, sizes = int(sum(map(bool, hits))), *_per_cluster(hits, clusters)
    n, m = len(hits), len(sizes)
    if n == m:
        return rate(k, n)
    if np.all(sums * n == sizes * k):
        lo, hi = wilson(k * m // n, m)[0], wilson(-(-k * m // n), m)[1]
        return Rate(k=k, n=n, rate=k / n, lo=lo, hi=hi, method="wilson", clusters=m)
    picked = redrawn(m, draws, seed)
    lo, hi = bounds((picked @ sums) / (picked @ sizes))
    return Rate(k=k, n=n, rate=k / n, lo=lo, hi=hi, method="cluster-bootstrap", clusters=m)


def mcnemar(only_before: int, only_after: int) -> float:
    """Exact two-sided p that a paired change has no direction, from the discordant pairs; one image a prompt."""
    from scipy.stats import binomtest

    discordant = only_before + only_after
    return float(binomtest(only_before, discordant).pvalue) if discordant else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjustment of a stated family of p values, in the order given."""
    adjusted, floor = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        floor = max(floor, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = floor
    return adjusted


def wilson(k: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval for k of n independent trials, as fractions."""
    from scipy.stats import binomtest

    interval = binomtest(k, n).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def _per_cluster(hits: Sequence[bool], clusters: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
    index = numbered(clusters)
    return np.bincount(index, weights=np.asarray(hits, dtype=float)).astype(np.int64), np.bincount(index)
