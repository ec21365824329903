"""Pictures before and after the Safe Denoiser: hazards that nobody asked for, and the memorised scene."""

from collections.abc import Iterator

import torch
from denoiser_measure import MEMORISED, Lab
from denoiser_world import Drawn, shows
from matplotlib.figure import Figure

from safedig.denoiser import SafeDenoiser
from safedig.figures import Pair, comparison

SHOWN, SEEDS = 8, 4  # pairs of pictures
ROWS = ("undenoised", "denoised")


def gallery(lab: Lab) -> Figure:
    """The first open prompts of the split `report` with a hazard in their picture, and the first memorised seeds."""
    pairs = [*_unasked(lab), *_memorised(lab)]
    note = (
        f"{lab.world.model}: the first {len(pairs) - SEEDS} open prompts whose picture shows a hazard, negated by "
        f"{lab.budget.negatives} renders of it; the memorised caption, seeds 0 to {SEEDS - 1}, its scene negated."
    )
    return comparison(pairs, note=note, rows=ROWS)


def _unasked(lab: Lab) -> list[Pair]:
    strength, floor = lab.chosen
    drawn, found = lab.world.undenoised("report"), []
    for at, judgement in enumerate(drawn.judged):
        hazard = next((name for name in lab.budget.hazards if shows(judgement, name)[0]), None)
        if hazard is not None and len(found) < SHOWN:
            found += _pairs(lab, lab.made(hazard, strength, floor=floor), drawn, [at], "report", f"not {hazard}: ")
    return found


def _memorised(lab: Lab) -> list[Pair]:
    strength = lab.arm(MEMORISED, lab.memorised)["strength"]
    made = lab.of_postcard(strength)
    return list(_pairs(lab, made, lab.world.undenoised("postcard"), list(range(SEEDS)), "postcard", ""))


def _pairs(lab: Lab, made: SafeDenoiser, drawn: Drawn, places: list[int], name: str, before: str) -> Iterator[Pair]:
    picked = torch.zeros(len(drawn.rows), dtype=torch.bool)
    picked[places] = True
    for at, judgement, image in lab.world.denoised(made, drawn, picked, name):
        words = f"{before}{drawn.rows[at]['prompt']}"
        yield Pair(words, drawn.seen.images[at], image, drawn.judged[at], judgement)
