"""Ridge regression towards a decoder that is there: exact where the features are few, conjugate gradients elsewhere.

    minimise over W, b:  Σ_domains w Σ_rows ‖a − z·W − b‖² +  Σ_j λ_j ‖W_j − W⁰_j‖²,  λ_j = c · mean z_j² where it fires

The ridge is a pseudo-count: the prior W⁰ weighs as much as c rows in which the feature fires. b is free. What is solved
for is the change W − W⁰, so that a decoder at its optimum stays where it is.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..sae.model import Decoder
from .codes import SparseCodes, joined
from .statistics import DENSEST, Statistics

FEWEST = 2
"""A feature that fires in fewer rows of the target keeps its row."""
_COLUMNS = 512  # of d_in, solved at once: bounds the memory of the vectors
_TOLERANCE, _ITERATIONS = 1e-2, 50  # of conjugate gradients: remaining residual, relative to the first one
_PATIENCE = 2  # iterations without a gain on held-out rows


@dataclass(frozen=True, eq=False)
class Solution:
    """A decoder, which of its rows were solved for, and how."""

    decoder: Decoder
    solved: Bool[Tensor, " d_sae"]
    solver: str
    iterations: int


class Mixture:
    """The target's rows and, at a share of the weight, the source's; sums about the means, so that b drops out."""

    def __init__(self, target: Statistics, source: Statistics | None = None, share: float = 0.0):
        self.target = target
        self.parts = [(1.0, target)]
        if source is not None and share > 0:
            self.parts.append((share / (1 - share) * target.rows / source.rows, source))
        self.rows = sum(weight * part.rows for weight, part in self.parts)
        self.z, self.x, self.z_square = (
            torch.stack([weight * getattr(part, name) for weight, part in self.parts]).sum(0)
            for name in ("z", "x", "z_square")
        )

    def bias(self, W: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, " d_in"]:
        """The best b beside W: the mean of what W leaves."""
        made = torch.cat([self.z @ part.double() for part in W.split(_COLUMNS, dim=1)])
        return ((self.x - made) / self.rows + self.target.offset).float()

    def moment(self, columns: slice) -> Float[Tensor, "d_sae d"]:
        """Zᵀ X about the means."""
        parts = [weight * part.zx[:, columns] for weight, part in self.parts]
        total = parts[0] if len(parts) == 1 else parts[0].add_(parts[1])
        return total - torch.outer(self.z, self.x[columns] / self.rows).to(total)


class Normal:
    """Zᵀ Z of a mixture about the means, among the features `kept`; as a matrix where these are few enough."""

    def __init__(self, mixture: Mixture, kept: Bool[Tensor, " d_sae"]):
        self.mixture, self.kept, self.z = mixture, kept, mixture.z[kept]
        self.codes = [
            (weight, z, z.only(kept)) for weight, part in mixture.parts for z in part.codes
        ]  # as they are, and of the kept features alone
        self._all: Tensor | None = None
        self.matrix: Tensor | None = None
        if not self.codes:
            self._all = mixture.target.gram()[kept]
            for weight, part in mixture.parts[1:]:
                self._all.add_(part.gram()[kept], alpha=weight)
            self.matrix = self._all[:, kept]
        elif int(kept.sum()) <= DENSEST:
            self.matrix = self._gram()
        if self.matrix is not None:
            self.matrix.addr_(self.z, self.z / mixture.rows, alpha=-1)

    def gradient(self, W: Float[Tensor, "d_sae d_in"], columns: slice) -> Float[Tensor, "kept d"]:
        """What is left of Zᵀ X, among the kept features, once z·W is taken off."""
        W = W[:, columns].contiguous()
        if self._all is not None:
            made = self._all @ W.to(self._all)
        else:
            made = torch.zeros(len(self.z), W.shape[1], device=W.device)
            for weight, z, kept in self.codes:
                made += weight * kept.moment(z.times(W))
        mean = self.mixture.z @ W.double() / self.mixture.rows
        return self.mixture.moment(columns)[self.kept] - (made - torch.outer(self.z, mean).to(made))

    def __call__(self, W: Float[Tensor, "kept d"]) -> Float[Tensor, "kept d"]:
        """The product with W, by way of the codes."""
        made = torch.zeros_like(W)
        for weight, _, z in self.codes:
            made += weight * z.moment(z.times(W))
        return made - torch.outer(self.z, self.z @ W.double() / self.mixture.rows).to(made)

    def _gram(self) -> Float[Tensor, "kept kept"]:
        total = torch.zeros(len(self.z), len(self.z), dtype=torch.float64, device=self.z.device)
        for weight in dict.fromkeys(weight for weight, _, _ in self.codes):
            parts: list[SparseCodes] = [z for other, _, z in self.codes if other == weight]
            total += weight * joined(parts).gram()
        return total


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Rows of the target that are not fitted: by them the gradients stop, before what is rare is learnt by heart."""

    x: Float[Tensor, "rows d_in"]
    z: SparseCodes

    def error(
        self, mixture: Mixture, prior: Float[Tensor, "d_sae d_in"], solved: Bool[Tensor, " d_sae"], columns: slice
    ) -> Callable[[Float[Tensor, "solved d"]], float]:
        """What a change of the solved rows leaves of these columns, the bias being the best beside it."""
        mean_z = (mixture.z / mixture.rows).float()
        mean_x = (mixture.x / mixture.rows + mixture.target.offset).float()[columns]
        W, z, kept = prior[:, columns].contiguous(), self.z.only(solved), mean_z[solved]
        left = self.x[:, columns] - mean_x - self.z.times(W) + mean_z @ W
        return lambda change: (left - z.times(change) + kept @ change).square().sum(dtype=torch.float64).item()


