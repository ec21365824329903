"""The rules by which x̂0 is moved: the theory's, its relative SPELL, and the released code's departures as ablations."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from jaxtyping import Float
from torch import Tensor

from .kernels import Kernel, Moment, expected, mean_density
from .negation import NegationSet
from .threshold import Threshold

Mode = Literal["theory", "spell", "released", "renoise-only"]
HOLDING: tuple[Mode, ...] = ("released", "renoise-only")  # these put the sample back to the σ it came from


@dataclass(frozen=True, eq=False)
class Sizes:
    """What a rule needs to know beside the sample."""

    negation: NegationSet
    kernel: Kernel
    threshold: Threshold
    strength: float
    limit: float
    """β_max."""
    floor: float
    """β below which a sample is left alone."""
    radius: float


@dataclass(frozen=True, eq=False)
class Push:
    """Where x̂0 goes, by how much it was wanted to; a sample with β = 0 stays."""

    x0: Float[Tensor, "batch d"]
    beta: Float[Tensor, " batch"]


def theory(at: Moment, how: Sizes) -> Push:
    """x̂0 + β (x̂0 − E_unsafe) (arXiv 2502.08011, theorem 3.2)."""
    log_q = how.kernel.log_q(how.negation, at)
    beta = how.threshold.log_beta(mean_density(log_q), how.kernel, at).exp().nan_to_num(nan=0.0, posinf=how.limit)
    beta = how.strength * beta.clamp(max=how.limit).where(beta >= how.floor, 0.0)
    if not beta.any():
        return Push(at.x0, beta)
    return Push(at.x0 + beta[:, None] * (at.x0 - expected(how.kernel, how.negation, at, log_q)), beta)


def spell(at: Moment, how: Sizes) -> Push:
    """x̂0 + s Σ_{n: d_n < r} (r / d_n − 1)(x̂0 − z_n) (arXiv 2410.06025): out of a ball around every image."""
    d = (how.negation.squared_distances(at.x0) / how.negation.d).sqrt()
    push = how.strength * (how.radius / d.clamp(min=1e-6) - 1).clamp(min=0)
    beta = push.sum(1)
    if not beta.any():
        return Push(at.x0, beta)
    return Push(at.x0 + beta[:, None] * at.x0 - how.negation.mean(push), beta)


def released(at: Moment, how: Sizes) -> Push:
    """x̂0 − s E_unsafe, with weights by distance unsquared, for one σ: as the authors' code departs from the theory."""
    d = (how.negation.squared_distances(at.x0) / how.negation.d).sqrt()
    width = getattr(how.kernel, "width", 1.0)
    unsafe = how.negation.mean((-d / (2 * width**2)).softmax(1))
    return Push(at.x0 - how.strength * unsafe, how.strength * at.x0.new_ones(len(d)))


def renoise_only(at: Moment, how: Sizes) -> Push:
    """Nothing but that the sample is noised back to the σ that it came from, which the released code does as well."""
    return Push(at.x0, at.x0.new_ones(len(at.x0)))


RULES: dict[str, Callable[[Moment, Sizes], Push]] = dict(
    zip(get_args(Mode), (theory, spell, released, renoise_only), strict=True)
)


def held(at: Moment, push: Push) -> Float[Tensor, "batch d"]:
    """The velocity whose Euler step leads to α x̂0′ + s ε̂ with the α and s of before the step."""
    following = at.mixing.following
    assert following is not None and at.mixing.says == "velocity"
    return at.mixing.alpha * (push.x0 - at.x0) / (following - at.mixing.s)
