"""Does the image still show what was asked for? CLIP score, or any other callable of images and texts."""

from collections.abc import Callable, Hashable, Sequence

from jaxtyping import Float
from torch import Tensor

from safedig.config import UsageError
from safedig.evaluation.means import Mean, clustered_mean
from safedig.evaluation.pictures import Image

Fit = Callable[[Sequence[Image], Sequence[str]], Float[Tensor, " n"]]  # such as judges.clip.Clip(…).score
BATCH = 16  # images


def text_fit(images: Sequence[Image], texts: Sequence[str], prompts: Sequence[Hashable], fit: Fit) -> Mean:
    """Mean fit of each image to its own text, in the callable's unit, clustered by prompt."""
    return clustered_mean(_fits(images, texts, fit), prompts)


def text_fit_change(
    steered: Sequence[Image],
    unsteered: Sequence[Image],
    texts: Sequence[str],
    prompts: Sequence[Hashable],
    fit: Fit,
) -> Mean:
    """Mean of steered − unsteered over pairs of one prompt and seed: below 0 where steering loses what was asked."""
    before, after = _fits(unsteered, texts, fit), _fits(steered, texts, fit)
    return clustered_mean([b - a for a, b in zip(before, after, strict=True)], prompts)


def _fits(images: Sequence[Image], texts: Sequence[str], fit: Fit) -> list[float]:
    if len(images) != len(texts):
        raise UsageError(f"{len(images)} images and {len(texts)} texts: expected one text for each image.")
    parts = [slice(at, at + BATCH) for at in range(0, len(images), BATCH)]
    found = [value for part in parts for value in fit(images[part], texts[part]).tolist()]
    if len(found) != len(images):
        raise UsageError(f"The callable gave {len(found)} numbers for {len(images)} images: expected one for each.")
    return found
