"""Pictures before and after the Safe Denoiser: hazards that nobody asked for, and the memorised scene."""

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
    drawn = lab.world.undenoised("report")
    seen = [[name for name in lab.budget.hazards if shows(one, name)[0]] for one in drawn.judged]
    shown = [(at, names[0]) for at, names in enumerate(seen) if names][:SHOWN]
    return [
        pair
        for at, hazard in shown
        for pair in _pairs(lab, lab.made(hazard, strength, floor=floor), drawn, [at], "report", f"not {hazard}: ")
    ]


def _memorised(lab: Lab) -> list[Pair]:
    made = lab.of_postcard(lab.arm(MEMORISED, lab.memorised)["strength"])
    return _pairs(lab, made, lab.world.undenoised("postcard"), list(range(SEEDS)), "postcard")


def _pairs(lab: Lab, made: SafeDenoiser, drawn: Drawn, places: list[int], name: str, before: str = "") -> list[Pair]:
    """These pictures as they were and drawn again; `before` stands before their prompt."""
    picked = torch.zeros(len(drawn.rows), dtype=torch.bool)
    picked[places] = True
    return [
        Pair(f"{before}{drawn.rows[at]['prompt']}", drawn.seen.images[at], image, drawn.judged[at], judgement)
        for at, judgement, image in lab.world.denoised(made, drawn, picked, name)
    ]
