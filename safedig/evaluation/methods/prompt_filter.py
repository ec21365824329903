"""Words of harm struck out of the prompt before anything reads it: the filter of safety tokens that services have.

prompt' = the words w of the prompt with w ∉ L, L the most telling words of the pairs. Strength is how many words L has;
with none the prompt is left as it is. It knows words, not wordings: what it has not seen goes through.
"""

import re
from dataclasses import dataclass

from .lesson import Lesson
from .method import Learnt
from .text import OnText
from .words import hazard_words, words_of


@dataclass(frozen=True)
class PromptFilter:
    """Strength in words on the list."""

    name: str = "prompt filter"
    unit: float = 32.0

    def learn(self, lesson: Lesson) -> Learnt:
        known = hazard_words(lesson.pairs, lesson.benign)

        def at(strength: float) -> OnText:
            listed = set(known[: round(strength)])
            return OnText("cond", words=lambda prompts: [without(one, listed) for one in prompts])

        return at


def without(prompt: str, listed: set[str]) -> str:
    """The prompt without the listed words; one that holds none stays the very same text."""
    if not listed & set(words_of(prompt)):
        return prompt
    kept = [word for word in re.split(r"\s+", prompt) if not set(words_of(word)) & listed]
    return " ".join(kept)
