"""What the package steers with by default: harm in a token is taken out by what stood in safety in its place.

a' = a − g · s · the mean of what harm has added to the known tokens nearest to a (see `Replace`, by counterparts), the
gate g open for images whose weighed codes say harm (see `Dose`), and for no more benign ones than is guaranteed. s = 1
replaces, s = 0 changes no bit.
"""

from dataclasses import dataclass

from ...steering.edits import Replace
from ...steering.steering import Steering
from .lesson import Lesson
from .method import Learnt

NEAREST = 4  # known tokens whose counterparts are averaged


@dataclass(frozen=True)
class Ours:
    """Strength in replacements."""

    name: str = "ours"
    unit: float = 1.0

    def learn(self, lesson: Lesson) -> Learnt:
        return lambda strength: steered(lesson, strength)


def steered(lesson: Lesson, strength: float) -> Steering:
    edit = Replace(strength, by="counterparts", nearest=NEAREST)
    return Steering(lesson.dictionaries, lesson.weighed, [edit], counterparts=lesson.counterparts, scope="image")
