"""Recordings made by hand: harm is one known direction, so that what should be found and fitted is known exactly."""

from typing import Any

import torch

from safedig.activations.record import Activations, Batch
from safedig.sae.model import Decoder, SparseAutoencoder, ThresholdEncoder
from safedig.sites import Site

SITE = Site.parse("txt.embed")
D_IN, D_SAE, TOKENS, STEPS = 8, 16, 5, 2
HARM, WEAK, SHARED, RARE = 3, 4, 5, 6
"""Features: fires on harm only; on harm and, less, on twins; on everything; on the harm of every tenth prompt only."""


def sae() -> SparseAutoencoder:
    """Feature j reads coordinate j; features 8–15 never fire."""
    eye = torch.eye(D_IN)
    encoder = ThresholdEncoder(torch.cat([eye, -eye], 1), torch.zeros(D_SAE), torch.full((D_SAE,), 0.1))
    decoder = Decoder(torch.cat([eye, -eye], 0), torch.zeros(D_IN))
    return SparseAutoencoder(encoder, decoder, {"model": "fingerprint", "site": str(SITE)})


def rows(prompts: int = 20, twins: bool = True) -> list[dict[str, Any]]:
    harmful = [
        {"id": f"h{i}", "seed": i, "risk": "weapons", "kind": "harmful", "twin": f"s{i}" if twins else ""}
        for i in range(prompts)
    ]
    safe = [{"id": f"s{i}", "seed": i, "risk": "", "kind": "benign", "twin": ""} for i in range(prompts)]
    other = [{"id": f"b{i}", "seed": i, "risk": "", "kind": "benign", "twin": ""} for i in range(prompts)]
    vague = [{"id": f"u{i}", "seed": i, "risk": "", "kind": "underspecified", "twin": ""} for i in range(prompts)]
    return [*(row for both in zip(harmful, safe, strict=True) for row in both), *other, *vague]


def activation(row: dict[str, Any], step: int) -> torch.Tensor:
    """One image: token 1 of a harmful prompt holds the harm; its twin has the same everything else."""
    generator = torch.Generator().manual_seed(1000 * row["seed"] + step)
    x = 0.01 * torch.randn(TOKENS, D_IN, generator=generator)
    x[:, SHARED] = 1 + 0.1 * torch.rand(TOKENS, generator=generator)
    harmful = row["id"].startswith(("h", "u"))
    if harmful:
        x[1, HARM] = 2 + torch.rand((), generator=generator)
        x[1, RARE] = 1.0 if row["seed"] % 10 == 0 else 0.0
    if harmful or row["id"].startswith("s"):
        x[2, WEAK] = 1.0 if harmful else 0.8
    return x


def recording(prompts: list[dict[str, Any]] | None = None, site: Site = SITE, batch_size: int = 7) -> Activations:
    given = rows() if prompts is None else prompts
    batches = [
        Batch(
            site,
            step,
            1.0 - step / STEPS,
            [row["id"] for row in part for _ in range(TOKENS)],
            [row["seed"] for row in part for _ in range(TOKENS)],
            ("cond",) * (TOKENS * len(part)),
            torch.arange(TOKENS).repeat(len(part)),
            torch.cat([activation(row, step) for row in part]),
        )
        for part in (given[at : at + batch_size] for at in range(0, len(given), batch_size))
        for step in range(STEPS)
    ]
    return Activations(lambda sites, ids: batches, [site], given, "fingerprint")
