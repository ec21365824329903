"""From the conventions of other libraries to ours: what their encoders read from the decoder goes into the weights.

Afterwards the codes depend on the encoder alone. Folding is computed in float64; what needs none keeps its bits.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..config import UsageError
from .model import Decoder, SparseAutoencoder, ThresholdEncoder, TopKEncoder

_SHAPES = {
    "W_enc": ("d_in", "d_sae"),
    "b_enc": ("d_sae",),
    "W_dec": ("d_sae", "d_in"),
    "b_dec": ("d_in",),
    "threshold": ("d_sae",),
    "centre": ("d_in",),
}
_NEEDED = ("W_enc", "b_enc", "W_dec", "b_dec")


@dataclass(frozen=True)
class Convention:
    """What another library's encoder takes from its decoder."""

    subtract_b_dec: bool = False
    """p = (a − b_dec)·W_enc + b_enc."""
    scale_by_norm: bool = False
    """p is multiplied by the length of the feature's decoder row before it is compared, and the row is normalised."""


def fold(
    tensors: Mapping[str, Tensor], file: Path, *, k: int | None = None, convention: Convention | None = None
) -> SparseAutoencoder:
    """An autoencoder of ours from sae-lens' tensor names; TopK where there is a `k`, else by `threshold`.

    `file` is where the tensors come from, for the errors. What is missing or of another shape is a `UsageError`.
    """
    convention = convention or Convention()
    tensors = {name: tensor.float() for name, tensor in tensors.items() if name in _SHAPES}
    _check(tensors, file, _NEEDED if k is not None else (*_NEEDED, "threshold"))
    W_enc, b_enc, W_dec, b_dec = (tensors[name] for name in _NEEDED)
    if convention.subtract_b_dec:
        b_enc = (b_enc.double() - b_dec.double() @ W_enc.double()).float()
    if convention.scale_by_norm:
        length = W_dec.norm(dim=1).clamp(min=1e-8)
        W_enc, b_enc, W_dec = W_enc * length, b_enc * length, W_dec / length[:, None]
    decoder = Decoder(W_dec, b_dec, tensors.get("centre"))
    if k is None:  # others pass p through a ReLU besides, so that a negative threshold is the same as none
        return SparseAutoencoder(ThresholdEncoder(W_enc, b_enc, tensors["threshold"].clamp(min=0)), decoder)
    if k > W_enc.shape[1]:
        raise UsageError(
            f"'{file.parent}' says k={k} and '{file.name}' has only {W_enc.shape[1]} features: the two files do not "
            "belong together; copy both again."
        )
    return SparseAutoencoder(TopKEncoder(W_enc, b_enc, k), decoder)


def _check(tensors: Mapping[str, Tensor], file: Path, needed: tuple[str, ...]) -> None:
    for name in needed:
        if name not in tensors:
            raise UsageError(f"'{file}' has no tensor '{name}': copy the file again.")
    sizes: dict[str, int] = {}
    for name, dims in _SHAPES.items():
        if name not in tensors:
            continue
        given = tuple(tensors[name].shape)
        expected = tuple(sizes.get(dim) for dim in dims)
        if len(given) != len(dims) or any(want not in (None, have) for want, have in zip(expected, given, strict=True)):
            raise UsageError(
                f"In '{file}' the tensor '{name}' has shape {given} where W_enc makes it ({', '.join(dims)}) = "
                f"{expected}: copy the file again."
            )
        sizes |= dict(zip(dims, given, strict=True))
