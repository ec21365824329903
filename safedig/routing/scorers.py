"""From the criteria of a site to one number: the default, the published four-term score, and every single rule.

A scorer is a name of `SCORERS`, a criterion's name, or several joined by `*`: their geometric mean. What is left out
of the default to see what it is worth is left out of the name.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..config import UsageError, did_you_mean

Terms = Mapping[str, Float[Tensor, "*draw"]]
Scorer = Callable[[Terms], Float[Tensor, "*draw"]]

DEFAULT = ("transfer", "linearity", "reach", "distance")
JUDGED = ("transfer", "judged", "distance")
"""Where whole images were judged: that shows linearity and reach at once."""
PAPER = {"semantic": 0.25, "binding": 0.35, "stability": 0.25, "cost": -0.15}
"""α, ρ, η and −ξ of SafeDIG (arXiv 2605.30049), as transcribed."""

MERITS: dict[str, Callable[[Tensor], Tensor]] = {
    "source_auroc": lambda auroc: (2 * auroc - 1).clamp(0, 1),
    "transfer": lambda auroc: (2 * auroc - 1).clamp(0, 1),
    "agreement": lambda cosine: cosine.clamp(0, 1),
    "share": lambda share: share.clamp(0, 1),
    "linearity": lambda r2: r2.clamp(0, 1),
    "stability": lambda stability: stability.clamp(0, 1),
    "binding": lambda r2: r2.clamp(0, 1),
    "shift": lambda distance: 1 / (1 + distance),
    "distance": lambda left: left,
    "cost": lambda cost: 1 - cost,
    "interchange": lambda effect: effect.clamp(0, 1),
    "reach": lambda reach: reach.clamp(0, 1),
    "removal": lambda effect: effect.clamp(0, 1),
    "harm": lambda harm: 1 / (1 + harm),
    "judged": lambda net: net.clamp(0, 1),
}
"""What each criterion is worth, from 0 to 1."""


def scorer(name: str) -> Scorer:
    """The rule by its name; an unknown one is a `UsageError`."""
    if name in SCORERS:
        return SCORERS[name]
    names = name.split("*")
    for one in names:
        if one not in MERITS:
            known = [*SCORERS, *MERITS]
            raise UsageError(f"There is no scorer '{one}'. {did_you_mean(one, known)} Criteria are joined by '*'.")
    return lambda terms: _together(names, terms)


def default(terms: Terms) -> Float[Tensor, "*draw"]:
    """Transfer × linearity × reach × distance, as a geometric mean.

    What is read off on other domains too, can be told from the token and so be taken out, moves the image, and has all
    the later blocks to work through. Late image sites carry everything, and hardly anything of it can be taken out
    there. At the sites where whole images were judged, what was freed there less what was lost stands for linearity and
    reach. What was not measured is left out; without a second domain the separability stands for the transfer.
    """
    return _together(parts(terms), terms)


def parts(terms: Mapping[str, Any]) -> list[str]:
    """The criteria that the default takes of a site of which these are known."""
    there = [name for name in (JUDGED if "judged" in terms else DEFAULT) if name in terms]
    return there if "transfer" in there else ["source_auroc", *there]


def paper(terms: Terms) -> Float[Tensor, "*draw"]:
    """R = .25·S_sem + .35·S_bind + .25·S_stab − .15·C, higher is better; not confined to 0…1.

    How the paper brings Δ and its embeddings to one width is unknown. Our reading, on activations alone: S_sem, whether
    Δ is about the risk, is the separability 2·AUROC − 1 on the source; S_bind is the R² of the image's Δ explained by
    the text's; S_stab is `stability`, C is `cost`. A term that could not be measured counts as 0.
    """
    measured = {
        "semantic": MERITS["source_auroc"](terms["source_auroc"]),
        "stability": terms["stability"],
        "cost": terms["cost"],
        "binding": terms.get("binding", torch.zeros_like(terms["cost"])),
    }
    return torch.stack([weight * measured[name] for name, weight in PAPER.items()]).sum(0)


def causal(terms: Terms) -> Float[Tensor, "*draw"]:
    """The interchange effect alone."""
    return _together(["interchange"], terms)


def _together(names: list[str], terms: Terms) -> Float[Tensor, "*draw"]:
    """Geometric mean of merits: one that is nothing makes all of it nothing."""
    for name in names:
        if name not in terms:
            raise UsageError(
                f"'{name}' was not measured: interchange, reach, removal and harm need the pipeline (a causal check), "
                "judged a judge of images, transfer, agreement and shift a second domain, linearity twins, binding a "
                "text and an image site."
            )
    merits = torch.stack([MERITS[name](terms[name]) for name in names])
    return merits.prod(0) ** (1 / len(names))


SCORERS: dict[str, Scorer] = {"default": default, "paper": paper, "causal": causal}
