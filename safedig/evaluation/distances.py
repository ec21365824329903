"""FID and KID between two sets of images. To the base model and to real images are two things, and are named so."""

from collections.abc import Iterable
from typing import Any, Literal, TypedDict

import torch
from jaxtyping import Float
from torch import Tensor, nn

from safedig.config import UsageError

Images = Float[Tensor, "_ 3 _ _"]  # a batch, RGB, 0 … 1
To = Literal["base", "real"]
ENOUGH = 2048  # images below which the covariance of 2,048 features has no full rank and FID is biased upwards
SUBSETS = 100


class Distance(TypedDict):
    """`metric` names what the images are compared with, so that two columns never become one."""

    metric: str
    value: float
    spread: float | None
    n: int
    reference: int
    warning: str


def fid(images: Iterable[Images], reference: Iterable[Images], to: To, feature: nn.Module) -> Distance:
    """Fréchet distance of the features; `feature`: [n, 3, h, w] in 0 … 1 → [n, d], such as a local Inception.

    Both sets come in batches, one of which is held at a time. Below 2,048 images a warning says so: take KID there.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    one, other = _features(images, feature), _features(reference, feature)
    metric = _shown(FrechetInceptionDistance(feature=_AsTheyAre(one)), one, other)
    few = min(len(one), len(other))
    warning = f"FID of {few} images is biased upwards (expected {ENOUGH:,}): compare by KID." if few < ENOUGH else ""
    return Distance(
        metric=f"fid_to_{to}",
        value=float(metric.compute()),
        spread=None,
        n=len(one),
        reference=len(other),
        warning=warning,
    )


def kid(
    images: Iterable[Images],
    reference: Iterable[Images],
    to: To,
    feature: nn.Module,
    subset: int | None = None,
    seed: int = 0,
) -> Distance:
    """Kernel distance (cubic polynomial), unbiased at any n; `spread` is its deviation over 100 random subsets.

    `subset`: images a subset, by default 1,000 or what there is.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    one, other = _features(images, feature), _features(reference, feature)
    least = min(len(one), len(other))
    subset = min(1000, least) if subset is None else subset
    if not 2 <= subset <= least:
        raise UsageError(f"subset={subset}: expected from 2 to {least}, which is what the smaller set has.")
    options: dict[str, Any] = {"subsets": SUBSETS, "subset_size": subset}
    metric = _shown(KernelInceptionDistance(feature=_AsTheyAre(one), **options), one, other)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        mean, spread = metric.compute()
    return Distance(
        metric=f"kid_to_{to}", value=float(mean), spread=float(spread), n=len(one), reference=len(other), warning=""
    )


@torch.inference_mode()
def _features(batches: Iterable[Images], feature: nn.Module) -> Float[Tensor, "n d"]:
    found = [feature(batch.float().clamp(0, 1)) for batch in batches if len(batch)]
    n = sum(map(len, found))
    if n < 2:
        raise UsageError(f"{n} images on one side: expected at least two on each.")
    return torch.cat(found)


class _AsTheyAre(nn.Module):
    """Features in place of images: the library's metrics extract them a batch at a time, here it is done before."""

    def __init__(self, features: Float[Tensor, "n d"]) -> None:
        super().__init__()
        self.num_features = features.shape[-1]

    def forward(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        return features


def _shown(metric: Any, images: Float[Tensor, "n d"], reference: Float[Tensor, "m d"]) -> Any:
    metric.update(images, real=False)
    metric.update(reference, real=True)
    return metric
