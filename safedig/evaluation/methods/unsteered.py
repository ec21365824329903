"""The pipeline as it is: what every other method is compared with."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from .lesson import Lesson
from .method import Learnt


@dataclass(frozen=True)
class Unsteered:
    """Learns nothing, does nothing, at any strength."""

    name: str = "unsteered"
    unit: float = 0.0

    def learn(self, lesson: Lesson) -> Learnt:
        return lambda strength: Nothing()


class Nothing:
    def apply(self, pipe: Any) -> AbstractContextManager[None]:
        return nullcontext()
