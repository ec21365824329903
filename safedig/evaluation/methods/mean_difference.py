"""The mean difference between harm and safety, taken away from every token: contrastive activation addition.

CAA (arXiv 2312.06681): v = mean over pairs of a(harmful) − a(safe); a' = a − s · v at all tokens, here in
the conditional rows. s = 0 changes no bit. Gated, the same only in the images that ours opens its gate for: the same
dictionary, features and guarantee.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from ...activations.pairs import Pairing
from ...hooks import Context, SiteFunction
from ...sites import Site
from ...steering.gate import Gate
from ...steering.rule import Rule
from .lesson import Lesson
from .method import AtSites, Learnt
from .ours import steered


@dataclass(frozen=True)
class MeanDifference:
    """Strength in lengths of the mean difference."""

    gated: bool = False
    name: str = "mean difference"
    unit: float = 2.0

    def learn(self, lesson: Lesson) -> Learnt:
        vectors = mean_differences(lesson)
        rules = steered(lesson, 0.0).rules if self.gated else {}
        places = [site for site in vectors if not self.gated or site in rules]

        def at(strength: float) -> AtSites:
            return AtSites({site: minus(strength * vectors[site], rules.get(site)) for site in places})

        return at


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


def minus(vector: Float[Tensor, " d_in"], rule: Rule | None) -> SiteFunction:
    """Takes the vector from the conditional rows, all of them or those that the rule's gate opens for."""
    every_row = Gate(float("-inf"))

    def function(x: Float[Tensor, "batch token d_in"], context: Context) -> Tensor:
        a = x.float()
        open_ = every_row(torch.zeros_like(a[..., :1]), context) if rule is None else rule.decided(x, context)[0]
        return torch.where(open_[..., None], (a - vector.to(a)).to(x.dtype), x)

    return function


PLAIN = MeanDifference()
GATED = replace(PLAIN, gated=True, name="mean difference, gated")
