"""Tokens of harm projected out of the prompt's text, within what its other words span: SAFREE, its text half.

SAFREE (arXiv 2410.12761). C: columns are the embeddings of words of harm, P_C = C C⁺. p̄_i: the pooled
embedding of the prompt without word i, I: these as columns, P_I = I I⁺. A word triggers if without it the prompt is
further from harm than without others: ‖(1 − P_C) p̄_i‖ > (1 + α) · mean_{j≠i} ‖(1 − P_C) p̄_j‖, α = 0.01. Then

    p'_i = p_i + s · (P_I (1 − P_C) p_i − p_i)    for the tokens of triggering words, and the pooled vector if any is.

s = 1 is the paper's, s = 0 changes no bit. Tokens and pooled vectors have subspaces of their own, for these models read
both. Left out are the choice of how many steps the projected text is used in (here: all) and the filter of latents.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .lesson import Lesson
from .method import Learnt
from .text import Encode, OnText, Text
from .words import hazard_words

ALPHA = 0.01
CONCEPTS = 8  # words of harm that span its subspace


@dataclass(frozen=True)
class Safree:
    """Strength in projections."""

    name: str = "SAFREE"
    unit: float = 1.0

    def learn(self, lesson: Lesson) -> Learnt:
        concepts = hazard_words(lesson.pairs, lesson.benign)[:CONCEPTS]

        def at(strength: float) -> OnText:
            def meaning(prompts: list[str], text: Text, encode: Encode) -> Text:
                if strength == 0:
                    return text
                return projected(lesson.pipe, prompts, text, encode, concepts, strength)

            return OnText("cond", meaning=meaning)

        return at


def projected(pipe: Any, prompts: list[str], text: Text, encode: Encode, concepts: list[str], strength: float) -> Text:
    """The text of each prompt with its triggering words projected; several images of a prompt lie side by side."""
    harm = encode(concepts)
    inside = [_mean(harm.tokens[at], pipe, word) for at, word in enumerate(concepts)]
    away = outside(torch.stack(inside, 1)), outside(harm.pooled.T)
    tokens, pooled = text.tokens.clone(), text.pooled.clone()
    copies = len(tokens) // len(prompts)
    for at, prompt in enumerate(prompts):
        words = [found.span() for found in re.finditer(r"\S+", prompt)]
        if len(words) < 2:
            continue
        fewer = [f"{prompt[:start]}{prompt[stop:]}".strip() for start, stop in words]
        others = encode(fewer)
        triggering = triggers((others.pooled @ away[1]).norm(dim=1))
        if not triggering.any():
            continue
        means = torch.stack([_mean(others.tokens[i], pipe, one) for i, one in enumerate(fewer)], 1)
        change = within(means) @ away[0]
        positions = token_positions(pipe, prompt, tokens.shape[1])
        hit = [token for word in triggering.nonzero()[:, 0].tolist() for token in positions[word]]
        for row in range(at * copies, (at + 1) * copies):
            here = tokens[row, hit]
            tokens[row, hit] = here + strength * (here @ change.T - here)
            safe = within(others.pooled.T) @ away[1] @ pooled[row]
            pooled[row] = pooled[row] + strength * (safe - pooled[row])
    return Text(tokens, pooled)


def within(columns: Float[Tensor, "d n"]) -> Float[Tensor, "d d"]:
    """The projection on what the columns span."""
    return columns @ torch.linalg.pinv(columns)


def outside(columns: Float[Tensor, "d n"]) -> Float[Tensor, "d d"]:
    """The projection on what is orthogonal to the columns."""
    return torch.eye(len(columns)).to(columns) - within(columns)


def triggers(distance: Float[Tensor, " word"]) -> Tensor:
    """Which words, left out, take the prompt further from harm than others do."""
    others = (distance.sum() - distance) / (len(distance) - 1)
    return distance > (1 + ALPHA) * others


def token_positions(pipe: Any, prompt: str, length: int) -> list[list[int]]:
    """The places of each word in the sequence the transformer reads: T5's, in Stable Diffusion 3 behind CLIP's."""
    parts = [(pipe.tokenizer, 0), (pipe.tokenizer_3, pipe.tokenizer_max_length)] if hasattr(pipe, "tokenizer_3") else []
    words = [found.span() for found in re.finditer(r"\S+", prompt)]
    places: list[list[int]] = [[] for _ in words]
    for tokenizer, start in parts or [(pipe.tokenizer_2, 0)]:
        end = pipe.tokenizer_max_length if parts and start == 0 else length
        for token, (low, high) in enumerate(tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"]):
            for word, (first, last) in enumerate(words):
                if first <= low < high <= last and start + token < end:
                    places[word].append(start + token)
    return places


def _mean(tokens: Float[Tensor, "token d"], pipe: Any, prompt: str) -> Float[Tensor, " d"]:
    """Of a text's own tokens, without padding."""
    own = [token for word in token_positions(pipe, prompt, len(tokens)) for token in word]
    return tokens[own].mean(0)
