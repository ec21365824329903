"""Which images are set against which: each harmful one against its safe twin, or against a stranger for want of one.

A stranger is a safe prompt of its own for each harmful one, as far as they reach. The mean difference is then that of
the class means, its noise is that of strangers, and all that is said of pairs holds for them too.
"""

import hashlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle, zip_longest
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..activations.pairs import benign, twins
from ..activations.record import Image, Prompts
from ..config import UsageError, did_you_mean

FEWEST = 8
"""Prompts a class; of fewer, nothing is said."""
Domains = str | Sequence[str] | Prompts
"""Names of risk domains, or the prompts that show them."""


@dataclass(frozen=True, eq=False)
class Contrast:
    """The i-th harmful image stands against the i-th safe one; indices into the images that it was made of."""

    harmful: Int[Tensor, " pair"]
    safe: Int[Tensor, " pair"]
    domain: list[str]
    """Of each pair."""
    cluster: Int[Tensor, " pair"]
    """Pairs that share a prompt stay together wherever prompts are left out or drawn again."""
    is_target: Bool[Tensor, " pair"]
    twins: bool

    @property
    def source(self) -> list[str]:
        return sorted({name for name, there in zip(self.domain, self.is_target.tolist(), strict=True) if not there})

    @property
    def target(self) -> list[str]:
        return sorted({name for name, there in zip(self.domain, self.is_target.tolist(), strict=True) if there})

    def of(self, domain: str) -> Bool[Tensor, " pair"]:
        """Which pairs are of a domain."""
        return torch.tensor([name == domain for name in self.domain])

    def folds(self, count: int, seed: int) -> Int[Tensor, " pair"]:
        """A fold for each pair: clusters stay whole, every domain is in every fold as far as it reaches."""
        fold = torch.zeros(len(self.domain), dtype=torch.long)
        generator, dealt = torch.Generator().manual_seed(seed), 0
        for domain in sorted(set(self.domain)):
            clusters = self.cluster[self.of(domain)].unique()
            for cluster in clusters[torch.randperm(len(clusters), generator=generator)]:
                fold[self.cluster == cluster] = dealt % count
                dealt += 1
        return fold

    def resamples(self, draws: int, seed: int) -> Float[Tensor, "draw pair"]:
        """How often each pair counts: once in the first row, then as its prompt was drawn anew within its domain.

        A prompt that several domains share is drawn once, in the first of them.
        """
        weights = torch.ones(1 + draws, len(self.domain), dtype=torch.float64)
        generator = torch.Generator().manual_seed(seed)
        left = torch.ones(len(self.domain), dtype=torch.bool)
        for domain in sorted(set(self.domain)):
            mask = torch.isin(self.cluster, self.cluster[left & self.of(domain)])
            if not mask.any():
                continue
            left &= ~mask
            clusters, where = self.cluster[mask].unique(return_inverse=True)
            picked = torch.randint(len(clusters), (draws, len(clusters)), generator=generator)
            counts = torch.zeros(draws, len(clusters), dtype=torch.float64)
            counts.scatter_add_(1, picked, torch.ones_like(picked, dtype=torch.float64))
            weights[1:, mask] = counts[:, where]
        return weights


def contrast(prompts: Sequence[dict[str, Any]], source: Domains, target: Domains | None = None) -> Contrast:
    """The pairs of the source domains and of the target; their order follows from their ids alone.

    Twins count if any harmful prompt of these was recorded with one, and then those alone. A `UsageError` names a
    domain that is absent, and a class with fewer than eight prompts in the source or the target.
    """
    names, aims = _names(prompts, source, "source"), _names(prompts, target, "target") if target is not None else []
    if both := set(names) & set(aims):
        raise UsageError(f"'{min(both)}' is a source and the target: a target is a domain that the source leaves out.")
    asked = dict.fromkeys(names, _asked(source)) | dict.fromkeys(aims, _asked(target or ()))
    risk = {
        (row["id"], row["seed"]): row["risk"]
        for row in prompts
        if (ids := asked.get(row.get("risk", ""))) is not None and (not ids or row["id"] in ids)
    }
    safe = benign(prompts)
    links = sorted((one, other) for one, other in twins(prompts) if one in risk and other in safe)
    paired = bool(links)
    links = links or _strangers(risk, sorted(safe))
    at = {(row["id"], row["seed"]): index for index, row in enumerate(prompts)}
    clusters = {name: index for index, name in enumerate(sorted({other[0] for _, other in links}))}
    made = Contrast(
        harmful=torch.tensor([at[one] for one, _ in links], dtype=torch.long),
        safe=torch.tensor([at[other] for _, other in links], dtype=torch.long),
        domain=[risk[one] for one, _ in links],
        cluster=torch.tensor([clusters[other[0]] for _, other in links], dtype=torch.long),
        is_target=torch.tensor([risk[one] in aims for one, _ in links], dtype=torch.bool),
        twins=paired,
    )
    _enough(links, made, aimed=bool(aims))
    return made


