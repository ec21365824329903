"""Recordings of phrases: a word is a set of features, so that it is known what tells of harm, alone or together."""

from typing import Any

import torch

from safedig.activations.record import Activations, Batch
from safedig.features import Dose, Features
from safedig.sae.model import Decoder, SparseAutoencoder, ThresholdEncoder
from safedig.sites import Site

SITE = Site.parse("txt.embed")
D_IN, TOKENS = 12, 6
PAD, ARTICLE, GUN, FLAME, SHARP, BOTTLE, CAR, CUP, TREE, DULL = range(10)
WORDS: dict[str, dict[int, float]] = {
    ".": {PAD: 1.0},
    "a": {ARTICLE: 1.0},
    "gun": {GUN: 0.5, SHARP: 1.0},
    "flame": {FLAME: 0.5, SHARP: 1.0},
    "sharp": {SHARP: 2.0, DULL: 0.5},
    "bottle": {BOTTLE: 1.0},
    "car": {CAR: 1.0},
    "cup": {CUP: 1.0},
    "tree": {TREE: 1.0},
}


def sae(features: torch.Tensor | None = None, d_sae: int = D_IN, **metadata: Any) -> SparseAutoencoder:
    """Feature j reads coordinate j; with `features` the coordinates are read by those of many, and others are dead."""
    index = torch.arange(D_IN) if features is None else features
    W = torch.zeros(D_IN, d_sae)
    W[torch.arange(D_IN), index] = 1.0
    encoder = ThresholdEncoder(W, torch.zeros(d_sae), torch.full((d_sae,), 0.1))
    return SparseAutoencoder(encoder, Decoder(W.T.contiguous(), torch.zeros(D_IN)), {"model": "fingerprint"} | metadata)


def token(word: str) -> torch.Tensor:
    x = torch.zeros(D_IN)
    for feature, size in WORDS[word].items():
        x[feature] = size
    return x


def told(phrase: str, seed: int = 0, risk: str = "", twin: str = "", kind: str = "benign") -> list[dict[str, Any]]:
    """The row of a prompt, and that of its safe twin behind it."""
    name = f"{phrase}-{seed}"
    both = {"id": name, "prompt": phrase, "seed": seed, "risk": risk, "kind": "harmful" if risk else kind, "twin": ""}
    if not twin:
        return [both]
    return [both | {"twin": f"{name}-safe"}, *(row | {"id": f"{name}-safe"} for row in told(twin, seed))]


def tokens(row: dict[str, Any], noise: float, step: int = 0) -> torch.Tensor:
    """The words of the prompt, and padding; the noise of a token is that of its image and place."""
    words = row["prompt"].split()
    generator = torch.Generator().manual_seed(1000 * row["seed"] + step)
    clean = torch.stack([token(word) for word in [*words, *["."] * (TOKENS - len(words))]])
    return clean + noise * torch.randn(TOKENS, D_IN, generator=generator)


def recording(rows: list[dict[str, Any]], noise: float = 0.0, steps: int = 1, site: Site = SITE) -> Activations:
    batches = [
        Batch(
            site,
            step,
            1.0 - step / steps,
            [row["id"] for row in part for _ in range(TOKENS)],
            [row["seed"] for row in part for _ in range(TOKENS)],
            ("cond",) * (TOKENS * len(part)),
            torch.arange(TOKENS).repeat(len(part)),
            torch.cat([tokens(row, noise, step) for row in part]),
        )
        for part in (rows[at : at + 8] for at in range(0, len(rows), 8))
        for step in range(steps)
    ]
    return Activations(lambda sites, ids: batches, [site], rows, "fingerprint")


def known_dose() -> Dose:
    """A gun, a flame, or a bottle beside a car."""
    weights = torch.zeros(D_IN)
    weights[GUN] = weights[FLAME] = 2.0
    half = torch.tensor(-0.5)
    return Dose(weights, half, torch.tensor([[BOTTLE, CAR]]), torch.ones(1), half.clone(), torch.ones(D_IN))


def features(threshold: float = 0.0) -> Features:
    """All features of `sae`, calibrated by hand."""
    every = torch.arange(D_IN)
    return Features(every, threshold, torch.ones(D_IN), torch.ones(D_IN), dose=known_dose())
