"""How well an autoencoder describes a stream, altogether and at each noise level: one pass, sums in float64."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .model import SparseAutoencoder

_LEVELS = 16  # σ values that are reported one by one; more are put into ten bins
_CHUNK = 4096  # rows


def measure(sae: SparseAutoencoder, batches: Iterable[Float[Tensor, "_ d_in"]]) -> dict[str, float]:
    """`fvu` (share of variance left unexplained), `cosine` (of a row with its reconstruction, on average), `l0`
    (active features a row), `dead` (share of the features that never fired)."""
    quality = Quality(sae)
    for a in batches:
        quality.add(a)
    return quality.result()


def measure_by_sigma(
    sae: SparseAutoencoder, x: Float[Tensor, "rows d_in"], sigma: Float[Tensor, " rows"]
) -> dict[str, Any]:
    """The same of all rows, and under `sigmas` for each σ (each tenth of its range, where there are many)."""
    names, member = _bins(sigma)
    parts = {name: Quality(sae) for name in names}
    for at, name in enumerate(names):
        for a in x[member == at].split(_CHUNK):
            parts[name].add(a)
    whole = Quality(sae)
    for part in parts.values():
        whole.absorb(part)
    return whole.result() | {
        "rows": whole.rows,
        "sigmas": {name: part.result() | {"rows": part.rows} for name, part in parts.items()},
    }


@dataclass
class Quality:
    """The sums that the measures are made of; of two streams they add up."""

    sae: SparseAutoencoder
    rows: int = 0
    active: int = 0
    error: float = 0.0
    square: float = 0.0
    cosine: float = 0.0
    fired: Tensor = field(init=False)
    total: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.fired = torch.zeros(self.sae.d_sae, dtype=torch.bool)
        self.total = torch.zeros(self.sae.d_in, dtype=torch.float64)

    def add(self, a: Float[Tensor, "_ d_in"]) -> None:
        z = self.sae.encode(a)
        exact, made = a.to("cpu", torch.float64), self.sae.decode(z).cpu().double()
        self.error += (exact - made).square().sum().item()
        self.square += exact.square().sum().item()
        self.total += exact.sum(0)
        self.cosine += torch.cosine_similarity(exact, made, dim=1).sum().item()
        self.active += int((z > 0).sum())
        self.fired |= (z > 0).any(0).cpu()
        self.rows += len(a)

    def absorb(self, other: "Quality") -> None:
        for name in ("rows", "active", "error", "square", "cosine"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.fired |= other.fired
        self.total += other.total

    def result(self) -> dict[str, float]:
        if self.rows == 0:
            raise ValueError("There is nothing to measure: the stream is empty.")
        variance = self.square - self.total.square().sum().item() / self.rows
        return {
            "fvu": self.error / variance if variance > 0 else float("nan"),
            "cosine": self.cosine / self.rows,
            "l0": self.active / self.rows,
            "dead": 1 - self.fired.double().mean().item(),
        }


def _bins(sigma: Float[Tensor, " rows"]) -> tuple[list[str], Tensor]:
    """The bins in falling σ, without empty ones, and the bin of each row."""
    levels, member = sigma.double().mul(1000).round().unique(return_inverse=True)
    if len(levels) > _LEVELS:
        tenths, member = (sigma.double() * 10).floor().clamp(0, 9).unique(return_inverse=True)
        names = [f"{int(low) / 10:.1f}-{(int(low) + 1) / 10:.1f}" for low in tenths.tolist()]
    else:
        names = [f"{level / 1000:.3f}" for level in levels.tolist()]
    return names[::-1], len(names) - 1 - member
