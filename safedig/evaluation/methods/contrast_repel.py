"""Harm repelled along the rows of the contrast decoder: the delta form of SafeDIG's Repel, gated.

a' = a − g · s · Σ_M z_j · w_j (see `Repel`), w fitted to what harm adds in the source and the target, the gate g open
for images in which a token's harmful codes add up to more than benign ones reach (see `Gate`). s = 0 changes no bit.
"""

from dataclasses import dataclass

from ...steering.edits import Repel
from ...steering.steering import Steering
from .lesson import Lesson
from .method import Learnt


@dataclass(frozen=True)
class ContrastRepel:
    """Strength is γ."""

    name: str = "Repel, contrast decoder"
    unit: float = 2.0

    def learn(self, lesson: Lesson) -> Learnt:
        return lambda strength: Steering(lesson.contrast, lesson.features, [Repel(strength)], scope="image")
