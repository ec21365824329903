"""How a scheduler mixes image and noise, x = α·x0 + s·ε, and what its model's output says about x̂0."""

from dataclasses import dataclass
from math import hypot
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from ..config import UsageError

Says = Literal["velocity", "epsilon", "v_prediction", "sample"]
# Those whose step takes x = x0 + s·ε (k-diffusion's frame), and those that keep the variance, α² + s² = 1.
EXPLODING = ("EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "LMSDiscrete")
PRESERVING = ("DDIM", "DDPM", "PNDM", "LCM", "DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep")


@dataclass(frozen=True)
class Mixing:
    """x = α·x0 + s·ε at one step, and what the model's output is there."""

    alpha: float
    s: float
    says: Says
    following: float | None = None
    """Rectified flow only: s after the step."""

    @property
    def sigma(self) -> float:
        """The rectified flow's σ of the same signal-to-noise ratio, in 0 … 1."""
        return self.s / (self.alpha + self.s)

    def x0(self, x: Float[Tensor, "*shape"], output: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """x̂0, as the scheduler itself would have it."""
        if self.says == "velocity":
            return x - self.s * output
        if self.says == "epsilon":
            return (x - self.s * output) / self.alpha
        if self.says == "sample":
            return output
        norm = hypot(self.alpha, self.s)
        return self.alpha / norm**2 * x - self.s / norm * output

    def output(self, delta: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """What the model's output changes by where x̂0 changes by `delta`, the noisy sample being the same."""
        if self.says == "velocity":
            return -delta / self.s
        if self.says == "epsilon":
            return -delta * (self.alpha / self.s)
        if self.says == "sample":
            return delta
        return -delta * (hypot(self.alpha, self.s) / self.s)


def check_scheduler(scheduler: Any) -> str:
    """`flow`, `preserving` or `exploding`; a `UsageError` for a scheduler that is not understood."""
    name = type(scheduler).__name__.removesuffix("Scheduler")
    if name == "FlowMatchEulerDiscrete":
        return "flow"
    if name in EXPLODING or name in PRESERVING:
        wanted = ("epsilon", "v_prediction", "sample")
        kind = scheduler.config.prediction_type
        if name in PRESERVING and kind == "flow_prediction":
            return "flow"
        if kind not in wanted:
            raise UsageError(f"The scheduler's prediction_type is '{kind}': expected one of {', '.join(wanted)}.")
        return "exploding" if name in EXPLODING else "preserving"
    known = ", ".join(("FlowMatchEulerDiscrete", *EXPLODING, *PRESERVING))
    raise UsageError(
        f"The scheduler {type(scheduler).__name__} is not understood, and x̂0 would be a guess: use one of {known}."
    )


def mixing(scheduler: Any, timestep: Any) -> Mixing:
    """At the step that the scheduler is about to take."""
    kind = check_scheduler(scheduler)
    if hasattr(scheduler, "_init_step_index") and scheduler.step_index is None:
        scheduler._init_step_index(timestep)
    if kind == "flow":
        sigma, following = scheduler.sigmas[scheduler.step_index :][:2].tolist()
        return Mixing(1 - sigma, sigma, "velocity", following)
    says: Any = scheduler.config.prediction_type
    if kind == "exploding":
        return Mixing(1.0, float(scheduler.sigmas[scheduler.step_index]), says)
    if hasattr(scheduler, "_sigma_to_alpha_sigma_t"):
        alpha, s = scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas[scheduler.step_index])
        return Mixing(float(alpha), float(s), says)
    share = float(scheduler.alphas_cumprod[int(timestep)])
    return Mixing(share**0.5, (1 - share) ** 0.5, says)
