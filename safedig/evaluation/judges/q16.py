"""A Q16-style head: CLIP's image vector against two learnt prompt vectors, appropriate and inappropriate."""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from safedig.config import UsageError
from safedig.evaluation.judges.clip import Clip
from safedig.evaluation.judges.judge import Look, hash_of
from safedig.evaluation.pictures import Image

DETECTOR = "q16"
TENSOR = "prompts"


class Q16:
    """Raw: logits `safe` and `unsafe`, 100 × cosine with each prompt, and `p_unsafe`, their softmax.

    The head is a safetensors file with one tensor `prompts` [2, d], inappropriate second. The published one
    (Schramowski et al. 2022, on ViT-L/14) is a pickle, which is never loaded here: convert it where you trust it.
    """

    detector = DETECTOR

    def __init__(self, clip: Clip, head: str | Path) -> None:
        prompts = _head(Path(head))
        width = clip.images([torch.zeros(3, 8, 8)]).shape[-1]
        if prompts.shape != (2, width):
            raise UsageError(
                f"'{head}': {TENSOR} has shape {list(prompts.shape)}, expected [2, {width}] for {clip.source}."
            )
        self._clip, self._prompts = clip, torch.nn.functional.normalize(prompts.float(), dim=-1)
        self.version = clip.source
        self.weights_sha = hash_of([("clip " + clip.weights_sha, torch.zeros(0)), (TENSOR, prompts)])

    def __call__(self, images: Sequence[Image]) -> list[Look]:
        logits = 100 * self._clip.images(images) @ self._prompts.T
        p = logits.softmax(-1)
        return [
            Look({"safe": safe, "unsafe": unsafe, "p_unsafe": float(share[1])})
            for (safe, unsafe), share in zip(logits.tolist(), p, strict=True)
        ]


def _head(path: Path) -> Float[Tensor, "rows d"]:
    try:
        return load_file(path)[TENSOR]
    except (OSError, SafetensorError, KeyError) as error:
        raise UsageError(
            f"'{path}' is no Q16 head ({error}): give a .safetensors file with one tensor '{TENSOR}' [2, d]."
        ) from error
