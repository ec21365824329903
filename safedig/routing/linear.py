"""How much of what harm adds to a token can be told from the token by a linear map: sums over pairs of tokens.

An edit takes out a function of the token alone, and along decoder rows not much more than a linear one: what cannot be
told from the token, no edit at this site can take out.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from hashlib import sha256
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from ..activations.pairs import twins
from ..activations.processes import Share
from ..activations.record import Image
from ..sites import Site

READ = 128
"""Dimensions of a site in which this is done; a wider one is sketched."""
TOKENS = 16  # of an image, evenly spread over it
_PENALTY = 1e-3  # of the mean variance a dimension: there are far more tokens than dimensions


@dataclass
class Moments:
    """Sums of x, of y = Δ on a harmful token and 0 on its safe twin's, and of their products."""

    n: Float[Tensor, ""]
    x: Float[Tensor, " r"]
    y: Float[Tensor, " r"]
    xx: Float[Tensor, "r r"]
    xy: Float[Tensor, "r r"]
    yy: Float[Tensor, ""]

    @classmethod
    def none(cls, r: int) -> "Moments":
        shapes = ((), (r,), (r,), (r, r), (r, r), ())
        return cls(*(torch.zeros(shape, dtype=torch.float64) for shape in shapes))

    def add(self, harmful: Float[Tensor, "image token r"], safe: Float[Tensor, "image token r"]) -> None:
        """Images beside their twins, all in float64: centred later, sums of tokens far from 0 would cancel."""
        h, s = (rearrange(part, "image token r -> (image token) r").double() for part in (harmful, safe))
        delta = h - s
        found = (torch.tensor(2.0 * len(h)), h.sum(0) + s.sum(0), delta.sum(0))
        self._sum(Moments(*found, h.T @ h + s.T @ s, h.T @ delta, delta.square().sum()))

    def __add__(self, other: "Moments") -> "Moments":
        total = Moments(*(getattr(self, one.name).clone() for one in fields(self)))
        total._sum(other)
        return total

    @property
    def nbytes(self) -> int:
        return sum(getattr(self, one.name).nbytes for one in fields(self))

    def _sum(self, other: "Moments") -> None:
        for one in fields(self):
            getattr(self, one.name).add_(getattr(other, one.name))


class PairSums:
    """The moments of each site, domain and half of its prompts; an image that comes before its twin is held till then.

    Who shares a twin shares a half, and the twin of several is held to the end.
    """

    def __init__(self, prompts: Sequence[dict[str, Any]]):
        self.of: dict[tuple[Site, str, int], Moments] = {}
        self._links: dict[Image, list[tuple[Image, Image]]] = {}
        self._domain = {(row["id"], row["seed"]): row["risk"] for row in prompts if row.get("risk")}
        for link in twins(prompts):
            for image in link if link[0] in self._domain else ():
                self._links.setdefault(image, []).append(link)
        self._held: dict[tuple[Site, int], dict[Image, Tensor]] = {}

    def add(self, site: Site, step: int, images: Sequence[Image], tokens: Float[Tensor, "image token r"]) -> None:
        """What has come of these images; a pair counts once both are there."""
        held, came = self._held.setdefault((site, step), {}), [image for image in images if image in self._links]
        held |= {image: own for image, own in zip(images, tokens, strict=True) if image in self._links}
        whole = dict.fromkeys(link for image in came for link in self._links[image] if held.keys() >= set(link))
        parts: dict[tuple[Site, str, int], list[tuple[Tensor, Tensor]]] = {}
        for harmful, safe in whole:
            parts.setdefault((site, self._domain[harmful], half(safe[0])), []).append((held[harmful], held[safe]))
        for part, pairs in parts.items():
            sums = self.of.setdefault(part, Moments.none(tokens.shape[2]))
            sums.add(*(torch.stack(side) for side in zip(*pairs, strict=True)))
        for image in {image for link in whole for image in link if len(self._links[image]) == 1}:
            del held[image]
        held |= {image: held[image].clone() for image in came if image in held}  # without the batch it is a part of

    def join(self, others: Iterable["PairSums"]) -> None:
        """Add what others have seen, of other prompts."""
        for other in others:
            for part, moments in other.of.items():
                self.of[part] = self.of[part] + moments if part in self.of else moments

    def summed(self, widths: Mapping[Site, int], share: Share) -> None:
        """Add what all processes have seen, each of them other pairs; `widths` are the r of every site."""
        domains = sorted(set(self._domain.values()))
        for part in ((site, domain, half) for site in widths for domain in domains for half in (0, 1)):
            own = self.of.get(part, Moments.none(widths[part[0]]))
            total = Moments(*(share.summed(getattr(own, one.name)) for one in fields(own)))
            if total.n > 0:
                self.of[part] = total

    def at(self, site: Site) -> dict[tuple[str, int], Moments]:
        return {(domain, half): one for (other, domain, half), one in self.of.items() if other == site}


def half(safe: str) -> int:
    """Which half a prompt is in, by the id of its safe twin: those that share one stay together."""
    return sha256(safe.encode()).digest()[0] % 2


@dataclass(frozen=True, eq=False)
class Map:
    """Δ as it is told from a token: Δ̂(x) = x·weight + offset."""

    weight: Float[Tensor, "r r"]
    offset: Float[Tensor, " r"]

    @classmethod
    def of(cls, seen: Moments) -> "Map":
        """The ridge regression of y on x."""
        mean_x, mean_y = seen.x / seen.n, seen.y / seen.n
        gram = seen.xx - seen.n * torch.outer(mean_x, mean_x)
        penalty = _PENALTY * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        weight = torch.linalg.solve(gram + penalty, seen.xy - seen.n * torch.outer(mean_x, mean_y))
        return cls(weight, mean_y - mean_x @ weight)


def halves(moments: Mapping[tuple[str, int], Moments], domains: Iterable[str]) -> tuple[Moments, Moments] | None:
    """The sums of these domains over each half of their prompts; None where there are none."""
    parts = [[moments[name, part] for name in sorted(set(domains)) if (name, part) in moments] for part in (0, 1)]
    if not all(parts):
        return None
    one, other = (sum(part[1:], part[0]) for part in parts)
    return one, other


def across_halves(moments: Mapping[tuple[str, int], Moments], domains: Iterable[str]) -> float | None:
    """`linearity` of these domains, learnt on one half of their prompts and seen on the other, both ways."""
    if (both := halves(moments, domains)) is None:
        return None
    one, other = both
    return (linearity(one, other) + linearity(other, one)) / 2


def linearity(train: Moments, test: Moments) -> float:
    """R² = 1 − Σ‖y − ŷ‖² / Σ‖y‖² on `test` of the map that `train` gives; 0 at the least.

    Against 0 and not against the mean of y: an edit that does nothing explains nothing.
    """
    if not (train.n > 0 and train.yy > 0 and test.yy > 0):
        return 0.0
    told = Map.of(train)
    weight, offset = told.weight, told.offset
    guessed = (weight * (test.xx @ weight)).sum() + 2 * (test.x @ weight) @ offset + test.n * offset @ offset
    shared = (weight * test.xy).sum() + test.y @ offset
    return max(0.0, 1 - ((test.yy - 2 * shared + guessed) / test.yy).item())


def memory(sites: int, domains: int, width: int) -> int:
    """Bytes of two halves a domain at sites at least r = min(`width`, READ) wide: 8 · (2r² + 2r + 2) each."""
    r = min(width, READ)
    return 2 * sites * domains * 8 * (2 * r * r + 2 * r + 2)
