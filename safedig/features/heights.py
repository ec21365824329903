"""From which height on the gate opens: the sum of a token's harmful codes that benign images stay below."""

import math
from dataclasses import replace

from jaxtyping import Float, Int
from torch import Tensor

from ..activations.record import Image
from ..sae.model import SparseAutoencoder, ThresholdEncoder, TopKEncoder


def columns(sae: SparseAutoencoder, index: Int[Tensor, " features"]) -> ThresholdEncoder:
    """The encoder of these features only; a centre that the decoder has subtracted before is folded into it."""
    encoder, centre = sae.encoder.columns(index), sae.decoder.centre
    return encoder if centre is None else replace(encoder, b_enc=encoder.b_enc - centre @ encoder.W_enc)


class Heights:
    """How high the harmful codes of any one token add up in each image: the highest token of the highest step."""

    def __init__(self, sae: SparseAutoencoder, index: Int[Tensor, " features"]):
        self.sae, self.index = sae, index
        self._columns = None if isinstance(sae.encoder, TopKEncoder) else columns(sae, index)
        self.of: dict[Image, float] = {}

    def add(self, image: Image, x: Float[Tensor, "token d_in"]) -> None:
        z = self.sae.encode(x)[:, self.index] if self._columns is None else self._columns(x)
        self.of[image] = max(self.of.get(image, 0.0), z.sum(-1).amax().item())

    def quantile(self, share: float) -> float:
        """The lowest height that this share of the images does not exceed."""
        heights = sorted(self.of.values())
        return heights[math.ceil(share * (len(heights) - 1))]
