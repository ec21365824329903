"""Fresh prompts of every kind for any seed, with safe twins, in splits that share no prompt and no indirect wording."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config import UsageError, did_you_mean
from ..prompts import WORDINGS, prompts_from_rows
from .captions import KINDS, Ask, Asked, Wordings, ask_for, fixed_colour
from .concepts import BACKGROUNDS, BENIGN, CONCEPTS, HAZARDS, PAIRS, RISKS, SPLITS, hazards_in, wording_kind

if TYPE_CHECKING:
    from datasets import Dataset

TRIES = 2000  # draws without a new prompt before a kind counts as exhausted


def prompts(
    kind: str,
    split: str = "report",
    seed: int = 0,
    n: int = 64,
    *,
    risk: str | list[str] | None = None,
    wording: str | None = None,
    mood: bool = True,
    twins: bool = True,
    stand_in: str | None = None,
) -> "Dataset":
    """`n` prompts of a kind, reproducible by seed; a prompt text belongs to one split for ever, whatever the seed.

    `risk` restricts harmful and mixed prompts to domains, `wording` (`noun` or `indirect`) to how the hazard is named.
    `mood=False` names a background in every prompt, so that the stormy mood of harmful training scenes has no say.
    `twins` puts behind every harmful and mixed prompt its safe twin: same seed, same words, the hazard replaced by a
    benign object: `stand_in` by its plain noun, if one is given, and only prompts that do not show it already are drawn
    then. Columns as in `safedig.prompts.COLUMNS`. Raises `UsageError` where fewer than `n` such prompts exist.
    """
    _check("kind", kind, KINDS)
    _check("split", split, SPLITS)
    risks = [risk] if isinstance(risk, str) else risk
    for name in risks or ():
        _check("risk", name, RISKS)
    if wording is not None:
        _check("wording", wording, WORDINGS)
    if stand_in is not None:
        _check("stand_in", stand_in, BENIGN)
    rng = np.random.default_rng((seed, KINDS.index(kind), SPLITS.index(split)))
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    for _ in range(n):
        ask, twin = _draw_new(kind, split, rng, seen, lambda a: _wanted(a, risks, wording), mood, twins, stand_in)
        number = int(rng.integers(2**31))
        identity = f"{kind}-{split}-{hashlib.sha256(f'{number}:{ask.text}'.encode()).hexdigest()[:12]}"
        twin_id = f"{identity}-safe" if twin else ""
        rows.append(row(ask, kind, identity, twin_id, split, number))
        if twin:
            rows.append(row(twin, "benign", twin_id, "", split, number))
    return prompts_from_rows(rows)


def _check(name: str, given: str, known: tuple[str, ...]) -> None:
    if given not in known:
        raise UsageError(f"{name}={given!r} is not known. {did_you_mean(given, known)}")


def _draw_new(
    kind: str,
    split: str,
    rng: np.random.Generator,
    seen: set[str],
    wanted: Callable[[Ask], bool],
    mood: bool,
    twins: bool,
    stand_in: str | None,
) -> tuple[Ask, Ask | None]:
    for _ in range(TRIES):
        ask = ask_for(kind, rng, Wordings(split=split))
        if not mood and ask.background is None:
            ask = replace(ask, background=str(rng.choice(list(BACKGROUNDS))))
        if not wanted(ask):
            continue
        if ask.text in seen or _split_of(ask.text) != split:
            continue
        if not (twins and hazard_of(ask)):
            seen.add(ask.text)
            return ask, None
        candidates = (safe_twin(ask, rng, split, stand_in) for _ in range(50)) if _lacks(ask, stand_in) else ()
        if twin := next((t for t in candidates if _split_of(t.text) == split and hazard_of(t) is None), None):
            seen.add(ask.text)
            return ask, twin
    raise UsageError(
        f"Only {len(seen)} different prompts of kind '{kind}' with these restrictions exist in split '{split}': "
        "ask for fewer, or loosen risk or wording."
    )


def _split_of(text: str) -> str:
    return SPLITS[hashlib.sha256(text.encode()).digest()[0] % len(SPLITS)]


def hazard_of(ask: Ask) -> str | None:
    """The hazard an ask names outright, if any: an object or a composition."""
    return next(iter(hazards_in([o.name for o in ask.objects if o.name])), None)


def _wanted(ask: Ask, risks: list[str] | None, wording: str | None) -> bool:
    hazard = hazard_of(ask)
    if risks and (hazard is None or CONCEPTS[hazard].risk not in risks):
        return False
    return wording is None or _wording(ask, hazard) == wording


def _wording(ask: Ask, hazard: str | None) -> str:
    if hazard is None:
        return (
            "indirect" if any(o.name and wording_kind(o.name, o.wording) == "indirect" for o in ask.objects) else "noun"
        )
    if hazard in PAIRS:
        return "indirect" if ask.whole else "noun"
    return next(wording_kind(hazard, o.wording) for o in ask.objects if o.name == hazard)


def _lacks(ask: Ask, stand_in: str | None) -> bool:
    return stand_in is None or all(one.name != stand_in for one in ask.objects)


def safe_twin(ask: Ask, rng: np.random.Generator, split: str, stand_in: str | None = None) -> Ask:
    """The same ask with a benign object for its hazard; of a composition, one of the two members is replaced.

    The object and the member are drawn by lot, and worded like the hazard. `stand_in` is named by its plain noun, and
    takes the place of the member that makes the most compositions: always of the same one.
    """
    hazard = hazard_of(ask) or ""
    guilty = [i for i, o in enumerate(ask.objects) if o.name == hazard or o.name in (CONCEPTS[hazard].pair or ())]
    i = int(rng.choice(guilty)) if stand_in is None else min(guilty, key=lambda at: _rank(ask.objects[at].name))
    others = [o.name for j, o in enumerate(ask.objects) if j != i and o.name]
    harmless = [b for b in BENIGN if b not in others and not hazards_in([*others, b])]
    name = str(rng.choice(harmless)) if stand_in is None else stand_in
    style = Wordings(
        1.0
        if stand_in is None and hazard in HAZARDS and wording_kind(hazard, ask.objects[i].wording) == "indirect"
        else 0.0,
        split,
    )
    swapped = replace(ask.objects[i], name=name, wording=style.pick(name, rng))
    return replace(ask, objects=(*ask.objects[:i], swapped, *ask.objects[i + 1 :]), whole=None)


def _rank(member: str | None) -> tuple[int, str]:
    """The most entangled first; of equals always the same one, whichever stands first in the prompt."""
    return -sum(member in (CONCEPTS[pair].pair or ()) for pair in PAIRS), member or ""


def row(ask: Ask, kind: str, identity: str, twin: str, split: str, seed: int) -> dict[str, Any]:
    """One prompt in the contract's columns."""
    hazard = hazard_of(ask)
    risk = CONCEPTS[hazard].risk if hazard else ""
    return {
        "id": identity,
        "prompt": ask.text,
        "risk": risk,
        "kind": kind,
        "wording": _wording(ask, hazard),
        "twin": twin,
        "split": split,
        "seed": seed,
        "objects": json.dumps([_object(o, hazard) for o in ask.objects]),
        "background": ask.background or "",
    }


def _object(o: Asked, hazard: str | None) -> dict[str, Any]:
    guilty = bool(hazard) and (o.name == hazard or o.name in (CONCEPTS[hazard].pair or ()))
    return {"name": o.name, "colour": o.colour or fixed_colour(o.wording), "place": o.place, "hazard": guilty}
