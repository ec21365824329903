"""What a new decoder changed: the share of variance it leaves in each domain, and how far each feature's row moved."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..sae.model import Decoder, SparseAutoencoder
from .codes import encoded

_ROWS = 2048  # features that are compared at once


@dataclass(frozen=True, eq=False)
class Movement:
    """How each feature's decoder row moved."""

    angle: Float[Tensor, " d_sae"]
    """Degrees between the row before and after; NaN where one of them is 0."""
    length: Float[Tensor, " d_sae"]
    """Norm after, relative to before; NaN where it was 0."""


def movement(before: Decoder, after: Decoder) -> Movement:
    """Row by row, from one decoder to another of the same encoder. Cost O(d_sae · d_in)."""
    parts = []
    for one, other in zip(before.W_dec.split(_ROWS), after.W_dec.split(_ROWS), strict=True):
        old, new = one.double(), other.double()
        norms = old.norm(dim=1), new.norm(dim=1)
        chord = (old / norms[0][:, None] - new / norms[1][:, None]).norm(dim=1)  # keeps its digits at small angles
        parts.append(torch.stack([(2 * (chord / 2).clamp(max=1).asin()).rad2deg(), norms[1] / norms[0]]).float())
    angle, length = torch.cat(parts, dim=1)
    return Movement(angle, length)


def moved(before: Decoder, after: Decoder) -> dict[str, Any]:
    """The movement in a few numbers: over the rows that moved at all, angle in degrees and relative length."""
    there = (before.W_dec != after.W_dec).any(1)
    if not there.any():
        return {"rows": 0}
    change = movement(before, after)
    angle, length = (values[there].nan_to_num() for values in (change.angle, change.length))
    return {
        "rows": int(there.sum()),
        "angle": {"median": angle.median().item(), "highest": angle.max().item()},
        "length": {"median": length.median().item(), "lowest": length.min().item(), "highest": length.max().item()},
    }


def quality(
    sae: SparseAutoencoder, decoders: Mapping[str, Decoder], x: Float[Tensor, "rows d_in"]
) -> dict[str, dict[str, float]]:
    """Beside each decoder: `fvu`, the share of variance left unexplained, and `l0`, active features a row.

    The rows are encoded once, and once more for each other centring of them.
    """
    mean = x.double().mean(0)
    variance = sum((part.double() - mean).square().sum().item() for part in x.split(4096))
    found: dict[str, dict[str, float]] = {}
    for group in _alike(decoders):
        error, active = dict.fromkeys(group, 0.0), 0
        for a, z in encoded(sae.with_decoder(next(iter(group.values()))), x):
            active += len(z.value)
            for name, decoder in group.items():
                error[name] += (a - z.times(decoder.W_dec) - decoder.b_dec).double().square().sum().item()
        for name in group:
            fvu = error[name] / variance if variance > 0 else float("nan")
            found[name] = {"fvu": fvu, "l0": active / len(x)}
    return {name: found[name] for name in decoders}


def _alike(decoders: Mapping[str, Decoder]) -> list[dict[str, Decoder]]:
    """The decoders in groups that read the same codes."""
    groups: list[dict[str, Decoder]] = []
    for name, decoder in decoders.items():
        for group in groups:
            if _centred_alike(next(iter(group.values())), decoder):
                group[name] = decoder
                break
        else:
            groups.append({name: decoder})
    return groups


def _centred_alike(one: Decoder, other: Decoder) -> bool:
    if one.centre is None or other.centre is None:
        return one.centre is other.centre
    return torch.equal(one.centre, other.centre)
