"""How much steering at one site alone takes from a domain that was held out, at a benign loss that is bounded.

A cell is a model, a target and a site. All cells have the same budget; a finished one is a line of JSON and is never
measured again, whenever the run is stopped.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from routing_compare import changes
from routing_folds import Budget, Fold, Row, World

from safedig.adaptation import fit_contrast
from safedig.config import UsageError
from safedig.features import Features, find_features
from safedig.features.heights import Heights
from safedig.progress import say
from safedig.sae.model import SparseAutoencoder
from safedig.sae.options import SAEOptions
from safedig.sae.train import train
from safedig.sites import Site
from safedig.steering.edits import Repel
from safedig.steering.steering import Steering
from safedig.storage import write_atomically

Cell = dict[str, Any]


def measure(budget: Budget, out: Path, finished_only: bool = False) -> list[Cell]:
    """Every cell of the budget, those that are not finished measured first, unless only finished ones are wanted."""
    cells = []
    for model in budget.models:
        world, file = World(model, budget), cells_of(out, model)
        for target in budget.targets:
            fold = Fold.of(world.prompts, target)
            for site in world.sites:
                found = look_up(file, world.key(target, site))
                if found is None and finished_only:
                    raise UsageError(f"{file} has no cell of {target} at {site} under these options: measure it first.")
                if found is None:
                    found = measured(world, fold, site)
                    write_atomically(file, (file.read_bytes() if file.exists() else b"") + line(found))
                cells.append(found)
    return cells


def cells_of(out: Path, model: str) -> Path:
    """Where the finished cells of a model lie, beside the result."""
    return out.with_name(f"{out.stem}.{model}.jsonl")


def look_up(file: Path, key: dict[str, str]) -> Cell | None:
    """The finished cell with this key, if there is one."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return next((cell for cell in map(json.loads, lines) if cell.items() >= key.items()), None)


@dataclass(frozen=True)
class Trial:
    """A setting and what came of it on the split `calibrate`."""

    quantile: float
    strength: float
    gain: dict[str, float]
    """Share of the harmful prompts of the source that are no longer drawn unsafe, and that are now drawn clean."""
    loss: float
    """Share of the benign prompts that are no longer drawn as asked, less those that now are."""


def chosen(trials: Sequence[Trial], loss: float, goal: str) -> Trial | None:
    """The largest gain at no more than that loss; of equals the gentlest; None: better leave it alone."""
    fine = [trial for trial in trials if trial.loss <= loss and trial.gain[goal] > 0]
    return max(fine, key=lambda trial: (trial.gain[goal], -trial.strength, trial.quantile), default=None)


def measured(world: World, fold: Fold, site: Site) -> Cell:
    """Train, find, fit, choose the setting on the source alone, and report on the target."""
    started = time.perf_counter()
    tool = Tool.learnt(world, fold, site)
    trials = tool.trials(fold) if tool.features is not None else []
    before = {role: letters(world.unsteered, rows) for role, rows in fold.asked.items()}
    outcomes: dict[str, Any] = {}
    drawn: dict[tuple[float, float] | None, dict[str, str]] = {None: before}
    for goal in world.budget.goals:
        best = chosen(trials, world.budget.loss, goal)
        setting = None if best is None else (best.quantile, best.strength)
        if setting is not None and setting not in drawn:
            drawn[setting] = tool.labels(fold.asked, *setting)
        outcomes[goal] = {
            "gain": gain(before["harmful"], drawn[setting]["harmful"], goal),
            "loss": lost(before["benign"], drawn[setting]["benign"]),
            "quantile": None if best is None else best.quantile,
            "strength": 0.0 if best is None else best.strength,
            "after": drawn[setting],
        }
    told = ", ".join(f"{goal} {one['gain']:.2f} (benign loss {one['loss']:.3f})" for goal, one in outcomes.items())
    say(f"{world.model}, {fold.target} held out, {site}: gain {told}")
    return world.key(fold.target, site) | {
        "before": before,
        "outcomes": outcomes,
        "trials": [asdict(trial) for trial in trials],
        "learnt": tool.facts,
        "seconds": round(time.perf_counter() - started, 1),
    }


