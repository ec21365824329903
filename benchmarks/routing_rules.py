"""What the router, the criteria alone and fixed rules say of the sites of every fold, before anything is trained."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from routing_compare import Ranked, changes, halves, prompt_interval, round4
from routing_folds import Budget, World
from torch import Tensor

from safedig.activations.record import record
from safedig.routing.causal import interchange
from safedig.routing.judged import ImageCheck
from safedig.routing.ranking import INERT
from safedig.routing.route import route
from safedig.routing.routed import Route
from safedig.routing.scorers import DEFAULT, MERITS, parts, scorer
from safedig.routing.statistics import collect
from safedig.sites import Site, places
from safedig.tiny import judge
from safedig.tiny.concepts import RISKS

Cell = dict[str, Any]
SIMPLER = ("paper", "source_auroc", "transfer", "causal", "middle block", "last block", "random")
"""Rules that the default is to beat."""
SPENT, JUDGED = 4096, 0.6  # rows of the causal check and the part for whole images: those of `safedig route`
DECODABLE = 0.8  # AUROC on the source from which on a probe calls a site good


@dataclass(frozen=True)
class Made:
    """The rankings of one fold."""

    route: Route
    strangers: Route | None = None
    """On the same prompts, recorded without their twins: each stands against the safe prompt of another one."""


def routes(world: World, budget: Budget) -> dict[str, Made]:
    """The ranking of each fold: its source's pairs against the target's few, and a causal check on all of them."""
    rows = world.prompts.routed_on()
    statistics = collect(record(world.pipe, rows, world.sites, paired=True, drawing=world.drawing))
    live = [place.site for place in places(world.pipe) if not place.dead and place.site in world.sites]
    alone = collect(record(world.pipe, [row | {"twin": ""} for row in rows], live, drawing=world.drawing))
    found = {}
    for target in budget.targets:
        source = [risk for risk in RISKS if risk != target]
        options: dict[str, Any] = {"drawing": world.drawing, "budget": int((1 - JUDGED) * SPENT)}
        effects = interchange(world.pipe, statistics.prompts, world.sites, source=source, **options)
        image_check = ImageCheck(judge_of, drawing=world.drawing, budget=SPENT - effects.forwards)
        found[target] = Made(
            route(world.pipe, statistics, source, [target], effects=effects, image_check=image_check, seed=budget.seed),
            route(None, alone, source, [target], seed=budget.seed),
        )
    return found


def ranked(cells: Sequence[Cell], made: Made, goal: str) -> Ranked:
    """One fold as the comparison takes it; the cells are in the order of the computation."""
    sites = [Site.parse(cell["site"]) for cell in cells]
    routed = [made.route[site] for site in sites]
    scores = {"default": np.array([-float(one.rank) for one in routed])}
    if made.strangers is not None:
        ranks = {one.site: one.rank for one in made.strangers.sites}
        scores["without twins"] = np.array([-float(ranks.get(site, len(sites))) for site in sites])
    return Ranked(
        model=cells[0]["model"],
        target=cells[0]["target"],
        sites=tuple(cell["site"] for cell in cells),
        gain=np.array([cell["outcomes"][goal]["gain"] for cell in cells]),
        halves=np.array([halves(changed(cell, goal)) for cell in cells]).T,
        live=np.array([one.terms["reach"] >= INERT for one in routed]),
        scores=scores
        | {rule: by_criteria(rule, [one.terms for one in routed]) for rule in ("paper", "source_auroc", "transfer")}
        | {"causal": by_criteria("causal", [one.terms for one in routed])}
        | by_place(sites)
        | ablated([one.terms for one in routed]),
    )


def judge_of(images: Tensor, rows: list[dict[str, Any]]) -> list[str]:
    return [one["label"] for one in judge(images, asked=rows)]


def by_criteria(name: str, terms: Sequence[Mapping[str, float]]) -> np.ndarray:
    """The scores that a scorer gives, as it stands: no verdict has a say."""
    rule = scorer(name)
    return np.array([rule({key: torch.tensor(value) for key, value in one.items()}).item() for one in terms])


def by_place(sites: Sequence[Site]) -> dict[str, np.ndarray]:
    """Rules that know nothing but where a site is: the nearer to the middle, or to the end, the better; or a lot.

    Of two streams of one block the image's is preferred. All that comes before the blocks is furthest from both.
    """
    blocks = list(dict.fromkeys((site.family, site.index) for site in sites if site.family))
    place = np.array([blocks.index((site.family, site.index)) if site.family else -1.0 for site in sites])
    image = np.array([0.25 if site.stream == "img" and site.family else 0.0 for site in sites])
    middle = (len(blocks) - 1) // 2
    near = np.where(place < 0, -float(len(blocks)), -np.abs(place - middle))
    return {"middle block": near + image, "last block": place + image, "random": np.zeros(len(sites))}


def ablated(terms: Sequence[Mapping[str, float]]) -> dict[str, np.ndarray]:
    """The default score as it stands, without each of its terms, and with each criterion that it leaves out.

    Without `judged`, linearity and reach stand for it at every site.
    """

    def without(name: str) -> np.ndarray:
        if name == "judged":
            return by_criteria("default", [{key: one[key] for key in one if key != name} for one in terms])
        kept = ["*".join(part for part in parts(one) if part != name) for one in terms]
        return np.concatenate([by_criteria(rule, [one]) for rule, one in zip(kept, terms, strict=True)])

    used = [name for name in (*DEFAULT, "judged") if any(name in parts(one) for one in terms)]
    found = {"score alone": by_criteria("default", terms)} | {f"without {name}": without(name) for name in used}
    known = [name for name in MERITS if name not in used and all(name in one for one in terms)]
    more = {name: ["*".join([*parts(one), name]) for one in terms] for name in known}
    return found | {
        f"with {name}": np.concatenate([by_criteria(rule, [one]) for rule, one in zip(rules, terms, strict=True)])
        for name, rules in more.items()
    }


def changed(cell: Cell, goal: str) -> list[int]:
    return changes(cell["before"]["harmful"], cell["outcomes"][goal]["after"]["harmful"], goal)


def described(cells: Sequence[Cell], made: Made, goal: str) -> dict[str, Any]:
    """What is written down of a fold: every site with what was foretold and what was reached, and each first choice."""
    fold, sites = ranked(cells, made, goal), {}
    for cell in cells:
        routed, outcome = made.route[Site.parse(cell["site"])], cell["outcomes"][goal]
        lo, hi = prompt_interval(changed(cell, goal))
        reached = {"gain": round4(outcome["gain"]), "lo": lo, "hi": hi, "benign_loss": round4(outcome["loss"])}
        setting = {name: outcome[name] for name in ("quantile", "strength")} | cell["learnt"]
        ranking = {"rank": routed.rank, "score": routed.score, "verdict": routed.verdict, "terms": routed.terms}
        sites[cell["site"]] = reached | setting | ranking
    first = {
        rule: [fold.sites[at] for at in np.flatnonzero(fold.scores[rule] == fold.scores[rule].max())]
        for rule in ("default", *SIMPLER)
        if rule != "random"
    }
    return {
        "model": fold.model,
        "target": fold.target,
        "unsafe_unsteered": round4(cells[0]["before"]["harmful"].count("U") / len(cells[0]["before"]["harmful"])),
        "best": fold.sites[int(np.argmax(fold.gain))],
        "first_choice": {
            rule: {"sites": names, "gain": round4(np.mean([sites[name]["gain"] for name in names]))}
            for rule, names in first.items()
        },
        "decodable_but_inert": dead_ends(sites),
        "sites": sites,
    }


def dead_ends(sites: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Sites that a probe calls good and the image does not depend on, and whether the router has put them last."""
    found = {
        name: {"source_auroc": site["terms"]["source_auroc"], "rank": site["rank"], "gain": site["gain"]}
        for name, site in sites.items()
        if site["verdict"] == "inert" and site["terms"]["source_auroc"] >= DECODABLE
    }
    return {"sites": found, "all_in_bottom_half": all(one["rank"] > len(sites) / 2 for one in found.values())}
