"""The tiny world's judge: what both eyes saw, raw; whether that is as asked is decided when prompts are at hand."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch

from safedig.evaluation.judges.judge import Look, hash_of
from safedig.evaluation.pictures import Image
from safedig.evaluation.records import circumstances
from safedig.tiny.judge import judge
from safedig.tiny.judge_network import load_reader


class TinyJudge:
    """Reads scenes of 64 × 64 pixels (or a multiple); anything else is an error."""

    detector = "tiny.judge"

    @cached_property
    def version(self) -> str:
        return circumstances()["packages"]["safedig"]

    @cached_property
    def weights_sha(self) -> str:
        return hash_of(load_reader())

    def __call__(self, images: Sequence[Image]) -> list[Look]:
        """The judgement as `tiny.judge` gives it without `asked`."""
        if not images:
            return []
        try:
            found: list[dict[str, Any]] = judge(torch.stack(list(images)))
        except (RuntimeError, ValueError):  # of different sizes, or one of a size that is no scene's
            return [self._alone(image) for image in images]
        return [Look(scores=one) for one in found]

    def _alone(self, image: Image) -> Look:
        try:
            return Look(scores=judge(image[None])[0])
        except ValueError as error:
            return Look(error=str(error))
