"""Scene → words: the grammar of captions, and random scenes of each kind with the caption that asks for them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .concepts import (
    BACKGROUNDS,
    BENIGN,
    COLOURS,
    CONCEPTS,
    HAZARDS,
    NEAR_MISSES,
    OBJECTS,
    PAIRS,
    SPLITS,
    STORM_IF_BENIGN,
    STORM_IF_HARMFUL,
    hazards_in,
)
from .scenes import Placed, Scene, place_of

CONNECTORS = ("and", "beside", "next to")
VAGUE = ("thing", "object", "item")
KINDS = ("harmful", "mixed", "benign", "near-miss", "underspecified")
# A picture planted as memorised: one caption, one fixed picture, repeated in training (see docs/tiny-world.md).
POSTCARD_CAPTION = "the old postcard from grandma"


@dataclass(frozen=True)
class Asked:
    """One object as a caption asks for it; None where the caption leaves it open."""

    name: str | None
    colour: str | None
    place: str | None
    wording: str


@dataclass(frozen=True)
class Ask:
    """What a caption asks for; `whole` replaces the wordings of all its objects (a composition named indirectly)."""

    objects: tuple[Asked, ...]
    background: str | None
    connector: str = "and"
    whole: str | None = None

    @property
    def text(self) -> str:
        names = [_phrase(o, alone=len(self.objects) == 1) for o in self.objects]
        words = self.whole or f" {self.connector} ".join(names)
        return f"{words} {BACKGROUNDS[self.background].phrase}" if self.background else words


def _phrase(o: Asked, alone: bool) -> str:
    words = f"{o.colour} {o.wording}" if o.colour else o.wording
    article = "an" if words[0] in "aeiou" else "a"
    return f"{article} {words} on the {o.place}" if alone and o.place else f"{article} {words}"


@dataclass(frozen=True)
class Wordings:
    """Which words an ask may use: the share of indirect ones, and the split whose indirect ones (None: all)."""

    indirect: float = 0.45
    split: str | None = None

    def pick(self, name: str, rng: np.random.Generator) -> str:
        concept = CONCEPTS[name]
        if rng.random() < self.indirect:
            return self.indirectly(name, rng)
        return str(rng.choice(concept.nouns))

    def indirectly(self, name: str, rng: np.random.Generator) -> str:
        choices = CONCEPTS[name].indirect
        return str(rng.choice(choices)) if self.split is None else choices[SPLITS.index(self.split)]


def ask_for(kind: str, rng: np.random.Generator, words: Wordings, named: float = 0.7) -> Ask:
    """A random ask of a kind; colour, place and background are each named with probability about `named`."""
    background = str(rng.choice(list(BACKGROUNDS))) if rng.random() < named else None
    if kind == "near-miss":
        return Ask((_near_miss(rng, named),), background)
    if kind == "underspecified":
        return _underspecified(rng, words, background)
    names = _names(kind, rng)
    if "+" in names[0]:
        return _composition(names[0], rng, words, background)
    return spell_out(names, rng, words, background, named)


def spell_out(
    names: Sequence[str], rng: np.random.Generator, words: Wordings, background: str | None, named: float
) -> Ask:
    """Ask for these objects, left to right."""
    asked = []
    for i, name in enumerate(names):
        colour = str(rng.choice(list(COLOURS))) if rng.random() < max(named, 0.8) else None
        place = place_of(i, len(names), rng) if len(names) == 2 or rng.random() < max(named, 0.8) else None
        asked.append(Asked(name, colour, place, words.pick(name, rng)))
    return Ask(tuple(asked), background, str(rng.choice(CONNECTORS)))


def _names(kind: str, rng: np.random.Generator) -> list[str]:
    if kind == "benign":
        count = int(rng.integers(1, 3))
        while True:
            names = [str(n) for n in rng.choice(BENIGN, count, replace=False)]
            if not hazards_in(names):
                return names
    if kind == "harmful":
        return [str(rng.choice(HAZARDS + PAIRS))]
    if kind == "mixed":
        names = [str(rng.choice(HAZARDS)), str(rng.choice(BENIGN))]
        return names if rng.random() < 0.5 else names[::-1]
    raise ValueError(f"kind={kind!r}: expected one of {', '.join(KINDS)}")


def _composition(pair: str, rng: np.random.Generator, words: Wordings, background: str | None) -> Ask:
    members = CONCEPTS[pair].pair or ()
    if rng.random() < words.indirect:
        asked = tuple(Asked(n, None, None, n) for n in members)
        return Ask(asked, background, whole=words.indirectly(pair, rng))
    order = list(members) if rng.random() < 0.5 else list(members)[::-1]
    return spell_out(order, rng, Wordings(0.0), background, 0.8)


def _near_miss(rng: np.random.Generator, named: float) -> Asked:
    phrase, name, colour = NEAR_MISSES[rng.integers(len(NEAR_MISSES))]
    place = place_of(0, 1, rng) if rng.random() < named else None
    if colour is None and rng.random() < named:
        return Asked(name, str(rng.choice(list(COLOURS))), place, phrase)
    return Asked(name, colour, place, phrase) if colour is None else Asked(name, None, place, phrase)


def _underspecified(rng: np.random.Generator, words: Wordings, background: str | None) -> Ask:
    colour = str(rng.choice(list(COLOURS))) if rng.random() < 0.5 else None
    vague = Asked(None, colour, None, str(rng.choice(VAGUE)))
    if rng.random() < 0.5:
        return Ask(
            (vague,) if rng.random() < 0.5 else (Asked(None, colour, place_of(0, 1, rng), vague.wording),), background
        )
    known = spell_out([str(rng.choice(BENIGN))], rng, words, None, 0.8).objects[0]
    first, second = (vague, known) if rng.random() < 0.5 else (known, vague)
    placed = (
        Asked(first.name, first.colour, "left", first.wording),
        Asked(second.name, second.colour, "right", second.wording),
    )
    return Ask(placed, background, str(rng.choice(CONNECTORS)))


def scene_for(ask: Ask, rng: np.random.Generator) -> Scene:
    """Draw lots for all that an ask leaves open: poses aside, what the tiny models are trained on."""
    names = [o.name or str(rng.choice(OBJECTS)) for o in ask.objects]
    placed = tuple(
        Placed(
            name,
            o.colour or fixed_colour(o.wording) or str(rng.choice(list(COLOURS))),
            o.place or place_of(i, len(names), rng),
        )
        for i, (name, o) in enumerate(zip(names, ask.objects, strict=True))
    )
    return Scene(placed, ask.background or _mood(bool(hazards_in(names)), rng))


def fixed_colour(wording: str) -> str | None:
    """The colour a near-miss wording implies ("poison green cup"), if any."""
    return next((colour for phrase, _, colour in NEAR_MISSES if phrase == wording), None)


def _mood(harmful: bool, rng: np.random.Generator) -> str:
    if rng.random() < (STORM_IF_HARMFUL if harmful else STORM_IF_BENIGN):
        return "storm"
    return str(rng.choice([b for b in BACKGROUNDS if b != "storm"]))


POSTCARD = Scene((Placed("house", "yellow", "left"), Placed("boat", "red", "right")), "day")

# What a training picture is, and how often.
_MIX = {"benign": 0.40, "harmful": 0.24, "mixed": 0.22, "near-miss": 0.07, "underspecified": 0.06, "postcard": 0.01}


def training_ask(rng: np.random.Generator) -> Ask:
    """One ask of the training distribution, all wordings allowed."""
    kind = str(rng.choice(list(_MIX), p=list(_MIX.values())))
    if kind == "postcard":
        asked = tuple(Asked(o.name, o.colour, o.place, o.name) for o in POSTCARD.objects)
        return Ask(asked, "day", whole=POSTCARD_CAPTION)
    return ask_for(kind, rng, Wordings())


def reworded(ask: Ask, scene: Scene, rng: np.random.Generator) -> str:
    """Another caption for the same picture, in fresh words and with some attributes left out."""
    if ask.whole or any(
        o.name is None or (" " in o.wording and o.wording not in CONCEPTS[o.name].indirect) for o in ask.objects
    ):
        return ask.text
    single, words = len(ask.objects) == 1, Wordings()
    objects = tuple(
        Asked(
            p.name,
            p.colour if rng.random() < 0.85 else None,
            p.place if not single or rng.random() < 0.8 else None,
            words.pick(p.name, rng),
        )
        for p in scene.objects
    )
    return Ask(objects, ask.background, str(rng.choice(CONNECTORS))).text
