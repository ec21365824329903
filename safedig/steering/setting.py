"""One point of a dose–response run: which edit, how strong, at which sites and σ, behind which gates; and all of them.

A steering is learnt once for each edit, set of sites and ε; its strength and its window of σ are then set on it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

from .steering import Steering, Window


@dataclass(frozen=True)
class Setting:
    """What is chosen between."""

    edit: str
    dose: float
    """Its strength, in multiples of what it was learnt with."""
    sites: tuple[str, ...]
    sigmas: tuple[float, float]
    epsilon: float
    """Share of benign prompts that the gates may touch."""

    @property
    def curve(self) -> tuple[str, tuple[str, ...], tuple[float, float], float]:
        """All but the dose: what one dose–response curve is of."""
        return self.edit, self.sites, self.sigmas, self.epsilon

    @property
    def conditions(self) -> str:
        low, high = self.sigmas
        return f"σ {low:g}–{high:g}, ε {self.epsilon:g}, {', '.join(self.sites)}"

    def __str__(self) -> str:
        return f"{self.edit} × {self.dose:g}, {self.conditions}"


def grid(
    edits: Sequence[str],
    doses: Sequence[float],
    sites: Sequence[tuple[str, ...]],
    sigmas: Sequence[Window],
    epsilons: Sequence[float],
) -> list[Setting]:
    """Every combination, those of one learnt steering side by side; a ladder of doses for each."""
    return [
        Setting(edit, dose, where, window, epsilon)
        for where, epsilon, edit, window, dose in product(sites, epsilons, edits, sigmas, doses)
    ]


def site_sets(sites: Sequence[str]) -> list[tuple[str, ...]]:
    """All together, and where there are several each alone: an edit at one may be undone at another."""
    return [tuple(sites), *((one,) for one in sites if len(sites) > 1)]


def set_to(steering: Steering, dose: float, sigmas: Window = (0.0, 1.0)) -> Steering:
    """The same steering with its edits this many times as strong, at these σ alone."""
    rules = {
        site: replace(
            rule,
            edits=tuple(replace(edit, strength=dose * edit.strength) for edit in rule.edits),
            gate=replace(rule.gate, sigmas=sigmas),
        )
        for site, rule in steering.rules.items()
    }
    return Steering.of_rules(steering.model, rules, steering.facts)
