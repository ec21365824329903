"""Latents of images on the local disk, in shards named by what they were made from, so that none is encoded twice."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..config import UsageError
from ..progress import say, track
from ..storage import write_atomically
from .encoding import encode, vae_digest
from .pictures import CorruptError, Fit, Picture, framed

SHARD, BATCH = 64, 8  # images
_NAME, _SKIPPED = "latents", "skipped"


@dataclass(frozen=True)
class Shard:
    """Latents of a few images, in memory or on disk."""

    held: Tensor | None
    path: Path | None

    def latents(self) -> Float[Tensor, "n *latent"]:
        if self.held is not None:
            return self.held
        with safe_open(str(self.path), framework="pt") as file:
            return file.get_tensor(_NAME)


def cache_folder(given: str | PathLike[str] | None) -> Path | None:
    """Where latents are kept: the user's own cache unless told otherwise; None for nowhere."""
    if given is None:
        return None
    if str(given):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "safedig" / "negation"


def encoded(
    pipe: Any, images: Iterable[Picture], frame: tuple[int, int], fit: Fit, folder: Path | None, skip_corrupt: bool
) -> Iterator[Shard]:
    """The images in shards, encoded or found in `folder`; an interrupted run goes on where it was.

    A shard that has left images out is found only by `skip_corrupt`: they may be readable by now.
    """
    made_by, skipped = f"{vae_digest(pipe)} {frame} {fit}", 0
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # its owner's alone
    for group in track(_grouped(images), "encode the negation set"):
        key = hashlib.sha256(" ".join([made_by, *(one.digest for one in group)]).encode()).hexdigest()
        path = None if folder is None else folder / f"{key}.safetensors"
        if path is not None and (found := _found(path)) is not None and (skip_corrupt or not found):
            left_out = found
        else:
            kept, left_out = _encoded(pipe, group, frame, fit, skip_corrupt)
            if path is None:
                skipped += left_out
                yield from [Shard(kept, None)] if kept is not None else []
                continue
            facts = {_SKIPPED: json.dumps(left_out)}
            write_atomically(path, save({} if kept is None else {_NAME: kept}, facts))
        skipped += left_out
        yield from [Shard(None, path)] if left_out < len(group) else []
    if skipped:
        say(f"{skipped} corrupt images were left out of the negation set.")


def _grouped(images: Iterable[Picture]) -> Iterator[list[Picture]]:
    rest = iter(images)
    while group := list(islice(rest, SHARD)):
        yield group


def _found(path: Path) -> int | None:
    """How many images a shard has left out; None where there is no whole one."""
    if not path.exists():
        return None
    try:
        with safe_open(str(path), framework="pt") as file:
            return int(json.loads(file.metadata()[_SKIPPED]))
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        say(f"{path} is torn ({error}); its images are encoded anew.")
        return None


def _encoded(
    pipe: Any, group: list[Picture], frame: tuple[int, int], fit: Fit, skip_corrupt: bool
) -> tuple[Tensor | None, int]:
    """The latents of those that can be read, if any, and the number of the others."""
    pixels = []
    for one in group:
        try:
            pixels.append(framed(one.read(), *frame, fit))
        except CorruptError as error:
            if not skip_corrupt:
                raise UsageError(f"{error}: mend it, or leave such images out with skip_corrupt=True.") from error
    parts = [encode(pipe, torch.stack(pixels[start : start + BATCH])) for start in range(0, len(pixels), BATCH)]
    return (torch.cat(parts).contiguous() if parts else None), len(group) - len(pixels)
