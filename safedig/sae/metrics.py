"""How well an autoencoder describes a stream: one pass, sums in float64."""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from .model import SparseAutoencoder


def measure(sae: SparseAutoencoder, batches: Iterable[Float[Tensor, "_ d_in"]]) -> dict[str, float]:
    """`fvu` (share of variance left unexplained), `l0` (active features a row), `dead` (share that never fired)."""
    rows, active, error = 0, 0, 0.0
    fired = torch.zeros(sae.d_sae, dtype=torch.bool)
    total, square = torch.zeros(sae.d_in, dtype=torch.float64), 0.0
    for a in batches:
        z = sae.encode(a)
        exact = a.to("cpu", torch.float64)
        error += (exact - sae.decode(z).cpu().double()).square().sum().item()
        square += exact.square().sum().item()
        total += exact.sum(0)
        active += int((z > 0).sum())
        fired |= (z > 0).any(0).cpu()
        rows += len(a)
    if rows == 0:
        raise ValueError("There is nothing to measure: the stream is empty.")
    variance = square - total.square().sum().item() / rows
    dead = 1 - fired.double().mean().item()
    return {"fvu": error / variance if variance > 0 else float("nan"), "l0": active / rows, "dead": dead}
