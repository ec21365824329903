"""The mean difference between harm and safety, taken away from every token: contrastive activation addition.

CAA (arXiv 2312.06681): v = mean over pairs of a(harmful) − a(safe); a' = a − s · v at all tokens, here in
the conditional rows. s = 0 changes no bit. Gated, the same only in the images that ours opens its gate for: the same
dictionary, features and guarantee.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ...activations.pairs import Pairing
from ...hooks import Context, SiteFunction
from ...sites import Site
from ...steering.applied import Opened
from ...steering.gate import Gate
from ...steering.rule import Rule
from .lesson import Lesson
from .method import AtSites, Learnt
from .ours import steered

OpenFor = Callable[[Tensor, Context], Tensor]
"""From what passes a site to the tokens that are acted on."""


@dataclass(frozen=True)
class MeanDifference:
    """Strength in lengths of the mean difference."""

    gated: bool = False
    name: str = "mean difference"
    unit: float = 2.0

    def learn(self, lesson: Lesson) -> Learnt:
        vectors = mean_differences(lesson)
        if not self.gated:
            return lambda strength: AtSites({site: minus(strength * v, every_row) for site, v in vectors.items()})
        rules, nothing = steered(lesson, 0.0).rules, torch.zeros(())

        def at(strength: float) -> AtSites:
            opened = Opened()
            lengths = {site: strength * vectors.get(site, nothing) for site in rules}
            return AtSites({site: minus(lengths[site], partial(gated, rule, opened)) for site, rule in rules.items()})

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


def every_row(x: Float[Tensor, "batch token d_in"], context: Context) -> Bool[Tensor, "batch token"]:
    """All conditional ones."""
    return Gate(float("-inf"))(torch.zeros_like(x[..., 0]), context)


def gated(
    rule: Rule, opened: Opened, x: Float[Tensor, "batch token d_in"], context: Context
) -> Bool[Tensor, "batch token"]:
    """Those that the rule opens for, or a rule that was passed before it."""
    open_, _ = rule.to(x.device).decided(x, context, opened.before(context))
    opened.add(context, open_.any(1))
    return open_


def minus(vector: Float[Tensor, "*d_in"], open_for: OpenFor) -> SiteFunction:
    """Takes the vector from the tokens that are open."""

    def function(x: Float[Tensor, "batch token d_in"], context: Context) -> Tensor:
        a = x.float()
        return torch.where(open_for(x, context)[..., None], (a - vector.to(a)).to(x.dtype), x)

    return function


PLAIN = MeanDifference()
GATED = replace(PLAIN, gated=True, name="mean difference, gated")
