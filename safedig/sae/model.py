"""A sparse autoencoder as two halves: an encoder that names features, and a decoder that can be replaced.

The codes are a function of the encoder alone, so they are the same bits under any decoder. The one exception is asked
for: a decoder with a `centre` has it subtracted from the input before the same encoder reads it.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..config import UsageError


@dataclass(frozen=True, eq=False)
class Encoder(ABC):
    """z from the preactivations p = a·W_enc + b_enc; what becomes of p is the kind's own."""

    W_enc: Float[Tensor, "d_in d_sae"]
    b_enc: Float[Tensor, " d_sae"]

    @abstractmethod
    def __call__(self, a: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """The codes, in float32 whatever the precision of `a`."""

    def fired(self, a: Float[Tensor, "rows d_in"]) -> tuple[Bool[Tensor, "rows d_sae"], Float[Tensor, "rows d_sae"]]:
        """Where the codes are not zero, and numbers that hold the codes there; elsewhere they hold anything."""
        z = self(a)
        return z != 0, z

    @abstractmethod
    def columns(self, index: Int[Tensor, " features"]) -> "ThresholdEncoder":
        """The encoder of these features only, at their share of the cost; a `UsageError` where there is none."""

    def preactivations(self, a: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        if a.shape[-1] != self.W_enc.shape[0]:
            raise UsageError(
                f"The activations have d_in={a.shape[-1]} and this SAE reads d_in={self.W_enc.shape[0]}: give it those "
                "of the model and site it was trained on."
            )
        return a.float() @ self.W_enc + self.b_enc


@dataclass(frozen=True, eq=False)
class ThresholdEncoder(Encoder):
    """z = p where p > threshold, else 0; no threshold is negative.

    JumpReLU, and what BatchTopK and Matryoshka BatchTopK become after training; a standard SAE has threshold 0.
    """

    threshold: Float[Tensor, " d_sae"]

    def __call__(self, a: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        pre = self.preactivations(a)
        return torch.where(pre > self.threshold, pre, 0.0)

    def fired(self, a: Float[Tensor, "rows d_in"]) -> tuple[Bool[Tensor, "rows d_sae"], Float[Tensor, "rows d_sae"]]:
        pre = self.preactivations(a)
        return pre > self.threshold, pre

    def columns(self, index: Int[Tensor, " features"]) -> "ThresholdEncoder":
        return ThresholdEncoder(self.W_enc[:, index].contiguous(), self.b_enc[index], self.threshold[index])


@dataclass(frozen=True, eq=False)
class TopKEncoder(Encoder):
    """z = p for the k highest p of a row where they are positive, else 0: a code depends on all other features."""

    k: int

    def __post_init__(self) -> None:
        d_sae = self.W_enc.shape[1]
        if not 0 < self.k <= d_sae:
            raise UsageError(f"k={self.k} of {d_sae} features: give a k from 1 to d_sae.")

    def __call__(self, a: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        pre = self.preactivations(a)
        highest, index = pre.topk(self.k, dim=-1, sorted=False)
        return torch.zeros_like(pre).scatter_(-1, index, highest.relu())

    def columns(self, index: Int[Tensor, " features"]) -> ThresholdEncoder:
        raise UsageError(
            f"Whether one of {len(index)} TopK features fires depends on all {self.W_enc.shape[1]}: encode in full, or "
            "train architecture='batchtopk', whose features each have a threshold of their own."
        )


@dataclass(frozen=True, eq=False)
class Decoder:
    """â = z·W_dec + b_dec, with z read from a − centre where there is a centre."""

    W_dec: Float[Tensor, "d_sae d_in"]
    b_dec: Float[Tensor, " d_in"]
    centre: Float[Tensor, " d_in"] | None = None
    """How far the mean of the decoder's domain lies from that of the encoder's; b_dec already holds it."""

    def __call__(self, z: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_in"]:
        return z @ self.W_dec + self.b_dec


@dataclass(frozen=True, eq=False)
class SparseAutoencoder:
    """An encoder and a decoder beside it; `metadata` is JSON that says where they come from."""

    encoder: Encoder
    decoder: Decoder
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        given, expected = tuple(self.decoder.W_dec.shape), (self.d_sae, self.d_in)
        if given != expected:
            raise UsageError(
                f"A decoder of shape {given} cannot stand beside this encoder, which needs {expected} "
                "(d_sae, d_in): take one fitted for the same encoder."
            )

    @property
    def d_in(self) -> int:
        return self.encoder.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        return self.encoder.W_enc.shape[1]

    def encode(self, a: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        centre = self.decoder.centre
        return self.encoder(a if centre is None else a.float() - centre)

    def fired(self, a: Float[Tensor, "rows d_in"]) -> tuple[Bool[Tensor, "rows d_sae"], Float[Tensor, "rows d_sae"]]:
        """The codes as `Encoder.fired` gives them."""
        centre = self.decoder.centre
        return self.encoder.fired(a if centre is None else a.float() - centre)

    def decode(self, z: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_in"]:
        return self.decoder(z)

    def to(self, device: str | torch.device) -> "SparseAutoencoder":
        """The same on another device."""

        def moved(half: Any) -> Any:
            tensors = {one.name: getattr(half, one.name) for one in fields(half)}
            return replace(half, **{name: x.to(device) for name, x in tensors.items() if isinstance(x, Tensor)})

        return replace(self, encoder=moved(self.encoder), decoder=moved(self.decoder))

    def with_decoder(self, decoder: Decoder, **metadata: Any) -> "SparseAutoencoder":
        """The same encoder object beside another decoder; `metadata` is added to what is known."""
        return replace(self, decoder=decoder, metadata=self.metadata | metadata)
