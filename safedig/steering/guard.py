"""How far an edit may take a token: no further out than unedited activations of benign prompts lie at this σ.

The delta is scaled back until the token is inside; what ends inside is not touched. A token that lies outside to begin
with may go no further out. Both regions are convex, so that the whole way back is inside.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..activations.pairs import benign
from ..activations.record import Activations, Batch, Image
from ..config import UsageError
from ..sites import Site

_SLACK = 1e-6  # a share of the way: float32 rounds, and must not round outwards


@dataclass(frozen=True, eq=False)
class Ellipsoid:
    """Mahalanobis distance at each σ: exact along the leading principal directions, the same in all others."""

    centre: Float[Tensor, "sigma d_in"]
    basis: Float[Tensor, "sigma rank d_in"]
    deviation: Float[Tensor, "sigma rank"]
    """Standard deviation along each of them."""
    rest: Float[Tensor, " sigma"]
    """Standard deviation in any other direction."""
    bound: Float[Tensor, " sigma"]

    def whitened(self, v: Float[Tensor, "*batch d_in"], at: int) -> Float[Tensor, "*batch rank_and_d_in"]:
        """A vector whose length is the Mahalanobis length of `v`; linear."""
        along = v @ self.basis[at].T
        across = v - along @ self.basis[at]
        return torch.cat([along / self.deviation[at], across / self.rest[at]], dim=-1)


@dataclass(frozen=True, eq=False)
class Guard:
    """The bounds of one site."""

    sigmas: tuple[float, ...]
    """Those of the calibration; between them the nearest one holds."""
    norm: Float[Tensor, " sigma"]
    ellipsoid: Ellipsoid | None = None

    def __call__(
        self, a: Float[Tensor, "*batch d_in"], delta: Float[Tensor, "*batch d_in"], sigma: float
    ) -> Float[Tensor, "*batch d_in"]:
        """As much of the delta as stays inside."""
        at = min(range(len(self.sigmas)), key=lambda index: abs(self.sigmas[index] - sigma))
        share = _reach(a, delta, self.norm[at])
        shape = self.ellipsoid
        if shape is not None:
            start = shape.whitened(a - shape.centre[at], at)
            share = share.minimum(_reach(start, shape.whitened(delta, at), shape.bound[at]))
        return delta * share[..., None]


def fit_guards(activations: Activations, *, quantile: float = 0.99, rank: int = 64) -> dict[Site, Guard]:
    """Bounds for every site and σ of a recording of benign prompts: others in it are passed over.

    On a share `quantile` of the images no token lies further out. The covariance is shrunk by OAS (Chen et al. 2010)
    and kept along `rank` directions; with rank=0 only norms are bounded, in one pass instead of two. Memory:
    8 · d_in² bytes a site and σ, with rank=0 a number for each image.
    """
    if not 0 <= quantile <= 1 or rank < 0:
        raise UsageError(f"quantile={quantile}, rank={rank}: expected a share from 0 to 1 and a number from 0 on.")
    if not benign(activations.prompts):
        raise UsageError("There is no benign prompt in the recording: record some, to set the bounds by.")
    sums: dict[tuple[Site, float], _Sums] = {}
    for batch, image, x in _images(activations):
        sums.setdefault((batch.site, batch.sigma), _Sums(rank > 0)).add(image, x)
    if not sums:
        raise UsageError("Nothing of the benign prompts passed any site: record at least one of them there.")
    shapes = {place: one.ellipsoid(rank) for place, one in sums.items()} if rank else {}
    far: dict[tuple[Site, float], dict[Image, float]] = {place: {} for place in shapes}
    for batch, image, x in _images(activations) if rank else ():
        place = (batch.site, batch.sigma)
        length = shapes[place].whitened(x - shapes[place].centre[0], 0).norm(dim=-1).max().item()
        far[place][image] = max(far[place].get(image, 0.0), length)
    guards = {}
    for site in dict.fromkeys(site for site, _ in sums):
        sigmas = tuple(sorted((sigma for place, sigma in sums if place == site), reverse=True))
        norm = torch.tensor([_quantile(sums[site, sigma].far, quantile) for sigma in sigmas])
        own = [
            replace(shapes[site, sigma], bound=torch.tensor([_quantile(far[site, sigma], quantile)]))
            for sigma in (sigmas if rank else ())
        ]
        guards[site] = Guard(sigmas, norm, _joined(own) if own else None)
    return guards


class _Sums:
    """How far out each image comes, and what the covariance of the tokens needs."""

    def __init__(self, covariance: bool):
        self.covariance = covariance
        self.far: dict[Image, float] = {}
        self.rows = 0
        self.total: Tensor | float = 0.0
        self.gram: Tensor | float = 0.0

    def add(self, image: Image, x: Float[Tensor, "token d_in"]) -> None:
        self.far[image] = max(self.far.get(image, 0.0), x.norm(dim=-1).max().item())
        if self.covariance:
            exact = x.double()
            self.rows += len(x)
            self.total, self.gram = self.total + exact.sum(0), self.gram + exact.T @ exact

    def ellipsoid(self, rank: int) -> Ellipsoid:
        """Without a bound as yet."""
        assert isinstance(self.total, Tensor) and isinstance(self.gram, Tensor)
        mean, d = self.total / self.rows, len(self.total)
        cov = self.gram / self.rows - torch.outer(mean, mean)
        trace, square = cov.trace().item(), cov.square().sum().item()
        apart = (self.rows + 1 - 2 / d) * (square - trace**2 / d)
        shrinkage = min(1.0, ((1 - 2 / d) * square + trace**2) / apart) if apart > 0 else 1.0
        least = max(1e-9 * trace / d, 1e-10 * mean.square().mean().item(), 1e-12)  # what float32 can tell from 0
        values, vectors = torch.linalg.eigh((1 - shrinkage) * cov + shrinkage * trace / d * torch.eye(d).double())
        values = values.clamp(min=least)
        kept = min(rank, d)
        rest = values[: d - kept].mean() if kept < d else values[0]
        return Ellipsoid(
            mean.float()[None],
            vectors[:, d - kept :].T.float()[None],
            values[d - kept :].sqrt().float()[None],
            rest.sqrt().float()[None],
            torch.full((1,), math.inf),
        )


def _images(activations: Activations) -> Iterator[tuple[Batch, Image, Float[Tensor, "token d_in"]]]:
    plain = benign(activations.prompts)
    for batch in activations:
        for image, rows in batch.images():
            if image in plain:
                yield batch, image, batch.x[rows].float()


def _reach(
    start: Float[Tensor, "*batch d"], step: Float[Tensor, "*batch d"], bound: Float[Tensor, ""]
) -> Float[Tensor, "*batch"]:
    """What share of the step can be taken inside the ball of this radius, or of the start's where that is larger."""
    radius = start.norm(dim=-1).maximum(bound)
    b, s = (start * step).sum(-1), step.square().sum(-1)
    c = (radius.square() - start.square().sum(-1)).clamp(min=0)  # ‖start + t·step‖² = radius²: s·t² + 2b·t − c = 0
    root = (b.square() + s * c).sqrt()
    share = torch.where(b > 0, c / (b + root), (root - b) / s).clamp(0, 1) * (1 - _SLACK)
    return torch.where((start + step).norm(dim=-1) <= radius, 1.0, share)


def _quantile(far: dict[Image, float], share: float) -> float:
    return float(np.quantile(list(far.values()), share, method="higher"))


def _joined(parts: list[Ellipsoid]) -> Ellipsoid:
    names = ("centre", "basis", "deviation", "rest", "bound")
    return Ellipsoid(**{name: torch.cat([getattr(one, name) for one in parts]) for name in names})
