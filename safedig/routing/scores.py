"""What paired differences say of a site, one short function a criterion; probes.py has those that read the rows.

Δ_i = x_i(harmful) − x_i(safe) of the pooled rows of pair i. All are the same for rotated and for rescaled rows, and
weighted: `weights[draw, pair]` counts the pairs, the first draw all of them once and the others a bootstrap's.
"""

from collections.abc import Sequence
from itertools import combinations

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from .contrast import Contrast
from .probes import PairedRows, explained

_COMPONENTS = 16  # leading directions in which safe activations are compared
_PROMPTS_A_COMPONENT = 4


def agreement(rows: PairedRows, pairs: Contrast, weights: Float[Tensor, "draw pair"]) -> Tensor | None:
    """cos(mean Δ of one domain, mean Δ of another), [draw step]; None if there is one domain only.

    ⟨Δ̄_g, Δ̄_h⟩ / √(‖Δ̄_g‖² ‖Δ̄_h‖²) with the squared lengths free of noise (`_mean`). The source against the target;
    without a target, the mean over pairs of source domains.
    """
    if pairs.is_target.any():
        sides = [(~pairs.is_target, pairs.is_target)]
    else:
        sides = [(pairs.of(one), pairs.of(other)) for one, other in combinations(pairs.source, 2)]
    found = []
    for both in sides:
        (one, square), (other, other_square) = (
            _mean(rows.delta[:, mask], pairs.cluster[mask], weights[:, mask]) for mask in both
        )
        length = (square.clamp(min=0) * other_square.clamp(min=0)).sqrt()
        found.append(_ratio((one * other).sum(-1), length).clamp(-1, 1))
    return torch.stack(found).mean(0) if found else None


def stability(rows: PairedRows, pairs: Contrast, weights: Float[Tensor, "draw pair"]) -> Float[Tensor, " draw"]:
    """1 − the normalised variance of Δ over prompts, seeds, σ and domains: ‖mean Δ‖² / mean ‖Δ‖², free of noise.

    Each step is first brought to mean ‖Δ‖² = 1, so that no σ has a greater say.
    """
    delta = rows.delta
    size = delta.square().sum(2).mean(1).sqrt()[:, None, None]
    unit = _ratio(delta, size).mean(0, keepdim=True)
    return _mean(unit, pairs.cluster, weights)[1][:, 0].clamp(0, 1)


def share(rows: PairedRows, within: Float[Tensor, "step 2 r r"], pairs: Contrast) -> Float[Tensor, " step"]:
    """The share of the tokens' variance along Δ̄ of the source: uᵀΣu / tr Σ, u = Δ̄/‖Δ̄‖.

    Σ, by the law of total variance, is that of tokens about their image and that of images about each other.
    """
    source = rows.of(~pairs.is_target)
    mean = source.delta.mean(1, keepdim=True)
    u = _ratio(mean, mean.norm(dim=-1, keepdim=True))
    images = torch.cat([source.harmful, source.safe], dim=1)
    images = images - images.mean(1, keepdim=True)
    covariance = within.mean(1) + images.mT @ images / images.shape[1]
    return _ratio((u @ covariance @ u.mT)[:, 0, 0], covariance.diagonal(dim1=-2, dim2=-1).sum(-1))


def shift(rows: PairedRows, pairs: Contrast) -> Float[Tensor, " step"] | None:
    """Fréchet distance between the domains' safe rows over their spread; None if there is one domain only.

    (‖μ_1 − μ_2‖² + tr(Σ_1 + Σ_2 − 2(Σ_1 Σ_2)^½)) / tr(Σ_1 + Σ_2), Heusel et al. (arXiv 1706.08500), in the leading
    components of both: the source against the target; without a target, each source domain against the others.
    """
    masks = [pairs.is_target] if pairs.is_target.any() else [pairs.of(name) for name in pairs.source]
    sides = [(mask, ~mask) for mask in masks if not mask.all()]
    if not sides:
        return None
    return torch.stack([_frechet(*(rows.safe[:, mask] for mask in both)) for both in sides]).mean(0)


