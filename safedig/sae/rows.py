"""What a training step is given: endless batches of a site in a known order, standardised, without what is far out."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from ..activations.record import Activations
from ..activations.shuffle import Shuffled, endless
from ..config import UsageError
from .options import Limits

_CHUNK = 2**14  # rows that are converted at once


@dataclass(frozen=True, eq=False)
class Standard:
    """Raw rows in, standardised rows of the same number out: (a − centre) / scale, far-out ones replaced or cut."""

    centre: Float[Tensor, " d_in"]
    scale: float
    """One number, so that directions keep their lengths relative to each other."""
    reach: float
    """The highest norm of a standardised row that is trained on."""
    clip: float

    @classmethod
    def of(cls, x: Float[Tensor, "rows d_in"], limits: Limits) -> "Standard":
        """Fitted to a sample; once more without the rows that are far out, if there are any."""
        centre, scale = _moments(x)
        reach = limits.max_norm * scale * math.sqrt(x.shape[1])
        near = torch.cat([(part.float() - centre).norm(dim=1) <= reach for part in x.split(_CHUNK)])
        if not near.all():
            centre, scale = _moments(x[near])
        return cls(centre, scale, reach / scale, limits.clip)

    def __call__(self, batch: Shaped[Tensor, "rows d_in"]) -> Float[Tensor, "rows d_in"]:
        x = (batch.to(self.centre.device).float() - self.centre) / self.scale
        near = x.norm(dim=1) <= self.reach  # false for NaN
        if not near.all():
            there = near.nonzero()[:, 0]
            if len(there) == 0:
                raise UsageError("Every row of a batch is far out or no number: raise limits.max_norm, or record anew.")
            x = x[there[torch.arange(len(x), device=x.device) % len(there)]]  # others of the batch stand in
        return x.clamp(-self.clip, self.clip)

    def to(self, device: str | torch.device) -> "Standard":
        return Standard(self.centre.to(device), self.scale, self.reach, self.clip)


def in_memory(x: Float[Tensor, "rows d_in"], batch_size: int, seed: int, done: int = 0) -> Iterator[Tensor]:
    """Batches of distinct rows, shuffled anew in every epoch, from the batch number `done` on."""
    return islice(endless(x, batch_size, seed), done, None)


def from_store(activations: Activations, batch_size: int, seed: int, done: int = 0) -> Iterator[Tensor]:
    """The same, of all rows of a store; `activations` are at one site."""
    order = Shuffled(activations, batch_size, seed=seed)
    return Shuffled(activations, batch_size, seed=seed, state=order.state() | {"batches": done}) if done else order


def _moments(x: Float[Tensor, "rows d_in"]) -> tuple[Float[Tensor, " d_in"], float]:
    """The mean, and the root mean square of all values about it; sums in float64."""
    total = torch.zeros(x.shape[1], dtype=torch.float64)
    for part in x.split(_CHUNK):
        total += part.double().sum(0).cpu()
    centre = (total / len(x)).float()
    square = sum((part.float() - centre).double().square().sum().item() for part in x.split(_CHUNK))
    return centre, max(math.sqrt(square / x.numel()), 1e-8)
