"""CLIP as an eye: images and texts as unit vectors, from a local folder or the Hub."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from safedig.config import UsageError
from safedig.evaluation.judges.judge import hash_of
from safedig.evaluation.pictures import Image, as_pil
from safedig.hub import why_not

LARGE = "openai/clip-vit-large-patch14"


class Clip:
    """A CLIPModel with its processor and tokenizer; both embeddings have length 1, so that products are cosines."""

    def __init__(self, source: str = LARGE, device: str = "cpu") -> None:
        from transformers import CLIPModel, CLIPTokenizer
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        self.source = source
        self._model: Any = fetched(CLIPModel, source).eval().requires_grad_(False).to(device)
        self._processor: Any = fetched(CLIPImageProcessorPil, source)
        self._tokenizer: Any = fetched(CLIPTokenizer, source)
        self._device = device

    @cached_property
    def weights_sha(self) -> str:
        return hash_of(self._model)

    @torch.inference_mode()
    def images(self, images: Sequence[Image]) -> Float[Tensor, "n d"]:
        """Any sizes, RGB in 0 … 1."""
        if not images:
            return torch.zeros(0, self._model.config.projection_dim)
        prepared = self._processor(images=[as_pil(image) for image in images], return_tensors="pt")
        return _unit(self._model.get_image_features(pixel_values=prepared["pixel_values"].to(self._device)))

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Float[Tensor, "n d"]:
        """Cut at CLIP's own length."""
        given = self._tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt").to(self._device)
        return _unit(
            self._model.get_text_features(input_ids=given["input_ids"], attention_mask=given["attention_mask"])
        )

    def score(self, images: Sequence[Image], texts: Sequence[str]) -> Float[Tensor, " n"]:
        """CLIP score of each image with its own text: 100 × cosine, at least 0 (Hessel et al. 2021, w = 1)."""
        return (100 * (self.images(images) * self.texts(texts)).sum(-1)).clamp(min=0)


def fetched(kind: Any, source: str, **options: Any) -> Any:
    """`kind.from_pretrained(source)`, or a `UsageError` that says what to do; safetensors only."""
    if hasattr(kind, "load_state_dict"):
        options = {"use_safetensors": True} | options
    try:
        return kind.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        raise UsageError(f"{kind.__name__} cannot be loaded: {why_not(source, error)}") from error


def _unit(found: Any) -> Float[Tensor, "n d"]:
    """The projected features, which some versions wrap in an output."""
    x = found if isinstance(found, Tensor) else found.pooler_output
    return torch.nn.functional.normalize(x.float(), dim=-1).cpu()
