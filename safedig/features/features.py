"""What is known of the harmful features of one site, and how it lies on disk.

A folder holds `features.json` and `features.safetensors`, for one site or many.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from ..sites import Site
from ..storage import Format, part
from .dose import Dose
from .prototypes import Prototypes

_FORMAT = Format("features", 1, "folder of features, as save_features writes it", "Find and save the features again.")
_VECTORS = ("index", "ratio", "support")


@dataclass(frozen=True, eq=False)
class Features:
    """The harmful features M of one site, the most telling first."""

    index: Int[Tensor, " features"]
    threshold: float
    """Their dose is higher in hardly any token of a benign image; the gate opens there."""
    ratio: Float[Tensor, " features"]
    """μ_harmful / (μ_harmful + μ_safe) of the prompt statistic: code, max over tokens, mean over steps."""
    support: Float[Tensor, " features"]
    """Share of the harmful prompts in which the feature fires."""
    prototypes: Prototypes | None = None
    """What the SAE reads in safety's place of the harm."""
    facts: dict[str, Any] = field(default_factory=dict)
    """JSON: what they were found in, by which options, and what the contrast cost."""
    dose: Dose | None = None
    """What their codes say together; the plain sum unless they were weighed."""

    def __len__(self) -> int:
        return len(self.index)


def save_features(found: Mapping[Site, Features], folder: str | PathLike[str]) -> None:
    """Write the features of every site into `folder`; what lay there of the same kind is replaced."""
    tensors, sites = {}, {}
    for site, one in found.items():
        own = {name: getattr(one, name) for name in _VECTORS}
        own |= {} if one.prototypes is None else one.prototypes.tensors()
        own |= {} if one.dose is None else {f"dose/{name}": tensor for name, tensor in vars(one.dose).items()}
        tensors |= {f"{site}/{name}": tensor for name, tensor in own.items()}
        sites[str(site)] = {"threshold": one.threshold, "facts": one.facts}
    _FORMAT.write(folder, {"sites": sites}, tensors)


def load_features(folder: str | PathLike[str]) -> dict[Site, Features]:
    """Read a folder written by `save_features`."""
    given, tensors = _FORMAT.read(folder)
    try:
        return {Site.parse(name): _read(entry, part(tensors, name)) for name, entry in given["sites"].items()}
    except KeyError as error:
        raise _FORMAT.incomplete(folder, error) from error


def _read(entry: Mapping[str, Any], own: dict[str, Tensor]) -> Features:
    vectors = {name: own[name] for name in _VECTORS}
    dose = part(own, "dose")
    return Features(
        threshold=entry["threshold"],
        facts=entry["facts"],
        prototypes=Prototypes.of_tensors(own),
        dose=Dose(**dose) if dose else None,
        **vectors,
    )
