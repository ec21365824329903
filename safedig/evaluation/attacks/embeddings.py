"""Gradient search on what the text encoders give, through the steered model: no words need stand behind it.

White-box. Adam on the tokens and the pooled vector, from the prompt's own; an image is drawn every few steps.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..methods.text import Text, encode
from .attack import Candidate, Row
from .objective import Objective
from .victim import Victim


@dataclass(frozen=True)
class EmbeddingSearch:
    """It does not know that there is a gate."""

    white_box: ClassVar[bool] = True
    tiny_world: ClassVar[bool] = False
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
    # In float32, whatever the model's own: a step of Adam may be less than the last bit of a half.
    parts = [one.detach().float().clone().requires_grad_() for one in (start.tokens, start.pooled)]
    groups = [{"params": [one], "lr": rate * float(one.detach().square().mean().sqrt())} for one in parts]
    adam = torch.optim.Adam(groups)
    while True:
        for _ in range(steps):
            with torch.enable_grad(), victim.reading() as margins, victim.acting.apply(victim.pipe):
                loss = objective.loss(Text(*parts)).sum()
                loss = loss + (silence(margins) if knows_gates else 0.0)
                for one, gradient in zip(parts, objective.gradients(loss, parts), strict=True):
                    one.grad = gradient
            adam.step()
        text = Text(*(one.detach().clone() for one in parts))
        yield [Candidate(row["prompt"], row["seed"], text=text)]


def silence(margins: Mapping[Any, Tensor]) -> Tensor | float:
    """How far rows lie above every gate, or within a tenth below it; 0 further below."""
    total: Tensor | float = 0.0
    for one in margins.values():
        total = total + (one + 0.1).relu().sum()
    return total
