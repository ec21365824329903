"""What a steering is learnt from: a bank of prompts, what passes the sites, and what is found in it.

Everything is of the split `train`, but for the benign prompts that set the gates: those are of `calibrate`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from safedig.activations.stream import Activations
from safedig.evaluation.bank import Bank, TinyBank
from safedig.evaluation.methods.ours import REPLACE
from safedig.features import Features, fit_counterparts, weigh
from safedig.features.safe_codes import fit_prototypes
from safedig.progress import say
from safedig.recipes import Recipe
from safedig.sae.model import SparseAutoencoder
from safedig.sites import Site
from safedig.steering.conformal import calibrated
from safedig.steering.edits import Blend, Edit, Repel
from safedig.steering.steering import Steering

Row = dict[str, Any]
EDITS: dict[str, Edit] = {"repel": Repel(2.0), "blend": Blend(1.0), "replace": REPLACE}
"""At their units: what a dose of 1 is."""


@dataclass(eq=False)
class Learnt:
    """What all steerings of a run share; each has edits, sites and gates of its own."""

    saes: Mapping[Site, SparseAutoencoder]
    features: Mapping[Site, Features]
    """Weighed; no gate opens as yet."""
    lessons: Activations
    """Harmful prompts with twins that show one thing in the hazard's place, and benign prompts."""
    quiet: Activations
    """Benign prompts that set the gates."""
    watch: Sequence[Site] = ()
    """Sites whose gates open those of the edited ones."""

    def steering(self, edit: str, sites: Sequence[Site], epsilon: float) -> Steering:
        """One edit at these sites, its gates open on no more than a share ε of benign prompts of each kind."""
        found = self._with_prototypes if edit == "blend" else self.features
        watch = [site for site in self.watch if site not in sites]
        features = calibrated({site: found[site] for site in [*sites, *watch]}, self.saes, self.quiet, epsilon=epsilon)
        replaced = edit == "replace"
        known = fit_counterparts(self.saes, self.lessons, features, quiet=self.quiet) if replaced else None
        saes = self.saes if edit == "blend" else self._contrast
        return Steering(saes, features, [EDITS[edit]], counterparts=known, watch=watch, scope="image")

    @cached_property
    def _with_prototypes(self) -> dict[Site, Features]:
        return fit_prototypes(self.saes, self.lessons, self.features)

    @cached_property
    def _contrast(self) -> dict[Site, SparseAutoencoder]:
        from safedig.adaptation import fit_contrast

        return fit_contrast(self.saes, self.lessons, self.features)


def learn(pipe: Any, recipe: Recipe, sites: Sequence[str], quiet: list[Row], bank: Bank | None = None) -> Learnt:
    """Record, train one SAE a site, and weigh its features; on the tiny world's prompts unless a bank is given."""
    from safedig.sae.train import train
    from safedig.sites import resolve

    sites = passed(recipe, sites)
    n, seed = recipe.prompts.learn, recipe.seed
    harmful, plain = {"harmful": n, "mixed": n // 2}, {"benign": n, "near-miss": n // 2}
    pairs, benign = drawn("train", harmful, seed, bank), drawn("train", plain, seed, bank)
    stand_ins = drawn("train", harmful, seed + 1, bank, stand_in=recipe.shown_instead)
    acts = recorded(pipe, recipe, sites, pairs + benign + stand_ins)
    saes = train(acts, options=recipe.sae)
    features = weigh(saes, acts)
    for site, found in features.items():
        say(f"{site}: {len(found)} harmful features of {saes[site].d_sae}")
    watch = resolve(pipe, recipe.watched)
    return Learnt(saes, features, acts.of(stand_ins + benign), recorded(pipe, recipe, sites, quiet), watch)


def passed(recipe: Recipe, sites: Sequence[str]) -> list[str]:
    """The sites that are edited, and those that the recipe watches."""
    return [*sites, *(site for site in recipe.watched if site not in sites)]


def drawn(split: str, kinds: Mapping[str, int], seed: int, bank: Bank | None = None, **wishes: Any) -> list[Row]:
    """So many prompts of each kind."""
    bank = bank or TinyBank()
    return [row for kind, n in kinds.items() for row in bank.rows(kind, split, seed, n, **wishes)]


def recorded(pipe: Any, recipe: Recipe, sites: Sequence[str], rows: list[Row]) -> Activations:
    """What passes the sites, drawn as the recipe draws."""
    from safedig.activations.record import record_once
    from safedig.sites import resolve

    return record_once(pipe, rows, resolve(pipe, sites), recipe.drawing_of(pipe))
