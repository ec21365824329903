"""What is done at one site: the harmful features' codes, a gate on them, edits of the tokens it opens for, a guard.

Only the columns of the harmful features are kept, so that a step costs |M| / d_sae of what encoding would; what some
edits need beside them lies in `material`.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..hooks import Context
from ..sae.model import ThresholdEncoder
from .edits import Edit
from .gate import Gate
from .guard import Guard
from .material import Material
from .tensors import named, rebuilt


@dataclass(frozen=True, eq=False)
class Rule:
    """Called with what passes the site; nothing of it is changed in place."""

    index: Int[Tensor, " features"]
    """Which features of the autoencoder they are."""
    encoder: ThresholdEncoder
    material: Material
    gate: Gate
    edits: tuple[Edit, ...]
    guard: Guard | None = None

    def __call__(
        self, x: Float[Tensor, "batch token d_in"], context: Context
    ) -> tuple[Float[Tensor, "batch token d_in"], Bool[Tensor, "batch token"], Float[Tensor, "batch token d_in"]]:
        """What goes on, the tokens that the gate has opened for, and what was added to these, in float32."""
        open_, delta = self.decided(x, context)
        return self.applied(x, open_, delta), open_, delta

    def decided(
        self,
        x: Float[Tensor, "batch token d_in"],
        context: Context,
        opened: Bool[Tensor, " batch"] | None = None,
    ) -> tuple[Bool[Tensor, "batch token"], Float[Tensor, "batch token d_in"]]:
        """The tokens that the gate opens for, and what is to be added to these; `opened`: see `Gate`."""
        with _exactly(x.device):
            a = x.float()
            z = self.encoder(a)
            open_ = self.gate(self._heights(z), context, opened)
            delta = self.delta(a, z, open_)
            return open_, delta if self.guard is None else self.guard(a, delta, context.sigma)

    def heights(self, x: Float[Tensor, "batch token d_in"]) -> Float[Tensor, "batch token"]:
        """How high each token comes at the gate: its dose where there is one, else the sum of its harmful codes."""
        return self._heights(self.encoder(x.float()))

    def _heights(self, z: Float[Tensor, "batch token features"]) -> Float[Tensor, "batch token"]:
        return z.sum(-1) if self.material.dose is None else self.material.dose(z)

    def applied(
        self,
        x: Float[Tensor, "batch token d_in"],
        open_: Bool[Tensor, "batch token"],
        delta: Float[Tensor, "batch token d_in"],
    ) -> Float[Tensor, "batch token d_in"]:
        """The same bits where it is closed."""
        return torch.where(open_[..., None], (x.float() + delta).to(x.dtype), x)

    def delta(
        self,
        a: Float[Tensor, "batch token d_in"],
        z: Float[Tensor, "batch token features"],
        open_: Bool[Tensor, "batch token"],
    ) -> Float[Tensor, "batch token d_in"]:
        """The sum of all edits; one of strength 0 is none. Adding −0.0 changes no bit, adding 0.0 turns −0.0."""
        deltas = [edit(a, z, open_, self.material) for edit in self.edits if edit.strength]
        return reduce(torch.add, deltas) if deltas else torch.full_like(a, -0.0)

    def tensors(self) -> dict[str, Tensor]:
        return named(self)

    def facts(self) -> dict[str, Any]:
        """What is no tensor and no option of the gate or an edit."""
        return {} if self.guard is None else {"guard": {"sigmas": list(self.guard.sigmas)}}

    @classmethod
    def of(
        cls, tensors: Mapping[str, Tensor], gate: Gate, edits: Sequence[Edit], facts: Mapping[str, Any] | None = None
    ) -> "Rule":
        """From what `tensors` and `facts` gave."""
        guard, own = None, {name: tensor for name, tensor in tensors.items() if not name.startswith("guard.")}
        if facts and "guard" in facts:
            bounds = {name.removeprefix("guard."): tensors[name] for name in tensors.keys() - own.keys()}
            guard = rebuilt(Guard, bounds, sigmas=tuple(facts["guard"]["sigmas"]))
        return rebuilt(cls, own, gate=gate, edits=tuple(edits), guard=guard)

    def to(self, device: torch.device) -> "Rule":
        """The same rule on another device."""
        if self.material.directions.device == device:
            return self
        moved = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return Rule.of(moved, self.gate, self.edits, self.facts())

    def __str__(self) -> str:
        gate, low_high = self.gate, "–".join(f"{sigma:g}" for sigma in self.gate.sigmas)
        acts = " + ".join(map(str, self.edits)) or "watches, no edit,"
        guarded = "" if self.guard is None else ", guarded"
        return (
            f"{acts} on {len(self.index)} features; opens above {gate.threshold:.3g} for the {gate.scope}, "
            f"{gate.rows} rows, σ {low_high}{guarded}"
        )


def _exactly(device: torch.device) -> AbstractContextManager[Any]:
    """Without the user's mixed precision: thresholds are of codes in float32."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()
