"""Gradient search on what the text encoders give, through the steered model: no words need stand behind it.

White-box. Adam on the tokens and the pooled vector, from the prompt's own; an image is drawn every few steps.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..methods.text import Text, encode
from .attack import Candidate, Row
from .objective import Objective
from .victim import Victim

Penalty = Callable[[], Tensor | float]


@dataclass(frozen=True)
class EmbeddingSearch:
    """It does not know that there is a gate."""

    name: str = "embedding search"
    steps: int = 8
    """Of Adam between two images."""
    rate: float = 0.1
    """Step size, in root mean squares of the text."""

    def candidates(self, victim: Victim, row: Row) -> Iterator[list[Candidate]]:
        yield [Candidate(row["prompt"], row["seed"])]
        start = encode(victim.pipe, [row["prompt"]], victim.drawing.max_sequence_length)
        yield from descent(victim, row, Objective(victim, row), start, self.steps, self.rate)


def descent(
    victim: Victim, row: Row, objective: Objective, start: Text, steps: int, rate: float, knows_gates: bool = False
) -> Iterator[list[Candidate]]:
    """The text after so many steps, again and again; with knowledge of the gates it also keeps below them."""
    parts = [start.tokens.detach().clone().requires_grad_(), start.pooled.detach().clone().requires_grad_()]
    groups = [{"params": [one], "lr": rate * float(one.detach().square().mean().sqrt())} for one in parts]
    adam = torch.optim.Adam(groups)
    while True:
        with torch.enable_grad(), victim.reading() as heights, victim.acting.apply(victim.pipe):
            for _ in range(steps):
                loss = objective.loss(Text(*parts)).sum()
                loss = loss + (silence(victim, heights) if knows_gates else 0.0)
                for one, gradient in zip(parts, objective.gradients(loss, parts), strict=True):
                    one.grad = gradient
                adam.step()
        text = Text(*(one.detach().clone() for one in parts))
        yield [Candidate(row["prompt"], row["seed"], text=text)]


def silence(victim: Victim, heights: dict) -> Tensor | float:
    """How far the harmful codes lie above nine tenths of what opens each gate, in units of that; 0 below."""
    total: Tensor | float = 0.0
    for site, (_, threshold) in victim.gates.items():
        total = total + (heights[site] / max(threshold, 1e-6) - 0.9).relu().sum()
    return total
