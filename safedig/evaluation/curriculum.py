"""The prompts of a contest: what is learnt from, what strengths are chosen on, what is reported.

Nothing is in two of these: splits share no prompt, and those of the tiny world no indirect wording.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from safedig.evaluation.bank import Bank, TinyBank
from safedig.tiny.stand_ins import STAND_IN

Row = dict[str, Any]
_STEP = 7919  # between the seeds of one prompt


@dataclass(frozen=True)
class Sizes:
    """How many prompts of each use, at most; the same for every method."""

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


@dataclass(frozen=True)
class Curriculum:
    """What is asked of a bank where one of its domains is moved to."""

    target: str
    sizes: Sizes
    seed: int = 0
    bank: Bank = field(default_factory=TinyBank)
    stand_in: str = STAND_IN
    """What twins show in the hazard's place where they all show one thing."""

    @property
    def sources(self) -> list[str]:
        return [risk for risk in self.bank.risks if risk != self.target]

    def taught(self) -> dict[str, list[Row]]:
        """What a `Lesson` takes, by its names."""
        sizes, seed = self.sizes, self.seed
        return {
            "source": _joined(self._pairs(risk, sizes.pairs, seed) for risk in self.sources),
            "stand_ins": _joined(
                self._pairs(risk, sizes.stand_ins, seed + 1, stand_in=self.stand_in) for risk in self.sources
            ),
            "target": self._pairs(self.target, sizes.target, seed + 2, stand_in=self.stand_in),
            "benign": self._plain("train", sizes.benign),
            "quiet": self._calm()[0],
        }

    def tried(self) -> dict[str, list[Row]]:
        """Harmful prompts of the source alone, and benign ones that set no gate."""
        return {"source": self._harmful("calibrate", self.sources, self.sizes.tried), "benign": self._calm()[1]}

    def asked(self) -> dict[str, list[Row]]:
        """By role; of a harmful prompt several images, if so wished."""
        roles, sizes = {"source": self.sources, "target": [self.target]}, self.sizes
        harmful = {role: self._harmful("report", risks, sizes.asked) for role, risks in roles.items()}
        return {role: _repeated(rows, sizes.images) for role, rows in harmful.items()} | {
            "benign": self._rows("benign", "report", sizes.asked),
            "near-miss": self._rows("near-miss", "report", sizes.near_misses),
        }

    def _calm(self) -> tuple[list[Row], list[Row]]:
        """Benign prompts that set gates, and those that strengths are tried on; few are shared out alike."""
        wanted = self.sizes.quiet + self.sizes.tried
        calm = self._plain("calibrate", wanted)
        at = len(calm) * self.sizes.quiet // wanted
        return calm[:at], calm[at:]

    def _harmful(self, split: str, risks: list[str], n: int) -> list[Row]:
        """As many of each domain, a third of them beside a benign object; a composition is two benign ones already."""
        found = []
        for at, risk in enumerate(risks):
            share = n * (at + 1) // len(risks) - n * at // len(risks)
            mixed = 0 if risk == "composition" else share // 3
            found += self._rows("harmful", split, share - mixed, risk=risk, twins=False)
            found += self._rows("mixed", split, mixed, risk=risk, twins=False) if mixed else []
        return found

    def _pairs(self, risk: str, n: int, seed: int, **wishes: Any) -> list[Row]:
        """Each harmful prompt before its twin."""
        mixed = 0 if risk == "composition" else n // 3
        found = self.bank.rows("harmful", "train", seed, n - mixed, risk=risk, **wishes)
        return found + (self.bank.rows("mixed", "train", seed, mixed, risk=risk, **wishes) if mixed else [])

    def _plain(self, split: str, n: int) -> list[Row]:
        """Benign prompts, every other one of them worded like a hazard."""
        benign, near = self._rows("benign", split, -(-n // 2)), self._rows("near-miss", split, n // 2)
        return [row for two in zip(benign, near, strict=False) for row in two] + benign[len(near) :]

    def _rows(self, kind: str, split: str, n: int, **wishes: Any) -> list[Row]:
        return self.bank.rows(kind, split, self.seed, n, **wishes)


def _repeated(rows: list[Row], images: int) -> list[Row]:
    return [row | {"seed": (row["seed"] + _STEP * at) % 2**31} for row in rows for at in range(images)]


def _joined(parts: Iterable[list[Row]]) -> list[Row]:
    return [row for part in parts for row in part]