def binding(
    text: PairedRows, image: PairedRows, fold: Int[Tensor, " pair"], weights: Float[Tensor, "draw pair"]
) -> Float[Tensor, "draw step"]:
    """Cross-validated R² of Δ at the image tokens, explained linearly by Δ at the text tokens of the same depth."""
    return explained(text.delta, image.delta, fold, weights).clamp(0, 1)


def distance(position: int, count: int) -> float:
    """How far from the output: 1 at the first of `count` recorded sites, 1/count at the last."""
    return (count - position) / count


def cost(d_in: int, tokens: int, largest: int) -> float:
    """Numbers that an edit touches an image and step, tokens · d_in, over those at the site with most.

    An edit of a few directions costs in proportion to them; a stopwatch would make the ranking differ by machine.
    """
    return d_in * tokens / largest


def redundancy(deltas: Sequence[Float[Tensor, "step pair _"]]) -> Float[Tensor, "site site"]:
    """How alike two sites tell the prompts apart: linear CKA of Δ (Kornblith et al., arXiv 1905.00414), from 0 to 1."""
    grams = []
    for delta in deltas:
        delta = delta - delta.mean(1, keepdim=True)
        gram = (delta @ delta.mT).sum(0).flatten()
        grams.append(_ratio(gram, gram.norm()))
    stacked = torch.stack(grams)
    return (stacked @ stacked.mT).clamp(0, 1)


def _mean(
    delta: Float[Tensor, "step pair r"], cluster: Int[Tensor, " pair"], weights: Float[Tensor, "draw pair"]
) -> tuple[Float[Tensor, "draw step r"], Float[Tensor, "draw step"]]:
    """Δ̄, and an estimate of ‖E Δ‖² that noise does not lift: the mean of ⟨Δ_i, Δ_j⟩ over pairs of other prompts."""
    names, where = cluster.unique(return_inverse=True)
    count = len(names)
    sums = torch.zeros(delta.shape[0], count, delta.shape[2], dtype=delta.dtype).index_add_(1, where, delta)
    sizes = torch.bincount(where, minlength=count).to(delta.dtype)
    w = torch.zeros(len(weights), count, dtype=weights.dtype).index_add_(1, where, weights) / sizes
    total = einsum(w, sums, "draw cluster, step cluster r -> draw step r")
    own = einsum(w.square(), sums.square().sum(2), "draw cluster, step cluster -> draw step")
    counted = (w * sizes).sum(1)
    others = counted.square() - (w * sizes).square().sum(1)
    return total / counted[:, None, None], _ratio(total.square().sum(-1) - own, others[:, None])


def _frechet(one: Float[Tensor, "step row r"], other: Float[Tensor, "step row_ r"]) -> Float[Tensor, " step"]:
    kept = min(_COMPONENTS, one.shape[2], max(1, min(one.shape[1], other.shape[1]) // _PROMPTS_A_COMPONENT))
    both = torch.cat([one - one.mean(1, keepdim=True), other - other.mean(1, keepdim=True)], dim=1)
    leading = torch.linalg.eigh(both.mT @ both).eigenvectors[..., -kept:]
    apart = ((one.mean(1) - other.mean(1))[:, None] @ leading).square().sum((1, 2))
    factors = [
        torch.linalg.qr((side - side.mean(1, keepdim=True)) @ leading / side.shape[1] ** 0.5).R for side in (one, other)
    ]
    spread = sum((factor.square().sum((1, 2)) for factor in factors), torch.zeros(len(one), dtype=one.dtype))
    shared = torch.linalg.svdvals(factors[0] @ factors[1].mT).sum(1)  # tr (Σ_1 Σ_2)^½ from Σ = RᵀR
    return _ratio(apart + spread - 2 * shared, spread).clamp(min=0)


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """0 where there is nothing to divide by."""
    return torch.where(whole > 0, part / torch.where(whole > 0, whole, 1), torch.zeros_like(part))
