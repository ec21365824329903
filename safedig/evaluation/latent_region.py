"""Do steered latents stay where unsteered ones lie? The share outside a region that holds 99 % of those."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor

from safedig.config import UsageError
from safedig.evaluation.intervals import Rate, clustered_rate
from safedig.evaluation.resampling import numbered

INSIDE = 0.99
GRID = 4  # cells on each side


@dataclass(frozen=True)
class Region:
    """Rows at a Mahalanobis distance up to `radius` from the mean; it holds at least `covers` of fresh ones."""

    mean: Float[Tensor, " d"]
    precision: Float[Tensor, "d d"]
    radius: float
    covers: float

    def distances(self, rows: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """Mahalanobis distance of each row."""
        off = rows.double() - self.mean
        return torch.einsum("nd,de,ne->n", off, self.precision, off).clamp(min=0).sqrt()

    def outside(self, rows: Float[Tensor, "n d"], prompts: Sequence[Hashable]) -> Rate:
        """Share of rows beyond the radius, clustered by prompt; a row that is not finite is outside."""
        far = self.distances(rows.nan_to_num()) > self.radius
        return clustered_rate((far | ~rows.isfinite().all(-1)).tolist(), prompts)


def fit_region(rows: Float[Tensor, "n d"], prompts: Sequence[Hashable], inside: float = INSIDE) -> Region:
    """Mean and shrunk covariance (Ledoit and Wolf) from every other prompt; the radius from the prompts in between.

    The radius is a rank among rows that shaped nothing (split conformal), so it holds whatever the distribution, where
    a χ² quantile holds for a known Gaussian only. That takes `inside` / (1 − `inside`) rows held out: 99.
    """
    from sklearn.covariance import LedoitWolf

    if len(rows) != len(prompts):
        raise UsageError(f"{len(rows)} latents and {len(prompts)} prompts: expected one prompt for each.")
    held_out = torch.from_numpy(numbered(prompts) % 2).bool()
    shaping, judging = rows[~held_out].double(), rows[held_out].double()
    rank = math.ceil((len(judging) + 1) * inside)
    if rank > len(judging) or len(shaping) < 2:
        least = math.ceil(inside / (1 - inside) - 1e-9)
        raise UsageError(f"{len(judging)} unsteered latents of held-out prompts: a {inside:.0%} region takes {least}.")
    fitted = LedoitWolf().fit(shaping.numpy())
    mean, precision = torch.from_numpy(fitted.location_), torch.from_numpy(fitted.precision_)
    region = Region(mean, precision, math.inf, inside)
    radius = float(region.distances(judging).sort().values[rank - 1])
    return Region(mean, precision, radius, inside)


def summarised(latents: Float[Tensor, "n c height width"], grid: int = GRID) -> Float[Tensor, "n d"]:
    """Each latent as its channels' means over grid × grid cells and their log deviations inside: few enough to fit."""
    n, _, height, width = latents.shape
    if height % grid or width % grid:
        raise UsageError(f"Latents of {height} × {width}: expected multiples of {grid}; give another grid.")
    cells = rearrange(latents.double(), "n c (gh h) (gw w) -> n c gh gw (h w)", gh=grid, gw=grid)
    means = reduce(cells, "n c gh gw pixels -> n (c gh gw)", "mean")
    spreads = cells.var(-1, unbiased=False).clamp(min=1e-12).log() / 2
    return torch.cat([means, spreads.reshape(n, -1)], dim=-1)
