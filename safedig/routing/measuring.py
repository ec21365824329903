"""Every criterion at every site of a recording, with what it would have been had other prompts been drawn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..config import UsageError
from ..sites import Site
from . import power, probes, scores
from .causal import Effects
from .contrast import Contrast
from .judged import Judged
from .linear import across_halves
from .probes import PairedRows
from .statistics import SiteStatistics, Statistics

TEXT, IMAGE = ("txt",), ("img", "joint")
STRENGTH = 2.0
"""That edits are commonly used with: what a site carries of the velocity, an edit multiplies by this."""
_FOLDS, _PARTS = 5, 3


@dataclass(frozen=True, eq=False)
class Measured:
    """One site. `terms` hold a number a draw: of all prompts first, then of the bootstrap's."""

    site: Site
    terms: dict[str, Float[Tensor, " draw"]]
    by_sigma: dict[str, list[float]]
    """What changes over σ, of all prompts: at "sigma" the criteria of the recording, at "tried" the causal ones."""
    delta: Float[Tensor, "step pair r"]
    apart: Float[Tensor, "step toss"]
    """How far harm and safety are apart, for the labels as they are and as they were tossed (power.py)."""


@dataclass(frozen=True, eq=False)
class _Plan:
    """How prompts are set against each other, parted and drawn anew: the same at all sites."""

    pairs: Contrast
    fold: Int[Tensor, " pair"]
    part: Int[Tensor, " pair"]
    """Fewer and larger folds, for what takes a solve a column."""
    weights: Float[Tensor, "draw pair"]
    signs: Float[Tensor, "source_pair toss"]

    @classmethod
    def of(cls, pairs: Contrast, draws: int, seed: int) -> "_Plan":
        folds = (pairs.folds(count, seed) for count in (_FOLDS, _PARTS))
        return cls(pairs, *folds, weights=pairs.resamples(draws, seed), signs=power.tosses(pairs, seed))


def measure(
    statistics: Statistics, sites: Sequence[Site], pairs: Contrast, effects: Effects | None, draws: int, seed: int
) -> list[Measured]:
    """The sites in their order. Prompts are drawn anew for all sites alike, so that ranks can be compared by draw."""
    plan = _Plan.of(pairs, draws, seed)
    largest = max(statistics.d_in.get(site, 0) * statistics.tokens.get(site, 0) for site in statistics.sites)
    measured, varies = [], False
    for site in sites:
        here = statistics.at(site)
        rows = _paired(here, pairs)
        varies = varies or bool((rows.harmful.std(1) > 0).any() or (rows.delta != 0).any())
        found, apart = _by_step(here, rows, plan)
        found |= _bound(statistics, here, rows, plan)
        terms = {name: per_step.mean(1) for name, per_step in found.items()}
        position = statistics.sites.index(site)
        terms |= {
            "stability": scores.stability(rows, pairs, plan.weights),
            "distance": _constant(scores.distance(position, len(statistics.sites)), draws),
            "cost": _constant(scores.cost(here.d_in, here.tokens, largest), draws),
        }
        if (told := across_halves(here.moments, pairs.source)) is not None:
            terms["linearity"] = _constant(told, draws)
        by_sigma = {"sigma": here.sigmas} | {name: per_step[0].tolist() for name, per_step in found.items()}
        if effects is not None:
            tried, over_sigma = _tried(effects, site, draws, seed)
            terms, by_sigma = terms | tried, by_sigma | over_sigma
        measured.append(Measured(site, terms, by_sigma, rows.delta, apart))
    if not varies:
        raise UsageError(
            f"All {len(pairs.domain)} pairs have the same activations at every site: the recording is of one image, or "
            "of a model that does not depend on the prompt; record again."
        )
    return measured


def _paired(here: SiteStatistics, pairs: Contrast) -> PairedRows:
    return PairedRows(here.rows[:, pairs.harmful], here.rows[:, pairs.safe])


