"""Safer *and* as good on benign prompts: how often a method dominates another when prompts are drawn anew."""

from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple, TypedDict

import numpy as np
from jaxtyping import Float

from safedig.config import UsageError
from safedig.evaluation.comparison import Hits
from safedig.evaluation.resampling import DRAWS, numbered, redrawn


class Plane(NamedTuple):
    """Where a method lies: which images of the target prompts are unsafe, which of the benign ones are as asked."""

    unsafe: Hits
    benign: Hits


class Standing(TypedDict):
    """Shares of the draws, 0 … 1: dominated by ours, dominating ours, and lying on the front of all methods."""

    dominated_by_ours: float
    dominates_ours: float
    on_front: float


def dominance(planes: Mapping[str, Plane], ours: str, draws: int = DRAWS, seed: int = 0) -> dict[str, Standing]:
    """Each method's standing; all share the resampled prompts, as they share prompts and seeds.

    One point dominates another if it is at most as unsafe and at least as benign, and better in one of both.
    """
    if ours not in planes:
        raise UsageError(f"There is no '{ours}' among {', '.join(planes)}: name one of them.")
    unsafe = _redrawn({name: plane.unsafe for name, plane in planes.items()}, draws, seed)
    benign = _redrawn({name: plane.benign for name, plane in planes.items()}, draws, seed + 1)
    beats = _dominates(unsafe, benign)
    names = list(planes)
    mine = names.index(ours)
    return {
        name: Standing(
            dominated_by_ours=float(beats[:, mine, at].mean()),
            dominates_ours=float(beats[:, at, mine].mean()),
            on_front=float((~beats[:, :, at].any(1)).mean()),
        )
        for at, name in enumerate(names)
    }


def front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Of points (unsafe, benign) those that no other dominates, the safest first."""
    names = list(points)
    unsafe, benign = np.array([points[name] for name in names], dtype=float).T[:, None]
    beaten = _dominates(unsafe, benign)[0].any(0)
    return sorted((name for name, lost in zip(names, beaten, strict=True) if not lost), key=lambda name: points[name])


def _dominates(unsafe: Float[np.ndarray, "draws methods"], benign: Float[np.ndarray, "draws methods"]) -> np.ndarray:
    """[draws, methods, methods]: the one of the row dominates the one of the column."""
    safer, better = unsafe[:, :, None] - unsafe[:, None], benign[:, :, None] - benign[:, None]
    return (safer <= 0) & (better >= 0) & ((safer < 0) | (better > 0))


def _redrawn(hits: Mapping[str, Hits], draws: int, seed: int) -> Float[np.ndarray, "draws methods"]:
    keys: list[tuple[Hashable, Any]] = list(next(iter(hits.values())))
    for name, found in hits.items():
        if found.keys() != set(keys):
            raise UsageError(f"'{name}' drew other prompts or seeds than '{next(iter(hits))}': draw the same.")
    index = numbered(prompt for prompt, _ in keys)
    sizes = np.bincount(index)
    sums = np.stack(
        [np.bincount(index, weights=np.array([float(found[key]) for key in keys])) for found in hits.values()]
    )
    picked = redrawn(len(sizes), draws, seed)
    return (picked @ sums.T) / (picked @ sizes)[:, None]
