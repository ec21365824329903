"""Where an edit may act: a boolean for each token, open where a harmful feature is above its benign range."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..hooks import Context


@dataclass(frozen=True, eq=False)
class Gate:
    """Opens for a token if any code exceeds its threshold, σ lies in the window and the row is to be steered."""

    threshold: Float[Tensor, " features"]
    rows: Literal["cond", "all"] = "cond"
    """Under guidance the unconditional row is what the image is pushed away from; by default it is left alone."""
    sigmas: tuple[float, float] = (0.0, 1.0)
    """Lowest and highest noise level σ at which it may open, both included."""

    def __call__(self, z: Float[Tensor, "batch token features"], context: Context) -> Bool[Tensor, "batch token"]:
        steered = torch.tensor(self.steered(context), device=z.device)
        return (z > self.threshold).any(-1) & steered[:, None]

    def steered(self, context: Context) -> list[bool]:
        """The rows whose tokens it may open for at this σ."""
        low, high = self.sigmas
        return [low <= context.sigma <= high and self.rows in ("all", row) for row in context.rows]
