"""What steering at one site is learnt from and measured on: prompts of every domain, drawn and recorded once a model.

A fold holds one domain out as the target; the others are the source. Which rows a fold may look at is decided here.
"""

import json
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import sha256
from typing import Any

from safedig.activations.record import Activations, Tokens, record
from safedig.pipelines import Drawing, draw, fingerprint, load_pipeline
from safedig.prompts import as_rows
from safedig.sites import Site, places
from safedig.tiny import judge, prompts, with_stand_in
from safedig.tiny.concepts import RISKS
from safedig.tiny.judge_network import TENSORS, WEIGHTS
from safedig.tiny.stand_ins import STAND_IN

Row = dict[str, Any]
INPUTS = ("txt.embed", "img.embed", "pooled.embed", "temb.out")
WHICH = ("models", "targets", "sites")  # say which cells are measured, not how
LETTERS = {"unsafe": "U", "unrecognised": "R", "empty": "E", "clean": "C"}


@dataclass(frozen=True)
class Budget:
    """How much is spent on a cell; the same for every site, so that sites can be compared."""

    models: tuple[str, ...] = ("tiny-flux", "tiny-sd3")
    targets: tuple[str, ...] = RISKS
    """Domains held out, one after the other."""
    sites: tuple[str, ...] = ()
    """Those of the candidates that are measured; all of them unless given."""
    pairs: int = 32
    """Harmful prompts of each domain with safe twins of all kinds: the SAE and the features learn from them."""
    stand_ins: int = 48
    """Pairs of each domain, the target among them, that the contrast decoder is fitted to."""
    benign: int = 96
    """Prompts of each use: to learn from, to set the gate, to set the strength, to report on."""
    tried: int = 8
    """Harmful prompts of each source domain that the strength is chosen on."""
    asked: int = 96
    """Harmful prompts of the target that are reported."""
    tokens: int = 16
    """Kept of an image in a step, of those that are learnt from; the gate sees all."""
    steps: int = 300
    expansion: int = 8
    k: int = 16
    min_ratio: float = 0.55
    """Of a harmful feature; lower than usual, for sites where hardly any feature fires on harm alone."""
    quantiles: tuple[float, ...] = (0.97, 0.9)
    """Shares of benign images on which the gate stays closed."""
    strengths: tuple[float, ...] = (1.0, 2.0, 4.0)
    loss: float = 0.03
    """Benign prompts that may be lost while the strength is chosen, as a share of all."""
    goals: tuple[str, ...] = ("unsafe", "clean")
    """What the strength is chosen for, each by itself: the fewest unsafe pictures, or the most clean ones."""
    seed: int = 0

    @property
    def sha(self) -> str:
        """What stands for all that decides what a cell says; which cells are run is not part of it."""
        facts = {name: value for name, value in asdict(self).items() if name not in WHICH}
        return sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


QUICK = Budget(
    targets=RISKS[:1],
    sites=(*INPUTS[::2], "temb.out", "transformer_blocks.1.img.resid_post", "transformer_blocks.2.txt.resid_post"),
    pairs=16,
    stand_ins=16,
    benign=32,
    tried=6,
    asked=24,
    steps=150,
    strengths=(2.0,),
)


def candidates(pipe: Any) -> list[Site]:
    """Where one may steer: the inputs of the blocks and what every block leaves in each stream, dead or alive."""
    wanted = [place.site for place in places(pipe) if not place.port.read_only]
    ends = [site for site in wanted if site.point == "resid_post" and site.component == "transformer"]
    return [site for site in wanted if str(site) in INPUTS] + ends


class Prompts:
    """All prompts of a budget; `pairs`, `stand_ins`, `tried` and `asked` by domain, `benign` by use."""

    def __init__(self, budget: Budget):
        n, seed = budget.benign, budget.seed
        self.pairs = {risk: _rows("harmful", "train", seed, budget.pairs, risk=risk) for risk in RISKS}
        self.stand_ins = {risk: stand_ins(risk, budget.stand_ins, seed) for risk in RISKS}
        self.tried = {risk: _rows("harmful", "calibrate", seed, budget.tried, risk=risk, twins=False) for risk in RISKS}
        self.asked = {
            risk: _rows("harmful", "report", seed, budget.asked, risk=risk, twins=False) for risk in budget.targets
        }
        calm = plain("calibrate", seed, 2 * n)
        self.benign = {
            "learn": plain("train", seed, n),
            "gate": calm[::2],
            "strength": calm[1::2],
            "report": plain("report", seed, n),
        }

    def learnt_from(self) -> list[Row]:
        return joined([*self.pairs.values(), *self.stand_ins.values(), self.benign["learn"]])

    def routed_on(self) -> list[Row]:
        """What the router may see, pictures of it too: the pairs that the SAEs learn from, of the target as well."""
        return joined([*self.pairs.values(), self.benign["learn"]])

    def looked_at(self) -> list[Row]:
        uses = ("gate", "strength", "report")
        return joined([*self.tried.values(), *self.asked.values(), *(self.benign[use] for use in uses)])


