"""The tiny world's prompts for a contest: what is learnt from, what strengths are chosen on, what is reported.

Nothing is in two of these: the splits share no prompt and no indirect wording.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from safedig.prompts import as_rows
from safedig.tiny import prompts
from safedig.tiny.concepts import RISKS
from safedig.tiny.stand_ins import STAND_IN

Row = dict[str, Any]
_STEP = 7919  # between the seeds of one prompt


@dataclass(frozen=True)
class Sizes:
    """How many prompts of each use; the same for every method."""

    pairs: int = 64
    """Harmful prompts of each known domain with safe twins, a third of them beside a benign object."""
    stand_ins: int = 64
    """As many again, whose twins all show one thing."""
    target: int = 48
    """Of the same sort, of the domain that is moved to."""
    benign: int = 192
    """To learn from, half of them worded like a hazard."""
    quiet: int = 400
    """The same, to set gates."""
    tried: int = 64
    """Of harmful and of benign prompts, to choose strengths on."""
    asked: int = 96
    """Of the source, of the target and of benign prompts, to report."""
    near_misses: int = 48
    """Benign prompts worded like a hazard, to report."""
    images: int = 1
    """Of each harmful prompt that is reported."""


def sources(target: str) -> list[str]:
    return [risk for risk in RISKS if risk != target]


def taught(target: str, sizes: Sizes, seed: int) -> dict[str, list[Row]]:
    """What a `Lesson` takes, by its names."""
    return {
        "source": _joined(_pairs(risk, sizes.pairs, seed) for risk in sources(target)),
        "stand_ins": _joined(_pairs(one, sizes.stand_ins, seed + 1, stand_in=STAND_IN) for one in sources(target)),
        "target": _pairs(target, sizes.target, seed + 2, stand_in=STAND_IN),
        "benign": _plain("train", seed, sizes.benign),
        "quiet": _plain("calibrate", seed, sizes.quiet),
    }


def tried(target: str, sizes: Sizes, seed: int) -> dict[str, list[Row]]:
    """Harmful prompts of the source alone, and benign ones that set no gate."""
    calm = _plain("calibrate", seed, sizes.quiet + sizes.tried)
    return {"source": _harmful("calibrate", sources(target), sizes.tried, seed), "benign": calm[sizes.quiet :]}


def asked(target: str, sizes: Sizes, seed: int) -> dict[str, list[Row]]:
    """By role; of a harmful prompt several images, if so wished."""
    roles = {"source": sources(target), "target": [target]}
    harmful = {role: _harmful("report", risks, sizes.asked, seed) for role, risks in roles.items()}
    return {role: _repeated(rows, sizes.images) for role, rows in harmful.items()} | {
        "benign": _rows("benign", "report", seed, sizes.asked),
        "near-miss": _rows("near-miss", "report", seed, sizes.near_misses),
    }


def _harmful(split: str, risks: list[str], n: int, seed: int) -> list[Row]:
    """As many of each domain, a third of them beside a benign object; a composition is two benign ones already."""
    found = []
    for at, risk in enumerate(risks):
        share = n * (at + 1) // len(risks) - n * at // len(risks)
        mixed = 0 if risk == "composition" else share // 3
        found += _rows("harmful", split, seed, share - mixed, risk=risk, twins=False)
        found += _rows("mixed", split, seed, mixed, risk=risk, twins=False) if mixed else []
    return found


def _pairs(risk: str, n: int, seed: int, **wishes: Any) -> list[Row]:
    """Each harmful prompt before its twin."""
    mixed = 0 if risk == "composition" else n // 3
    found = _rows("harmful", "train", seed, n - mixed, risk=risk, **wishes)
    return found + (_rows("mixed", "train", seed, mixed, risk=risk, **wishes) if mixed else [])


def _plain(split: str, seed: int, n: int) -> list[Row]:
    """Benign prompts, every other one of them worded like a hazard."""
    benign, near = _rows("benign", split, seed, -(-n // 2)), _rows("near-miss", split, seed, n // 2)
    return [row for two in zip(benign, near, strict=False) for row in two] + benign[len(near) :]


def _repeated(rows: list[Row], images: int) -> list[Row]:
    return [row | {"seed": (row["seed"] + _STEP * at) % 2**31} for row in rows for at in range(images)]


def _rows(kind: str, split: str, seed: int, n: int, **wishes: Any) -> list[Row]:
    return as_rows(prompts(kind, split, seed, n, **wishes))


def _joined(parts: Iterable[list[Row]]) -> list[Row]:
    return [row for part in parts for row in part]
