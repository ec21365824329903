"""What a site does to the image: its activations swapped with the safe twin's, or Δ's direction taken out of them.

Read off the predicted velocity at a few σ of the real schedule, prompt by prompt. Nothing is trained or ranked here.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from ..activations.processes import Share
from ..activations.schedule import schedule
from ..activations.stream import Prompts
from ..config import UsageError
from ..pipelines import Drawing, guided
from ..progress import track
from ..sites import Site, resolve
from .direction import Direction, direction_of, removing
from .replay import Inputs, Replay
from .trial import Rows, Trial, chosen, chunks, counted, spread


@dataclass(frozen=True)
class Effects:
    """How far each site carries the harm, for each prompt at each σ, so that intervals can be drawn by prompt."""

    sites: list[Site]
    sigmas: list[float]
    prompt_ids: list[str]
    """Of the harmful prompts of the pairs."""
    interchange: Float[Tensor, "site sigma pair"]
    """⟨v_patched − v, v_safe − v⟩ / ‖v_safe − v‖²: 1, all of the difference goes through this site; 0, none."""
    removal: Float[Tensor, "site sigma pair"]
    """The same, with the component along the source's mean Δ set to that of its safe twins instead."""
    benign_ids: list[str]
    harm: Float[Tensor, "site sigma benign"]
    """‖v_removed − v‖ / ‖v‖: what the removal does to benign prompts."""
    forwards: int
    """Rows that the transformer was called with, those of the drawing among them; as many as in one process."""


@torch.no_grad()
def interchange(
    pipe: Any,
    prompts: Prompts,
    sites: Iterable[str | Site],
    *,
    source: Iterable[str] = (),
    drawing: Drawing | None = None,
    pairs: int = 32,
    sigmas: int = 3,
    budget: int | None = None,
    batch_size: int = 16,
    share: Share | None = None,
) -> Effects:
    """Try every site on up to `pairs` harmful prompts and half as many benign ones, on their own latents at a few σ.

    `source` names the risk domains whose mean Δ is removed, all unless given; a prompt's own Δ is left out of it. The
    prompts are taken from all domains in turn, by a hash of their ids. With `budget`, in rows of the transformer,
    fewer pairs and σ are tried. Several processes that run together give their `share`: each tries its own sites, and
    all get the effects at every site. The pipeline is afterwards as it was.
    """
    there, drawing = _tried(pipe, sites), drawing or Drawing.of(pipe)
    harmful, safe, benign = chosen(prompts, pairs)
    levels = schedule(pipe, drawing)
    sizes = {"sites": len(there), "pairs": len(harmful), "benign": len(benign), "sigmas": min(sigmas, len(levels))}
    trial = Trial.within(budget, **sizes, steps=len(levels), doubled=guided(pipe, drawing))
    harmful, safe, benign = harmful[: trial.pairs], safe[: trial.pairs], benign[: trial.benign]
    share = _share(share, len(there))
    replay, taken = Replay(pipe, drawing), counted(harmful, source)
    given = _caught(replay, harmful, safe, benign, trial.steps, batch_size)
    mine = there[share.rank :: share.world]
    swapped, seen = _swapped(replay, given, mine, batch_size)
    directions = seen.directions(taken, len(trial.steps))
    removed, harm = _removed(replay, given, seen, directions, mine, batch_size)
    shape = {"site": len(there), "sigma": len(trial.steps)}
    tables = [
        rearrange(share.joined(table, len(there)), "site (sigma row) -> site sigma row", **shape)
        for table in (swapped, removed, harm)
    ]
    return Effects(
        sites=there,
        sigmas=[levels[step] for step in trial.steps],
        prompt_ids=[row["id"] for row in harmful],
        interchange=tables[0],
        removal=tables[1],
        benign_ids=[row["id"] for row in benign],
        harm=tables[2],
        forwards=trial.forwards if share.world > 1 else replay.rows,
    )


