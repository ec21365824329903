"""Edits under gates at sites, put on a pipeline for the duration of a `with`, saved and loaded. Repel first of all.

Only the columns of the harmful features are kept, so that a step costs |M| / d_sae of what encoding would.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..config import UsageError, build, did_you_mean
from ..features import Features
from ..features.heights import columns
from ..hooks import Context, attach
from ..pipelines import fingerprint
from ..sae.model import SparseAutoencoder, ThresholdEncoder
from ..sites import Site
from ..storage import Format, part
from .edits import EDITS, Repel
from .gate import Gate

_FORMAT = Format("steering", 2, "steering folder, as Steering.save writes it", "Save the steering again.")


@dataclass(frozen=True, eq=False)
class Rule:
    """What is done at one site: the harmful features' encoder, their directions, a gate and edits."""

    index: Int[Tensor, " features"]
    """Which features of the autoencoder they are."""
    encoder: ThresholdEncoder
    directions: Float[Tensor, "features d_in"]
    gate: Gate
    edits: tuple[Repel, ...]

    def tensors(self) -> dict[str, Tensor]:
        encoder = {name: getattr(self.encoder, name) for name in ("W_enc", "b_enc", "threshold")}
        return {"index": self.index, **encoder, "directions": self.directions}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], gate: Gate, edits: Sequence[Repel]) -> "Rule":
        encoder = ThresholdEncoder(tensors["W_enc"], tensors["b_enc"], tensors["threshold"])
        return cls(tensors["index"], encoder, tensors["directions"], gate, tuple(edits))


class Steering:
    """Edits along the decoder rows of the harmful features, at the sites of one model, each under a gate."""

    def __init__(
        self,
        saes: Mapping[Site, SparseAutoencoder],
        features: Mapping[Site, Features],
        edits: Sequence[Repel] = (Repel(),),
        *,
        scope: Literal["token", "image"] = "token",
        rows: Literal["cond", "all"] = "cond",
        sigmas: tuple[float, float] = (0.0, 1.0),
    ):
        """`saes` are those of `fit_contrast`; edits act one after the other; for the others see `Gate`."""
        models = {str(saes[site].metadata.get("model", "")) for site in features}
        if len(models) != 1 or "" in models:
            raise UsageError("The SAEs do not all name one model that they were trained on: train them together.")
        self.model = models.pop()
        """Fingerprint of the pipeline it was made for; another one is refused."""
        self.rules = {
            site: Rule(
                found.index,
                columns(saes[site], found.index),
                saes[site].decoder.W_dec[found.index],
                Gate(found.threshold, scope, rows, sigmas),
                tuple(edits),
            )
            for site, found in features.items()
        }
        self._live: dict[Site, _Live] = {}

    @contextmanager
    def apply(self, pipe: Any) -> Iterator["Steering"]:
        """Steer every call of `pipe` inside the `with`; afterwards the pipeline is bit for bit as it was."""
        given = fingerprint(pipe)
        if given != self.model:
            raise UsageError(
                f"This steering was made for the model {self.model[:12]}… and the pipeline holds {given[:12]}…: "
                "train, or load a steering, for this one."
            )
        self._live = {site: _Live(rule) for site, rule in self.rules.items()}
        with attach(pipe, self._live):
            yield self

    @property
    def report(self) -> dict[str, dict[str, int]]:
        """What happened in the last `apply`: at each site the tokens that could be and those that were touched."""
        return {str(site): {"passed": live.passed, "touched": int(live.touched)} for site, live in self._live.items()}

    def save(self, folder: str | PathLike[str]) -> None:
        """Write `steering.json` and `steering.safetensors` into `folder`."""
        tensors = {f"{site}/{name}": t for site, rule in self.rules.items() for name, t in rule.tensors().items()}
        sites = {
            str(site): {
                "edits": [{"edit": _name(edit)} | asdict(edit) for edit in rule.edits],
                "gate": asdict(rule.gate),
            }
            for site, rule in self.rules.items()
        }
        _FORMAT.write(folder, {"model": self.model, "sites": sites}, tensors)

    @classmethod
    def load(cls, folder: str | PathLike[str]) -> "Steering":
        """Read a folder written by `save`."""
        given, tensors = _FORMAT.read(folder)
        steering = cls.__new__(cls)
        try:
            steering.model, steering._live = given["model"], {}
            steering.rules = {
                Site.parse(name): _rule(entry, part(tensors, name)) for name, entry in given["sites"].items()
            }
        except (KeyError, TypeError) as error:
            raise _FORMAT.incomplete(folder, error) from error
        return steering


class _Live:
    """A rule on a running pipeline: moves its tensors to where the activations are, and counts."""

    def __init__(self, rule: Rule):
        self.rule = rule
        self.passed = 0
        self.touched: int | Tensor = 0

    def __call__(self, x: Float[Tensor, "batch token d"], context: Context) -> Float[Tensor, "batch token d"]:
        if self.rule.directions.device != x.device:
            moved = {name: tensor.to(x.device) for name, tensor in self.rule.tensors().items()}
            self.rule = Rule.of(moved, self.rule.gate, self.rule.edits)
        rule, a = self.rule, x.float()
        z = rule.encoder(a)
        open_ = rule.gate(z, context)
        for edit in rule.edits:
            a = edit(a, z, rule.directions)
        self.passed += sum(rule.gate.steered(context)) * x.shape[1]
        self.touched = self.touched + open_.sum()
        return torch.where(open_[..., None], a.to(x.dtype), x)


def _name(edit: Repel) -> str:
    return next(name for name, kind in EDITS.items() if kind is type(edit))


def _edit(entry: Mapping[str, Any]) -> Repel:
    name = entry["edit"]
    if name not in EDITS:
        raise UsageError(f"There is no edit '{name}'. {did_you_mean(name, EDITS)}")
    return build(EDITS[name], {key: value for key, value in entry.items() if key != "edit"})


def _rule(entry: Mapping[str, Any], own: Mapping[str, Tensor]) -> Rule:
    gate = build(Gate, entry["gate"], path="gate.")
    return Rule.of(own, gate, [_edit(edit) for edit in entry["edits"]])
