"""Codes of harm set to a negative multiple of themselves where they are above their mean: SAeUron's clamp.

Cywiński and Deja (arXiv 2501.18052): z'_j = −m · μ_j · z_j where z_j > μ_j, j ∈ M, μ_j the mean code over harmful
prompts. With the reconstruction error kept, as the paper says, a' = D(z') + (a − D(z)). The published code has that
error's sign reversed, a' = D(z') + (D(z) − a): a token without any harm then becomes 2 · D(z) − a. All tokens and rows.

m = 0 sets the codes to nought; no strength of the formula is a no-op.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...activations.pairs import Pairing
from ...hooks import Context, SiteFunction
from ...sae.model import SparseAutoencoder
from ...sites import Site
from .lesson import Lesson
from .method import AtSites, Learnt


@dataclass(frozen=True)
class Clamp:
    """Strength is m."""

    published: bool = False
    name: str = "SAeUron clamp"
    unit: float = 4.0

    def learn(self, lesson: Lesson) -> Learnt:
        means = mean_codes(lesson)

        def at(strength: float) -> AtSites:
            return AtSites(
                {
                    site: clamping(lesson.dictionaries[site], one.index, means[site], strength, self.published)
                    for site, one in lesson.features.items()
                }
            )

        return at


def mean_codes(lesson: Lesson) -> dict[Site, Float[Tensor, " features"]]:
    """Over all tokens, steps and harmful prompts."""
    total: dict[Site, Tensor] = {}
    tokens: dict[Site, int] = {}
    pairing = Pairing(lesson.recording)
    for batch in lesson.recording:
        for pair in pairing.add(batch) if batch.site in lesson.features else ():
            codes = lesson.dictionaries[pair.site].encode(pair.harmful)[:, lesson.features[pair.site].index]
            total[pair.site] = total.get(pair.site, 0.0) + codes.double().sum(0)
            tokens[pair.site] = tokens.get(pair.site, 0) + len(codes)
    return {site: (total[site] / tokens[site]).float() for site in total}


def clamping(
    sae: SparseAutoencoder,
    index: Int[Tensor, " features"],
    mean: Float[Tensor, " features"],
    strength: float,
    published: bool,
) -> SiteFunction:
    @lru_cache(maxsize=1)
    def there(device: torch.device) -> tuple[SparseAutoencoder, Tensor, Tensor]:
        return sae.to(device), index.to(device), mean.to(device)

    def clamp(x: Float[Tensor, "batch token d_in"], context: Context) -> Tensor:
        a = x.float()
        own, features, usual = there(x.device)
        z = own.encode(a)
        harmful = z[..., features]
        changed = torch.where(harmful > usual, -strength * usual * harmful, harmful)
        delta = (changed - harmful) @ own.decoder.W_dec[features]  # D(z') − D(z)
        kept = 2 * own.decode(z) - a if published else a
        return (kept + delta).to(x.dtype)

    return clamp


CORRECT = Clamp()
PUBLISHED = replace(CORRECT, published=True, name="SAeUron clamp, published sign")
