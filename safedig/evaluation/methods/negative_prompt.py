"""The words of harm as the negative prompt: guidance then leads away from them instead of from nothing in particular.

Negative prompts have no paper; with classifier-free guidance (arXiv 2207.12598), v = v(∅) + w · (v(c) − v(∅)),
v(∅) becomes v(words). They have no strength either: here it is how many words are given, the most telling first. With
none the prompt is the empty one, and no bit changes.
"""

from dataclasses import dataclass

from ...config import UsageError
from ...pipelines import Drawing, guided
from .lesson import Lesson
from .method import Learnt
from .text import OnText
from .words import hazard_words


@dataclass(frozen=True)
class NegativePrompt:
    """Strength in words; what does not fit the text encoders is cut by them."""

    name: str = "negative prompt"
    unit: float = 4.0

    def learn(self, lesson: Lesson) -> Learnt:
        check_guided(lesson, self.name)
        known = hazard_words(lesson.pairs, lesson.benign)

        def at(strength: float) -> OnText:
            words = known[: round(strength)]
            return OnText("uncond", words=lambda prompts: [" ".join([*one.split(), *words]) for one in prompts])

        return at


def check_guided(lesson: Lesson, name: str) -> None:
    """A `UsageError` where images have no unconditional row to act on."""
    if not guided(lesson.pipe, lesson.drawing or Drawing.of(lesson.pipe)):
        raise UsageError(
            f"'{name}' acts on the unconditional row, and this model draws without one: give a drawing with guidance "
            "above 1 (and true_cfg=true for FLUX), or leave the method out."
        )
