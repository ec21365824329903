"""What x̂0 looks like on its way to an unsafe or a safe image, and the thresholds that tell them apart at each σ."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..config import UsageError
from ..pipelines import Drawing, draw
from ..progress import track
from ..shadow import amend
from .kernels import Kernel, Moment, flat, log_density
from .mixing import Mixing, mixing
from .negation import NegationSet
from .threshold import Thresholds, evidence

Row = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Seen:
    """The way of some images through the denoising, step by step."""

    moments: list[Moment]
    images: Float[Tensor, "n 3 height width"]

    def log_unsafe(self, kernel: Kernel, negation: NegationSet) -> Float[Tensor, "step n"]:
        return torch.stack([log_density(kernel, negation, at) for at in self.moments])


def watch(pipe: Any, rows: Iterable[Row], *, drawing: Drawing | None = None, batch_size: int = 16) -> Seen:
    """Draw the rows as they are, and keep every step's samples and x̂0 in memory (8 · d bytes an image and step)."""
    steps: list[list[tuple[Tensor, Tensor, Mixing]]] = []
    shape: tuple[int, ...] = ()

    def look(given: dict[str, Any]) -> None:
        nonlocal shape
        now, x = mixing(pipe.scheduler, given["timestep"]), flat(given["sample"])
        shape = tuple(given["sample"].shape[1:])
        steps[-1].append((x.cpu(), now.x0(x, flat(given["model_output"])).cpu(), now))

    images = []
    with amend(pipe, "check_inputs", lambda _: steps.append([])), amend(pipe.scheduler, "step", look):
        for _, drawn in track(draw(pipe, rows, drawing=drawing, batch_size=batch_size), "watch x̂0"):
            images.append(drawn.cpu())
    if not images:
        raise UsageError(
            "There is no prompt to calibrate on: give some that draw what is unsafe, and some that do not."
        )
    moments = [
        Moment(torch.cat([one[0] for one in same]), torch.cat([one[1] for one in same]), same[0][2], shape)
        for same in zip(*steps, strict=True)
    ]
    return Seen(moments, torch.cat(images))


def fit_thresholds(
    pipe: Any,
    negation: NegationSet,
    rows: Iterable[Row],
    unsafe: Callable[[Sequence[Row], Tensor], Sequence[bool]],
    *,
    kernel: Kernel,
    reference: NegationSet | None = None,
    drawing: Drawing | None = None,
) -> Thresholds:
    """At each σ, the log odds that an image will be unsafe given x̂0, from prompts that are drawn unsteered.

    `unsafe(rows, images)` says of each finished image whether it is. Both kinds must be among them, and as often as
    they will be: β answers the odds that were seen.
    """
    rows = list(rows)
    seen = watch(pipe, rows, drawing=drawing)
    labels = torch.tensor([bool(one) for one in unsafe(rows, seen.images)])
    near = torch.stack([evidence(log_density(kernel, negation, at), kernel, reference, at) for at in seen.moments])
    return thresholds([at.mixing.sigma for at in seen.moments], near, labels, reference)


def thresholds(
    sigmas: Sequence[float],
    near: Float[Tensor, "step n"],
    unsafe: Bool[Tensor, " n"],
    reference: NegationSet | None = None,
) -> Thresholds:
    """Logistic regression of what became unsafe on how near x̂0 was, at each σ by itself; nearer is never safer."""
    from sklearn.linear_model import LogisticRegression

    if unsafe.all() or not unsafe.any():
        raise UsageError(
            f"{int(unsafe.sum())} of {len(unsafe)} images are unsafe: to calibrate, draw some of either kind."
        )
    slopes, offsets = [], []
    prior = float(torch.logit(unsafe.double().mean()))
    for values in near.double():
        mean, deviation = values.mean(), values.std().clamp(min=1e-9)
        fit = LogisticRegression(C=100.0).fit(((values - mean) / deviation)[:, None].numpy(), unsafe.numpy())
        slope, offset = float(fit.coef_[0, 0] / deviation), float(fit.intercept_[0])
        slopes.append(max(slope, 0.0))
        offsets.append(offset - slope * float(mean) if slope > 0 else prior)
    return Thresholds(tuple(sigmas), tuple(slopes), tuple(offsets), reference)
