"""Erases from every token, as little as possible, what a linear probe could tell harm from safety by: LEACE.

Belrose et al. (arXiv 2306.03819): r(x) = x − W⁺ P W (x − E x), W = Σ_xx^(−1/2) the whitening, P the
orthogonal projection on the column space of W Σ_xz, z = 1 for tokens of harmful prompts and 0 for those of safe twins.
a' = a + s · (r(a) − a), s = 1 in the paper, in the conditional rows; s = 0 changes no bit. Ungated.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ...activations.pairs import Pairing
from ...hooks import Context, SiteFunction
from ...sites import Site
from .lesson import Lesson
from .method import AtSites, Learnt

_LEAST = 1e-8  # share of the largest variance from which on a direction counts as one that is used


@dataclass(frozen=True)
class Leace:
    """Strength in erasures."""

    name: str = "LEACE"
    unit: float = 1.0

    def learn(self, lesson: Lesson) -> Learnt:
        sums: dict[Site, Moments] = {}
        pairing = Pairing(lesson.recording)
        for batch in lesson.recording:
            for pair in pairing.add(batch):
                here = sums.setdefault(pair.site, Moments(pair.safe.shape[1]))
                here.add(pair.harmful, 1.0)
                here.add(pair.safe, 0.0)
        erasers = {site: one.eraser() for site, one in sums.items()}
        return lambda strength: AtSites({site: eraser.function(strength) for site, eraser in erasers.items()})


class Moments:
    """First and second moments of x and z, in float64."""

    def __init__(self, d_in: int):
        self.n = self.z = 0.0
        self.x, self.xz = torch.zeros(d_in).double(), torch.zeros(d_in).double()
        self.xx = torch.zeros(d_in, d_in).double()

    def add(self, x: Float[Tensor, "token d_in"], z: float) -> None:
        exact = x.double()
        self.n, self.z = self.n + len(x), self.z + z * len(x)
        self.x, self.xz, self.xx = self.x + exact.sum(0), self.xz + z * exact.sum(0), self.xx + exact.T @ exact

    def eraser(self) -> "Eraser":
        mean = self.x / self.n
        values, vectors = torch.linalg.eigh(self.xx / self.n - torch.outer(mean, mean))
        used = values > _LEAST * values.max()
        root, vectors = values[used].sqrt(), vectors[:, used]
        across = vectors.T @ (self.xz / self.n - mean * self.z / self.n) / root  # W Σ_xz, in the principal axes
        unit = across / across.norm()
        return Eraser(mean.float(), (vectors @ (root * unit)).float(), (vectors @ (unit / root)).float())


@dataclass(frozen=True, eq=False)
class Eraser:
    """r(x) − x = −out · (into · (x − mean)): of rank one, for there are two classes."""

    mean: Float[Tensor, " d_in"]
    out: Float[Tensor, " d_in"]
    into: Float[Tensor, " d_in"]

    def __call__(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """What erasing adds."""
        return -((x - self.mean.to(x)) @ self.into.to(x))[..., None] * self.out.to(x)

    def function(self, strength: float) -> SiteFunction:
        def erase(x: Float[Tensor, "batch token d_in"], context: Context) -> Tensor:
            steered = torch.tensor([row == "cond" for row in context.rows], device=x.device)
            a = x.float()
            return torch.where(steered[:, None, None], (a + strength * self(a)).to(x.dtype), x)

        return erase
