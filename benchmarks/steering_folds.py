"""The prompts of the steering table, and what each fold learns: one risk domain held out, the others the source.

What passes `txt.embed` and `pooled.embed` is the prompt's alone and the same at every σ, so it is recorded in drawings
of one step; the fixed sites inside the blocks, for comparison, are recorded at every step.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from hashlib import sha256
from typing import Any

from safedig.activations.record import Activations, record, record_once
from safedig.adaptation import adapt, fit_contrast
from safedig.features import Counterparts, Features, Weighing, find_features, fit_counterparts, weigh
from safedig.pipelines import Drawing, fingerprint, load_pipeline
from safedig.prompts import as_rows
from safedig.sae.model import SparseAutoencoder
from safedig.sae.options import SAEOptions
from safedig.sae.train import train
from safedig.sites import Site
from safedig.steering.conformal import calibrated
from safedig.tiny import prompts
from safedig.tiny.concepts import RISKS

Row = dict[str, Any]
STAND_INS = {"tiny-flux": "heart", "tiny-sd3": "tree"}  # what each draws best: steering.py --only stand-ins
TXT, POOLED = Site.parse("txt.embed"), Site.parse("pooled.embed")
FIXED = {
    "middle block": Site.parse("transformer_blocks.1.img.resid_post"),
    "most decodable inert site": Site.parse("transformer_blocks.2.txt.resid_post"),
}


@dataclass(frozen=True)
class Budget:
    """How much each fold learns from and is measured on."""

    models: tuple[str, ...] = ("tiny-flux", "tiny-sd3")
    targets: tuple[str, ...] = RISKS
    pairs: int = 64
    """Harmful prompts of each source domain whose twins are of all kinds, and as many whose twins show the stand-in."""
    stand_in: str = "heart"
    """What the twins show that the edits learn from: the mean of many things would be drawn as none of them."""
    few: int = 48
    """Pairs of the target domain: all that is ever learnt from it."""
    benign: int = 500
    near: int = 250
    """Benign prompts and near-misses to learn from."""
    quiet: int = 400
    """Of each, of the split `calibrate`: they set the gates."""
    tried: int = 12
    """Harmful prompts of each source domain, of the split `calibrate`: the configuration is chosen on them."""
    asked: int = 96
    """Harmful prompts of the target that are reported, and half as many of the source."""
    harmless: int = 192
    """Benign prompts that are reported, and as many near-misses."""
    fixed: int = 24
    """Pairs of each domain that the fixed sites inside the blocks learn from."""
    expansion: int = 4
    k: int = 48
    steps: int = 1000
    epsilon: float = 0.07
    """The smallest of .05, .06, … .1 above which at most half a point more of held-out harm is heard."""
    delta: float = 0.1
    unknown: float = 2.0
    """How far a token that is like no known one is repelled."""
    within: float = 0.9
    """Share of the tokens that set the gates which are like known ones."""
    seed: int = 0

    @property
    def sha(self) -> str:
        facts = {name: value for name, value in asdict(self).items() if name not in ("models", "targets")}
        return sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def of(self, model: str) -> "Budget":
        """The same, with what this model draws best."""
        return replace(self, stand_in=STAND_INS[model])


QUICK = Budget(targets=("fire",), pairs=24, benign=120, near=80, quiet=200, tried=4, asked=12, harmless=24, fixed=12)


def harmful(risk: str, split: str, seed: int, n: int, **wishes: Any) -> list[Row]:
    """A third of them beside a benign object; a composition is two benign objects already."""
    mixed = 0 if risk == "composition" else n // 3
    found = as_rows(prompts("harmful", split, seed, n - mixed, risk=risk, **wishes))
    return found + (as_rows(prompts("mixed", split, seed, mixed, risk=risk, **wishes)) if mixed else [])


def plain(split: str, seed: int, benign: int, near: int) -> list[Row]:
    return as_rows(prompts("benign", split, seed, benign)) + as_rows(prompts("near-miss", split, seed, near))


def joined(parts: Iterable[Sequence[Row]]) -> list[Row]:
    return [row for part in parts for row in part]


class World:
    """One model, its prompts, and what passes its text inputs."""

    def __init__(self, model: str, budget: Budget):
        self.model, self.budget = model, budget.of(model)
        self.pipe = load_pipeline(model)
        self.drawing = Drawing.of(self.pipe)
        self.fingerprint = fingerprint(self.pipe)
        b, seed = self.budget, budget.seed
        self.source = {risk: harmful(risk, "train", seed, b.pairs) for risk in RISKS}
        self.stand_ins = {risk: harmful(risk, "train", seed + 1, b.pairs, stand_in=b.stand_in) for risk in RISKS}
        self.few = {risk: harmful(risk, "train", seed + 2, b.few, stand_in=b.stand_in) for risk in RISKS}
        self.benign = plain("train", seed, b.benign, b.near)
        self.quiet = plain("calibrate", seed, b.quiet, b.quiet)

    @cached_property
    def inputs(self) -> Activations:
        """At both text inputs, for everything that is learnt from."""
        parts = [*self.source.values(), *self.stand_ins.values(), *self.few.values(), self.benign, self.quiet]
        return record_once(self.pipe, joined(parts), [TXT, POOLED], self.drawing)

    @cached_property
    def inside(self) -> Activations:
        """At the fixed sites, for fewer prompts, at every step, some tokens of each image to learn from."""
        n = 2 * self.budget.fixed
        pairs = (rows[:n] for rows in (*self.stand_ins.values(), *self.few.values()))
        rows = joined([*pairs, self.benign[: 4 * n]])
        return record(self.pipe, rows, FIXED.values(), drawing=self.drawing, tokens=16).in_memory()

    @cached_property
    def quiet_inside(self) -> Activations:
        """The same of prompts that set the gates there, and all tokens: a gate sees them all."""
        q = self.budget.quiet // 2
        rows = [*self.quiet[:q], *self.quiet[-q:]]
        return record(self.pipe, rows, FIXED.values(), drawing=self.drawing).in_memory()


class Fold:
    """What is learnt with one domain held out; each part when it is first wanted. The encoders see the source alone."""

    def __init__(self, world: World, target: str):
        self.world, self.target = world, target
        self.sources = [risk for risk in RISKS if risk != target]

    @cached_property
    def saes(self) -> dict[Site, SparseAutoencoder]:
        b = self.world.budget
        options = SAEOptions(expansion=b.expansion, k=b.k, steps=b.steps)
        pooled = SAEOptions(expansion=8, k=16, steps=b.steps)
        acts = self.world.inputs.of(self.source_pairs + self.stand_ins + self.world.benign)
        return train(acts.at(TXT), options=options) | train(acts.at(POOLED), options=pooled)

    @property
    def source_pairs(self) -> list[Row]:
        return joined(self.world.source[risk] for risk in self.sources)

    @property
    def stand_ins(self) -> list[Row]:
        return joined(self.world.stand_ins[risk] for risk in self.sources)

    def learnt_from(self, adapted: bool, *, stand_ins: bool = False) -> Activations:
        """Pairs of the source, few of the target if it is adapted to, and benign prompts."""
        pairs = self.stand_ins if stand_ins else self.source_pairs + self.stand_ins
        target = self.world.few[self.target] if adapted else []
        return self.world.inputs.of(pairs + target + self.world.benign)

    def features(self, adapted: bool, sites: Sequence[Site] = (TXT,)) -> dict[Site, Features]:
        b, saes = self.world.budget, {site: self.saes[site] for site in sites}
        found = weigh(saes, self.learnt_from(adapted), weighing=Weighing())
        return calibrated(found, saes, self.world.inputs.of(self.world.quiet), epsilon=b.epsilon, delta=b.delta)

    def counterparts(self, adapted: bool, features: dict[Site, Features]) -> dict[Site, Counterparts]:
        pairs, quiet = self.learnt_from(adapted, stand_ins=True), self.world.inputs.of(self.world.quiet)
        return fit_counterparts(self.saes, pairs, features, quiet=quiet, within=self.world.budget.within)

    def contrast(self, adapted: bool, features: dict[Site, Features]) -> dict[Site, SparseAutoencoder]:
        saes = {site: self.saes[site] for site in features}
        return fit_contrast(saes, self.learnt_from(adapted, stand_ins=True), features)

    def reconstruction(self, features: dict[Site, Features]) -> dict[Site, SparseAutoencoder]:
        """The decoders refitted to the target's activations."""
        target, acts = self.world.few[self.target], self.world.inputs
        saes = {site: self.saes[site] for site in features}
        sites = [acts.of(rows) for rows in (target, self.source_pairs + self.world.benign)]
        return {
            site: adapt({site: sae}, sites[0].at(site), features, replay=sites[1].at(site))[site]
            for site, sae in saes.items()
        }

    def prototypes(self, features: dict[Site, Features]) -> dict[Site, Features]:
        """The same features with the safe prototypes that Blend needs."""
        found = find_features(
            {site: self.saes[site] for site in features},
            self.learnt_from(True, stand_ins=True),
            fdr=1.0,
            min_ratio=0.5,
            min_support=0.0,
        )
        from safedig.features import Prototypes

        banks = {}
        for site, one in features.items():
            known = found[site].prototypes
            assert known is not None
            z = known.others(self.saes[site].d_sae).index_copy(1, found[site].index, known.harmful)
            banks[site] = replace(one, prototypes=Prototypes.of(z, one.index))
        return banks
