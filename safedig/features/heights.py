"""From which height on the gate opens: the dose of a token's harmful codes that benign images stay below."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..activations.record import Image
from ..sae.model import SparseAutoencoder, ThresholdEncoder, TopKEncoder
from .dose import Dose

Codes = Callable[[Float[Tensor, "token d_in"]], Float[Tensor, "token features"]]


def columns(sae: SparseAutoencoder, index: Int[Tensor, " features"]) -> ThresholdEncoder:
    """The encoder of these features only; a centre that the decoder has subtracted before is folded into it."""
    encoder, centre = sae.encoder.columns(index), sae.decoder.centre
    return encoder if centre is None else replace(encoder, b_enc=encoder.b_enc - centre @ encoder.W_enc)


def codes(sae: SparseAutoencoder, index: Int[Tensor, " features"]) -> Codes:
    """What reads the codes of these features; all others are encoded too only where they compete for their places."""
    if isinstance(sae.encoder, TopKEncoder):
        return lambda x: sae.encode(x)[:, index]
    return columns(sae, index)


class Heights:
    """How high the harmful dose of any one token comes in each image: the highest token of the highest step."""

    def __init__(self, sae: SparseAutoencoder, index: Int[Tensor, " features"], dose: Dose | None = None):
        self.codes, self.dose = codes(sae, index), dose or Dose.of(torch.ones(len(index)))
        self.of: dict[Image, float] = {}
        self.own: dict[Image, float] = {}
        """By what single tokens say alone."""
        self.together: dict[Image, float] = {}
        """By what pairs of features say alone."""

    def add(self, image: Image, x: Float[Tensor, "token d_in"]) -> None:
        """All tokens of the image in one step."""
        z = self.codes(x)[None]
        for of, read in ((self.of, self.dose), (self.own, self.dose.own), (self.together, self.dose.together)):
            of[image] = max(of.get(image, -math.inf), read(z).amax().item())

    def quantile(self, share: float) -> float:
        """A height that at least this share of the images does not exceed, and that one of them has."""
        return float(np.quantile(list(self.of.values()), share, method="higher"))
