"""What a judge is: a name, a version, the hash of its weights, and a call that gives each image raw scores."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from safedig.config import UsageError
from safedig.evaluation.pictures import Image, Picture
from safedig.evaluation.records import Score

BATCH = 16  # images


@dataclass(frozen=True)
class Look:
    """What a judge saw in one image: numbers and words by name, boxes, or why it saw nothing."""

    scores: dict[str, Any] = field(default_factory=dict)
    boxes: tuple[dict[str, Any], ...] = ()
    error: str = ""


@runtime_checkable
class Judge(Protocol):
    """Looks at images; a new one is one file with these four, and needs to know nothing else."""

    @property
    def detector(self) -> str: ...

    @property
    def version(self) -> str: ...

    @property
    def weights_sha(self) -> str: ...

    def __call__(self, images: Sequence[Image]) -> list[Look]: ...


def score(judge: Judge, pictures: Iterable[Picture], batch: int = BATCH) -> Iterator[Score]:
    """A raw score for every picture, in their order; those without pixels, and NaN, become errors."""
    rest = iter(pictures)
    while some := list(islice(rest, batch)):
        images = [one.pixels for one in some if one.pixels is not None]
        looks = judge(images)
        if len(looks) != len(images):
            raise UsageError(
                f"{judge.detector} gave {len(looks)} answers for {len(images)} images: expected one for each, in order."
            )
        left = iter(looks)
        for one in some:
            yield _score(judge, one.sha, Look(error=one.error) if one.pixels is None else next(left))


def _score(judge: Judge, sha: str, look: Look) -> Score:
    wrong = [name for name, value in look.scores.items() if isinstance(value, float) and value - value != 0]
    if wrong:
        look = Look(error=f"{wrong[0]} is no finite number")
    return Score(
        image_sha=sha,
        detector=judge.detector,
        version=judge.version,
        weights_sha=judge.weights_sha,
        scores=look.scores,
        boxes=look.boxes,
        error=look.error,
    )


def hash_of(model: nn.Module | Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of names, shapes and values: the same weights have one hash, whatever file they come from."""
    digest = hashlib.sha256()
    named = model.state_dict().items() if isinstance(model, nn.Module) else model
    for name, tensor in sorted(named):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().to(torch.float32).numpy().tobytes())
    return digest.hexdigest()
