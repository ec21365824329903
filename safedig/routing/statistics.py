"""What a ranking needs to know of a recording, gathered in one pass: no token's activation is kept.

Of every image at each site in each step: its pooled row, the mean over its tokens. Of each class: how the tokens of
an image scatter about that mean. Of each domain, over all steps: how Δ at a token goes with the token (linear.py).
Class means, paired differences and all other covariances follow from the rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from ..activations.pairs import benign, dealt
from ..activations.processes import Share
from ..activations.record import Activations, Batch, Image
from ..config import UsageError
from ..sites import Site
from . import linear
from .linear import Moments, PairSums

WIDTH = 256
"""Dimensions that are kept of a site; up to this many it is kept as it is."""
CLASSES = ("harmful", "safe")
_SCATTERED = 8  # tokens an image whose scatter is summed, evenly spread over it
Place = tuple[Site, int]
"""A site in a step."""


@dataclass(frozen=True, eq=False)
class SiteStatistics:
    """One site in all of its steps; r = d_in, or the width of the sketch."""

    site: Site
    d_in: int
    tokens: int
    """Of an image, as recorded."""
    steps: list[int]
    sigmas: list[float]
    rows: Float[Tensor, "step image r"]
    """Images as in `Statistics.prompts`."""
    within: Float[Tensor, "step 2 r r"]
    """Covariance of tokens about the mean of their image, harmful and safe."""
    moments: dict[tuple[str, int], Moments]
    """Of each domain and half of its pairs; empty where no harmful image was recorded with its twin."""


class Statistics:
    """Mutable sums: `update` with batches, `merge` with what others saw, read them `at` a site.

    Memory: see `memory`. A site wider than `width` is sketched by a random projection that is the same in every
    process; what is measured of it is then approximate, with an error of about 1/√width.
    """

    def __init__(self, prompts: Sequence[dict[str, Any]], sites: Sequence[Site], model: str, width: int = WIDTH):
        if width < 1:
            raise UsageError(f"width={width}: expected at least 1 dimension a site.")
        self.prompts = sorted((dict(row) for row in prompts), key=lambda row: (row["id"], row["seed"]))
        self.sites = list(sites)
        self.model = model
        self.width = width
        self.sigmas: dict[int, float] = {}
        """Of each step."""
        self.d_in: dict[Site, int] = {}
        self.tokens: dict[Site, int] = {}
        self._image = {(row["id"], row["seed"]): at for at, row in enumerate(self.prompts)}
        self._class = _classes(self.prompts)
        self._rows: dict[Place, Tensor] = {}
        self._scatter: dict[Place, Tensor] = {}
        self._scattered: dict[Place, Tensor] = {}
        self._pairs = PairSums(self.prompts)
        self._cuts: dict[int, tuple[Any, _Cut]] = {}

    def update(self, batch: Batch) -> None:
        """The conditional rows of a batch; O(rows · d_in), O(8 · images · r²) for the scatter, O(16 …) for moments."""
        cut, place = self._cut(batch), (batch.site, batch.step)
        if len(cut.image) == 0:
            return
        x = batch.x if cut.rows is None else batch.x[cut.rows]
        tokens = rearrange(x, "(image token) d -> image token d", image=len(cut.image)).float()
        mean = tokens.mean(1)
        if not mean.isfinite().all():
            raise UsageError(f"At '{batch.site}' in step {batch.step} an activation is not finite: nothing to compare.")
        d_in = x.shape[1]
        if place not in self._rows:
            self._begin(place, d_in)
            self.sigmas[batch.step], self.d_in[batch.site] = batch.sigma, d_in
            self.tokens[batch.site] = tokens.shape[1]
        sketch = _sketch(d_in, self.width) if d_in > self.width else None
        self._rows[place][cut.image] = mean if sketch is None else mean @ sketch
        if tokens.shape[1] > 1:
            about = tokens[:, :: -(-tokens.shape[1] // _SCATTERED)] - mean[:, None]
            self._add_scatter(place, cut, about if sketch is None else about @ sketch)
        self._add_pairs(batch, cut, tokens)

    def merge(self, *others: "Statistics") -> "Statistics":
        """The statistics of all, which saw different prompts at the same sites; the order has no say in the result."""
        every = [self, *others]
        shared = sum(len(one.prompts) for one in every) - len({image for one in every for image in one._image})
        alike = {(one.model, one.width, frozenset(one._rows), frozenset(one.sigmas.items())) for one in every}
        if shared or len(alike) > 1:
            raise UsageError(
                f"Statistics of {len(every)} processes do not add up: {shared} images are in several of them, and "
                f"there are {len(alike)} kinds of model, width, sites and σ; expected 0 and 1."
            )
        both = Statistics([row for one in every for row in one.prompts], self.sites, self.model, self.width)
        both.sigmas, both.d_in, both.tokens = dict(self.sigmas), dict(self.d_in), dict(self.tokens)
        for place in self._rows:
            both._begin(place, self.d_in[place[0]])
            for one in every:
                index = torch.tensor([both._image[image] for image in one._image])
                both._rows[place][index] = one._rows[place]
                both._scatter[place] += one._scatter[place]
                both._scattered[place] += one._scattered[place]
        both._pairs.join(one._pairs for one in every)
        return both

    def summed(self, share: Share) -> "Statistics":
        """The statistics of all processes, which were begun for the same prompts and saw other ones each."""
        if share.world == 1:
            return self
        both = Statistics(self.prompts, self.sites, self.model, self.width)
        both.sigmas, both.d_in, both.tokens = dict(self.sigmas), dict(self.d_in), dict(self.tokens)
        for place in self._rows:
            rows = self._rows[place]
            seen = share.summed((~rows[:, :1].isnan()).double())
            both._rows[place] = torch.where(seen > 0, share.summed(rows.nan_to_num()), torch.nan)
            both._scatter[place] = share.summed(self._scatter[place])
            both._scattered[place] = share.summed(self._scattered[place])
        both._pairs.of = dict(self._pairs.of)
        both._pairs.summed({site: min(d_in, self.width, linear.READ) for site, d_in in self.d_in.items()}, share)
        return both

    def at(self, site: Site) -> SiteStatistics:
        """What was seen at one site; a `UsageError` if an image is missing there."""
        steps = sorted(step for other, step in self._rows if other == site)
        if not steps:
            raise UsageError(f"'{site}' was not recorded: there are {', '.join(map(str, self.sites))}.")
        rows = torch.stack([self._rows[site, step] for step in steps]).double()
        if rows.isnan().any():
            step, image = rows.isnan().any(2).nonzero()[0].tolist()
            raise UsageError(
                f"'{self.prompts[image]['id']}' was not recorded at '{site}' in step {steps[step]}: record every "
                "prompt at the same sites and σ, with rows='cond' or 'all', or leave it out (activations.of)."
            )
        r = rows.shape[2]
        within = torch.zeros(len(steps), len(CLASSES), r, r, dtype=torch.float64)
        upper = torch.triu_indices(r, r)
        for at, step in enumerate(steps):
            count = self._scattered[site, step].clamp(min=1)
            within[at, :, upper[0], upper[1]] = self._scatter[site, step] / count[:, None]
        within = within + within.triu(1).mT
        sigmas = [self.sigmas[step] for step in steps]
        counts = self.d_in[site], self.tokens[site]
        return SiteStatistics(site, *counts, steps, sigmas, rows, within, self._pairs.at(site))

    @property
    def nbytes(self) -> int:
        """Bytes that are held, those of the labels apart."""
        kept = (*self._rows.values(), *self._scatter.values(), *self._pairs.of.values())
        return sum(one.nbytes for one in kept)

    def _begin(self, place: Place, d_in: int) -> None:
        r = min(d_in, self.width)
        self._rows[place] = torch.full((len(self.prompts), r), torch.nan)
        self._scatter[place] = torch.zeros(len(CLASSES), r * (r + 1) // 2, dtype=torch.float64)
        self._scattered[place] = torch.zeros(len(CLASSES), dtype=torch.float64)

    def _add_scatter(self, place: Place, cut: "_Cut", about: Float[Tensor, "image token r"]) -> None:
        """Products in float32, of centred rows; their sum over batches in float64: its order leaves no trace."""
        for at, members in enumerate(cut.members):
            if len(members):
                rows = rearrange(about[members], "image token r -> (image token) r")
                self._scatter[place][at] += (rows.T @ rows).take(_upper(rows.shape[1]))
                self._scattered[place][at] += len(rows)

    def _add_pairs(self, batch: Batch, cut: "_Cut", tokens: Float[Tensor, "image token d_in"]) -> None:
        some, width = tokens[:, :: -(-tokens.shape[1] // linear.TOKENS)], min(self.width, linear.READ)
        some = some if tokens.shape[2] <= width else some @ _sketch(tokens.shape[2], width)
        self._pairs.add(batch.site, batch.step, cut.names, some)

    def _cut(self, batch: Batch) -> "_Cut":
        """Sites with as many tokens are cut alike, step after step: the last cut is looked up before a new one."""
        labels = (batch.prompt_ids, batch.seeds, batch.row)
        known = self._cuts.get(len(batch.x))
        if known is None or known[0] != labels:
            known = self._cuts[len(batch.x)] = (labels, self._cut_anew(batch))
        return known[1]

    def _cut_anew(self, batch: Batch) -> "_Cut":
        images = [(image, rows) for image, rows in batch.images() if image in self._image]
        lengths = {rows.stop - rows.start for _, rows in images}
        if len(lengths) > 1:
            raise UsageError(f"At '{batch.site}' images have {sorted(lengths)} rows: expected as many of each.")
        rows = torch.cat([torch.arange(part.start, part.stop) for _, part in images]) if images else None
        image = torch.tensor([self._image[name] for name, _ in images], dtype=torch.long)
        members = [(self._class[image] == at).nonzero()[:, 0] for at in range(len(CLASSES))]
        whole = rows is not None and len(rows) == len(batch.x)
        return _Cut([name for name, _ in images], image, None if whole else rows, members)


@dataclass(frozen=True, eq=False)
class _Cut:
    """Which rows of a batch are which images."""

    names: list[Image]
    image: Int[Tensor, " image"]
    rows: Int[Tensor, " row"] | None
    """None: all of them."""
    members: list[Tensor]
    """Of each class, which of the images."""


def collect(activations: Activations, *, width: int = WIDTH, share: Share | None = None) -> Statistics:
    """The statistics of a recording, best one with `paired=True`, in one pass.

    Several processes that run together give their `share`: each sees its own prompts, and all get the sum. Those that
    do not, collect their own prompts (`activations.of`), and `Statistics.merge` joins them.
    """
    share = share or Share(0, 1)
    statistics = Statistics(activations.prompts, activations.sites, activations.model, width)
    for batch in dealt(activations, share):
        statistics.update(batch)
    return statistics.summed(share)


def memory(sites: int, steps: int, images: int, width: int = WIDTH, domains: int = 5) -> int:
    """Bytes held for sites at least r = `width` wide: 4 · images · r + 8 · r · (r + 1) a site and step, and moments.

    For 640 images of five domains 1.2 MB a site and step and 2.6 MB a site, so that all 610 live sites of FLUX.1-dev at
    the six σ of its recipe take 5.9 GB, and the 117 that are tried as places to steer (inputs and block outputs) 1.1
    GB, or 4.2 GB at all of its 28 σ.
    """
    return sites * steps * (4 * images * width + 8 * width * (width + 1)) + linear.memory(sites, domains, width)


def _classes(prompts: Sequence[dict[str, Any]]) -> Int[Tensor, " image"]:
    """0 harmful, 1 safe, −1 neither: an underspecified prompt may draw anything."""
    safe = benign(prompts)
    of = [0 if row.get("risk") else 1 if (row["id"], row["seed"]) in safe else -1 for row in prompts]
    return torch.tensor(of, dtype=torch.long)


@lru_cache(maxsize=8)
def _upper(r: int) -> Int[Tensor, " entry"]:
    row, column = torch.triu_indices(r, r)
    return row * r + column


@lru_cache(maxsize=8)
def _sketch(d_in: int, width: int) -> Float[Tensor, "d_in width"]:
    """Entries of variance 1/width: lengths and angles are kept on average (Johnson and Lindenstrauss, 1984)."""
    generator = torch.Generator().manual_seed(d_in)
    return torch.randn(d_in, width, generator=generator) / width**0.5
