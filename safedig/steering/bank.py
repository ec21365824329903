"""Safe prototypes as a running pipeline looks them up: those nearest to a token in all latents but the harmful ones.

Only latents that some prototype holds are encoded: the others add the same to a token's distance from each of them.
"""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

from ..features import Features
from ..features.heights import columns
from ..sae.model import SparseAutoencoder, ThresholdEncoder


@dataclass(frozen=True, eq=False)
class Bank:
    """The prototypes of one site. Cost of a look-up: O(d_in · latents + latents · prototype) a token."""

    encoder: ThresholdEncoder
    """Of the latents outside M that any prototype holds."""
    codes: Float[Tensor, "prototype latents"]
    harmful: Float[Tensor, "prototype features"]
    """Their codes of M."""
    values: Float[Tensor, "prototype d_in"] | None = None
    """The activations that the decoder makes of them, where an edit puts those in a token's place."""

    @classmethod
    def of(cls, sae: SparseAutoencoder, features: Features, *, values: bool) -> "Bank":
        """From what `find_features` has kept; `sae` has the decoder that reconstructs."""
        known = features.prototypes
        assert known is not None
        others = known.others(sae.d_sae)
        latents = (others > 0).any(0).nonzero()[:, 0]
        whole = others.index_copy(1, features.index, known.harmful)
        return cls(
            columns(sae, latents), others[:, latents].contiguous(), known.harmful, sae.decode(whole) if values else None
        )

    def nearest(self, a: Float[Tensor, "token d_in"], k: int) -> Int[Tensor, "token k"]:
        """The k prototypes at the least Euclidean distance; all of them where there are fewer."""
        z = self.encoder(a)
        distance = self.codes.square().sum(1) - 2 * z @ self.codes.T  # + ‖z‖², the same for all of them
        return distance.topk(min(k, len(self.codes)), dim=1, largest=False, sorted=False).indices

    def mean(
        self, a: Float[Tensor, "token d_in"], k: int, of: Float[Tensor, "prototype d"]
    ) -> Float[Tensor, "token d"]:
        """The mean over each token's nearest prototypes of what is known `of` them."""
        return mean_of(of, self.nearest(a, k))


def mean_of(rows: Float[Tensor, "row d"], index: Int[Tensor, "token k"]) -> Float[Tensor, "token d"]:
    """The mean of each token's k rows, without k · d numbers a token being held."""
    return embedding_bag(index, rows, mode="mean") if len(index) else rows.new_zeros(0, rows.shape[1])
