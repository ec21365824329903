"""Linear probes in closed form, and what they are worth on prompts they have not seen.

A ridge regression on the labels ±1 (regularised Fisher discriminant): one small solve serves every label that is
tried, and its penalty is a share of the mean variance, so that rotating or rescaling a site changes nothing.
"""

from dataclasses import dataclass

import torch
from einops import einsum, reduce
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .contrast import Contrast

_PENALTY = 0.1  # of the mean variance a dimension


@dataclass(frozen=True, eq=False)
class PairedRows:
    """The pooled rows of a site, harmful and safe, pair by pair."""

    harmful: Float[Tensor, "step pair r"]
    safe: Float[Tensor, "step pair r"]

    @property
    def delta(self) -> Float[Tensor, "step pair r"]:
        return self.harmful - self.safe

    def of(self, pairs: Bool[Tensor, " pair"]) -> "PairedRows":
        return PairedRows(self.harmful[:, pairs], self.safe[:, pairs])


def penalised(rows: Float[Tensor, "*step row r"]) -> Float[Tensor, "*step r r"]:
    """The Cholesky factor of XᵀX + λ·1 with X centred and λ = 0.1 · tr(XᵀX)/r; that of 1 where nothing varies."""
    x = rows - rows.mean(-2, keepdim=True)
    gram = x.mT @ x
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype)
    spread = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    return torch.linalg.cholesky(torch.where(spread > 0, gram + _PENALTY * spread * eye, eye))


def probe(train: PairedRows) -> Float[Tensor, "step r 1"]:
    """w = (XᵀX + λ)⁻¹ Σ (x_harmful − x_safe): the labels ±1 are balanced, so that no mean enters."""
    rows = torch.cat([train.harmful, train.safe], dim=1)
    return torch.cholesky_solve(train.delta.sum(1)[..., None], penalised(rows))


Scores = tuple[Float[Tensor, "step pair"], Float[Tensor, "step pair"]]
"""What a probe gives the harmful and the safe row of each pair."""


def read(rows: PairedRows, w: Float[Tensor, "step r 1"]) -> Scores:
    return (rows.harmful @ w)[..., 0], (rows.safe @ w)[..., 0]


def cross_validated(
    rows: PairedRows, fold: Int[Tensor, " pair"], signs: Float[Tensor, "pair toss"]
) -> tuple[Scores, Float[Tensor, "step pair toss"]]:
    """Each pair as the probe of the other folds reads it; and Δ read by it, had labels been tossed: ±wᵀΔ, w of them.

    The scores are those of the first toss, about the mean of what the probe was fitted on. With A = LLᵀ of all rows,
    whatever their labels, wᵀΔ = (L⁻¹Δ_train signs)ᵀ(L⁻¹Δ): a fold is factored once for all tosses.
    """
    harmful, safe = torch.zeros(2, *rows.harmful.shape[:2], dtype=rows.harmful.dtype)
    apart = torch.zeros(rows.harmful.shape[0], *signs.shape, dtype=rows.harmful.dtype)
    for held_out in fold.unique():
        test = fold == held_out
        train = rows.of(~test)
        everything = torch.cat([train.harmful, train.safe], dim=1)
        factor = penalised(everything)
        whitened = torch.linalg.solve_triangular(factor, rows.delta.mT, upper=False)
        tossed = whitened[..., ~test] @ signs[~test]
        apart[:, test] = (whitened[..., test].mT @ tossed) * signs[test]
        w = torch.linalg.solve_triangular(factor.mT, tossed[..., :1], upper=True)
        centre = (everything.mean(1, keepdim=True) @ w)[..., 0]
        for kept, part in zip((harmful, safe), read(rows.of(test), w), strict=True):
            kept[:, test] = part - centre
    return (harmful, safe), apart


def auroc(scores: Scores, weights: Float[Tensor, "draw pair"]) -> Float[Tensor, "draw step"]:
    """P(harmful > safe) + P(equal)/2 over all pairs of a harmful and a safe row, each counted as its weight says.

    1/2 in a draw in which none of them counts.
    """
    size = weights.sum(1)
    steps = []
    for harmful, safe in zip(*scores, strict=True):
        above = (harmful[:, None] > safe).double() + 0.5 * (harmful[:, None] == safe).double()
        steps.append(reduce((weights @ above) * weights, "draw pair -> draw", "sum") / size**2)
    return torch.where(size[:, None] > 0, torch.stack(steps, dim=1), 0.5)


def transfer_auroc(rows: PairedRows, pairs: Contrast, weights: Float[Tensor, "draw pair"]) -> Tensor | None:
    """AUROC on domains that the probe has not seen, [draw step]; None if there is nothing else to learn from.

    The probe of the whole source on the target; without a target, that of all source domains but one on that one,
    averaged over them. A pair that shares a prompt with what is held out is not learnt from.
    """
    held_out = [pairs.is_target] if pairs.is_target.any() else [pairs.of(name) for name in pairs.source]
    parted = [(~test & ~torch.isin(pairs.cluster, pairs.cluster[test]), test) for test in held_out]
    found = [
        auroc(read(rows.of(test), probe(rows.of(train))), weights[:, test]) for train, test in parted if train.any()
    ]
    return torch.stack(found).mean(0) if found else None


def explained(
    x: Float[Tensor, "step pair r"],
    y: Float[Tensor, "step pair s"],
    fold: Int[Tensor, " pair"],
    weights: Float[Tensor, "draw pair"],
) -> Float[Tensor, "draw step"]:
    """Cross-validated R² of y by ridge regression on x, 1 − Σ‖y − ŷ‖² / Σ‖y − ȳ‖²; 0 where y does not vary."""
    left, whole = torch.zeros(2, *y.shape[:2], dtype=y.dtype)
    for held_out in fold.unique():
        test = fold == held_out
        mean_x, mean_y = x[:, ~test].mean(1, keepdim=True), y[:, ~test].mean(1, keepdim=True)
        moment = (x[:, ~test] - mean_x).mT @ (y[:, ~test] - mean_y)
        fitted = (x[:, test] - mean_x) @ torch.cholesky_solve(moment, penalised(x[:, ~test]))
        left[:, test] = (y[:, test] - mean_y - fitted).square().sum(2)
        whole[:, test] = (y[:, test] - mean_y).square().sum(2)
    left, whole = (einsum(weights, part, "draw pair, step pair -> draw step") for part in (left, whole))
    return torch.where(whole > 0, 1 - left / whole.clamp(min=torch.finfo(y.dtype).tiny), torch.zeros_like(whole))
