"""The direction in which harmful prompts differ from their safe twins at a site, and how it is taken out."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Direction:
    """What is removed at one site: unit vectors and where the component is put, for each row and for all others."""

    unit: Float[Tensor, "row d_in"]
    centre: Float[Tensor, "row d_in"]
    unit_benign: Float[Tensor, "sigma d_in"]
    centre_benign: Float[Tensor, "sigma d_in"]


def direction_of(
    delta: Float[Tensor, "row d_in"], mean: Float[Tensor, "row d_in"], counted: list[bool], sigmas: int
) -> Direction:
    """The mean Δ of the counted pairs, without the pair's own where it is one of them, at each σ."""
    take = torch.tensor(counted, dtype=torch.float64)
    weights = take.expand(len(take), -1) * (1 - torch.eye(len(take), dtype=torch.float64))
    weights = weights / weights.sum(1, keepdim=True)

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        by_sigma = rearrange(x.double(), "(sigma pair) d -> sigma pair d", sigma=sigmas)
        return rearrange(weights @ by_sigma, "sigma pair d -> (sigma pair) d"), (take / take.sum()) @ by_sigma

    (units, unit), (centres, centre) = both(delta), both(mean)
    return Direction(_unit(units), centres.float(), _unit(unit), centre.float())


def _unit(x: Float[Tensor, "row d_in"]) -> Float[Tensor, "row d_in"]:
    """Where there is no difference there is no direction: zero."""
    norm = x.norm(dim=1, keepdim=True)
    return torch.where(norm > 0, x / norm, torch.zeros_like(x)).float()


def removing(unit: Float[Tensor, "row d_in"], centre: Float[Tensor, "row d_in"]) -> Callable[[Tensor], Tensor]:
    """a ← a − u⟨u, a − m⟩ at every token, computed in float32."""

    def without(x: Tensor) -> Tensor:
        u, m = (rearrange(vector.to(x.device), "row d -> row 1 d") for vector in (unit, centre))
        return (x.float() - u * (u * (x.float() - m)).sum(-1, keepdim=True)).to(x.dtype)

    return without
