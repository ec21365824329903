"""What a site's activations are like before anything is trained, and what that says of width, k, centring and death.

The prediction is an experiment: as many random directions as there will be features compete for the rows, as they do
in the first step of training. Those that never win get no gradient but the auxiliary loss's.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .options import Limits

_ROWS, _DIRECTIONS = 2**14, 256  # of the sample, and drawn to stand for all features: O(rows · directions · d_in)
_OUTLIER = 6.0  # root mean squares of the median channel
_WIDTHS = (16, 8, 4, 2, 1)  # expansions to choose from
_DEAD = 0.05  # the share of dead features that is put up with


@dataclass(frozen=True)
class Diagnosis:
    """The numbers; shares are of rows or features, and ‖σ‖ is the length of the vector of standard deviations."""

    rows: int
    d_in: int
    mean_ratio: float
    """‖μ‖ / ‖σ‖: from about 1 on, uncentred features die (arXiv 2605.31518)."""
    kurtosis: float
    """The fourth standardised moment, on average over channels; 3 where they are Gaussian."""
    outlier_channels: tuple[int, ...]
    """Those whose root mean square is over six times the median channel's."""
    effective_rank: float
    """exp of the entropy of the covariance's normalised spectrum (Roy & Vetterli 2007)."""
    distinct: float
    """Share of the sampled rows that differ from all rows before them."""
    far_out: float
    """Share of rows beyond `Limits().max_norm`, which are not trained on."""
    dead_uncentred: float
    """Predicted for the width and k that were asked about, if the mean were left in."""
    dead: float
    """Predicted with the mean taken out, as training does."""
    centre: bool
    """Whether taking the mean out is what keeps features alive."""
    expansion: int
    """The widest of 1, 2, 4, 8, 16 at which no more than 5 % are predicted dead, and no feature lacks a row."""
    k: int
    """Half of the effective rank, at most d_in / 8 and at least 1."""


def diagnose(x: Float[Tensor, "rows d_in"], expansion: int, k: int, seed: int = 0) -> Diagnosis:
    """Look at a sample of a site's rows, for training with this expansion and k."""
    generator = torch.Generator().manual_seed(seed)
    x = x[torch.randperm(len(x), generator=generator)[:_ROWS]].double().cpu()
    mean, d_in = x.mean(0), x.shape[1]
    centred = x - mean
    spread, rms = centred.square().mean(0), x.square().mean(0).sqrt()
    limit = Limits().max_norm * spread.sum().sqrt()
    probe = torch.randn(d_in, generator=generator, dtype=torch.float64)
    rank, distinct = _effective_rank(centred), len((x @ probe).unique()) / len(x)  # rows differ where their shadows do
    wanted = max(1, min(round(rank / 2), d_in // 8))
    start = _Start(centred.float(), mean.float(), generator)
    dead, uncentred = start.dead(expansion, k, centred=True), start.dead(expansion, k, centred=False)
    fitting = [e for e in _WIDTHS if e * d_in <= distinct * len(x) and start.dead(e, wanted, centred=True) <= _DEAD]
    return Diagnosis(
        rows=len(x),
        d_in=d_in,
        mean_ratio=(mean.norm() / spread.sum().sqrt().clamp(min=1e-30)).item(),
        kurtosis=_kurtosis(centred),
        outlier_channels=tuple((rms > _OUTLIER * rms.median()).nonzero()[:, 0].tolist()),
        effective_rank=rank,
        distinct=distinct,
        far_out=(centred.norm(dim=1) > limit).double().mean().item(),
        dead_uncentred=uncentred,
        dead=dead,
        centre=uncentred > dead + _DEAD / 2,
        expansion=fitting[0] if fitting else 1,
        k=wanted,
    )


def compared(diagnosis: Diagnosis, trained: dict[str, Any]) -> dict[str, float]:
    """What was predicted beside what training gave; `revived` is what the auxiliary loss has to its credit."""
    return {
        "dead_predicted": diagnosis.dead,
        "dead_trained": trained["dead"],
        "revived": diagnosis.dead - trained["dead"],
    }


class _Start:
    """Random unit directions and what they score on each row, with and without the mean."""

    def __init__(self, centred: Float[Tensor, "rows d_in"], mean: Float[Tensor, " d_in"], generator: torch.Generator):
        directions = 2 * torch.rand(centred.shape[1], _DIRECTIONS, generator=generator) - 1  # as sae-lens draws them
        directions = directions / directions.norm(dim=0)
        self.d_in, self.score, self.offset = centred.shape[1], centred @ directions, mean @ directions

    def dead(self, expansion: int, k: int, *, centred: bool) -> float:
        """The share of directions that are nowhere among the best k of d_sae a row, counted over all rows at once."""
        score = self.score if centred else self.score + self.offset
        winners = max(1, min(math.ceil(score.numel() * k / (expansion * self.d_in)), score.numel()))
        threshold = score.flatten().kthvalue(score.numel() - winners + 1).values.clamp(min=0)
        return (score.amax(0) < threshold).double().mean().item()


def _kurtosis(centred: Float[Tensor, "rows d_in"]) -> float:
    moving = centred[:, centred.square().mean(0) > 0]
    if moving.shape[1] == 0:
        return 0.0
    return (moving.pow(4).mean(0) / moving.square().mean(0).square()).mean().item()


def _effective_rank(centred: Float[Tensor, "rows d_in"]) -> float:
    spectrum = torch.linalg.eigvalsh(centred.T @ centred / len(centred)).clamp(min=0)
    share = spectrum / spectrum.sum().clamp(min=1e-30)
    return torch.special.entr(share).sum().exp().item()
