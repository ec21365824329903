"""How an edit acts: pure rules from an activation and the codes of its harmful features to what is added to it.

Each answers with a delta, and the deltas of several edits, all of the same activation, are summed: their order does
not matter, and none undoes another. They compute for open tokens alone what more than |M| features are needed for.
`form="paper"` is the published formula to the letter, for comparison: it moves benign tokens too, wherever the gate
lets it.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..config import UsageError, build, check_choices, did_you_mean
from .bank import mean_of
from .material import Material
from .phrases import as_one

Form = Literal["delta", "paper"]


@dataclass(frozen=True)
class Repel:
    """a' = a − γ · Σ_M z_j·w_j with the contrast decoder's rows: take out what it attributes to the harmful features.

    The delta form of SafeDIG's Repel (arXiv 2605.30049), which leaves a token without harmful features alone. Paper:
    a' = a − γ · (D(z ⊙ M) − a), D the decoder that reconstructs; only its rows in M and b_dec are needed.
    """

    strength: float = 1.5
    form: Form = "delta"

    def __post_init__(self) -> None:
        _check(self)

    @property
    def needs(self) -> tuple[str, ...]:
        return ("reconstruction", "bias") if self.form == "paper" else ()

    def __call__(
        self,
        a: Float[Tensor, "batch token d_in"],
        z: Float[Tensor, "batch token features"],
        open_: Bool[Tensor, "batch token"],
        material: Material,
    ) -> Float[Tensor, "batch token d_in"]:
        if self.form == "delta":
            return -self.strength * (z @ material.directions)
        assert material.reconstruction is not None and material.bias is not None
        return -self.strength * (z @ material.reconstruction + material.bias - a)


@dataclass(frozen=True)
class Blend:
    """a' = a + β · Σ_M (z̃_j − z_j)·w_j with the reconstruction's rows: what stands in safety takes harm's place.

    z̃ is the mean of the M-part of the `nearest` safe prototypes, nearest in all other latents. Paper:
    a' = (1 − β) · a + β · D(E(a)), for which the whole dictionary is kept and run on every open token.
    """

    strength: float = 0.5
    form: Form = "delta"
    nearest: int = 8

    def __post_init__(self) -> None:
        _check(self)

    @property
    def needs(self) -> tuple[str, ...]:
        return ("whole", "bias") if self.form == "paper" else ("reconstruction", "bank")

    def __call__(
        self,
        a: Float[Tensor, "batch token d_in"],
        z: Float[Tensor, "batch token features"],
        open_: Bool[Tensor, "batch token"],
        material: Material,
    ) -> Float[Tensor, "batch token d_in"]:
        delta, here = torch.zeros_like(a), a[open_]
        if self.form == "paper":
            whole = material.whole
            assert whole is not None and material.bias is not None
            delta[open_] = self.strength * (whole.encoder(here) @ whole.W_dec + material.bias - here)
            return delta
        assert material.bank is not None and material.reconstruction is not None
        safe = material.bank.mean(here, self.nearest, of=material.bank.harmful)
        delta[open_] = self.strength * ((safe - z[open_]) @ material.reconstruction)
        return delta


@dataclass(frozen=True)
class Replace:
    """a' = a + s · (v − a): a detected token takes an in-distribution value v, and the SAE is a detector only.

    By counterparts: v − a is minus the mean of what harm has added to the `nearest` known tokens, which is nothing
    where these are harmless: with scope="image" only the harm goes. A token like none of them is repelled instead, with
    the strength `unknown`. By prototypes: v is the mean of what the `nearest` safe ones are reconstructed to. By the
    map (arXiv 2606.31699): the mean of the `nearest` undetected tokens of the same image, nearest to the token without
    what the directions attribute to harm; where all its tokens are detected, that itself.
    """

    strength: float = 1.0
    by: Literal["counterparts", "prototypes", "map"] = "prototypes"
    nearest: int = 1
    unknown: float = 0.0
    """By counterparts: how far a token goes by the contrast decoder (see Repel) that is like no known one."""
    phrases: bool = False
    """In text: such tokens side by side, moved as far as harm is, become one stand-in and padding (see phrases.py)."""

    def __post_init__(self) -> None:
        _check(self)
        if self.phrases and not self.unknown:
            raise UsageError(f"{self}: a phrase is made of unknown tokens, so give unknown above 0 too.")
        if not (math.isfinite(self.unknown) and self.unknown >= 0) or (self.unknown and self.by != "counterparts"):
            raise UsageError(f"{self}: expected unknown from 0 on, and above it with by='counterparts' alone.")

    @property
    def needs(self) -> tuple[str, ...]:
        if self.by == "counterparts":
            return ("counterparts", "radius") if self.unknown else ("counterparts",)
        return ("values",) if self.by == "prototypes" else ()

    def __call__(
        self,
        a: Float[Tensor, "batch token d_in"],
        z: Float[Tensor, "batch token features"],
        open_: Bool[Tensor, "batch token"],
        material: Material,
    ) -> Float[Tensor, "batch token d_in"]:
        delta = torch.zeros_like(a)
        if self.by == "counterparts":
            harm, unknown = self._harm(a, z, open_, material)
            delta[open_] = -harm
            if self.phrases and a.shape[1] > 1:
                assert material.counterparts is not None
                strange = torch.zeros_like(open_).masked_scatter(open_, unknown)
                delta = as_one(a, delta, strange, material.counterparts.all().harmful(), self.nearest)
            return self.strength * delta
        if self.by == "prototypes":
            bank = material.bank
            assert bank is not None and bank.values is not None
            delta[open_] = self.strength * (bank.mean(a[open_], self.nearest, of=bank.values) - a[open_])
            return delta
        for image in open_.any(1).nonzero()[:, 0].tolist():
            detected = open_[image]
            tokens, others = a[image, detected], a[image, ~detected]
            value = tokens - z[image, detected] @ material.directions
            if len(others):
                near = torch.cdist(value, others).topk(min(self.nearest, len(others)), dim=1, largest=False).indices
                value = mean_of(others, near)
            delta[image, detected] = self.strength * (value - tokens)
        return delta

    def _harm(
        self,
        a: Float[Tensor, "batch token d_in"],
        z: Float[Tensor, "batch token features"],
        open_: Bool[Tensor, "batch token"],
        material: Material,
    ) -> tuple[Float[Tensor, "open d_in"], Bool[Tensor, " open"]]:
        """What harm has added to each open token, as is known of its like or else by its codes; and which are those."""
        known, dose, here = material.counterparts, material.dose, a[open_]
        assert known is not None
        alone, together = open_, torch.zeros_like(open_)
        if dose is not None:
            alone, together = open_ & dose.alone(z)[:, None], open_ & dose.only_pairs(z)[:, None]
        harm = known.harm(here, alone[open_], together[open_], self.nearest)
        if not self.unknown:
            return harm, torch.zeros_like(open_[open_])
        said, unknown = self.unknown * (z[open_] @ material.directions), known.unknown(here)
        return torch.where(unknown[:, None], said, harm), unknown


Edit = Repel | Blend | Replace
EDITS: dict[str, type[Edit]] = {"repel": Repel, "blend": Blend, "replace": Replace}


def to_json(edit: Edit) -> dict[str, Any]:
    """Its name and options."""
    return {"edit": type(edit).__name__.lower()} | asdict(edit)


def from_json(entry: Mapping[str, Any]) -> Edit:
    """What `to_json` gave; an unknown name is a `UsageError` that points to the nearest."""
    name = entry["edit"]
    if name not in EDITS:
        raise UsageError(f"There is no edit '{name}'. {did_you_mean(name, EDITS)}")
    return build(EDITS[name], {key: value for key, value in entry.items() if key != "edit"})


def check_together(edits: tuple[Edit, ...], *, tokens: bool, scope: str, text: bool = True) -> None:
    """A `UsageError` where edits cannot be meant together, or at such sites.

    `tokens`: each has more than one; `text`: those that do hold text alone.
    """
    if len(edits) > 1 and any(isinstance(edit, Replace) for edit in edits):
        raise UsageError(
            "Replace puts other values in a token's place, which no other edit is meant for: give it alone."
        )
    if any(isinstance(edit, Replace) and edit.by == "map" for edit in edits) and (scope == "image" or not tokens):
        raise UsageError(
            "Replace(by='map') takes undetected tokens of the same image, and with scope='image' or at a pooled vector "
            "there are none: use scope='token' at a site of tokens, or by='prototypes'."
        )
    if not text and any(isinstance(edit, Replace) and edit.phrases for edit in edits):
        raise UsageError(
            "Replace(phrases=True) takes words side by side for one thing, and the tokens of an image are no words: "
            "use it at sites of the stream txt."
        )


def _check(edit: Edit) -> None:
    check_choices(edit)
    if not (math.isfinite(edit.strength) and edit.strength >= 0):
        raise UsageError(f"{edit}: expected a strength from 0 on.")
    if not isinstance(edit, Repel) and edit.nearest < 1:
        raise UsageError(f"{edit}: expected at least 1 nearest.")
