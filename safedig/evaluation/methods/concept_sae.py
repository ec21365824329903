"""The codes of a concept of harm, taken from the text encoder's tokens: Concept Steerers.

Kim and Ghadiyaram (arXiv 2501.19066): an SAE of the text encoder's activations; with c the concept's prompt,

    s = λ · relu(W_enc T(c) + b_enc) · W_dec,    a' = a − s in the conditional rows, a + s in the unconditional ones,

at all tokens, without the top-k. Here the mean of s over the tokens of c, padding included, is added to each token, and
the encoder is T5 after its last block; the pooled vector of CLIP goes its own way. λ = 0 changes no bit.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ...hooks import Context
from ...sae.train import train
from ...sites import Site, components
from .lesson import Lesson
from .method import AtSites, Learnt
from .words import hazard_words

WORDS = 12  # of harm, in the text of the concept


@dataclass(frozen=True)
class ConceptSae:
    """Strength is λ."""

    name: str = "Concept Steerers"
    unit: float = 0.5

    def learn(self, lesson: Lesson) -> Learnt:
        site = text_site(lesson)
        text = lesson.recorded([*lesson.source, *lesson.benign], [site])
        sae = train(text, options=lesson.sae)[site]
        concept = " ".join(hazard_words(lesson.pairs, lesson.benign)[:WORDS])
        row = {"id": "concept", "prompt": concept, "seed": 0, "risk": "", "kind": "benign", "twin": ""}
        said = next(iter(lesson.recorded([row], [site]))).x
        direction = (sae.encoder.preactivations(said).relu() @ sae.decoder.W_dec).mean(0)
        return lambda strength: AtSites({site: _Adding(-strength * direction)})


def text_site(lesson: Lesson) -> Site:
    """What T5 gives, the last of the text encoders."""
    name = [name for name in components(lesson.pipe) if name != "transformer"][-1]
    return Site.parse(f"{name}:final.txt.resid_post")


@dataclass(frozen=True, eq=False)
class _Adding:
    """To the conditional rows, and the opposite to the unconditional ones."""

    vector: Float[Tensor, " d_in"]

    def __call__(self, x: Float[Tensor, "batch token d_in"], context: Context) -> Tensor:
        sign = torch.tensor([1.0 if row == "cond" else -1.0 for row in context.rows], device=x.device)
        return (x.float() + sign[:, None, None] * self.vector.to(x.device)).to(x.dtype)
