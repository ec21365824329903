"""What the package steers with by default: harm in a token is taken out by what stood in safety in its place.

a' = a − g · s · what harm has added to the known token nearest to a, or, where a is like no known token, a' = a −
g · s · 2 · what the contrast decoder says of it (see `Replace`, by counterparts). The gate g opens for images whose
weighed codes say harm (see `Dose`), there or at a watched site, and for no more benign ones than is guaranteed. s = 1
replaces, s = 0 changes no bit.
"""

from dataclasses import dataclass, replace

from ...steering.edits import Replace
from ...steering.steering import Steering
from .lesson import Lesson
from .method import Learnt

REPLACE = Replace(1.0, by="counterparts", unknown=2.0)
"""At its unit."""


@dataclass(frozen=True)
class Ours:
    """Strength in replacements."""

    name: str = "ours"
    unit: float = 1.0

    def learn(self, lesson: Lesson) -> Learnt:
        return lambda strength: steered(lesson, strength)


def steered(lesson: Lesson, strength: float) -> Steering:
    return Steering(
        lesson.weighed_contrast,
        lesson.weighed,
        [replace(REPLACE, strength=strength)],
        counterparts=lesson.counterparts,
        watch=lesson.watched,
        scope="image",
    )
