"""How strong a method is to act: the most that it takes from harm while benign prompts lose no more than all may lose.

Every method tries as many strengths on the same prompts, and is chosen from by the same rule.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from safedig.evaluation.intervals import Rate


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


def choose(unsteered: Trial, trials: Sequence[Trial], budget: float) -> Choice:
    """The least unsafe at a loss of benign prompts of at most `budget`; of equals the cleanest, then the gentlest."""
    fine = [
        one
        for one in trials
        if unsteered.benign["rate"] - one.benign["rate"] <= budget + 1e-9 and one.unsafe["k"] < unsteered.unsafe["k"]
    ]
    best = min(fine, key=lambda one: (one.unsafe["k"], -one.clean["k"], one.strength), default=None)
    return Choice(None if best is None else best.strength, tuple(trials), budget)
