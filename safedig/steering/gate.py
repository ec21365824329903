"""Where an edit may act: a boolean for each token, open where the harmful codes add up to more than is benign."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..config import UsageError, check_choices
from ..hooks import Context

_DIGITS = 1e-6  # a window is written with so many digits, and its ends are levels of the schedule


@dataclass(frozen=True)
class Gate:
    """Opens for a token that comes higher than the threshold, if σ lies in the window and the row is to be steered.

    How high it comes is its dose, or Σ_M z_j (see `Rule.heights`): one number, for features that are each a little up
    in harmless tokens are seldom all up in one.
    """

    threshold: float
    scope: Literal["token", "image"] = "token"
    """What a token over the threshold opens it for: itself, or all tokens of its image, where the harm has spread; of
    the image also those that pass the steering's other sites later in the same step."""
    rows: Literal["cond", "all"] = "cond"
    """Under guidance the unconditional row is what the image is pushed away from; by default it is left alone."""
    sigmas: tuple[float, float] = (0.0, 1.0)
    """Lowest and highest noise level σ at which it may open, both included."""

    def __post_init__(self) -> None:
        check_choices(self)
        if not self.sigmas[0] <= self.sigmas[1]:
            raise UsageError(f"sigmas={self.sigmas}: expected the lowest σ first, then the highest.")

    def __call__(
        self,
        height: Float[Tensor, "batch token"],
        context: Context,
        opened: Bool[Tensor, " batch"] | None = None,
    ) -> Bool[Tensor, "batch token"]:
        """`opened`: the images that gates of other sites have opened for, and so does this one if it is of images."""
        over = height > self.threshold
        if self.scope == "image":
            image = over.any(-1) if opened is None else over.any(-1) | opened
            over = image[:, None].expand_as(over)
        steered = self.steered(context)
        return over if all(steered) else over & torch.tensor(steered, device=height.device)[:, None]

    def steered(self, context: Context) -> list[bool]:
        """The rows whose tokens it may open for at this σ."""
        low, high = self.sigmas
        inside = low - _DIGITS <= context.sigma <= high + _DIGITS
        return [inside and self.rows in ("all", row) for row in context.rows]
