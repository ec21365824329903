"""Was the ranking right? What each rule says of the sites of a fold, against what steering there has reached.

A fold is a model and a domain held out. Every rule ranks all of its sites; intervals are over folds, and where two
rules are compared, of their difference in the same folds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

DRAWS = 4000  # of folds with replacement
TAILS = (0.025, 0.975)
LEAST = 3  # sites below which a correlation says nothing


@dataclass(frozen=True)
class Ranked:
    """One fold: its sites in the order of the computation, what was measured there, and what the rules say."""

    model: str
    target: str
    sites: tuple[str, ...]
    gain: np.ndarray
    """[site]: share of the target's prompts for which steering there alone has reached the goal."""
    halves: np.ndarray
    """[2, site]: the same of every other prompt, and of those between."""
    live: np.ndarray
    """[site]: whether the image depends on the site, by the router's verdict."""
    scores: Mapping[str, np.ndarray]
    """[site] for each rule, the higher the better; those of equal score are chosen among by lot."""


def rho(score: np.ndarray, gain: np.ndarray) -> float:
    """Spearman's rank correlation; 0 where all sites are alike to one of the two."""
    from scipy.stats import spearmanr

    if np.ptp(score) == 0 or np.ptp(gain) == 0:
        return 0.0
    statistic: Any = spearmanr(score, gain)[0]
    return float(statistic)


def reached(score: np.ndarray, gain: np.ndarray) -> float:
    """What the first choice reaches, as a share of the best site's; 1 where no site reaches anything."""
    best = gain.max()
    return 1.0 if best <= 0 else float(gain[score == score.max()].mean() / best)


def reached_on_others(score: np.ndarray, halves: np.ndarray) -> float:
    """The same, the best site being known from one half of the prompts and measured on the other half.

    The best of many noisy figures is too high by itself; that of a half is not, on the other one.
    """
    best = np.mean([halves[1 - half][halves[half].argmax()] for half in (0, 1)])
    return 1.0 if best <= 0 else float(halves[:, score == score.max()].mean() / best)


def among_live(score: np.ndarray, fold: Ranked) -> float:
    """Spearman's ρ where the image depends on the site; NaN where there are too few of them."""
    if fold.live.sum() < LEAST:
        return float("nan")
    return rho(score[fold.live], fold.gain[fold.live])


def by_fold(folds: Sequence[Ranked], rule: str) -> dict[str, np.ndarray]:
    """Each measure of a rule, one number a fold."""
    pairs = [(fold.scores[rule], fold) for fold in folds]
    return {
        "rho": np.array([rho(score, fold.gain) for score, fold in pairs]),
        "rho_live": np.array([among_live(score, fold) for score, fold in pairs]),
        "reached": np.array([reached(score, fold.gain) for score, fold in pairs]),
        "reached_on_others": np.array([reached_on_others(score, fold.halves) for score, fold in pairs]),
    }


def interval(values: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """The mean over folds with a 95 % percentile interval; folds without a value do not count."""
    values = values[~np.isnan(values)]
    if len(values) == 0:
        return {"mean": None, "lo": None, "hi": None, "folds": 0}
    picked = np.random.default_rng(seed).integers(len(values), size=(DRAWS, len(values)))
    lo, hi = np.quantile(values[picked].mean(1), TAILS)
    return {"mean": round4(values.mean()), "lo": round4(lo), "hi": round4(hi), "folds": len(values)}


def compare(folds: Sequence[Ranked], default: str = "default") -> dict[str, Any]:
    """Every rule, and how far the default is ahead of it in the same folds."""
    ours, found = by_fold(folds, default), {}
    for rule in folds[0].scores:
        theirs = by_fold(folds, rule)
        found[rule] = {name: interval(values) for name, values in theirs.items()}
        if rule != default:
            found[rule]["default_ahead"] = {name: interval(ours[name] - theirs[name]) for name in ours}
    return found


def by_model(folds: Sequence[Ranked], rule: str = "default") -> dict[str, dict[str, Any]]:
    """The means of a rule on each model alone."""
    models = dict.fromkeys(fold.model for fold in folds)
    parts = {model: by_fold([fold for fold in folds if fold.model == model], rule) for model in models}
    return {model: {name: interval(values)["mean"] for name, values in part.items()} for model, part in parts.items()}


def met(rules: Mapping[str, Any], simpler: Sequence[str]) -> dict[str, Any]:
    """The goals that were set before, and whether the figures reach them."""
    least = {"rho": 0.7, "reached": 0.9, "rho_live": 0.5}
    ours = {name: rules["default"][name]["mean"] for name in least}
    ahead = {
        rule: {name: rules[rule]["default_ahead"][name]["lo"] > 0 for name in ("rho", "reached")} for rule in simpler
    }
    return {
        **{f"{name} >= {goal}": ours[name] is not None and ours[name] >= goal for name, goal in least.items()},
        "ahead of every simpler rule": all(all(one.values()) for one in ahead.values()),
        "ahead of": ahead,
    }


def changes(before: str, after: str, goal: str) -> list[int]:
    """Of each prompt, by its letters: 1 for the better, −1 for the worse, 0 as before."""
    if goal == "unsafe":
        return [(one == "U") - (other == "U") for one, other in zip(before, after, strict=True)]
    return [(other == "C") - (one == "C") for one, other in zip(before, after, strict=True)]


def prompt_interval(changed: Sequence[int], seed: int = 0) -> tuple[float, float]:
    """A 95 % interval of the gain of one cell: prompts are drawn with replacement, each with both its pictures."""
    change = np.array(changed, dtype=float)
    picked = np.random.default_rng(seed).integers(len(change), size=(DRAWS, len(change)))
    lo, hi = np.quantile(change[picked].mean(1), TAILS)
    return round4(lo), round4(hi)


def halves(changed: Sequence[int]) -> tuple[float, float]:
    """The gain on every other prompt, and on those between."""
    first, second = (np.mean(changed[start::2]) for start in (0, 1))
    return float(first), float(second)


def round4(value: Any) -> float:
    return round(float(value), 4)
