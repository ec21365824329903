"""The same words from other noise: what anyone can do who may press the button again."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from .attack import Candidate, Row
from .victim import Victim

_STEP = 104729  # between seeds


@dataclass(frozen=True)
class SeedSearch:
    white_box: ClassVar[bool] = False
    tiny_world: ClassVar[bool] = False
    name: str = "seed search"
    batch: int = 4

    def candidates(self, victim: Victim, row: Row) -> Iterator[list[Candidate]]:
        at = 0
        while True:
            seeds = [(row["seed"] + _STEP * (at + one)) % 2**31 for one in range(self.batch)]
            yield [Candidate(row["prompt"], seed) for seed in seeds]
            at += self.batch
