"""Harm that is in no token by itself: two features that mean it where both fire in one image."""

from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..activations.record import Image
from .dose import Dose

ALONE = 0.98  # share of the harmless images whose own dose is lower: harmful images below it are heard by pairs only
FEW = 8  # missed images, below which no pair is learnt
MEMBERS = 96  # latents of which pairs are made: those that tell such images best, of all domains that have some


class Peaks:
    """The highest code of each candidate latent in each image. Memory: 4 · candidates bytes an image."""

    def __init__(self) -> None:
        self.risk: dict[Image, str] = {}
        self._peak: dict[Image, Float[Tensor, " candidates"]] = {}
        self._own: dict[Image, float] = {}

    def add(self, image: Image, risk: str, z: Float[Tensor, "token candidates"], own: float) -> None:
        """The tokens of an image in one step, and the highest dose of any one of them."""
        peak = z.amax(0).cpu()
        self._peak[image] = peak.maximum(self._peak[image]) if image in self._peak else peak
        self._own[image] = max(own, self._own.get(image, own))
        self.risk[image] = risk

    def highest(self) -> Float[Tensor, "image candidates"]:
        return torch.stack(list(self._peak.values()))

    def harmful(self) -> Bool[Tensor, " image"]:
        return torch.tensor([bool(risk) for risk in self.risk.values()])

    def missed(self) -> Bool[Tensor, " image"]:
        """The harmful images none of whose tokens has a higher dose than the tokens of harmless images."""
        own, harmful = torch.tensor(list(self._own.values())), self.harmful()
        return harmful & (own <= own[~harmful].quantile(ALONE))


def members(
    peak: Float[Tensor, "image candidates"], missed: Bool[Tensor, " image"], harmful: Bool[Tensor, " image"]
) -> Int[Tensor, " member"]:
    """The latents that tell the missed images from harmless ones best; none where hardly an image is missed."""
    if missed.sum() < FEW:
        return torch.zeros(0, dtype=torch.long)
    high, low = peak[missed], peak[~harmful]
    apart = (high.mean(0) - low.mean(0)) / (high.std(0) + low.std(0)).clamp(min=1e-6)
    best = apart.topk(min(MEMBERS, len(apart)))
    return best.indices[best.values > 0]


def with_pairs(
    dose: Dose,
    at: Int[Tensor, " member"],
    peaks: Float[Tensor, "image features"],
    missed: Bool[Tensor, " image"],
    harmful: Bool[Tensor, " image"],
    ridge: float,
) -> Dose:
    """The dose with what pairs of the features at these places say: ridge regression of 1 on missed images, 0 on safe.

    Harm and safety weigh the same, however many images there are of each. A feature's unit is its mean peak in the
    missed images, so that a pair's lower peak compares like with like.
    """
    if len(at) < 2:
        return dose
    every = torch.combinations(at)
    units = peaks[missed].mean(0).clamp(min=1e-6)
    scaled = replace(dose, pairs=every, pair_weights=torch.zeros(len(every)), units=units)
    told = missed | ~harmful
    x = scaled.meeting(peaks[told]).double()
    y = missed[told].double()
    weight = torch.where(y > 0, 0.5 / y.sum(), 0.5 / (1 - y).sum())[:, None]
    centre = (weight * x).sum(0)
    spread = x - centre
    gram = spread.T @ (weight * spread)
    penalty = ridge * gram.diagonal().mean().clamp(min=1e-12) * torch.eye(len(gram), dtype=torch.float64)
    w = torch.linalg.solve(gram + penalty, spread.T @ (weight[:, 0] * (y - 0.5)))
    return replace(scaled, pair_weights=w.float(), pair_bias=(0.5 - centre @ w).float())
