"""What a calibration measures with: its prompts, and the steerings that settings are set on, kept as bundles."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safedig.activations.stream import Activations
from safedig.config import UsageError
from safedig.evaluation.bank import Bank
from safedig.evaluation.dose_response import Cell
from safedig.evaluation.jury import Jury
from safedig.evaluation.records import circumstances
from safedig.evaluation.response import Cells, Response
from safedig.pipelines import fingerprint
from safedig.progress import say
from safedig.recipes import Recipe
from safedig.recipes.calibrating import Tried
from safedig.sites import Site, resolve
from safedig.steering import bundle
from safedig.steering.edits import to_json
from safedig.steering.openings import touched
from safedig.steering.setting import Setting, set_to
from safedig.steering.steering import Steering
from safedig.verbs.learning import EDITS, Learnt, drawn, learn, passed, recorded

Row = dict[str, Any]
CELLS, LEARNT = "cells.jsonl", "learnt"


@dataclass(frozen=True, eq=False)
class Asked:
    """Prompts of the split `calibrate`: those that set the gates, and those that settings are tried on."""

    harmful: list[Row]
    benign: list[Row]
    quiet: list[Row]

    @classmethod
    def of(cls, sizes: Tried, seed: int, bank: Bank) -> "Asked":
        """Of a bank that has fewer benign prompts, both uses get their share."""
        mixed, near = sizes.harmful // 3, sizes.benign // 2
        benign, quiet = [], []
        for kind, tried in (("benign", sizes.benign - near), ("near-miss", near)):
            rows = drawn("calibrate", {kind: sizes.quiet + tried}, seed, bank)
            at = len(rows) * sizes.quiet // (sizes.quiet + tried)
            quiet, benign = quiet + rows[:at], benign + rows[at:]
        harmful = drawn("calibrate", {"harmful": sizes.harmful - mixed, "mixed": mixed}, seed, bank, twins=False)
        return cls(harmful, benign, quiet)


@dataclass(eq=False)
class Base:
    """A steering at the units of its edits, and what stands for it."""

    steering: Steering
    sha: str
    unsteered: Callable[[], Activations]
    """A recording of the benign prompts that settings are tried on."""

    @cached_property
    def opened(self) -> set[str]:
        """Ids of those whose gates it opens."""
        return {name for name, _ in touched(self.steering, self.unsteered())}


class Bench:
    """Measures settings; what is learnt is learnt once, and found again by the next run."""

    def __init__(
        self, recipe: Recipe, sites: tuple[str, ...], sizes: Tried, pipe: Any, out: Path, bank: Bank, looks: Jury
    ):
        self.recipe, self.pipe, self.out, self.bank = recipe, pipe, out, bank
        self.sites = tuple(str(site) for site in resolve(pipe, sites))
        self.asked = asked = Asked.of(sizes, recipe.seed, bank)
        self.judge = looks.told
        self.model, drawing = fingerprint(pipe), recipe.drawing_of(pipe)
        common = {"model": self.model, "drawing": dataclasses.asdict(drawing), "dtype": str(pipe.transformer.dtype)}
        self._lessons = (
            common
            | {
                "version": circumstances()["packages"]["safedig"],
                "sites": self.sites,
                "seed": recipe.seed,
                "learn": recipe.prompts.learn,
                "sae": dataclasses.asdict(recipe.sae),
                "quiet": _sha([_words(row) for row in asked.quiet]),
            }
            | ({"prompts": bank.sha} if bank.sha else {})
            | ({"watch": recipe.watch} if recipe.watch else {})
            | ({"stand_in": recipe.stand_in} if recipe.stand_in else {})
        )
        facts = common | {"judge": self.judge, "prompts": _sha([_words(row) for row in asked.harmful + asked.benign])}
        self.response = Response(pipe, drawing, looks.labels, asked.harmful, asked.benign, Cells(out / CELLS), facts)
        self._bases: dict[tuple[Any, ...], Base | None] = {}

    def measured(self, setting: Setting) -> Cell | None:
        """Its cell; None where its gates cannot be vouched for."""
        base = self.base(setting)
        if base is None:
            return None
        acting = set_to(base.steering, setting.dose, setting.sigmas)
        return self.response.cell(setting, base.sha, acting, lambda: base.opened)

    def base(self, setting: Setting) -> Base | None:
        """The steering that it is set on."""
        key = (setting.edit, setting.sites, setting.epsilon)
        if key not in self._bases:
            try:
                self._bases[key] = self._found(*key)
            except UsageError as error:
                say(f"{setting.edit}, ε {setting.epsilon:g} at {', '.join(setting.sites)} is left out: {error}")
                self._bases[key] = None
        return self._bases[key]

    def _found(self, edit: str, sites: tuple[str, ...], epsilon: float) -> Base:
        folder = self.out / LEARNT / f"{edit}-{_sha([self._lessons, to_json(EDITS[edit]), sites, epsilon])}"
        if not (folder / bundle.JSON).is_file():
            self._learnt.steering(edit, [Site.parse(site) for site in sites], epsilon).save(folder)
        steering = Steering.load(folder)
        facts = json.loads((folder / bundle.JSON).read_text(encoding="utf-8"))
        return Base(steering, facts["sha256"], lambda: self._unsteered)

    @cached_property
    def _learnt(self) -> Learnt:
        return learn(self.pipe, self.recipe, self.sites, self.asked.quiet, self.bank)

    @cached_property
    def _unsteered(self) -> Activations:
        return recorded(self.pipe, self.recipe, passed(self.recipe, self.sites), self.asked.benign)


def _words(row: Row) -> tuple[str, str, int]:
    return row["id"], row["prompt"], row["seed"]


def _sha(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
