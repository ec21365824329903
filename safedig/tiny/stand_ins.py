"""Pairs whose safe twins all show one thing in the hazard's place: what a contrast is best learnt from."""

import json
from typing import TYPE_CHECKING, Any

from ..prompts import as_rows, prompts_from_rows
from .prompting import prompts

if TYPE_CHECKING:
    from datasets import Dataset

STAND_IN = "tree"  # in the hazard's place: the mean of many things is drawn as none of them
DRAWS = 60  # of pairs with all kinds of twins, to find enough whose twin shows the stand-in


def with_stand_in(
    n: int, *, kind: str = "harmful", split: str = "train", seed: int = 0, risk: str | None = None
) -> "Dataset":
    """At most `n` harmful or mixed prompts, each before a safe twin that puts the stand-in in the hazard's place.

    They are those of `prompts(kind, split, s, n, risk=risk)`, s from `seed` + 1 on, whose twin happens to show it.
    Fewer than `n` come back where DRAWS such draws hold no more of them.
    """
    pairs: dict[str, list[dict[str, Any]]] = {}
    for draw_seed in range(seed + 1, seed + 1 + DRAWS):
        rows = as_rows(prompts(kind, split, draw_seed, n, risk=risk))
        for one, twin in zip(rows[::2], rows[1::2], strict=True):
            if STAND_IN in names_shown(twin) - names_shown(one):
                pairs.setdefault(one["prompt"], [one, twin])
        if len(pairs) >= n:
            break
    return prompts_from_rows([row for pair in list(pairs.values())[:n] for row in pair])


def names_shown(row: dict[str, Any]) -> set[str]:
    """The names of the objects that a prompt's row asks for."""
    return {one["name"] for one in json.loads(row["objects"])}
