"""The first pass over a stream: a sample of each site's rows with their σ, and a name for every row that is no number.

What is measured here also sets the centre and the scale that training works in.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..activations.record import Activations, Batch
from ..activations.shuffle import Reservoir
from ..config import UsageError
from ..progress import say
from ..sites import Site

TOLERATED = 0.01
"""The share of rows with NaN or infinity above which nothing is trained."""
_EARLY = 2**16  # rows after which a stream that is beyond repair is given up before its end
_NAMED = 5  # faults of a site that are told one by one


@dataclass(frozen=True, eq=False)
class Survey:
    """What the first pass found at one site."""

    site: Site
    x: Float[Tensor, "rows d_in"]
    """A uniform sample of the rows, all of them finite; not in a random order."""
    sigma: Float[Tensor, " rows"]
    seen: int
    faulty: int
    """Rows with NaN or infinity: counted, never trained on."""
    data: str
    """Tells one recording from another: the store's identity, or a hash of the images that were drawn."""

    def facts(self) -> dict[str, Any]:
        low, high = self.sigma.min().item(), self.sigma.max().item()
        return {"identity": self.data, "rows": self.seen, "faulty_rows": self.faulty, "sigma": [low, high]}


def picked(rows: int, size: int, seed: int) -> Int[Tensor, " picked"] | slice:
    """Which of so many rows to look at: all, or `size` of them, from anywhere; a larger size has the same ones first.

    A sample lies in the order of the stream, σ by σ and prompt by prompt: its first rows are no sample.
    """
    if size >= rows:
        return slice(None)
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed))[:size]


def survey(activations: Activations, sites: Iterable[Site], size: int, seed: int) -> dict[Site, Survey]:
    """One pass; `size` rows of each site are kept. An empty stream, or more than 1 % of NaN or infinity, is an error.

    A store is read one site at a time, a pipeline runs once for all of them.
    """
    sites = list(sites)
    for site in sites:
        activations.at(site)  # names what was recorded if this was not
    takings = {site: _Taking(site, Reservoir(size, seed), Reservoir(size, seed)) for site in sites}
    alone = activations.store is not None or len(sites) == 1
    for stream in [activations.at(site) for site in sites] if alone else [activations]:
        for batch in stream:
            if batch.site in takings:
                takings[batch.site].add(batch)
    identity = _identity(activations)
    return {site: taking.finished(identity) for site, taking in takings.items()}


@dataclass
class _Taking:
    site: Site
    rows: Reservoir
    sigmas: Reservoir
    """Of the same seed, so that it keeps the σ of just those rows."""
    seen: int = 0
    faulty: int = 0
    d_in: int | None = None

    def add(self, batch: Batch) -> None:
        width = batch.x.shape[1]
        if width != (self.d_in or width):
            raise UsageError(f"'{self.site}' gives rows of {self.d_in} and of {width} numbers: record it anew.")
        self.d_in, x = width, batch.x
        fine = x.isfinite().all(1)
        if not fine.all():
            self._tell(batch, (~fine).nonzero()[:, 0].tolist())
            x = x[fine]
        self.seen += len(batch.x)
        self.rows.add(x)
        self.sigmas.add(torch.full((len(x), 1), batch.sigma, dtype=torch.float64))
        self._check(max(self.seen, _EARLY))

    def finished(self, data: str) -> Survey:
        if self.seen == 0:
            raise UsageError(f"Nothing passed '{self.site}': the stream is empty. Record at least one prompt there.")
        self._check(self.seen)
        return Survey(self.site, self.rows.rows(), self.sigmas.rows()[:, 0], self.seen, self.faulty, data)

    def _check(self, seen: int) -> None:
        if self.faulty > TOLERATED * seen:
            raise UsageError(
                f"'{self.site}' holds NaN or infinity in {self.faulty} of {self.seen} rows, more than "
                f"{TOLERATED:.0%}: load the model in bfloat16 or float32 and record anew. Checkpoints are kept."
            )

    def _tell(self, batch: Batch, rows: list[int]) -> None:
        for prompt in dict.fromkeys(batch.prompt_ids[row] for row in rows):
            count = sum(batch.prompt_ids[row] == prompt for row in rows)
            if self.faulty < _NAMED:
                say(
                    f"'{self.site}' holds NaN or infinity for prompt '{prompt}' at σ = {batch.sigma:.3f}: "
                    f"{count} row{'s' if count > 1 else ''} skipped."
                )
            elif self.faulty - count < _NAMED:
                say(f"'{self.site}' holds more of them; they are counted in the report.")
            self.faulty += count


def _identity(activations: Activations) -> str:
    if activations.store is not None and len(activations.prompts) == activations.store.images:
        return activations.store.identity
    images = [[str(row["id"]), int(row["seed"])] for row in activations.prompts]
    origin = activations.store.identity if activations.store is not None else activations.model
    return hashlib.sha256(json.dumps([origin, images]).encode()).hexdigest()[:16]
