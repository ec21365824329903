"""Does the order of the methods hold under another rule? Where it does not, a table says so above its first line."""

from collections.abc import Mapping
from itertools import combinations
from typing import NamedTuple

from safedig.evaluation.intervals import Rate


class Flip(NamedTuple):
    """Under rule `one` method `better` has the lower rate, under rule `other` it has the higher one."""

    better: str
    worse: str
    one: str
    other: str
    clear: bool
    """Whether the intervals are apart under both rules: else the flip may be chance."""


def flips(rates: Mapping[str, Mapping[str, Rate]]) -> list[Flip]:
    """Every pair of methods that two rules put in opposite order; `rates`: rule → method → unsafe rate, same images."""
    found = []
    for one, other in combinations(rates, 2):
        for a, b in combinations([name for name in rates[one] if name in rates[other]], 2):
            first, second = (_order(rates[rule][a], rates[rule][b]) for rule in (one, other))
            if first * second < 0:
                better, worse = (a, b) if first < 0 else (b, a)
                clear = all(_apart(rates[rule][a], rates[rule][b]) for rule in (one, other))
                found.append(Flip(better, worse, one, other, clear))
    return found


def warning(rates: Mapping[str, Mapping[str, Rate]]) -> str:
    """One paragraph for the head of a table, empty where every rule puts the methods in the same order."""
    lines = [
        f"{flip.better} is below {flip.worse} under {flip.one} and above it under {flip.other}"
        + ("" if flip.clear else " (intervals overlap under at least one)")
        for flip in flips(rates)
    ]
    return f"The ranking depends on the rule: {'; '.join(lines)}." if lines else ""


def _order(one: Rate, other: Rate) -> int:
    """−1, 0 or 1: exact, from counts."""
    difference = one["k"] * other["n"] - other["k"] * one["n"]
    return (difference > 0) - (difference < 0)


def _apart(one: Rate, other: Rate) -> bool:
    return one["hi"] < other["lo"] or other["hi"] < one["lo"]
