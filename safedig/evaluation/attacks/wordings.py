"""Other words for the same picture: the hazard's synonyms and circumlocutions, or the whole sentence anew.

Black-box: the attacker sees images alone. The words are the tiny world's, those of all splits; what the prompt asks for
is read from its row. A prompt whose row does not say has no other words.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ...tiny.captions import CONNECTORS, Ask, Asked
from ...tiny.concepts import BACKGROUNDS, CONCEPTS, PAIRS, hazards_in
from .attack import Candidate, Row
from .victim import Victim


@dataclass(frozen=True)
class Synonyms:
    """Every wording of the hazard in turn, all else as it was; then the same from other seeds."""

    white_box: ClassVar[bool] = False
    tiny_world: ClassVar[bool] = True
    name: str = "synonyms"
    batch: int = 4

    def candidates(self, victim: Victim, row: Row) -> Iterator[list[Candidate]]:
        texts, at = synonyms(row), 0
        while True:
            seeds = [(row["seed"] + 104729 * ((at + one) // len(texts))) % 2**31 for one in range(self.batch)]
            yield [Candidate(texts[(at + one) % len(texts)], seed) for one, seed in enumerate(seeds)]
            at += self.batch


@dataclass(frozen=True)
class Paraphrases:
    """Whole sentences: other words for every object, colours, places and background named or not, from new seeds."""

    white_box: ClassVar[bool] = False
    tiny_world: ClassVar[bool] = True
    name: str = "paraphrases"
    batch: int = 4

    def candidates(self, victim: Victim, row: Row) -> Iterator[list[Candidate]]:
        rng = np.random.default_rng(row["seed"])
        while True:
            yield [Candidate(paraphrase(row, rng), int(rng.integers(2**31))) for _ in range(self.batch)]


def synonyms(row: Row) -> list[str]:
    """The prompt itself first."""
    if not (asked := _asked(row)):
        return [row["prompt"]]
    hazard = next(iter(hazards_in([one.name or "" for one in asked])), "")
    said = Ask(asked, row["background"] or None)
    if hazard in PAIRS:
        texts = [Ask(asked, said.background, whole=whole).text for whole in CONCEPTS[hazard].indirect]
        return list(dict.fromkeys([row["prompt"], said.text, *texts]))
    words = (*CONCEPTS[hazard].nouns, *CONCEPTS[hazard].indirect) if hazard else ()
    swapped = [
        Ask(tuple(_worded(one, word) if one.name == hazard else one for one in asked), said.background).text
        for word in words
    ]
    return list(dict.fromkeys([row["prompt"], *swapped]))


def paraphrase(row: Row, rng: np.random.Generator) -> str:
    """The same objects in other words; what is left out is up to the model."""
    if not (asked := _asked(row)):
        return row["prompt"]
    hazard = next(iter(hazards_in([one.name or "" for one in asked])), "")
    background = str(rng.choice(list(BACKGROUNDS))) if rng.random() < 0.5 else None
    if hazard in PAIRS and rng.random() < 0.5:
        return Ask(asked, background, whole=str(rng.choice(CONCEPTS[hazard].indirect))).text
    objects = tuple(
        Asked(
            one.name,
            one.colour if rng.random() < 0.7 else None,
            one.place if len(asked) > 1 or rng.random() < 0.7 else None,
            str(rng.choice([*CONCEPTS[one.name or ""].nouns, *CONCEPTS[one.name or ""].indirect])),
        )
        for one in asked
    )
    return Ask(objects, background, str(rng.choice(CONNECTORS))).text


def _asked(row: Row) -> tuple[Asked, ...]:
    objects = json.loads(row["objects"])
    return tuple(
        Asked(one["name"], one.get("colour"), one.get("place"), CONCEPTS[one["name"]].nouns[0]) for one in objects
    )


def _worded(one: Asked, wording: str) -> Asked:
    return Asked(one.name, one.colour, one.place, wording)
