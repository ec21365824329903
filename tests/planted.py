"""Recordings in which it is known where harm lies, whether it is the same in every domain, and where there is none."""

from collections.abc import Mapping
from typing import Any

import torch

from safedig.activations.record import Activations, Batch
from safedig.routing.causal import Effects
from safedig.sites import Site

TXT, POOLED = Site.parse("txt.embed"), Site.parse("pooled.embed")
BIND_TXT, BIND = (Site.parse(f"transformer_blocks.0.{stream}.resid_post") for stream in ("txt", "img"))
RENDER, LAST = (Site.parse(f"single_transformer_blocks.{index}.img.resid_post") for index in (0, 1))
SITES = [TXT, POOLED, BIND_TXT, BIND, RENDER, LAST]
SOURCE, TARGET = ("fire", "weapon"), "poison"
D_IN, TOKENS, STEPS = 12, 4, 2
Rule = Mapping[str, float]
"""How far harm lifts each domain along the one direction of a site."""
TRANSFERS: Rule = {"fire": 1.5, "weapon": 1.5, "poison": 1.5}
FLIPS: Rule = {"fire": 3.0, "weapon": 3.0, "poison": -3.0}
NOISE: Rule = {}


def rows(pairs: int = 16, twins: bool = True, seeds: int = 1, domains: tuple[str, ...] = (*SOURCE, TARGET)) -> Any:
    """Of each domain `pairs` harmful prompts, each followed by its safe twin."""
    made: list[dict[str, Any]] = []
    for number, (domain, pair, seed) in enumerate(
        (domain, pair, seed) for domain in domains for pair in range(pairs) for seed in range(seeds)
    ):
        name, seed = f"{domain}-{pair}", 7 * pair + seed
        text = {"prompt": name, "seed": seed, "number": number}
        made.append(text | {"id": name, "risk": domain, "kind": "harmful", "twin": f"{name}-safe" if twins else ""})
        made.append(text | {"id": f"{name}-safe", "risk": "", "kind": "benign", "twin": ""})
    return made


def recording(
    rules: Mapping[Site, Rule] | None = None,
    prompts: list[dict[str, Any]] | None = None,
    seed: int = 0,
    scene: float = 1.0,
    tokens: int = TOKENS,
    turn: torch.Tensor | None = None,
    scale: float = 1.0,
    per_batch: int = 8,
    twin_of: Mapping[Site, Site] | None = None,
) -> Activations:
    """Twins share a scene, each token has noise of its own, and harm is added along a direction of the site.

    `rules` say how far, `twin_of` which sites hold the same numbers as another one.
    """
    given = rows() if prompts is None else prompts
    placed = rules or {SITES[0]: TRANSFERS}
    batches = [
        Batch(
            site,
            step,
            1.0 - step / STEPS,
            [row["id"] for row in part for _ in range(tokens)],
            [row["seed"] for row in part for _ in range(tokens)],
            ("cond",) * (tokens * len(part)),
            torch.arange(tokens).repeat(len(part)),
            torch.cat([_tokens(row, (twin_of or {}).get(site, site), step, rule, seed, scene, tokens) for row in part])
            @ (torch.eye(D_IN, dtype=torch.float64) if turn is None else turn)
            * scale,
        )
        for part in (given[at : at + per_batch] for at in range(0, len(given), per_batch))
        for step in range(STEPS)
        for site, rule in placed.items()
    ]
    return Activations(lambda sites, ids: batches, list(placed), given, "fingerprint")


def _tokens(row: Any, site: Site, step: int, rule: Rule, seed: int, scene: float, tokens: int) -> torch.Tensor:
    where = 1009 * SITES.index(site) + 100_003 * seed
    shared = torch.Generator().manual_seed(where + 31 * row["number"])
    own = torch.Generator().manual_seed(10**8 + where + 62 * row["number"] + 17 * step + bool(row["risk"]))
    along = torch.zeros(D_IN, dtype=torch.float64)
    along[SITES.index(site)] = rule.get(row["risk"], 0.0)
    base = scene * torch.randn(1, D_IN, generator=shared, dtype=torch.float64)
    return base + along + torch.randn(tokens, D_IN, generator=own, dtype=torch.float64)


def effects(carried: Mapping[Site, float], pairs: int = 12, seed: int = 0) -> Effects:
    """As if swapping a site had carried this share of the twins' velocity, give or take a little of it by prompt."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(carried), STEPS, pairs)
    mean = torch.tensor(list(carried.values()))[:, None, None]
    around = mean * (1 + 0.05 * torch.randn(shape, generator=generator))
    return Effects(
        sites=list(carried),
        sigmas=[1.0, 0.5],
        prompt_ids=[f"fire-{pair}" for pair in range(pairs)],
        interchange=around,
        removal=around / 2,
        benign_ids=["fire-0-safe", "fire-1-safe"],
        harm=torch.full((len(carried), STEPS, 2), 0.1),
        forwards=100,
    )