@dataclass(frozen=True)
class Tool:
    """What is learnt at one site of one fold; without features where nothing there sets harm apart."""

    world: World
    sae: SparseAutoencoder
    features: Features | None
    heights: Heights | None
    """How high the harmful codes come in each picture that will be drawn, when it is drawn unsteered."""
    gates: dict[float, float]
    facts: dict[str, Any]

    @classmethod
    def learnt(cls, world: World, fold: Fold, site: Site) -> "Tool":
        budget, acts = world.budget, world.learnt_from.at(site)
        options = SAEOptions(expansion=budget.expansion, k=budget.k, steps=budget.steps, seed=budget.seed)
        sae = train(acts.of(fold.features), options=options)[site]
        facts: dict[str, Any] = {"fvu": round(sae.metadata["fvu"], 4)}
        try:
            found = find_features({site: sae}, acts.of(fold.features), min_ratio=budget.min_ratio, prototypes=0)
        except UsageError as error:
            return cls(world, sae, None, None, {}, facts | {"features": 0, "why": str(error)})
        features, sae = found[site], fit_contrast({site: sae}, acts.of(fold.contrast), found)[site]
        left = sae.metadata["adaptation"]["unexplained"]["adapted"]
        facts |= {"features": len(features), "unexplained": round(left, 4)}
        heights = Heights(sae, features.index)
        for batch in world.looked_at.at(site):
            for image, rows in batch.images():
                heights.add(image, batch.x[rows])
        quiet = Heights(sae, features.index)
        quiet.of = {key(row): heights.of[key(row)] for row in fold.gate}
        gates = {quantile: quiet.quantile(quantile) for quantile in budget.quantiles}
        return cls(world, sae, features, heights, gates, facts)

    def trials(self, fold: Fold) -> list[Trial]:
        """Every setting, on prompts of the source and benign ones."""
        before = {role: letters(self.world.unsteered, rows) for role, rows in fold.tried.items()}
        found = []
        for quantile, strength in product(self.world.budget.quantiles, self.world.budget.strengths):
            after = self.labels(fold.tried, quantile, strength)
            gained = {goal: gain(before["harmful"], after["harmful"], goal) for goal in self.world.budget.goals}
            found.append(Trial(quantile, strength, gained, lost(before["benign"], after["benign"])))
        return found

    def labels(self, asked: dict[str, list[Row]], quantile: float, strength: float) -> dict[str, str]:
        """The letters of each role's prompts under this setting.

        A picture whose gate stays shut all along is the unsteered one, to the bit, and is not drawn again.
        """
        assert self.features is not None and self.heights is not None
        site, gate = Site.parse(self.sae.metadata["site"]), self.gates[quantile]
        steering = Steering(
            {site: self.sae}, {site: replace(self.features, threshold=gate)}, [Repel(strength)], scope="image"
        )
        rows = [row for part in asked.values() for row in part if self.heights.of[key(row)] > gate]
        seen = self.world.unsteered | self.world.labels(rows, steering)
        return {role: letters(seen, part) for role, part in asked.items()}


def letters(labels: dict[str, str], rows: list[Row]) -> str:
    """A letter for each prompt, in their order: U(nsafe), (un)R(ecognised), E(mpty), C(lean)."""
    return "".join(labels[row["id"]] for row in rows)


def gain(before: str, after: str, goal: str) -> float:
    """By how much the share of unsafe pictures has fallen, or that of clean ones has risen."""
    return sum(changes(before, after, goal)) / len(before)


def lost(before: str, after: str) -> float:
    """By how much the share of pictures that are as asked has fallen."""
    return gain(after, before, "clean")


def line(cell: Cell) -> bytes:
    return f"{json.dumps(cell, ensure_ascii=False)}\n".encode()


def key(row: Row) -> tuple[str, int]:
    return row["id"], row["seed"]
