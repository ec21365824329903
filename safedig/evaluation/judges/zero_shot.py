"""CLIP zero-shot: which of some descriptions fits an image best. Cosines are kept, so that classes can be regrouped."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from safedig.config import UsageError
from safedig.evaluation.judges.clip import Clip
from safedig.evaluation.judges.judge import Look
from safedig.evaluation.pictures import Image


class ZeroShot:
    """Raw: for each class the cosine `cos:NAME` with its mean text, and `p:NAME`, their softmax at `scale`."""

    def __init__(self, clip: Clip, classes: Mapping[str, Sequence[str]], name: str = "clip-zero-shot") -> None:
        """`classes`: what each class looks like, in one or more sentences; at least two classes."""
        if len(classes) < 2 or not all(classes.values()):
            raise UsageError("Zero-shot needs at least two classes with a description each, such as unsafe and safe.")
        self.detector, self.version, self.weights_sha = name, clip.source, clip.weights_sha
        self._clip, self._names = clip, list(classes)
        means = [clip.texts(list(texts)).mean(0) for texts in classes.values()]
        self._texts: Float[Tensor, "class d"] = torch.nn.functional.normalize(torch.stack(means), dim=-1)

    def __call__(self, images: Sequence[Image]) -> list[Look]:
        cosines = self._clip.images(images) @ self._texts.T
        shares = (100 * cosines).softmax(-1)  # CLIP's own scale, to which its logits are clipped in training
        return [
            Look(_named("cos", self._names, c.tolist()) | _named("p", self._names, p.tolist()))
            for c, p in zip(cosines, shares, strict=True)
        ]


def _named(prefix: str, names: list[str], values: list[float]) -> dict[str, float]:
    return {f"{prefix}:{name}": value for name, value in zip(names, values, strict=True)}
