"""How many prompts give at least one hit among N images: the attacker's view, who may draw again."""

from collections.abc import Hashable, Mapping
from typing import Any, TypedDict

import numpy as np
from jaxtyping import Float

from safedig.config import UsageError
from safedig.evaluation.intervals import Rate, rate, wilson
from safedig.evaluation.resampling import DRAWS, bounds, redrawn


class Chance(TypedDict):
    """The share of prompts with a hit among `images` images, as a fraction with its 95 % bounds."""

    images: int
    rate: float
    lo: float
    hi: float
    method: str
    prompts: int


def any_of(hits: Mapping[tuple[Hashable, Any], bool], images: int) -> Rate:
    """Prompts with a hit among their first `images` seeds, with Wilson's interval over prompts."""
    first = _first(hits, images)
    return rate(sum(map(any, first)), len(first))


def any_of_curve(
    hits: Mapping[tuple[Hashable, Any], bool], images: int | None = None, draws: int = DRAWS, seed: int = 0
) -> list[Chance]:
    """The same for every N up to `images`, each averaged over all choices of N seeds: it never falls.

    `images` is by default what the prompt with fewest has. Bounds come from resampling prompts; at the full N they are
    Wilson's, as they are where resampling cannot vary.
    """
    counts: dict[Hashable, list[int]] = {}
    for (prompt, _), hit in hits.items():
        counts.setdefault(prompt, [0, 0])
        counts[prompt][0] += bool(hit)
        counts[prompt][1] += 1
    if not counts:
        raise UsageError("There is no image to count: give the hits of at least one prompt.")
    k, n = np.array(list(counts.values())).T
    fewest = int(n.min())
    images = fewest if images is None else images
    if not 1 <= images <= fewest:
        raise UsageError(f"images={images}: expected from 1 to {fewest}, which is what the prompt with fewest has.")
    picked = redrawn(len(k), draws, seed)
    return [_chance(_any_among(k, n, at), at, bool((n == at).all()), picked) for at in range(1, images + 1)]


def _first(hits: Mapping[tuple[Hashable, Any], bool], images: int) -> list[list[bool]]:
    of_prompt: dict[Hashable, list[tuple[Any, bool]]] = {}
    for (prompt, seed), hit in hits.items():
        of_prompt.setdefault(prompt, []).append((seed, bool(hit)))
    fewest = min(map(len, of_prompt.values()), default=0)
    if not 1 <= images <= fewest:
        raise UsageError(f"images={images}: expected from 1 to {fewest}, which is what the prompt with fewest has.")
    return [[hit for _, hit in sorted(found)[:images]] for found in of_prompt.values()]


def _any_among(k: np.ndarray, n: np.ndarray, images: int) -> Float[np.ndarray, " prompts"]:
    """1 − C(n − k, N) / C(n, N): the chance of a hit among N of a prompt's n images, k of which hit."""
    misses = [(n - k - at) / (n - at) for at in range(images)]
    return 1 - np.prod(np.clip(misses, 0, None), axis=0)


def _chance(each: Float[np.ndarray, " prompts"], images: int, full: bool, picked: np.ndarray) -> Chance:
    m, mean = len(each), float(each.mean())
    if full or each.min() == each.max():
        lo, hi = wilson(int(np.floor(mean * m + 1e-9)), m)[0], wilson(int(np.ceil(mean * m - 1e-9)), m)[1]
        return Chance(images=images, rate=mean, lo=lo, hi=hi, method="wilson", prompts=m)
    lo, hi = bounds(picked @ each / m)
    return Chance(images=images, rate=mean, lo=lo, hi=hi, method="cluster-bootstrap", prompts=m)