def _share(share: Share | None, sites: int) -> Share:
    if share is not None and share.world > sites:
        raise UsageError(f"{share.world} processes share {sites} sites: launch at most as many.")
    return share or Share(0, 1)


@torch.no_grad()
def interchange_together(
    pipe: Any,
    prompts: Prompts,
    sites: Iterable[str | Site],
    *,
    drawing: Drawing | None = None,
    pairs: int = 32,
    sigmas: int = 3,
    batch_size: int = 16,
) -> Float[Tensor, "sigma pair"]:
    """The effect of swapping all of these sites at once, for the prompts that `interchange` takes."""
    there, drawing = _tried(pipe, sites), drawing or Drawing.of(pipe)
    harmful, safe, _ = chosen(prompts, pairs)
    replay, steps = Replay(pipe, drawing), spread(len(schedule(pipe, drawing)), sigmas)
    given = _caught(replay, harmful, safe, [], steps, batch_size)
    effects = []
    for rows in chunks(len(given.harmful), batch_size):
        kept: dict[Site, Tensor] = {}
        unpatched = replay.velocity(given.harmful.of(rows))
        wanted = replay.velocity(given.safe.of(rows), {site: _keeping(kept, site) for site in there})
        patched = replay.velocity(given.harmful.of(rows), {site: _giving(kept[site]) for site in there})
        effects.append(_effect(patched, unpatched, wanted))
    return rearrange(torch.cat(effects), "(sigma pair) -> sigma pair", sigma=len(steps))


@dataclass(frozen=True)
class _Given:
    """What the transformer is called with; σ by σ, the rows of a σ in the order of the prompts."""

    harmful: Inputs
    safe: Inputs
    benign: Inputs | None


@dataclass(frozen=True)
class _Seen:
    """What the unpatched forwards have shown."""

    harmful: Float[Tensor, "row n"]
    """Their velocities."""
    safe: Float[Tensor, "row n"]
    delta: list[Tensor]
    """At each site [row, d_in]: harmful − safe, the mean over an image's tokens."""
    means: list[Tensor]
    """The same of the safe twins alone."""

    def directions(self, counted: list[bool], sigmas: int) -> list["Direction"]:
        """At each site."""
        return [direction_of(delta, mean, counted, sigmas) for delta, mean in zip(self.delta, self.means, strict=True)]


def _tried(pipe: Any, sites: Iterable[str | Site]) -> list[Site]:
    there = resolve(pipe, sites)
    for site in there:
        if site.component != "transformer":
            raise UsageError(f"'{site}' is passed before the first σ: swap 'txt.embed' or 'pooled.embed' instead.")
    return there


def _swapped(
    replay: Replay, given: _Given, sites: list[Site], batch_size: int
) -> tuple[Float[Tensor, "site row"], _Seen]:
    """The harmful rows with each site's activations taken from the twins'."""
    effects, velocities = [], []
    pooled: list[tuple[dict[Site, Tensor], dict[Site, Tensor]]] = []
    for rows in track(chunks(len(given.harmful), batch_size), "Swapping activations with the twins'"):
        means: dict[Site, Tensor] = {}
        kept: dict[Site, Tensor] = {}
        harmful = given.harmful.of(rows)
        unpatched = replay.velocity(harmful, {site: _averaging(means, site) for site in sites})
        wanted = replay.velocity(given.safe.of(rows), {site: _keeping(kept, site) for site in sites})
        patched = [replay.velocity(harmful, {site: _giving(kept[site])}) for site in sites]
        effects.append(torch.stack([_effect(v, unpatched, wanted) for v in patched]))
        velocities.append((unpatched, wanted))
        pooled.append((means, {site: _mean(x) for site, x in kept.items()}))
    mean = [[torch.cat([part[kind][site] for part in pooled]) for site in sites] for kind in (0, 1)]
    seen = _Seen(
        *(torch.cat([part[kind] for part in velocities]) for kind in (0, 1)),
        delta=[harmful - safe for harmful, safe in zip(*mean, strict=True)],
        means=mean[1],
    )
    return torch.cat(effects, dim=1), seen


