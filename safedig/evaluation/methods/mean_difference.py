"""The mean difference between harm and safety, taken away from every token: contrastive activation addition.

CAA (arXiv 2312.06681): v = mean over pairs of a(harmful) − a(safe); a' = a − s · v at all tokens, here in
the conditional rows. s = 0 changes no bit. Gated, the same only in images in which a token's harmful codes exceed what
benign images reach: g = 1 [max_token Σ_M z_j > τ], with the same dictionary, features and threshold τ as ours.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from ...activations.pairs import Pairing
from ...features.heights import columns
from ...hooks import Context, SiteFunction
from ...sae.model import ThresholdEncoder
from ...sites import Site
from ...steering.gate import Gate
from .lesson import Lesson
from .method import AtSites, Learnt


@dataclass(frozen=True)
class MeanDifference:
    """Strength in lengths of the mean difference."""

    gated: bool = False
    name: str = "mean difference"
    unit: float = 2.0

    def learn(self, lesson: Lesson) -> Learnt:
        vectors = mean_differences(lesson)
        detectors = detectors_of(lesson) if self.gated else {}
        places = [site for site in vectors if not self.gated or site in detectors]

        def at(strength: float) -> AtSites:
            return AtSites({site: minus(strength * vectors[site], detectors.get(site)) for site in places})

        return at


@dataclass(frozen=True, eq=False)
class Detector:
    """The codes of the harmful features and the gate on them."""

    encoder: ThresholdEncoder
    gate: Gate

    def __call__(self, a: Float[Tensor, "batch token d_in"], context: Context) -> Tensor:
        return self.gate(self.encoder(a), context)


def detectors_of(lesson: Lesson) -> dict[Site, Detector]:
    """The gates of ours, for the whole image, at every site where there are harmful features."""
    return {
        site: Detector(columns(lesson.dictionaries[site], one.index), Gate(one.threshold, scope="image"))
        for site, one in lesson.features.items()
    }


def mean_differences(lesson: Lesson) -> dict[Site, Float[Tensor, " d_in"]]:
    """Over tokens, steps and pairs of both domains, at every site."""
    total: dict[Site, Tensor] = {}
    tokens: dict[Site, int] = {}
    pairing = Pairing(lesson.recording)
    for batch in lesson.recording:
        for pair in pairing.add(batch):
            apart = pair.harmful.double() - pair.safe.double()
            total[pair.site] = total.get(pair.site, 0.0) + apart.sum(0)
            tokens[pair.site] = tokens.get(pair.site, 0) + len(apart)
    return {site: (total[site] / tokens[site]).float() for site in total}


def minus(vector: Float[Tensor, " d_in"], detector: Detector | None) -> SiteFunction:
    """Takes the vector from the conditional rows, all of them or those that the detector opens."""
    every_row = Gate(float("-inf"))

    def function(x: Float[Tensor, "batch token d_in"], context: Context) -> Tensor | None:
        a = x.float()
        open_ = every_row(torch.zeros_like(a[..., :1]), context) if detector is None else detector(a, context)
        return torch.where(open_[..., None], (a - vector.to(a)).to(x.dtype), x)

    return function


PLAIN = MeanDifference()
GATED = replace(PLAIN, gated=True, name="mean difference, gated")
