"""A harmful prompt's activations beside those of its safe twin, from the same seed, as both pass by in the stream."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from ..config import UsageError
from ..sites import Site
from .alignment import alignment
from .processes import Share
from .record import Activations, Batch, Image


@dataclass(frozen=True)
class Pair:
    """One image and its twin at one site in one step, token by token."""

    ends: tuple[Image, Image]
    """The harmful one, and its twin."""
    site: Site
    step: int
    token: Int[Tensor, " token"]
    harmful: Float[Tensor, "token d_in"]
    safe: Float[Tensor, "token d_in"]

    def aligned(self) -> "Pair":
        """The twin's tokens of text in the order of the prompt's, word for word; those of an image stay in place."""
        if self.site.stream != "txt" or len(self.harmful) == 1:
            return self
        return replace(self, safe=self.safe[alignment(self.harmful, self.safe).to(self.safe.device)])

    def change(self) -> Float[Tensor, " token"]:
        """How much each token differs from its twin's, as a share of the token that differs most."""
        norm = (self.harmful.float() - self.safe.float()).norm(dim=1)
        return norm / norm.max().clamp(min=1e-12)


class Pairing:
    """Shown the batches of a recording one by one, gives the pairs that each completes.

    Holds only what still waits for its other half; `record` draws twins side by side, so that this is little.
    """

    def __init__(self, activations: Activations):
        self._links: dict[Image, list[tuple[Image, Image]]] = {}
        self._waiting: dict[tuple[Site, int, Image], _Half] = {}
        for link in twins(activations.prompts):
            for image in link:
                self._links.setdefault(image, []).append(link)

    def add(self, batch: Batch) -> Iterator[Pair]:
        for image, rows in batch.images():
            if image not in self._links:
                continue
            here = (batch.site, batch.step)
            self._waiting[*here, image] = _Half(batch.token[rows], batch.x[rows], len(self._links[image]))
            for ends in self._links[image]:
                keys = [(*here, end) for end in ends]
                if all(key in self._waiting for key in keys):
                    yield _pair(ends, *here, *(self._waiting[key] for key in keys))
                    self._release(keys)

    def _release(self, keys: list[tuple[Site, int, Image]]) -> None:
        for key in keys:
            self._waiting[key].wanted -= 1
            if self._waiting[key].wanted == 0:
                del self._waiting[key]


@dataclass
class _Half:
    token: Int[Tensor, " token"]
    x: Float[Tensor, "token d_in"]
    wanted: int


def twins(prompts: Sequence[dict[str, Any]]) -> list[tuple[Image, Image]]:
    """Each harmful image of these and the image of its safe twin; a twin that may show harm itself is none."""
    safe = benign(prompts)
    links = [((row["id"], row["seed"]), (row.get("twin", ""), row["seed"])) for row in prompts]
    return [(harmful, twin) for harmful, twin in links if twin in safe]


def dealt(activations: Activations, share: Share, batch_size: int = 16) -> Activations:
    """A process's part of the recording: whole batches in turn, a prompt always in the same one as its safe twin."""
    if share.world == 1:
        return activations
    number: dict[str, int] = {}
    for at, row in enumerate(activations.prompts):
        number.setdefault(row.get("twin") or row["id"], at // batch_size)
    batches = set(number.values())
    if share.world > len(batches):
        raise UsageError(f"{share.world} processes share {len(batches)} batches of images: launch at most as many.")
    mine = set(sorted(batches)[share.rank :: share.world])
    return activations.of([row for row in activations.prompts if number[row.get("twin") or row["id"]] in mine])


def benign(prompts: Sequence[dict[str, Any]]) -> set[Image]:
    """The images of these in which no harm is expected; an underspecified prompt may draw one."""
    kinds = ("harmful", "mixed", "underspecified")
    rows = (row for row in prompts if not row.get("risk") and row.get("kind") not in kinds)
    return {(row["id"], row["seed"]) for row in rows}


def _pair(ends: tuple[Image, Image], site: Site, step: int, harmful: _Half, safe: _Half) -> Pair:
    if harmful.token.tolist() != safe.token.tolist():
        raise UsageError(f"At '{site}' a prompt and its safe twin have other tokens: pad prompts to one length.")
    return Pair(ends, site, step, harmful.token, harmful.x, safe.x)
