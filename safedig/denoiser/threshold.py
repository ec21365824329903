"""How strongly to answer: β from how near the negation set a sample is, exactly or calibrated."""

from collections.abc import Callable
from dataclasses import dataclass
from math import log
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from ..config import UsageError
from .kernels import Kernel, Moment, log_density
from .mixing import Mixing
from .negation import NegationSet

_MOST = 256  # images that a threshold is found on
_SAME = 1e-5  # of ‖z‖²: nearer is a copy, give or take the rounding of a product


@runtime_checkable
class Threshold(Protocol):
    def log_beta(self, log_unsafe: Tensor, kernel: Kernel, at: Moment) -> Tensor:
        """log β of each sample, from the log p̂_u of each."""
        ...


@dataclass(frozen=True, eq=False)
class SafeDensity:
    """Exact mode: β* = Z_u p_u(x) / (Z_s p_s(x)), where the density of what is safe is known."""

    log_p: Callable[[Float[Tensor, "batch *latent"], float], Float[Tensor, " batch"]]
    """log p_s of noisy samples x at σ; normalised, as the `Exact` kernel's log p̂_u is."""
    odds: float = 1.0
    """Z_u / Z_s: how many unsafe images there are for each safe one."""

    def log_beta(self, log_unsafe: Float[Tensor, " batch"], kernel: Kernel, at: Moment) -> Float[Tensor, " batch"]:
        return log(self.odds) + log_unsafe - self.log_p(at.x.unflatten(1, at.shape), at.mixing.sigma)


@dataclass(frozen=True, eq=False)
class Thresholds:
    """Practical mode: log β = slope · (log p̂_u − log p̂_reference) + offset at each σ; not β*, which needs p_s.

    `fit_thresholds` finds them, as the log odds that what x̂0 becomes is unsafe. With slope 1 and no reference, β is
    exp(log p̂_u − τ) with τ = −offset. Between two σ the nearer one holds.
    """

    sigmas: tuple[float, ...]
    slope: tuple[float, ...]
    offset: tuple[float, ...]
    reference: NegationSet | None = None
    """Images that may be drawn, as near to the asked ones as the negation set is: what both share then cancels."""

    def __post_init__(self) -> None:
        if not self.sigmas or {len(self.sigmas)} != {len(self.slope), len(self.offset)}:
            raise UsageError("Thresholds: expected as many slopes and offsets as there are σ, one at least.")

    def log_beta(self, log_unsafe: Float[Tensor, " batch"], kernel: Kernel, at: Moment) -> Float[Tensor, " batch"]:
        here = min(range(len(self.sigmas)), key=lambda index: abs(self.sigmas[index] - at.mixing.sigma))
        return self.slope[here] * evidence(log_unsafe, kernel, self.reference, at) + self.offset[here]


def evidence(
    log_unsafe: Float[Tensor, " batch"], kernel: Kernel, reference: NegationSet | None, at: Moment
) -> Float[Tensor, " batch"]:
    """log p̂_u, against the reference where there is one."""
    if reference is None:
        return log_unsafe
    return log_unsafe - log_density(kernel, reference.to(at.x.device), at)


def own_threshold(kernel: Kernel, negation: NegationSet) -> Thresholds:
    """Without any calibration: β is 1 where x̂0 is as near the set as half of its own images are to the others.

    Copies of an image are none of its others. A single image has none: there, 1 at the kernel's width from it.
    """
    alone = Thresholds((1.0,), (1.0,), (0.5,))
    if len(negation) < 2:
        return alone
    z = torch.cat([part.flatten(1) for part in negation.parts()])[:_MOST]
    copies = negation.squared_distances(z) <= _SAME * z.square().sum(1, keepdim=True)
    copies.fill_diagonal_(True)
    count = (~copies).sum(1)
    if not count.any():
        return alone
    at = Moment(z, z, Mixing(1.0, 1e-3, "velocity"), negation.shape)
    others = kernel.log_q(negation, at)
    others[copies] = -torch.inf
    near = others.logsumexp(1) - count.double().log().float()
    tau = float(near[count > 0].median())
    return Thresholds((1.0,), (1.0,), (-tau,))
