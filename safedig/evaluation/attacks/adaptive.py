"""An attacker who knows the dictionary and the gates: looks for harm that keeps the harmful latents silent.

Other wordings are looked at in one pass each, and only those that come least high at the gates are drawn; then the text
of the most silent one is moved down the objective and under the gates at once. Where nothing is known to be gated it is
the search on embeddings, after paraphrases.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from ..methods.text import Text, encode
from .attack import Candidate, Row
from .embeddings import descent
from .objective import Objective
from .victim import Victim
from .wordings import paraphrase, synonyms


@dataclass(frozen=True)
class Adaptive:
    white_box: ClassVar[bool] = True
    tiny_world: ClassVar[bool] = False
    name: str = "adaptive"
    looked_at: int = 24
    """Wordings that are read in one pass each, and of which the most silent ones are drawn."""
    drawn: int = 4
    steps: int = 8
    rate: float = 0.1

    def candidates(self, victim: Victim, row: Row) -> Iterator[list[Candidate]]:
        yield [Candidate(row["prompt"], row["seed"])]
        rng = np.random.default_rng(row["seed"])
        wordings = list(dict.fromkeys([*synonyms(row), *(paraphrase(row, rng) for _ in range(4 * self.looked_at))]))
        wordings = wordings[: self.looked_at]
        text = encode(victim.pipe, wordings, victim.drawing.max_sequence_length)
        objective = Objective(victim, row)
        loud = self._loudness(victim, objective, text)
        quiet = loud.argsort(stable=True)[: self.drawn].tolist()
        yield [Candidate(wordings[at], row["seed"]) for at in quiet]
        start = Text(text.tokens[quiet[:1]], text.pooled[quiet[:1]])
        yield from descent(victim, row, objective, start, self.steps, self.rate, knows_gates=True)

    def _loudness(self, victim: Victim, objective: Objective, text: Text) -> torch.Tensor:
        """How far each wording lies above the gate that it comes highest at."""
        if not victim.gates:
            return torch.zeros(len(text.tokens))
        with torch.no_grad(), victim.reading() as margins, victim.acting.apply(victim.pipe):
            objective.loss(text)
        return torch.stack(list(margins.values())).amax(0)