def _removed(
    replay: Replay, given: _Given, seen: _Seen, directions: list[Direction], sites: list[Site], batch_size: int
) -> tuple[Float[Tensor, "site row"], Float[Tensor, "site benign"]]:
    """The harmful rows without each site's component along Δ, and what the same does to benign ones."""
    effects, harm = [], [torch.zeros(len(sites), 0)]
    for rows in track(chunks(len(given.harmful), batch_size), "Removing the direction of Δ"):
        inputs, at = given.harmful.of(rows), list(rows)
        without = [
            replay.velocity(inputs, {site: removing(one.unit[at], one.centre[at])})
            for site, one in zip(sites, directions, strict=True)
        ]
        effects.append(torch.stack([_effect(v, seen.harmful[at], seen.safe[at]) for v in without]))
    benign = given.benign
    for rows in chunks(len(benign), batch_size) if benign is not None else ():
        assert benign is not None
        inputs = benign.of(rows)
        sigma = [row * len(directions[0].unit_benign) // len(benign) for row in rows]
        v = replay.velocity(inputs)
        without = [
            replay.velocity(inputs, {site: removing(one.unit_benign[sigma], one.centre_benign[sigma])})
            for site, one in zip(sites, directions, strict=True)
        ]
        harm.append(torch.stack([(one - v).norm(dim=1) / v.norm(dim=1) for one in without]))
    return torch.cat(effects, dim=1), torch.cat(harm, dim=1)


def _effect(
    patched: Float[Tensor, "row n"], v: Float[Tensor, "row n"], wanted: Float[Tensor, "row n"]
) -> Float[Tensor, " row"]:
    """How much of the way from `v` to `wanted` was gone; 0 where there is no way to go."""
    way = (wanted - v).double()
    length = way.square().sum(1)
    gone = ((patched - v).double() * way).sum(1)
    return torch.where(length > 0, gone / length, torch.zeros_like(gone)).float()


def _mean(x: Float[Tensor, "row token d_in"]) -> Float[Tensor, "row d_in"]:
    return x.float().mean(1).cpu()


def _averaging(means: dict[Site, Tensor], site: Site) -> Callable[[Tensor], None]:
    def look(x: Tensor) -> None:
        means[site] = _mean(x)

    return look


def _keeping(kept: dict[Site, Tensor], site: Site) -> Callable[[Tensor], None]:
    def look(x: Tensor) -> None:
        kept[site] = x.clone()

    return look


def _giving(new: Float[Tensor, "row token d_in"]) -> Callable[[Tensor], Tensor]:
    return lambda x: new


def _caught(replay: Replay, harmful: Rows, safe: Rows, benign: Rows, steps: Sequence[int], batch_size: int) -> _Given:
    """Draw harmful prompts with their twins on the same latents, and benign ones; σ by σ."""
    beside, alone = [], []
    for rows in track(chunks(len(harmful), max(1, batch_size // 2)), "Drawing up to the σ that are tried"):
        images = [harmful[row] for row in rows] + [safe[row] for row in rows]
        beside.append(replay.catch(images, steps, twins=len(rows)))
    for rows in chunks(len(benign), batch_size):
        alone.append(replay.catch([benign[row] for row in rows], steps))
    halves = [[part.of(range(len(part) // 2)) for part in parts] for parts in beside]
    others = [[part.of(range(len(part) // 2, len(part))) for part in parts] for parts in beside]
    return _Given(*(_by_sigma(parts) for parts in (halves, others)), benign=_by_sigma(alone) if alone else None)


def _by_sigma(parts: list[list[Inputs]]) -> Inputs:
    return Inputs.joined([Inputs.joined(list(one_sigma)) for one_sigma in zip(*parts, strict=True)])
