"""From what was measured to an order of the sites, to what can be said of each, and to a set that goes together."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ..sites import Site, Stage
from .measuring import Measured
from .power import LEVEL
from .scorers import MERITS
from .scores import redundancy

INERT = 0.025
"""Share of the way to the twins' velocity that an edit must be able to go, or the image does not depend on
the site."""
CONFIDENCE = 0.95
_REPEATED = 0.5  # what a site counts for beside another of its stage
_FAINT = 0.25  # of the first site's score: what adds less is left out of the set
_LARGEST = 6  # sites of a set
_LOOKED_AT = 2  # sites of which whole images are judged, beside the vectors
VECTORS = ("pooled", "temb")  # streams
_HALF = 0.5  # of the best σ: the window ends where less is left
VERDICTS = ("ok", "not_separable", "inert")


def interval(draws: Float[Tensor, " draw"]) -> tuple[float, float]:
    """Of 95 %, by the percentiles of the bootstrap; it holds the value itself."""
    tail = (1 - CONFIDENCE) / 2
    lo, hi = draws[1:].quantile(torch.tensor([tail, 1 - tail], dtype=draws.dtype)).tolist()
    return min(lo, draws[0].item()), max(hi, draws[0].item())


def verdict(one: Measured, p: float) -> str:
    """Separability is asked first: where harm is not told from safety, nothing can be removed, live or not."""
    if p > LEVEL:
        return "not_separable"
    if "reach" in one.terms and interval(one.terms["reach"])[1] < INERT:
        return "inert"
    return "ok"


def order(scores: Float[Tensor, "site draw"], verdicts: Sequence[str]) -> list[int]:
    """Best first; what is not ok comes after all that is, and a dead place last. Equal ones stay as they run."""
    point = scores[:, 0].tolist()
    return sorted(range(len(point)), key=lambda at: (VERDICTS.index(verdicts[at]), -round(point[at], 6), at))


def shortlist(sites: Sequence[Site], ranked: Sequence[int], verdicts: Sequence[str]) -> list[int]:
    """What is worth drawing whole images for: the best sites, and vectors that stand for the whole prompt.

    A vector acts on every block a little, which the velocity of one step does not show.
    """
    usable = [at for at in ranked if verdicts[at] == "ok"]
    vectors = [at for at in usable if sites[at].stream in VECTORS]
    return [at for at in usable if at not in vectors][:_LOOKED_AT] + vectors


def steadiness(scores: Float[Tensor, "site draw"]) -> float:
    """Mean Spearman correlation between the ranks of a bootstrap's draw and those of all prompts; 1 for one site."""
    if len(scores) < 2:
        return 1.0
    ranks = scores.round(decimals=6).argsort(dim=0, stable=True).argsort(dim=0).double()
    ranks = ranks - ranks.mean(0)
    spread = ranks.square().sum(0)
    return (ranks[:, :1] * ranks[:, 1:]).sum(0).div(spread[0]).mean().item()


def window(one: Measured) -> tuple[float, float]:
    """σ about the best one where at least half is left of separability (transferred, if known) × causal effect.

    The window reaches to 1 or 0 where it holds the first or the last recorded σ.
    """
    sigmas = one.by_sigma["sigma"]
    merit = MERITS["transfer"](torch.tensor(one.by_sigma.get("transfer", one.by_sigma["source_auroc"])))
    if "interchange" in one.by_sigma:
        apart = (torch.tensor(sigmas)[:, None] - torch.tensor(one.by_sigma["tried"])).abs()
        effect = torch.tensor(one.by_sigma["interchange"])[apart.argmin(1)]
        merit = merit * effect.clamp(0, 1)
    enough = (merit >= _HALF * merit.max()).tolist()
    first = last = int(merit.argmax())
    while first > 0 and enough[first - 1]:
        first -= 1
    while last + 1 < len(sigmas) and enough[last + 1]:
        last += 1
    return 0.0 if last + 1 == len(sigmas) else sigmas[last], 1.0 if first == 0 else sigmas[first]


def complementary(
    measured: Sequence[Measured], stages: Sequence[Stage], score: Sequence[float], candidates: Sequence[int]
) -> list[int]:
    """Of the candidates, best first, those that add to each other.

    Greedy: score × (1 − the most that a chosen site tells the same prompts apart), halved where its stage (text, bind,
    render) has one already.
    """
    chosen: list[int] = []
    alike = redundancy([measured[at].delta for at in candidates]) if candidates else torch.zeros(0, 0)
    place = {at: index for index, at in enumerate(candidates)}

    def gain(at: int) -> float:
        same = max((alike[place[at], place[other]].item() for other in chosen), default=0.0)
        repeated = stages[at] in {stages[other] for other in chosen}
        return score[at] * (1 - same) * (_REPEATED if repeated else 1.0)

    while len(chosen) < min(_LARGEST, len(candidates)):
        gains = {at: round(gain(at), 6) for at in candidates if at not in chosen}
        best = max(gains, key=lambda at: gains[at])
        if chosen and gains[best] < _FAINT * score[chosen[0]]:
            break
        chosen.append(best)
    return chosen
