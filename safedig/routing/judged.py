"""Whole images drawn with Δ taken out at one site, and what a judge says of them: harmful ones freed, benign ones lost.

Taken out is what a linear map tells of Δ from the token (linear.py), by a gentle and by a strong edit, with no gate:
what training would add is a better map and a gate; what it cannot add is a place at which the image listens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from ..activations.processes import Share
from ..activations.schedule import schedule
from ..activations.stream import Prompts
from ..hooks import Context, SiteFunction, attach
from ..pipelines import Drawing, draw, guided
from ..progress import say, track
from ..sites import Site
from .linear import Map, half
from .trial import Rows, chosen

STRENGTHS = (1.0, 4.0)
"""What is told of Δ is taken out once, or as many times as a strong edit would."""
FEWEST = 4  # prompts of each kind, or nothing is judged
LEAST_STEPS = 4
Judge = Callable[[Tensor, Rows], Sequence[str]]
"""Images [n, 3, height, width] and their rows → a label each: unsafe, unrecognised, empty or clean."""
Maps = tuple[Map, Map]
"""Of the one half of the prompts and of the other: a prompt is edited by the map that has not seen it."""


@dataclass(frozen=True)
class Judging:
    """Who judges, of how many images, and what that may cost."""

    judge: Judge
    drawing: Drawing | None = None
    pairs: int = 16
    """Harmful prompts."""
    benign: int = 16
    budget: int | None = None
    """Rows of the transformer; with it fewer prompts are tried."""
    batch_size: int = 16
    share: Share = field(default_factory=lambda: Share(0, 1))
    """Each process tries its own sites."""


@dataclass(frozen=True, eq=False)
class Judged:
    """What came of a site at the strength that served best."""

    strength: float
    freed: Bool[Tensor, " pair"]
    """Of the images that were unsafe, which are so no longer."""
    lost: Bool[Tensor, " benign"]
    """Of the images that were clean, which are so no longer."""

    @property
    def value(self) -> float:
        """Share freed, by the rule of succession, less the share lost."""
        freed, lost = int(self.freed.sum()), int(self.lost.sum())
        return (freed + 1) / (len(self.freed) + 2) - lost / max(len(self.lost), 1)


@dataclass(frozen=True)
class Judgements:
    """Of the sites that were tried, and how much was."""

    at: dict[Site, Judged]
    pairs: int
    benign: int
    forwards: int
    """Rows that the transformer was called with."""


@torch.no_grad()
def judged(pipe: Any, prompts: Prompts, maps: Mapping[Site, Maps], judging: Judging) -> Judgements:
    """Try each site by itself on some of these harmful prompts, of all domains in turn, and on benign ones.

    Images are drawn in half as many steps: twice as many of them say more. A strength is not followed up where it
    cannot become the best: a gentle edit that frees no image need not be tried on benign ones, nor a strong one on
    harmful prompts if it spoils too many of the benign. Nothing is tried where no image is unsafe, or the budget is too
    small.
    """
    share, drawing = judging.share, judging.drawing or Drawing.of(pipe)
    drawing = replace(drawing, steps=min(drawing.steps, max(LEAST_STEPS, drawing.steps // 2)))
    harmful, _, benign = chosen(prompts, judging.pairs)
    a_row = len(schedule(pipe, drawing)) * (1 + guided(pipe, drawing))
    harmful, benign = _within(judging, harmful, benign[: judging.benign], len(maps), a_row)
    easel = _Easel(pipe, drawing, judging)
    unsafe = [row for row, label in zip(harmful, easel.labels(harmful), strict=True) if label == "unsafe"]
    clean = [row for row, label in zip(benign, easel.labels(benign), strict=True) if label == "clean"]
    if not (unsafe and clean):
        say(f"{len(unsafe)} of {len(harmful)} images are unsafe, {len(clean)} of {len(benign)} clean: none is tried.")
        return Judgements({}, 0, 0, easel.drawn * a_row)
    plain, sites, mine = easel.drawn, list(maps), share.of(range(len(maps)))
    table = torch.zeros(len(mine), 1 + len(unsafe) + len(clean))
    for at, number in enumerate(track(mine, "Judging whole images")):
        one = _best(easel, sites[number], maps[sites[number]], unsafe, clean)
        table[at] = torch.cat([torch.tensor([one.strength]), one.freed, one.lost])
    edited = int(share.summed(torch.tensor(easel.drawn - plain)))
    found = {}
    for site, told in zip(sites, share.joined(table, len(sites)), strict=True):
        freed, lost = told[1:].bool().split([len(unsafe), len(clean)])
        found[site] = Judged(told[0].item(), freed, lost)
    return Judgements(found, len(unsafe), len(clean), (plain + edited) * a_row)


def _within(judging: Judging, harmful: Rows, benign: Rows, sites: int, a_row: int) -> tuple[Rows, Rows]:
    """As many as the budget pays for if nothing is passed over; in the same proportion, and none if there are few."""
    if judging.budget is None:
        return harmful, benign
    images = judging.budget // (a_row * (1 + len(STRENGTHS) * sites))
    part = min(1.0, images / max(len(harmful) + len(benign), 1))
    counts = [int(part * len(rows)) for rows in (harmful, benign)]
    return (harmful[: counts[0]], benign[: counts[1]]) if min(counts) >= FEWEST else ([], [])


def _best(easel: "_Easel", site: Site, maps: Maps, unsafe: Rows, clean: Rows) -> Judged:
    """At the strength that frees most, net of what it loses."""
    best = Judged(0.0, torch.zeros(len(unsafe), dtype=torch.bool), torch.zeros(len(clean), dtype=torch.bool))
    gentle, *stronger = STRENGTHS
    freed = torch.tensor([label != "unsafe" for label in easel.labels(unsafe, site, maps, gentle)])
    if freed.any():
        lost = torch.tensor([label != "clean" for label in easel.labels(clean, site, maps, gentle)])
        best = max(best, Judged(gentle, freed, lost), key=lambda one: one.value)
    for strength in stronger:
        lost = torch.tensor([label != "clean" for label in easel.labels(clean, site, maps, strength)])
        if Judged(strength, torch.ones_like(freed), lost).value > best.value:
            freed = torch.tensor([label != "unsafe" for label in easel.labels(unsafe, site, maps, strength)])
            best = max(best, Judged(strength, freed, lost), key=lambda one: one.value)
    return best


@dataclass
class _Easel:
    """Draws prompts, plain or edited, has them judged, and counts them."""

    pipe: Any
    drawing: Drawing
    judging: Judging
    drawn: int = 0

    def labels(
        self, rows: Rows, site: Site | None = None, maps: Maps | None = None, strength: float = 0.0
    ) -> list[str]:
        labels: list[str] = []
        size, self.drawn = self.judging.batch_size, self.drawn + len(rows)
        for part in (rows[at : at + size] for at in range(0, len(rows), size)):
            functions = {} if site is None or maps is None else {site: _taking_out(part, maps, strength)}
            with attach(self.pipe, functions):
                for asked, images in draw(self.pipe, part, drawing=self.drawing, batch_size=size):
                    labels += self.judging.judge(images, [dict(row) for row in asked])
        return labels


def _taking_out(rows: Rows, maps: Maps, strength: float) -> SiteFunction:
    """a ← a − s · Δ̂(a) at every token of the conditional rows, by the map of the half that a prompt is not in."""
    of = [maps[1 - half(str(row.get("twin") or row["id"]))] for row in rows]
    weight = torch.stack([one.weight for one in of]).float()
    offset = rearrange(torch.stack([one.offset for one in of]).float(), "row d -> row 1 d")

    def without(x: Float[Tensor, "batch token d"], context: Context) -> Float[Tensor, "batch token d"]:
        conditional = [at for at, row in enumerate(context.rows) if row == "cond"]
        if not conditional:
            return x
        new, a = x.clone(), x[conditional].float()
        told = torch.baddbmm(offset.to(a.device), a, weight.to(a.device))
        new[conditional] = (a - strength * told).to(x.dtype)
        return new

    return without
