"""Two methods on the same prompts and seeds: difference in percentage points, discordant counts, and a p value."""

from collections.abc import Hashable, Mapping
from typing import Any, TypedDict

import numpy as np
from jaxtyping import Float, Int

from safedig.config import UsageError
from safedig.evaluation.intervals import Rate, clustered_rate, holm, mcnemar, wilson
from safedig.evaluation.resampling import DRAWS, bounds, numbered, redrawn

Hits = Mapping[tuple[Hashable, Any], bool]  # (prompt, seed or whatever tells its images apart) → is it so
PERMUTATIONS = 9999


class Delta(TypedDict):
    """after − before in percentage points; `gained` and `lost` count images that are so only after, only before."""

    before: Rate
    after: Rate
    delta: float
    lo: float
    hi: float
    method: str
    gained: int | None
    lost: int | None
    p: float
    test: str
    family: str
    holm: float | None


def paired(before: Hits, after: Hits, draws: int = DRAWS, seed: int = 0) -> Delta:
    """The difference between methods that drew the same prompts from the same seeds; whole prompts are resampled.

    p is McNemar's (exact) where each prompt has one image, and elsewhere that of swapping the methods within prompts.
    Where resampling cannot vary, the interval is as wide as Wilson's of no change among that many prompts.
    """
    if before.keys() != after.keys():
        only = len(before.keys() - after.keys()), len(after.keys() - before.keys())
        raise UsageError(
            f"The methods drew different prompts or seeds ({only[0]} only before, {only[1]} only after): draw the "
            "same, or compare them as unpaired."
        )
    keys = list(before)
    one, other = (np.array([bool(hits[key]) for key in keys], dtype=np.int64) for hits in (before, after))
    index = numbered(prompt for prompt, _ in keys)
    changes, sizes = np.bincount(index, weights=other - one), np.bincount(index)
    gained, lost = int((other > one).sum()), int((other < one).sum())
    if len(sizes) == len(keys):
        p, test = mcnemar(lost, gained), "mcnemar"
    else:
        p, test = _swapped(changes, seed), "cluster-permutation"
    return _delta(before, after, _interval(changes, sizes, draws, seed), (p, test), (gained, lost))


def unpaired(before: Hits, after: Hits, draws: int = DRAWS, seed: int = 0) -> Delta:
    """The difference between methods that drew different prompts or seeds: each is resampled on its own.

    p is twice the share of resampled differences on the far side of 0: coarser than a paired test, and said so.
    """
    shares = [_redrawn_rate(hits, draws, seed + at) for at, hits in enumerate((before, after))]
    drawn = 100 * (shares[1] - shares[0])
    smaller = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    p = min(1.0, 2 * (smaller + 1) / (draws + 1))
    return _delta(before, after, (*bounds(drawn), "cluster-bootstrap"), (p, "bootstrap"), (None, None))


def compared(arms: Mapping[str, Hits], reference: str, family: str) -> dict[str, Delta]:
    """Every other arm against the reference, with p values adjusted by Holm over these comparisons: the `family`."""
    if reference not in arms:
        raise UsageError(f"There is no '{reference}' among {', '.join(arms)}: name one of them as the reference.")
    deltas = {name: paired(arms[reference], hits) for name, hits in arms.items() if name != reference}
    adjusted = holm([delta["p"] for delta in deltas.values()])
    for delta, p in zip(deltas.values(), adjusted, strict=True):
        delta["family"], delta["holm"] = f"{family}: {len(deltas)} comparisons with {reference}", p
    return deltas


def _delta(
    before: Hits,
    after: Hits,
    interval: tuple[float, float, str],
    tested: tuple[float, str],
    discordant: tuple[int | None, int | None],
) -> Delta:
    one, other = (clustered_rate(list(hits.values()), [prompt for prompt, _ in hits]) for hits in (before, after))
    (lo, hi, method), (p, test), (gained, lost) = interval, tested, discordant
    told = {"before": one, "after": other, "delta": 100 * (other["rate"] - one["rate"])}
    return Delta(**told, lo=lo, hi=hi, method=method, gained=gained, lost=lost, p=p, test=test, family="", holm=None)


def _interval(
    changes: Float[np.ndarray, " prompts"], sizes: Int[np.ndarray, " prompts"], draws: int, seed: int
) -> tuple[float, float, str]:
    """Bounds in percentage points."""
    m, mean = len(sizes), changes.sum() / sizes.sum()
    if np.all(changes * sizes.sum() == sizes * changes.sum()):
        doubt = wilson(0, m)[1]
        return 100 * max(-1.0, mean - doubt), 100 * min(1.0, mean + doubt), "wilson"
    picked = redrawn(m, draws, seed)
    lo, hi = bounds(100 * (picked @ changes) / (picked @ sizes))
    return lo, hi, "cluster-bootstrap"


def _swapped(changes: Float[np.ndarray, " prompts"], seed: int) -> float:
    """p of the sum of changes when in each prompt either method may have been the other; exact up to 13 prompts."""
    from scipy.stats import permutation_test

    moved = changes[changes != 0]
    if len(moved) < 2:
        return 1.0  # the two signs of one change are equally far from 0
    rng = np.random.default_rng(seed)
    options = {"permutation_type": "samples", "vectorized": True, "n_resamples": PERMUTATIONS, "batch": 500}
    return float(permutation_test((moved,), np.sum, rng=rng, **options).pvalue)


def _redrawn_rate(hits: Hits, draws: int, seed: int) -> Float[np.ndarray, " draws"]:
    index = numbered(prompt for prompt, _ in hits)
    sums, sizes = np.bincount(index, weights=np.array([float(hit) for hit in hits.values()])), np.bincount(index)
    picked = redrawn(len(sizes), draws, seed)
    return (picked @ sums) / (picked @ sizes)