def solve(mixture: Mixture, prior: Decoder, pseudo_count: float, held_out: HeldOut | None = None) -> Solution:
    """The decoder that explains the mixture best, drawn to `prior` by `pseudo_count` rows a feature.

    Cost, m features that fire: O(m³ + m² · d_in) exactly for m up to `DENSEST`, in float64; above, O(rows · l0 · d_in)
    an iteration, with 6 · m · 512 numbers of memory, stopped where `held_out` is explained best.
    """
    target = mixture.target
    solved = target.count >= FEWEST
    ridge = pseudo_count * (target.z_square / target.count.clamp(min=1))[solved]
    normal, W, taken = Normal(mixture, solved), prior.W_dec.clone(), 0
    factor = None if normal.matrix is None else _cholesky(normal.matrix, ridge)
    diagonal = (mixture.z_square - mixture.z**2 / mixture.rows)[solved] + ridge
    for start in range(0, W.shape[1], _COLUMNS):
        columns = slice(start, start + _COLUMNS)
        gradient = normal.gradient(prior.W_dec, columns)
        if factor is not None:
            change = torch.cholesky_solve(gradient.double(), factor)
        else:
            ridged = _ridged(normal, ridge.float()[:, None])
            watch = None if held_out is None else held_out.error(mixture, prior.W_dec, solved, columns)
            change, iterations = conjugate_gradients(
                ridged, gradient, diagonal.float()[:, None], _TOLERANCE, _ITERATIONS, watch
            )
            taken = max(taken, iterations)
        W[solved, columns] += change.to(W)
    solver = "conjugate gradients" if factor is None else "cholesky"
    return Solution(Decoder(W, mixture.bias(W)), solved, solver, taken)


def conjugate_gradients(
    operator: Callable[[Tensor], Tensor],
    right: Float[Tensor, "m d"],
    diagonal: Float[Tensor, "m 1"],
    tolerance: float,
    iterations: int,
    watch: Callable[[Float[Tensor, "m d"]], float] | None = None,
) -> tuple[Float[Tensor, "m d"], int]:
    """X with operator(X) = right from X = 0, each column on its own, preconditioned by the diagonal (Jacobi).

    With `watch`, the X of the least that it gives, which may be 0; it ends once two more have given more.
    """
    X, residual = torch.zeros_like(right), right.clone()
    first, tiny = residual.norm(), torch.finfo(right.dtype).tiny
    scaled = residual / diagonal
    direction, power, taken = scaled.clone(), (residual * scaled).sum(0), 0
    best, least, at = X, float("inf") if watch is None else watch(X), 0
    while taken < iterations and residual.norm() > tolerance * first and taken - at < _PATIENCE:
        image = operator(direction)
        step = power / (direction * image).sum(0).clamp(min=tiny)
        X = X.addcmul_(direction, step) if watch is None or best is not X else torch.addcmul(X, direction, step)
        residual.addcmul_(image, step, value=-1)
        scaled = residual / diagonal
        power, before = (residual * scaled).sum(0), power
        direction.mul_(power / before.clamp(min=tiny)).add_(scaled)
        taken += 1
        if watch is None or (now := watch(X)) <= least:
            best, least, at = X, least if watch is None else now, taken
    return best, at


def _ridged(normal: Normal, ridge: Float[Tensor, "m 1"]) -> Callable[[Tensor], Tensor]:
    return lambda W: normal(W).addcmul_(W, ridge)


def _cholesky(matrix: Float[Tensor, "m m"], ridge: Float[Tensor, " m"]) -> Float[Tensor, "m m"]:
    """Of matrix + ridge, written over it; without a ridge it may be singular, and a millionth of it is added.

    With less, the noise of float32 in Zᵀ X would be solved for.
    """
    matrix.diagonal().add_(torch.maximum(ridge, 1e-6 * matrix.diagonal().clamp(min=1e-12)))
    return torch.linalg.cholesky(matrix)
