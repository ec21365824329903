"""How much harm a token's codes say it carries: a weighted sum, and what two features say that meet in one image.

Codes merely added up let one feature that fires on harmless tokens drown what all others say, and harm by composition
is no feature of any one token: a bottle is harmless and so is a car.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Dose:
    """Higher on a token that harm has changed than on a harmless one; once calibrated, above 0 on hardly any."""

    weights: Float[Tensor, " features"]
    """Of the features of M, in their order; negative where a feature speaks against harm."""
    bias: Float[Tensor, ""]
    pairs: Int[Tensor, "pair 2"]
    """Features that mean harm where both fire in one image, by their place in M."""
    pair_weights: Float[Tensor, " pair"]
    pair_bias: Float[Tensor, ""]
    units: Float[Tensor, " features"]
    """What a usual peak of each feature is, so that those of a pair compare."""

    @classmethod
    def of(cls, weights: Float[Tensor, " features"]) -> "Dose":
        """A weighted sum, without pairs."""
        pairs, none = torch.zeros(0, 2, dtype=torch.long), torch.zeros(0)
        return cls(weights, torch.tensor(0.0), pairs, none, torch.tensor(0.0), torch.ones_like(weights))

    def __call__(self, z: Float[Tensor, "batch token features"]) -> Float[Tensor, "batch token"]:
        """Of each token: the larger of its own dose and, where it holds a feature of the pairs, of what these say.

        Cost O(features + pairs) a token.
        """
        own = self.own(z)
        if not len(self.pairs):
            return own
        holds = (z[..., self.pairs.unique()] > 0).any(-1)
        return own.maximum(torch.where(holds, self.together(z)[:, None], -torch.inf))

    def own(self, z: Float[Tensor, "batch token features"]) -> Float[Tensor, "batch token"]:
        """What each token says by itself."""
        return z @ self.weights + self.bias

    def together(self, z: Float[Tensor, "batch token features"]) -> Float[Tensor, " batch"]:
        """What the pairs say of each image."""
        return self.meeting(z.amax(1)) @ self.pair_weights + self.pair_bias

    def alone(self, z: Float[Tensor, "batch token features"]) -> Bool[Tensor, " batch"]:
        """Whether a single token says by itself that the image is harmful; once calibrated."""
        return (self.own(z) > 0).any(1)

    def only_pairs(self, z: Float[Tensor, "batch token features"]) -> Bool[Tensor, " batch"]:
        """Whether pairs of features say that the image is harmful and no single token does; once calibrated."""
        if not len(self.pairs):
            return torch.zeros(len(z), dtype=torch.bool, device=z.device)
        return (self.together(z) > 0) & ~self.alone(z)

    def meeting(self, peak: Float[Tensor, "batch features"]) -> Float[Tensor, "batch pair"]:
        """The lower of the two peaks of each pair: above 0 where both fire somewhere in the image."""
        scaled = peak / self.units
        return scaled[:, self.pairs[:, 0]].minimum(scaled[:, self.pairs[:, 1]])

    def lowered(self, own: float, together: float = 0.0) -> "Dose":
        """The same with 0 where these heights were."""
        return replace(self, bias=self.bias - own, pair_bias=self.pair_bias - together)
