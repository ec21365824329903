"""Two domains of one dictionary, as recordings: in the target some atoms point elsewhere, so a decoder must move."""

from typing import Any

import torch
from torch.nn.functional import normalize

from safedig.activations.record import Activations, Batch
from safedig.sae.model import Decoder, SparseAutoencoder, ThresholdEncoder
from safedig.sites import Site

SITE, OTHER = Site.parse("txt.embed"), Site.parse("img.embed")
D_IN, D_SAE, TOKENS, PROMPTS = 12, 24, 25, 80
TURNED, SILENT, RARE = slice(0, 6), slice(20, 22), 22
"""Atoms that the target turns; those it never shows; one that it shows once."""


def sae(seed: int = 0) -> SparseAutoencoder:
    """An encoder that reads 24 directions in 12 dimensions, beside a rough decoder."""
    generator = torch.Generator().manual_seed(seed)
    W_enc = normalize(torch.randn(D_IN, D_SAE, generator=generator), dim=0)
    rough = W_enc.T + 0.1 * torch.randn(D_SAE, D_IN, generator=generator)
    encoder = ThresholdEncoder(W_enc, torch.zeros(D_SAE), torch.full((D_SAE,), 0.6))
    return SparseAutoencoder(encoder, Decoder(rough, torch.zeros(D_IN)), {"model": "fingerprint", "site": str(SITE)})


def overgrown(features: int = 300) -> SparseAutoencoder:
    """Far more features than these rows can tell apart, beside a decoder that is not bad."""
    generator = torch.Generator().manual_seed(4)
    W_enc = normalize(torch.randn(D_IN, features, generator=generator), dim=0)
    encoder = ThresholdEncoder(W_enc, torch.zeros(features), torch.full((features,), 0.9))
    return SparseAutoencoder(
        encoder, Decoder(W_enc.T / 10, torch.zeros(D_IN)), {"model": "fingerprint", "site": str(SITE)}
    )


def source(rows: int = PROMPTS * TOKENS, seed: int = 1) -> torch.Tensor:
    """Rows of two atoms each, with noise."""
    generator = torch.Generator().manual_seed(seed)
    atoms = sae().encoder.W_enc.T
    weight = torch.rand(rows, D_SAE, generator=generator) + 0.7
    chosen = torch.rand(rows, D_SAE, generator=generator).argsort(1) < 2
    return (weight * chosen) @ atoms + 0.05 * torch.randn(rows, D_IN, generator=generator)


def target(rows: int = PROMPTS * TOKENS, seed: int = 2, shift: float = 0.0) -> torch.Tensor:
    """The same codes mean other vectors here: what lies along the first atoms is partly moved to fixed directions."""
    generator = torch.Generator().manual_seed(7)
    moved = 0.5 * torch.randn(6, D_IN, generator=generator)
    x = source(rows, seed)
    z = sae().encode(x)
    return x + z[:, TURNED] @ moved + shift * normalize(torch.randn(D_IN, generator=generator), dim=0)


def prompts(count: int = PROMPTS) -> list[dict[str, Any]]:
    return [{"id": f"p{n}", "seed": n, "risk": "", "kind": "benign", "twin": ""} for n in range(count)]


def recording(x: torch.Tensor, sites: tuple[Site, ...] = (SITE,), per_batch: int = 10) -> Activations:
    """These rows as tokens of prompts, the same at every site, a few prompts a batch."""
    rows = prompts(len(x) // TOKENS)
    batches = [
        Batch(
            site,
            0,
            1.0,
            [row["id"] for row in part for _ in range(TOKENS)],
            [row["seed"] for row in part for _ in range(TOKENS)],
            ("cond",) * (TOKENS * len(part)),
            torch.arange(TOKENS).repeat(len(part)),
            x[at * TOKENS : (at + len(part)) * TOKENS],
        )
        for at in range(0, len(rows), per_batch)
        for part in [rows[at : at + per_batch]]
        for site in sites
    ]
    return Activations(lambda sites, ids: batches, list(sites), rows, "fingerprint")


def fvu(sae: SparseAutoencoder, x: torch.Tensor) -> float:
    left = (x - sae.decode(sae.encode(x))).double().square().sum()
    return (left / (x - x.mean(0)).double().square().sum()).item()
