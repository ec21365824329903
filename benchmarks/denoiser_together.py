"""The Safe Denoiser and what acts elsewhere: steering, SLD and SAFREE, each alone and with it, on the same pictures.

Here the denoiser stays away from all hazards at once. Strengths of all of them are chosen on the split `calibrate`, at
the same loss of calm pictures; steering is the default of the package, at its own strength.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from denoiser_world import shows

from safedig.denoiser import NegationSet
from safedig.evaluation.curriculum import Curriculum, Sizes
from safedig.evaluation.methods import METHODS, Lesson
from safedig.pipelines import draw
from safedig.progress import say
from safedig.recipes import load
from safedig.tiny import judge

if TYPE_CHECKING:
    from denoiser_measure import Lab

Cell = dict[str, Any]
BESIDE = {"steering": "ours", "SLD": "SLD", "SAFREE": "SAFREE"}
PARTS = ("report", "naming", "benign")
FEW = 480  # underspecified prompts
LADDER = (0.25, 1.0, 4.0)  # strengths, in multiples of a method's own unit


class Side:
    """What may stand on the pipeline beside the denoiser."""

    def __init__(self, lab: "Lab"):
        self.lab, self.world, self.budget = lab, lab.world, lab.budget
        self.recipe = load(self.world.model)
        self._learnt: dict[str, Any] = {}

    @cached_property
    def lesson(self) -> Lesson:
        """Of all domains of hazards; compositions are nothing that a set of hazards could negate."""
        recipe = self.recipe
        taught = Curriculum("composition", Sizes(), self.budget.seed, stand_in=recipe.shown_instead).taught()
        options = {"drawing": self.world.drawing, "sae": recipe.sae, "quantile": recipe.quantile}
        options |= {"watch": recipe.watched}
        return Lesson(self.world.pipe, **(taught | {"target": []}), sites=recipe.sites, **options)

    def acting(self, name: str, strength: float) -> AbstractContextManager[Any]:
        if not strength:
            return nullcontext()
        if name not in self._learnt:
            say(f"{name} learns")
            self._learnt[name] = METHODS[BESIDE[name]].learn(self.lesson)
        return self._learnt[name](strength).apply(self.world.pipe)

    def denoiser(self, strength: float, floor: float) -> AbstractContextManager[Any]:
        """Away from all hazards at once."""
        sets = [self.lab.negatives(hazard) for hazard in self.budget.hazards]
        every = NegationSet(torch.cat([part for one in sets for part in one.parts()]))
        return self.lab.made_of(every, strength, floor=floor).apply(self.world.pipe)

    def strength(self, name: str) -> float:
        """The one that leaves the fewest hazards at no more than the loss of calm pictures, of equals the strongest.

        Where all lose more, the gentlest.
        """
        unit = METHODS[BESIDE[name]].unit
        if name == "steering":
            return unit
        plain = self.measured("none", 0.0, 0.0, 0.0, ("calibrate", "calm"))["calm"]
        tried = {at * unit: self.measured(name, at * unit, 0.0, 0.0, ("calibrate", "calm")) for at in LADDER}
        hazards = {
            at: len(cell["calibrate"]["hazard"])
            for at, cell in tried.items()
            if len(plain["clean"]) - len(cell["calm"]["clean"]) <= self.budget.loss * plain["n"]
        }
        return min(hazards, key=lambda at: (hazards[at], -at), default=min(tried))

    def measured(self, name: str, strength: float, away: float, floor: float, parts: tuple[str, ...] = PARTS) -> Cell:
        """What of each part shows a hazard, by either eye and by the second check, and what is clean."""
        beside = f"{name} of recipe {self.recipe.sha}" if name == "steering" else name
        told = f"{', '.join(parts)} with {beside} at {strength:g}, denoiser at {away:g} from β = {floor:g} on"
        return self.lab.cell(told, lambda: {part: self._part(part, name, strength, away, floor) for part in parts})

    def _part(self, part: str, name: str, strength: float, away: float, floor: float) -> Cell:
        rows = self.world.rows(part)
        rows = rows[:FEW] if part == "report" else rows
        asked = part in ("benign", "calm")
        judged: list[dict[str, Any]] = []
        # What is put on last acts first: the denoiser sees what guidance and its rivals have made of the velocity.
        with self.denoiser(away, floor) if away else nullcontext(), self.acting(name, strength):
            for of, images in draw(self.world.pipe, rows, drawing=self.world.drawing):
                judged += judge(images, asked=of if asked else None)
        eyes = [[shows(one, hazard) for hazard in self.budget.hazards] for one in judged]
        return {
            "n": len(rows),
            "hazard": [at for at, each in enumerate(eyes) if any(one[0] for one in each)],
            "second": [at for at, each in enumerate(eyes) if any(one[1] for one in each)],
            "clean": [at for at, one in enumerate(judged) if one["label"] == "clean"],
        }


def beside(lab: "Lab", strength: float, floor: float) -> dict[str, Cell]:
    """Every rival alone and with the denoiser, and the denoiser alone, as they are named in the table."""
    side, found = Side(lab), {}
    for name in ("none", *BESIDE):
        own = 0.0 if name == "none" else side.strength(name)
        for away in (0.0, strength):
            label = " + ".join([*([name] if name != "none" else []), *(["denoiser"] if away else [])]) or "nothing"
            found[label] = side.measured(name, own, away, floor if away else 0.0) | {"own": own}
    return found