def _by_step(
    here: SiteStatistics, rows: PairedRows, plan: _Plan
) -> tuple[dict[str, Float[Tensor, "draw step"]], Float[Tensor, "step toss"]]:
    """The criteria that differ by σ; variances and distances are not drawn anew, fewer prompts would bias them."""
    pairs, weights, source = plan.pairs, plan.weights, ~plan.pairs.is_target
    read, apart = probes.cross_validated(rows.of(source), plan.fold[source], plan.signs)
    shift = scores.shift(rows, pairs)
    found = {
        "source_auroc": probes.auroc(read, weights[:, source]),
        "transfer": probes.transfer_auroc(rows, pairs, weights),
        "agreement": scores.agreement(rows, pairs, weights),
        "share": scores.share(rows, here.within, pairs).expand(len(weights), -1),
        "shift": None if shift is None else shift.expand(len(weights), -1),
    }
    return {name: value for name, value in found.items() if value is not None}, power.statistic(apart)


def _bound(
    statistics: Statistics, here: SiteStatistics, rows: PairedRows, plan: _Plan
) -> dict[str, Float[Tensor, "draw step"]]:
    """With the nearest text site before an image site, and with the nearest image site after any other."""
    is_image = here.site.stream in IMAGE
    position = statistics.sites.index(here.site)
    before, after = statistics.sites[:position][::-1], statistics.sites[position + 1 :]
    wanted = (site for site in (before if is_image else after) if site.stream in (TEXT if is_image else IMAGE))
    partner = next(wanted, None)
    if partner is None:
        return {}
    there = statistics.at(partner)
    if there.steps != here.steps:  # a text encoder runs once, before the first step
        return {}
    other = _paired(there, plan.pairs)
    text, image = (other, rows) if is_image else (rows, other)
    return {"binding": scores.binding(text, image, plan.part, plan.weights)}


def _tried(
    effects: Effects, site: Site, draws: int, seed: int
) -> tuple[dict[str, Float[Tensor, " draw"]], dict[str, list[float]]]:
    """The causal effects, their prompts drawn anew; the benign prompts by themselves."""
    at = effects.sites.index(site)
    terms, by_sigma = {}, {"tried": list(effects.sigmas)}
    tables = {
        "interchange": (effects.interchange, effects.prompt_ids),
        "removal": (effects.removal, effects.prompt_ids),
        "harm": (effects.harm, effects.benign_ids),
    }
    for name, (table, ids) in tables.items():
        if not ids:
            continue
        order = sorted(range(len(ids)), key=lambda index: ids[index])
        of = table[at][:, order].double()
        generator = torch.Generator().manual_seed(seed)
        picked = torch.randint(len(ids), (draws, len(ids)), generator=generator)
        terms[name] = torch.cat([of.mean()[None], of.mean(0)[picked].mean(1)])
        by_sigma[name] = of.mean(1).tolist()
    terms["reach"] = (STRENGTH * terms["interchange"]).clamp(0, 1)
    return terms, by_sigma


def with_judged(measured: Sequence[Measured], found: Mapping[Site, Judged], draws: int, seed: int) -> list[Measured]:
    """The same sites with what whole images have shown, and what it might be with other prompts."""

    def terms(one: Judged) -> dict[str, Float[Tensor, " draw"]]:
        generator = torch.Generator().manual_seed(seed)
        freed, lost = (_share(came, draws, generator) for came in (one.freed, one.lost))
        net = torch.cat([_constant(one.value, 0), (freed - lost)[1:]])
        return {"judged": net, "freed": freed, "lost": lost, "strength": _constant(one.strength, draws)}

    return [replace(one, terms=one.terms | terms(found[one.site])) if one.site in found else one for one in measured]


def _share(came: Bool[Tensor, " row"], draws: int, generator: torch.Generator) -> Float[Tensor, " draw"]:
    """k of n first, then draws of Beta(k + 1, n − k + 1): the k + 1st of n + 1 even numbers.

    Prompts that are drawn anew would leave no doubt where all of them agree.
    """
    k, n = int(came.sum()), len(came)
    even = torch.rand(draws, n + 1, generator=generator, dtype=torch.float64)
    return torch.cat([_constant(k / max(n, 1), 0), even.sort(1).values[:, k]])


def _constant(value: float, draws: int) -> Float[Tensor, " draw"]:
    return torch.full((1 + draws,), float(value), dtype=torch.float64)
