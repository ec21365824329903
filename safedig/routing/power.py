"""Whether a site tells harmful from safe at all: one permutation test over all sites and steps of a run at once.

Within each prompt's pair the labels are tossed. The statistic of a toss is the largest over every site and step, so
that the chance of calling any site separable where none is stays below the level (Westfall and Young, 1993).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from .contrast import Contrast

LEVEL = 0.01
"""Chance that a run without any separable site reports one; well below the 5 % that is usual."""
TOSSES = 300


def tosses(pairs: Contrast, seed: int) -> Float[Tensor, "pair toss"]:
    """Signs by which the source's Δ are turned: none in the first column, then every prompt's by chance."""
    generator = torch.Generator().manual_seed(seed)
    clusters, where = pairs.cluster[~pairs.is_target].unique(return_inverse=True)
    signs = torch.randint(2, (len(clusters), TOSSES), generator=generator) * 2.0 - 1
    return torch.cat([torch.ones(len(clusters), 1), signs], dim=1).double()[where]


def statistic(apart: Float[Tensor, "step pair toss"]) -> Float[Tensor, "step toss"]:
    """t = mean/sd · √n over pairs of what probes.cross_validated reads in Δ; 0 where nothing varies."""
    spread = apart.std(1)
    t = apart.mean(1) / torch.where(spread > 0, spread, 1) * apart.shape[1] ** 0.5
    return torch.where(spread > 0, t, torch.zeros_like(t))


def family_wise(statistics: Sequence[Float[Tensor, "step toss"]]) -> list[float]:
    """p of each site, its best step against the best of every site and step under each toss."""
    best = torch.stack([site.amax(0) for site in statistics])
    highest = best[:, 1:].amax(0)
    return [(1 + int((highest >= observed).sum())) / (1 + len(highest)) for observed in best[:, 0].tolist()]


def enough(pairs: Contrast) -> bool:
    """Whether so many prompts can be significant at all: turning every sign says the same, 2 of 2ⁿ tosses are best."""
    return 2.0 ** (1 - len(pairs.cluster[~pairs.is_target].unique())) <= LEVEL / 2
