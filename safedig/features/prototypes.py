"""A bank of safe codes: what the SAE reads where a safe twin differs most from the harm. Bounded, whatever is recorded.

`Blend` replaces a token's harmful codes by those of the prototypes that are nearest to it in all other latents.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

_ACTIVE = 64  # codes kept of a prototype's other latents, the highest: more than a row of any usual k has


@dataclass(frozen=True, eq=False)
class Prototypes:
    """Codes of safe tokens, those of M apart from those of the others, of which only the highest are kept."""

    harmful: Float[Tensor, "prototype features"]
    """Their codes of the harmful features, in the order of M."""
    other: Int[Tensor, "prototype active"]
    """Which other latents are highest; where fewer fire than are kept, the code beside it is 0."""
    codes: Float[Tensor, "prototype active"]

    @classmethod
    def of(cls, z: Float[Tensor, "prototype d_sae"], index: Int[Tensor, " features"]) -> "Prototypes":
        """From full codes; `index` is M."""
        harmful = z[:, index]
        others = z.index_fill(1, index, 0.0)
        most = int((others > 0).sum(1).max())
        codes, other = others.topk(max(1, min(_ACTIVE, most)), dim=1)
        return cls(harmful, other, codes)

    def __len__(self) -> int:
        return len(self.harmful)

    def others(self, d_sae: int) -> Float[Tensor, "prototype d_sae"]:
        """The codes of all latents outside M, written out."""
        return torch.zeros(len(self), d_sae, device=self.codes.device).scatter_(1, self.other, self.codes)

    def tensors(self) -> dict[str, Tensor]:
        return {f"prototypes.{name}": tensor for name, tensor in vars(self).items()}

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> "Prototypes | None":
        """From what `tensors` gave; None where there is nothing of it."""
        own = {name.removeprefix("prototypes."): t for name, t in tensors.items() if name.startswith("prototypes.")}
        return cls(own["harmful"], own["other"], own["codes"]) if own else None
