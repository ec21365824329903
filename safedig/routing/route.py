"""Rank the sites of a recording by how well steering there will hold when the risk shifts."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..activations.record import Activations
from ..config import UsageError
from ..progress import say
from ..sites import Site, Stage, sites, stage
from . import power
from .causal import Effects, interchange
from .contrast import Contrast, Domains, concerned, contrast
from .judged import STRENGTHS, ImageCheck, Judgements, Maps, judged
from .linear import Map, halves
from .measuring import Measured, measure, with_judged
from .ranking import complementary, interval, order, shortlist, steadiness, verdict, window
from .routed import Route, RoutedSite
from .scorers import scorer as scorer_of
from .statistics import Statistics, collect

__all__ = ["Route", "RoutedSite", "route"]

OPERATOR = "repel"
_DIGITS = 6
_FEWEST_DRAWS = 20


def route(
    pipe: Any,
    activations: Activations | Statistics,
    source: Domains,
    target: Domains | None = None,
    *,
    effects: Effects | None = None,
    image_check: ImageCheck | None = None,
    scorer: str = "default",
    bootstrap: int = 200,
    seed: int = 0,
) -> Route:
    """Rank the recorded sites by how well steering there, learnt on the source, will hold on the target.

    `source` and `target` are names of risk domains or their prompts; without a target the source's domains are left
    out one at a time. Statistics that were collected before serve any number of rankings. The causal check is made on
    the recorded prompts unless its `effects` are given; with neither a pipeline nor effects it is left out. With
    `image_check` whole images of the target are drawn at the few sites that come first so, and at those of pooled
    vectors. Sites that cannot be edited, or were not tried, are not ranked. `scorer` is a name of `scorers.SCORERS`, or
    criteria joined by `*`. Too few prompts, an absent domain, or activations that are all alike are a `UsageError`.
    """
    rule = scorer_of(scorer)
    if bootstrap < _FEWEST_DRAWS:
        raise UsageError(f"bootstrap={bootstrap}: expected at least {_FEWEST_DRAWS} draws to tell an interval from.")
    statistics = activations if isinstance(activations, Statistics) else collect(activations)
    pairs = contrast(statistics.prompts, source, target)
    candidates = _candidates(pipe, statistics, effects)
    if effects is None and pipe is not None:
        effects = interchange(pipe, statistics.prompts, candidates, source=pairs.source)
    measured = measure(statistics, candidates, pairs, effects, bootstrap, seed)
    p = power.family_wise([one.apart for one in measured])
    said = [verdict(one, chance) for one, chance in zip(measured, p, strict=True)]
    looked_at = None
    if image_check is not None:
        ranked = order(torch.stack([rule(one.terms) for one in measured]), said)
        maps = _maps(statistics, [measured[at].site for at in shortlist(candidates, ranked, said)], pairs)
        there = concerned(statistics.prompts, pairs.target or pairs.source)
        looked_at = judged(pipe, there, maps, image_check) if maps else None
        measured = with_judged(measured, looked_at.at if looked_at else {}, bootstrap, seed)
    scores = torch.stack([rule(one.terms) for one in measured])
    ranked = order(scores, said)
    stages: list[Stage] = [stage(site, pipe) for site in candidates]
    routed = tuple(
        _routed(measured[at], stages[at], scores[at], rank, said[at], p[at]) for rank, at in enumerate(ranked, start=1)
    )
    usable = [at for at in ranked if said[at] == "ok"]
    together = complementary(measured, stages, scores[:, 0].tolist(), usable)
    return Route(
        model=Path(str(getattr(pipe, "name_or_path", "") or "")).name,
        fingerprint=statistics.model,
        source=tuple(pairs.source),
        target=tuple(pairs.target),
        data=_data(statistics, pairs, measured),
        options=_options(pairs, measured, effects, scorer, bootstrap, seed)
        | {"judged": _looked_at(looked_at), "rank_stability": _round(steadiness(scores))},
        sites=routed,
        chosen=tuple(measured[at].site for at in together),
    )


def _candidates(pipe: Any, statistics: Statistics, effects: Effects | None) -> list[Site]:
    """The recorded sites that can be steered at, as far as the pipeline or the causal check tells."""
    fit = effects.sites if effects is not None else statistics.sites if pipe is None else sites(pipe, editable=True)
    found = [site for site in statistics.sites if site in fit]
    if not found:
        raise UsageError(
            f"None of the {len(statistics.sites)} recorded sites can be ranked: the causal check tried "
            f"{', '.join(map(str, fit[:4]))} …; record these."
        )
    if left := [str(site) for site in statistics.sites if site not in found]:
        say(f"{len(left)} of the recorded sites cannot be edited or were not tried, and are not ranked: {left[0]} …")
    return found


def _maps(statistics: Statistics, sites: list[Site], pairs: Contrast) -> dict[Site, Maps]:
    """How Δ is told from a token where whole images are judged; a site of which there is a sketch only is left out."""
    found: dict[Site, Maps] = {}
    for site in sites:
        if both := halves(statistics.at(site).moments, [*pairs.source, *pairs.target]):
            if len(both[0].x) == statistics.d_in[site]:
                found[site] = (Map.of(both[0]), Map.of(both[1]))
            else:
                say(
                    f"No images are judged at '{site}': it is {statistics.d_in[site]} wide, and there is only a sketch."
                )
    return found


def _looked_at(found: Judgements | None) -> str | dict[str, Any]:
    if found is None or not found.at:
        return "none: no image was judged"
    facts = {name: getattr(found, name) for name in ("pairs", "benign", "forwards")}
    return facts | {"strengths": list(STRENGTHS), "sites": [str(site) for site in found.at]}


def _routed(one: Measured, at: Stage, score: torch.Tensor, rank: int, said: str, p: float) -> RoutedSite:
    lo, hi = interval(score)
    low, high = window(one)
    return RoutedSite(
        site=one.site,
        stage=at,
        operator=OPERATOR,
        sigmas=(_round(low), _round(high)),
        score=_round(score[0].item()),
        lo=_round(lo),
        hi=_round(hi),
        rank=rank,
        verdict=said,  # type: ignore[arg-type]
        terms={name: _round(value[0].item()) for name, value in one.terms.items()} | {"p": _round(p)},
        by_sigma={name: [_round(value) for value in values] for name, values in one.by_sigma.items()},
    )


def _data(statistics: Statistics, pairs: Contrast, measured: Sequence[Measured]) -> dict[str, Any]:
    """What was ranked on; the identity is the hash of which images stood against which, at which σ."""
    names = [
        [statistics.prompts[one]["id"], statistics.prompts[other]["id"], statistics.prompts[one]["seed"], domain]
        for one, other, domain in zip(pairs.harmful.tolist(), pairs.safe.tolist(), pairs.domain, strict=True)
    ]
    sigmas = [_round(sigma) for _, sigma in sorted(statistics.sigmas.items())]
    facts = json.dumps([statistics.model, names, sigmas], ensure_ascii=False)
    return {
        "identity": hashlib.sha256(facts.encode()).hexdigest()[:16],
        "pairs": {name: int(pairs.of(name).sum()) for name in sorted(set(pairs.domain))},
        "prompts": len(pairs.cluster.unique()),
        "sites": len(measured),
        "sigmas": sigmas,
        "width": statistics.width,
    }


def _options(
    pairs: Contrast, measured: Sequence[Measured], effects: Effects | None, scorer: str, bootstrap: int, seed: int
) -> dict[str, Any]:
    """How it was ranked, and what could not be had."""
    held_out = "the target" if pairs.target else "each source domain in turn"
    alone = "there is one domain only" if len(set(pairs.domain)) == 1 else "the domains share all of their safe prompts"
    return {
        "scorer": scorer,
        "bootstrap": bootstrap,
        "seed": seed,
        "contrast": "safe twins" if pairs.twins else "class means: no harmful prompt was recorded with its safe twin",
        "held_out": held_out if "transfer" in measured[0].terms else f"nothing: {alone}",
        "level": power.LEVEL,
        "tosses": power.TOSSES,
        "power": "enough" if power.enough(pairs) else "low: so few prompts cannot be told from chance, record more",
        "causal": "none: nothing was tried on the model"
        if effects is None
        else {
            "pairs": len(effects.prompt_ids),
            "benign": len(effects.benign_ids),
            "sigmas": [_round(sigma) for sigma in effects.sigmas],
            "forwards": effects.forwards,
        },
    }


def _round(value: float) -> float:
    """Without a negative zero."""
    return round(float(value), _DIGITS) + 0.0