@dataclass(frozen=True)
class Fold:
    """One domain held out: the rows of the recordings that each step of learning may see, and those it is judged by."""

    target: str
    features: list[Row]
    """Source pairs and benign prompts: for the SAE and the harmful features."""
    contrast: list[Row]
    """Source and target pairs with the stand-in, and benign prompts."""
    gate: list[Row]
    tried: dict[str, list[Row]]
    """Harmful and benign prompts of the split `calibrate`."""
    asked: dict[str, list[Row]]
    """Harmful and benign prompts of the split `report`."""

    @classmethod
    def of(cls, given: Prompts, target: str) -> "Fold":
        source = [risk for risk in RISKS if risk != target]
        return cls(
            target,
            joined([*(given.pairs[risk] for risk in source), given.benign["learn"]]),
            joined([*given.stand_ins.values(), given.benign["learn"]]),
            given.benign["gate"],
            {"harmful": joined(given.tried[risk] for risk in source), "benign": given.benign["strength"]},
            {"harmful": given.asked[target], "benign": given.benign["report"]},
        )


class World:
    """One model; what passes its sites is recorded when first wanted, in one pass for all folds."""

    def __init__(self, model: str, budget: Budget):
        self.model, self.budget, self.prompts = model, budget, Prompts(budget)
        self.pipe = load_pipeline(model)
        self.drawing = Drawing.of(self.pipe)
        self.fingerprint = fingerprint(self.pipe)
        there = candidates(self.pipe)
        self.sites = [site for site in there if not budget.sites or str(site) in budget.sites]

    @cached_property
    def learnt_from(self) -> Activations:
        return self._recorded(self.prompts.learnt_from(), self.budget.tokens)

    @cached_property
    def looked_at(self) -> Activations:
        return self._recorded(self.prompts.looked_at(), "all")

    @cached_property
    def unsteered(self) -> dict[str, str]:
        return self.labels(self.prompts.looked_at())

    def key(self, target: str, site: Site) -> dict[str, str]:
        """What tells a cell from all others: another model, judge or budget makes another cell."""
        return {
            "model": self.model,
            "fingerprint": self.fingerprint,
            "judge": sha256((WEIGHTS / TENSORS).read_bytes()).hexdigest()[:16],
            "options": self.budget.sha,
            "target": target,
            "site": str(site),
        }

    def labels(self, rows: list[Row], steering: Any = None) -> dict[str, str]:
        """What the judge calls the picture of each prompt, a letter by its id."""
        found = {}
        with steering.apply(self.pipe) if steering is not None else nullcontext():
            for asked, images in draw(self.pipe, rows, drawing=self.drawing):
                seen = judge(images, asked=asked)
                found |= {row["id"]: LETTERS[one["label"]] for row, one in zip(asked, seen, strict=True)}
        return found

    def _recorded(self, rows: list[Row], tokens: Tokens) -> Activations:
        return record(self.pipe, rows, self.sites, tokens=tokens, drawing=self.drawing).in_memory()


def plain(split: str, seed: int, n: int) -> list[Row]:
    """Benign prompts, every other one of them worded like a hazard."""
    benign, near = _rows("benign", split, seed, -(-n // 2)), _rows("near-miss", split, seed, n // 2)
    return [row for two in zip(benign, near, strict=False) for row in two] + benign[len(near) :]


def stand_ins(risk: str, n: int, seed: int) -> list[Row]:
    """`n` harmful prompts of a domain, each before a safe twin that shows the stand-in in the hazard's place."""
    rows = as_rows(with_stand_in(n, seed=seed, risk=risk))
    if len(rows) < 2 * n:
        raise ValueError(
            f"Only {len(rows) // 2} prompts of '{risk}' have a twin that shows a {STAND_IN}: fewer, please."
        )
    return rows


def joined(parts: Iterable[list[Row]]) -> list[Row]:
    return [row for part in parts for row in part]


def _rows(kind: str, split: str, seed: int, n: int, **wishes: Any) -> list[Row]:
    return as_rows(prompts(kind, split, seed, n, **wishes))
