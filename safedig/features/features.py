"""What is known of the harmful features of one site, and how it lies on disk.

A folder holds `features.json` and `features.safetensors`, for one site or many.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ..config import UsageError
from ..sites import Site
from ..storage import write_atomically
from .prototypes import Prototypes

_FACTS, _TENSORS, _FORMAT = "features.json", "features.safetensors", 1
_VECTORS = ("index", "ratio", "support")


@dataclass(frozen=True, eq=False)
class Features:
    """The harmful features M of one site, the most telling first."""

    index: Int[Tensor, " features"]
    threshold: float
    """Their codes add up to more in hardly any token of a benign image; the gate opens there."""
    ratio: Float[Tensor, " features"]
    """μ_harmful / (μ_harmful + μ_safe) of the prompt statistic: code, max over tokens, mean over steps."""
    support: Float[Tensor, " features"]
    """Share of the harmful prompts in which the feature fires."""
    prototypes: Prototypes | None = None
    """What the SAE reads in safety's place of the harm."""
    facts: dict[str, Any] = field(default_factory=dict)
    """JSON: what they were found in, by which options, and what the contrast cost."""

    def __len__(self) -> int:
        return len(self.index)


def save_features(found: Mapping[Site, Features], folder: str | PathLike[str]) -> None:
    """Write the features of every site into `folder`; what lay there of the same kind is replaced."""
    tensors, sites = {}, {}
    for site, one in found.items():
        own = {name: getattr(one, name) for name in _VECTORS}
        own |= {} if one.prototypes is None else one.prototypes.tensors()
        tensors |= {f"{site}/{name}": tensor.cpu().contiguous() for name, tensor in own.items()}
        sites[str(site)] = {"threshold": one.threshold, "facts": one.facts}
    write_atomically(Path(folder) / _TENSORS, save(tensors))
    write_atomically(Path(folder) / _FACTS, json.dumps({"format": _FORMAT, "sites": sites}, indent=2).encode())


def load_features(folder: str | PathLike[str]) -> dict[Site, Features]:
    """Read a folder written by `save_features`."""
    try:
        given = json.loads((Path(folder) / _FACTS).read_text(encoding="utf-8"))
        tensors = load_file(Path(folder) / _TENSORS)
    except (OSError, ValueError, SafetensorError) as error:
        raise UsageError(f"'{folder}' holds no features as save_features writes them ({error}).") from error
    if given.get("format") != _FORMAT:
        raise UsageError(f"'{folder}' has format {given.get('format')}; this version reads format {_FORMAT}.")
    try:
        return {Site.parse(name): _read(name, entry, tensors) for name, entry in given["sites"].items()}
    except KeyError as error:
        raise UsageError(f"'{folder}' is incomplete: {error} is missing. Find and save the features again.") from error


def _read(site: str, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Features:
    own = {name.removeprefix(f"{site}/"): tensor for name, tensor in tensors.items() if name.startswith(f"{site}/")}
    vectors = {name: own[name] for name in _VECTORS}
    return Features(
        threshold=entry["threshold"], facts=entry["facts"], prototypes=Prototypes.of_tensors(own), **vectors
    )
