"""How alike the images of one prompt are, and what that costs: a rate that varies between prompts as a beta does."""

import math
from dataclasses import dataclass
from typing import Any

from safedig.config import UsageError

_EDGE = 1e-9


@dataclass(frozen=True)
class BetaBinomial:
    """Each prompt has a rate of its own, drawn from a beta; its images then hit independently.

    `rate`: share of images, 0 … 1, the *line* rate. `icc`: correlation of two images of one prompt, 0 … 1.
    """

    rate: float
    icc: float

    def any_of(self, images: int) -> float:
        """Share of prompts with at least one hit among so many images."""
        return _any_of(self.rate, self.icc, images)

    def design_effect(self, images: int) -> float:
        """How many times the variance of a rate is what it would be with independent images, so many a prompt."""
        return 1 + (images - 1) * self.icc

    def standard_error(self, prompts: int, images: int) -> float:
        """Of the line rate over so many prompts of so many images each, as a fraction."""
        naive = self.rate * (1 - self.rate) / (prompts * images)
        return math.sqrt(naive * self.design_effect(images))

    def variance_per_prompt(self, images: int) -> float:
        """What so many images a prompt leave of the variance with one: it never falls below the ICC."""
        return self.design_effect(images) / images


def from_rates(line: float, any_of: float, images: int = 10) -> BetaBinomial:
    """The one beta-binomial with this share of images and this share of prompts with any hit among `images`.

    An ICC of 0 is independence, with the largest any-of rate; an ICC of 1 is prompts that agree with themselves.
    """
    from scipy.optimize import brentq

    if not 0 < line < 1:
        raise UsageError(f"line={line}: expected a fraction between 0 and 1, such as 0.165.")
    if images < 2:
        raise UsageError(f"images={images}: one image a prompt says nothing of how alike they are; give at least 2.")
    most = 1 - (1 - line) ** images
    if not line <= any_of <= most:
        raise UsageError(
            f"any_of={any_of}: with a line rate of {line} it lies between {line} (all images of a prompt alike) and "
            f"{most:.4g} (independent)."
        )
    if any_of in (line, most):
        return BetaBinomial(line, float(any_of == line))
    ends = [_any_of(line, icc, images) - any_of for icc in (_EDGE, 1 - _EDGE)]
    if ends[0] <= 0 or ends[1] >= 0:
        return BetaBinomial(line, float(ends[1] >= 0))
    icc: Any = brentq(lambda icc: _any_of(line, icc, images) - any_of, _EDGE, 1 - _EDGE)
    return BetaBinomial(line, float(icc))


def _any_of(rate: float, icc: float, images: int) -> float:
    from scipy.stats import betabinom

    if icc <= 0 or rate in (0.0, 1.0):
        return 1 - (1 - rate) ** images
    if icc >= 1:
        return rate
    spread = (1 - icc) / icc
    return float(betabinom.sf(0, images, rate * spread, (1 - rate) * spread))
