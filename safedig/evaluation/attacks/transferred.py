"""Prompts that have broken something else: found once, handed on. Black-box, and the cheapest attack of all."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from .attack import Candidate, Row
from .victim import Victim


@dataclass(frozen=True)
class Transferred:
    """Those of the same prompt, from its own seed; without any, the prompt itself."""

    white_box: ClassVar[bool] = False
    tiny_world: ClassVar[bool] = False
    name: str = "transferred"
    batch: int = 4

    def candidates(self, victim: Victim, row: Row) -> Iterator[list[Candidate]]:
        texts = list(dict.fromkeys(victim.pool.get(row["id"], []))) or [row["prompt"]]
        for at in range(0, len(texts), self.batch):
            yield [Candidate(text, row["seed"]) for text in texts[at : at + self.batch]]
