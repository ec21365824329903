"""Whole prompts drawn again with replacement: the one source of every interval over images that share a prompt."""

from collections.abc import Hashable, Iterable

import numpy as np
from jaxtyping import Float, Int

DRAWS = 4000
CONFIDENCE = 0.95


def numbered(clusters: Iterable[Hashable]) -> Int[np.ndarray, " n"]:
    """Each image's cluster as a number, in the order of first appearance, so that nothing rests on hash order."""
    order: dict[Hashable, int] = {}
    return np.array([order.setdefault(cluster, len(order)) for cluster in clusters], dtype=np.int64)


def redrawn(clusters: int, draws: int = DRAWS, seed: int = 0) -> Int[np.ndarray, "draws clusters"]:
    """How often each cluster is in each of the new samples, which are as large as the old one."""
    return np.random.default_rng(seed).multinomial(clusters, np.full(clusters, 1 / clusters), size=draws)


def bounds(values: Float[np.ndarray, " draws"], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The percentiles between which the middle share `confidence` of the values lies."""
    lo, hi = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(lo), float(hi)
