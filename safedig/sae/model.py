"""A sparse autoencoder as two halves: an encoder that names features, and a decoder that can be replaced.

The codes are a function of the encoder alone, so they are the same bits under any decoder.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Encoder:
    """z = p where p > threshold, else 0, with p = a·W_enc + b_enc; thresholds are not negative (JumpReLU)."""

    W_enc: Float[Tensor, "d_in d_sae"]
    b_enc: Float[Tensor, " d_sae"]
    threshold: Float[Tensor, " d_sae"]

    def __call__(self, a: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        pre = a.float() @ self.W_enc + self.b_enc
        return torch.where(pre > self.threshold, pre, 0.0)

    def columns(self, index: Int[Tensor, " features"]) -> "Encoder":
        """The encoder of these features only, at their share of the cost."""
        return Encoder(self.W_enc[:, index].contiguous(), self.b_enc[index], self.threshold[index])


@dataclass(frozen=True, eq=False)
class Decoder:
    """â = z·W_dec + b_dec."""

    W_dec: Float[Tensor, "d_sae d_in"]
    b_dec: Float[Tensor, " d_in"]

    def __call__(self, z: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_in"]:
        return z @ self.W_dec + self.b_dec


@dataclass(frozen=True, eq=False)
class SparseAutoencoder:
    """An encoder and a decoder beside it; `metadata` is JSON that says where they come from."""

    encoder: Encoder
    decoder: Decoder
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def d_in(self) -> int:
        return self.encoder.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        return self.encoder.W_enc.shape[1]

    def encode(self, a: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        return self.encoder(a)

    def decode(self, z: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_in"]:
        return self.decoder(z)

    def with_decoder(self, decoder: Decoder, **metadata: Any) -> "SparseAutoencoder":
        """The same encoder object beside another decoder; `metadata` is added to what is known."""
        return replace(self, decoder=decoder, metadata=self.metadata | metadata)
