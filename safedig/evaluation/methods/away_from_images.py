"""What is about to be drawn, pushed away from pictures of harm: the Safe Denoiser, alone or together with ours.

x̂0' = x̂0 + s · β · (x̂0 − E_u) at every step (arXiv 2502.08011; see `SafeDenoiser`). The negation set is what the model
itself draws of every other harmful prompt, the reference what it draws of every other safe one. From those in between
β follows: the odds that what x̂0 becomes is of a harmful prompt. s = 0 changes no bit.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ...denoiser import NegationSet, SafeDenoiser, Tempered
from ...denoiser.calibrate import fit_thresholds, watch
from ...pipelines import Drawing
from .lesson import Lesson
from .method import Learnt
from .ours import Ours

MOST = 64  # images in each set
WIDTH = 0.15


@dataclass(frozen=True)
class AwayFromImages:
    """Strength multiplies β; beside it ours, if it stands beside, replaces whole."""

    name: str = "Safe Denoiser"
    unit: float = 1.0
    with_ours: bool = False

    def learn(self, lesson: Lesson) -> Learnt:
        kernel, drawing = Tempered(WIDTH), lesson.drawing or Drawing.of(lesson.pipe)
        harmful, safe = lesson.pairs[::2], [*lesson.pairs[1::2], *lesson.benign]
        negation, reference = (_drawn(lesson, rows[::2][:MOST]) for rows in (harmful, safe))
        between = [*harmful[1::2][:MOST], *safe[1::2][:MOST]]
        thresholds = fit_thresholds(
            lesson.pipe,
            negation,
            between,
            lambda rows, images: [bool(row["risk"]) for row in rows],
            kernel=kernel,
            reference=reference,
            drawing=drawing,
        )
        beside = Ours().learn(lesson)(1.0) if self.with_ours else None

        def at(strength: float) -> Any:
            away = SafeDenoiser(negation, strength, kernel=kernel, threshold=thresholds)
            return away if beside is None or strength == 0 else Together((beside, away))

        return at


@dataclass(frozen=True)
class Together:
    """All of them at once, put on in this order."""

    parts: Sequence[Any]

    @contextmanager
    def apply(self, pipe: Any) -> Iterator[None]:
        with ExitStack() as stack:
            for part in self.parts:
                stack.enter_context(part.apply(pipe))
            yield


def _drawn(lesson: Lesson, rows: Sequence[dict[str, Any]]) -> NegationSet:
    """The last x̂0 of each, as the scheduler sees it."""
    last = watch(lesson.pipe, rows, drawing=lesson.drawing).moments[-1]
    return NegationSet(last.x0.unflatten(1, last.shape).to(torch.float32))


ALONE, TOGETHER = AwayFromImages(), AwayFromImages("ours and Safe Denoiser", with_ours=True)
