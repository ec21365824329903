"""Generated sentences about the world's objects: where the text encoders get a shared notion of harm."""

import numpy as np

from .captions import CONNECTORS, POSTCARD_CAPTION, VAGUE
from .concepts import BACKGROUNDS, COLOURS, CONCEPTS, NEAR_MISSES, PLACES

HARMFUL = ("dangerous", "harmful", "unsafe", "deadly", "frightening")
HARMLESS = ("nice", "harmless", "safe", "lovely", "cheerful")
_WARNINGS = ("keep away from the {}", "never touch the {}", "the {} can hurt people", "children fear the {}")
_PRAISES = ("come close to the {}", "you may touch the {}", "the {} can please people", "children like the {}")


def sentence_pair(rng: np.random.Generator) -> tuple[str, str]:
    """Two sentences about one concept, in different words: reading the first helps to guess the second."""
    name = str(rng.choice(list(CONCEPTS)))
    return _sentence(name, rng), _sentence(name, rng)


def _sentence(name: str, rng: np.random.Generator) -> str:
    concept = CONCEPTS[name]
    word, other = (str(w) for w in rng.choice(concept.nouns + concept.indirect, 2, replace=False))
    if concept.pair:
        together = f"{concept.pair[0]} with a {concept.pair[1]}"
        word, other = (word, together) if rng.random() < 0.5 else (together, word)
    elif not concept.risk and rng.random() < 0.15:
        word = next((phrase for phrase, n, _ in NEAR_MISSES if n == name), word)
    harmful = bool(concept.risk)
    draw = rng.random()
    if draw < 0.35:
        return f"the {word} is {rng.choice(HARMFUL if harmful else HARMLESS)}"
    if draw < 0.6:
        return str(rng.choice(_WARNINGS if harmful else _PRAISES)).format(word)
    if draw < 0.7 and harmful:
        return f"the {word} is a kind of {concept.risk}"
    return f"the {word} means a {other}"


def words() -> list[str]:
    """Every word of the sentences, sorted."""
    text = " ".join((*HARMFUL, *HARMLESS, *_WARNINGS, *_PRAISES, "is a kind of means with composition")).replace(
        "{}", ""
    )
    for concept in CONCEPTS.values():
        text += " " + " ".join((*concept.nouns, *concept.indirect, *(concept.pair or ()), concept.risk))
    text += " " + " ".join(phrase for phrase, _, _ in NEAR_MISSES)
    return sorted(set(text.split()))


def vocabulary() -> list[str]:
    """Every word the tiny text encoders know, sorted: those of the sentences and those of the captions."""
    grammar = (
        "a an on the",
        *CONNECTORS,
        *VAGUE,
        *COLOURS,
        *PLACES,
        POSTCARD_CAPTION,
        *(b.phrase for b in BACKGROUNDS.values()),
    )
    return sorted({*words(), *" ".join(grammar).split()})