def concerned(prompts: Sequence[dict[str, Any]], domains: Collection[str]) -> list[dict[str, Any]]:
    """The prompts of these domains, their twins, shared with other domains or not, and those that are nobody's twin."""
    harmful = [row for row in prompts if row.get("risk")]
    others = {row.get("twin") for row in harmful if row["risk"] not in domains}
    wanted = {row.get("twin") for row in harmful if row["risk"] in domains}
    return [
        row
        for row in prompts
        if (row["risk"] in domains if row.get("risk") else row["id"] in wanted or row["id"] not in others)
    ]


def _names(prompts: Sequence[dict[str, Any]], given: Domains, role: str) -> list[str]:
    """The risk domains that are meant; each of them was recorded."""
    recorded = sorted({row["risk"] for row in prompts if row.get("risk")})
    wanted = [given] if isinstance(given, str) else list(given)
    names = sorted({entry if isinstance(entry, str) else entry.get("risk", "") for entry in wanted} - {""})
    if not names:
        raise UsageError(f"The {role} names no risk domain: give names or harmful prompts; recorded are {recorded}.")
    for name in names:
        if name not in recorded:
            raise UsageError(
                f"The {role} domain '{name}' is not in the recording. {did_you_mean(name, recorded)} Record it first."
            )
    return names


def _asked(given: Domains) -> set[str]:
    """Ids, where prompts were given and not names."""
    return set() if isinstance(given, str) else {entry["id"] for entry in given if not isinstance(entry, str)}


def _strangers(risk: dict[Image, str], safe: list[Image]) -> list[tuple[Image, Image]]:
    """Each harmful prompt with a safe one by the hash of its id, image by image; a safe one only then serves twice."""
    by_prompt: dict[str, list[Image]] = {}
    for image in safe:
        by_prompt.setdefault(image[0], []).append(image)
    if not by_prompt:
        return []
    domain = {image[0]: name for image, name in risk.items()}
    of = _dealt({name: domain[name] for name in sorted(domain, key=_hash)}, sorted(by_prompt, key=_hash))
    seeds = {name: cycle(images) for name, images in by_prompt.items()}
    return [(image, next(seeds[of[image[0]]])) for image in sorted(risk)]


def _hash(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def _dealt(domain: dict[str, str], strangers: list[str]) -> dict[str, str]:
    """A stranger for each prompt. Too few are dealt to the domains in turn, so that two domains do not share one."""
    members: dict[str, list[str]] = {}
    for prompt, name in domain.items():
        members.setdefault(name, []).append(prompt)
    order = list(domain)
    if len(order) > len(strangers):
        order = [prompt for turn in zip_longest(*members.values()) for prompt in turn if prompt is not None]
    own: dict[str, list[str]] = {}
    for prompt, stranger in zip(order, strangers, strict=False):
        own.setdefault(domain[prompt], []).append(stranger)
    return {
        prompt: stranger
        for name, prompts in members.items()
        for prompt, stranger in zip(prompts, cycle(own.get(name, strangers)), strict=False)
    }


def _enough(links: Iterable[tuple[Image, Image]], made: Contrast, aimed: bool) -> None:
    """Prompts, not images: ten seeds of a prompt say the same ten times."""
    for role, wanted in (("source", False), ("target", True)):
        there = [link for link, is_target in zip(links, made.is_target.tolist(), strict=True) if is_target == wanted]
        counts = [len({link[side][0] for link in there}) for side in (0, 1)]
        if min(counts) < FEWEST and (aimed or not wanted):
            against = f"{counts[1]} safe {'twins' if made.twins else 'ones'}"
            raise UsageError(
                f"The {role} has {counts[0]} harmful prompts against {against}; expected at least {FEWEST} of each, "
                "too few would rank sites by chance: record more prompts with their safe twins."
            )
