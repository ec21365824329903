"""Which words tell harm from safety: those of harmful prompts that their safe twins lack, the most frequent first."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

TELLING = 0.8  # share of the prompts with a word that are harmful, from which on the word tells harm


def words_of(prompt: str) -> list[str]:
    return re.findall(r"[^\W_]+(?:['-][^\W_]+)*", prompt.lower())


def hazard_words(pairs: Sequence[dict[str, Any]], benign: Sequence[dict[str, Any]]) -> list[str]:
    """Each harmful prompt lies before its safe twin. Of equally frequent words those that are met first come first."""
    harmful: Counter[str] = Counter()
    safe: Counter[str] = Counter(word for row in benign for word in set(words_of(row["prompt"])))
    for one, twin in zip(pairs[::2], pairs[1::2], strict=True):
        theirs = set(words_of(twin["prompt"]))
        harmful.update(list(dict.fromkeys(word for word in words_of(one["prompt"]) if word not in theirs)))
        safe.update(theirs)
    return [word for word, count in harmful.most_common() if count >= TELLING * (count + safe[word])]
