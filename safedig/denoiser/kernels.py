"""How near a sample is to each image of a set: log q(x | z_n), from which a density and a weighted mean follow."""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import log, pi, prod
from typing import Any, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from ..config import UsageError
from .mixing import Mixing
from .negation import NegationSet

_FAINT = 1e-5  # of the largest weight: images that count less are left out of the mean, and not read


@dataclass(frozen=True, eq=False)
class Moment:
    """A batch of samples at one step, flat and in float32."""

    x: Float[Tensor, "batch d"]
    x0: Float[Tensor, "batch d"]
    mixing: Mixing
    shape: tuple[int, ...]
    """Of one latent, as the scheduler sees it."""


def _positive(width: float) -> None:
    if not width > 0:
        raise UsageError(f"width={width}: expected a kernel width above 0.")


@runtime_checkable
class Kernel(Protocol):
    def log_q(self, images: NegationSet, at: Moment) -> Float[Tensor, "batch n"]: ...

    def log_weights(self, images: NegationSet, at: Moment, log_q: Float[Tensor, "batch n"]) -> Float[Tensor, "batch n"]:
        """Up to a constant of each sample: by how much each image counts in their mean."""
        ...


@dataclass(frozen=True)
class Exact:
    """The density of the noised set itself: N(x; α z_n, s² I) (arXiv 2502.08011, eq. 8). One-hot in high dimension."""

    def log_q(self, images: NegationSet, at: Moment) -> Float[Tensor, "batch n"]:
        variance = at.mixing.s**2
        d2 = images.squared_distances(at.x, at.mixing.alpha)
        return -d2 / (2 * variance) - images.d / 2 * log(2 * pi * variance)

    def log_weights(self, images: NegationSet, at: Moment, log_q: Tensor) -> Float[Tensor, "batch n"]:
        return log_q


@dataclass(frozen=True)
class Tempered:
    """exp(−‖x̂0 − z_n‖² / (2 h² D)): as wide as asked, at every σ."""

    width: float = 0.15
    """h: root mean square difference per latent number, in the units of the latents."""

    def __post_init__(self) -> None:
        _positive(self.width)

    def log_q(self, images: NegationSet, at: Moment) -> Float[Tensor, "batch n"]:
        return -images.squared_distances(at.x0) / (2 * self.width**2 * images.d)

    def log_weights(self, images: NegationSet, at: Moment, log_q: Tensor) -> Float[Tensor, "batch n"]:
        return log_q


@dataclass(frozen=True, eq=False)
class Semantic:
    """Nearness of features of x̂0, not of its latent; what it is moved away from is near in the latent as well."""

    features: Callable[[Float[Tensor, "batch *latent"]], Float[Tensor, "batch d_features"]]
    """Of latents as the scheduler sees them."""
    width: float = 1.0
    """h, in the units of the features."""
    within: Tempered = Tempered()
    """Which of the images alike in features count in the mean."""
    _known: WeakKeyDictionary[Any, Any] = field(default_factory=WeakKeyDictionary, repr=False)

    def __post_init__(self) -> None:
        _positive(self.width)

    def log_q(self, images: NegationSet, at: Moment) -> Float[Tensor, "batch n"]:
        known = self._known.get(images)
        if known is None:
            parts = [self._of(z.split(64)) for z in images.parts()]
            known = self._known[images] = NegationSet(torch.cat(parts) if parts else torch.zeros(0, 1))
        own = self._known.get(at)
        if own is None:
            own = self._known[at] = self._of(at.x0.unflatten(1, at.shape).split(64))
        return -known.to(own.device).squared_distances(own) / (2 * self.width**2 * known.d)

    def log_weights(self, images: NegationSet, at: Moment, log_q: Tensor) -> Float[Tensor, "batch n"]:
        return log_q + self.within.log_q(images, at)

    @torch.no_grad()
    def _of(self, latents: Any) -> Float[Tensor, "n d_features"]:
        found = torch.cat([self.features(part) for part in latents]).float()
        if found.ndim != 2 or not found.isfinite().all():
            raise UsageError(f"features= gave shape {tuple(found.shape)}: expected finite numbers [images, features].")
        return found


def log_density(kernel: Kernel, images: NegationSet, at: Moment) -> Float[Tensor, " batch"]:
    """log p̂(x) = logsumexp_n log q(x | z_n) − log N."""
    return mean_density(kernel.log_q(images, at))


def mean_density(log_q: Float[Tensor, "batch n"]) -> Float[Tensor, " batch"]:
    return log_q.logsumexp(1) - log(log_q.shape[1])


def expected(
    kernel: Kernel, images: NegationSet, at: Moment, log_q: Float[Tensor, "batch n"]
) -> Float[Tensor, "batch d"]:
    """E[x0 | x] if it is one of these images: Σ_n z_n q(x | z_n) / Σ_n q(x | z_n)."""
    weights = kernel.log_weights(images, at, log_q).softmax(1)
    weights = weights.where(weights > _FAINT * weights.amax(1, keepdim=True), 0.0)
    return images.mean(weights / weights.sum(1, keepdim=True))


def flat(x: Float[Tensor, "batch *latent"]) -> Float[Tensor, "batch d"]:
    return x.float().reshape(len(x), prod(x.shape[1:]))
