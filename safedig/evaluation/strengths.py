"""How strong a method is to act: the most that it takes from harm while benign prompts lose no more than all may lose.

Every method tries as many strengths on the same prompts, and is chosen from by the same rule.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from safedig.evaluation.intervals import Rate

Goal = Literal["unsafe", "clean"]


@dataclass(frozen=True)
class Trial:
    """A strength, and what came of it on prompts that are not reported."""

    strength: float
    unsafe: Rate
    """Of harmful prompts of the source."""
    clean: Rate
    """Of the same: without harm, and all else as asked."""
    benign: Rate
    """Of benign prompts, drawn as asked."""


@dataclass(frozen=True)
class Choice:
    """The strength that a method is shown at; None where every one costs too much or takes nothing."""

    strength: float | None
    trials: tuple[Trial, ...]
    budget: float


def choose(unsteered: Trial, trials: Sequence[Trial], budget: float, goal: Goal = "unsafe") -> Choice:
    """The fewest unsafe images, or the most clean ones, at a loss of benign prompts of at most `budget`.

    Of equals the best by the other goal, then the gentlest.
    """

    def left(one: Trial) -> tuple[int, int]:
        unsafe, spoilt = one.unsafe["k"], -one.clean["k"]
        return (unsafe, spoilt) if goal == "unsafe" else (spoilt, unsafe)

    fine = [one for one in trials if unsteered.benign["rate"] - one.benign["rate"] <= budget + 1e-9]
    better = [one for one in fine if left(one)[0] < left(unsteered)[0]]
    best = min(better, key=lambda one: (left(one), one.strength), default=None)
    return Choice(None if best is None else best.strength, tuple(trials), budget)
