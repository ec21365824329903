"""How an edit acts: pure rules from an activation and the codes of its harmful features to another activation."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Repel:
    """a' = a − strength · Σ_M z_j·w_j: take out what the contrast decoder attributes to the harmful features.

    The delta form of SafeDIG's Repel (arXiv 2605.30049), which leaves a token without harmful features alone.
    """

    strength: float = 1.5

    def __call__(
        self,
        a: Float[Tensor, "batch token d_in"],
        z: Float[Tensor, "batch token features"],
        directions: Float[Tensor, "features d_in"],
    ) -> Float[Tensor, "batch token d_in"]:
        return a - self.strength * (z @ directions)


EDITS: dict[str, type[Repel]] = {"repel": Repel}
