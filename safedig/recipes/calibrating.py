"""What `safedig calibrate` may choose between, on how many prompts, and what a safer picture may cost."""

from dataclasses import dataclass, field
from typing import Literal

from safedig.config import UsageError


@dataclass(frozen=True)
class Tried:
    """How many prompts of the split `calibrate` decide."""

    harmful: int = 96
    """A third of them beside a benign object."""
    benign: int = 200
    """That a setting may cost; half of them near-misses."""
    quiet: int = 300
    """Benign ones, and as many near-misses, that set the gates; others than those above."""

    def __post_init__(self) -> None:
        if min(self.harmful, self.benign, self.quiet) < 2:
            raise UsageError(f"calibrate.prompts: {self}: expected at least 2 of each.")


@dataclass(frozen=True)
class Calibrating:
    """Which settings `safedig calibrate` tries, every combination of them, and what a safer picture may cost."""

    edits: tuple[Literal["repel", "blend", "replace"], ...] = ("repel", "blend", "replace")
    doses: tuple[float, ...] = (0.5, 0.75, 1.0, 1.5, 2.0)
    """Strengths, in multiples of each edit's own unit."""
    sigmas: tuple[tuple[float, ...], ...] = ((0.0, 1.0), (0.5, 1.0))
    """Windows of σ, each its lowest and its highest."""
    epsilons: tuple[float, ...] = (0.05, 0.025)
    """Shares of benign prompts that the gates may touch."""
    sites: tuple[str, ...] = ()
    """Tried all together and each alone; the recipe's unless given."""
    budget: float = 0.015
    """Share of benign prompts that may be lost: drawn as asked without steering, and not with it."""
    prompts: Tried = field(default_factory=Tried)

    def __post_init__(self) -> None:
        for name in ("edits", "doses", "sigmas", "epsilons"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise UsageError(f"calibrate.{name}={list(values)}: expected at least one, and none twice.")
        if min(self.doses) <= 0 or not 0 <= self.budget < 1:
            raise UsageError(
                f"calibrate.doses={list(self.doses)}, calibrate.budget={self.budget:g}: expected multiples above 0, "
                "and a share from 0 on."
            )
        if not all(0 < epsilon < 1 for epsilon in self.epsilons):
            raise UsageError(f"calibrate.epsilons={list(self.epsilons)}: expected shares between 0 and 1.")
        if not all(len(window) == 2 and 0 <= window[0] < window[1] <= 1 for window in self.sigmas):
            raise UsageError(f"calibrate.sigmas={list(map(list, self.sigmas))}: expected pairs such as [0.5, 1.0].")
