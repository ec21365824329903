"""Mixtures of Gaussians, where everything that the theory speaks of is known: densities, E[x0 | x], what is safe.

`ExactPipeline` draws from one with the exact velocity, by any diffusers scheduler of a rectified flow, and takes a
`SafeDenoiser` like a real pipeline.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log, pi
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    """Σ_k w_k N(μ_k, std_k² I)."""

    weights: Float[Tensor, " k"]
    means: Float[Tensor, "k d"]
    std: Float[Tensor, " k"]

    @classmethod
    def of(cls, weights: Sequence[float], means: Sequence[Sequence[float]], std: Sequence[float]) -> "GaussianMixture":
        w = torch.tensor(weights)
        return cls(w / w.sum(), torch.tensor(means), torch.tensor(std))

    def part(self, which: Bool[Tensor, " k"]) -> "GaussianMixture":
        """Some of its components, as a distribution of their own."""
        weights = self.weights[which]
        return GaussianMixture(weights / weights.sum(), self.means[which], self.std[which])

    def sample(self, n: int, generator: torch.Generator) -> Float[Tensor, "n d"]:
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, self.means.shape[1], generator=generator)
        return self.means[k] + self.std[k, None] * noise

    def log_p(self, x: Float[Tensor, "n d"], sigma: float) -> Float[Tensor, " n"]:
        """Of (1 − σ) x0 + σ ε."""
        return self._log_joint(x, sigma).logsumexp(1)

    def expected(self, x: Float[Tensor, "n d"], sigma: float) -> Float[Tensor, "n d"]:
        """E[x0 | (1 − σ) x0 + σ ε = x], by Tweedie's formula component by component."""
        alpha, variance = 1 - sigma, self._variance(sigma)
        gain = alpha * self.std.square() / variance
        each = self.means + gain[:, None] * (x[:, None] - alpha * self.means)
        return (self._log_joint(x, sigma).softmax(1)[..., None] * each).sum(1)

    def _variance(self, sigma: float) -> Float[Tensor, " k"]:
        return ((1 - sigma) * self.std).square() + sigma**2

    def _log_joint(self, x: Float[Tensor, "n d"], sigma: float) -> Float[Tensor, "n k"]:
        variance, d = self._variance(sigma), x.shape[1]
        d2 = (x[:, None] - (1 - sigma) * self.means).square().sum(-1)
        return self.weights.log() - d2 / (2 * variance) - d / 2 * (log(2 * pi) + variance.log())


class ExactPipeline:
    """Draws from a mixture with its exact velocity: what a trained pipeline would be without any error of training."""

    interrupt = False

    def __init__(self, data: GaussianMixture, scheduler: Any):
        self.data, self.scheduler = data, scheduler
        self.num_timesteps = 0

    def check_inputs(self) -> None:
        """Where a real pipeline begins."""

    def maybe_free_model_hooks(self) -> None:
        """Where a real pipeline ends."""

    def __call__(self, n: int, *, steps: int, generator: torch.Generator) -> SimpleNamespace:
        """`images`: n samples [n, d], by `steps` steps on an even grid of σ."""
        self.check_inputs()
        self.scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist())
        self.num_timesteps = len(self.scheduler.timesteps)
        x = torch.randn(n, self.data.means.shape[1], generator=generator)
        for timestep, sigma in zip(self.scheduler.timesteps, self.scheduler.sigmas.tolist(), strict=False):
            velocity = (x - self.data.expected(x, sigma)) / sigma
            x = self.scheduler.step(velocity, timestep, x, return_dict=False)[0]
        self.maybe_free_model_hooks()
        return SimpleNamespace(images=x)


def wasserstein(a: Float[Tensor, "n d"], b: Float[Tensor, "n d"]) -> float:
    """W1 between two samples of one size, in the units of the data: the cheapest matching of the two."""
    from scipy.optimize import linear_sum_assignment

    cost = torch.cdist(a, b)
    return float(cost[linear_sum_assignment(cost.numpy())].mean())


def inside(x: Float[Tensor, "n d"], centre: Float[Tensor, " d"], radius: float) -> float:
    """The share of a sample that lies in a ball: how much of it is unsafe."""
    return float(((x - centre).norm(dim=1) < radius).float().mean())
