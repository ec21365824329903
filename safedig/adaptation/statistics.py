"""What a decoder's least squares need of the rows of a domain: sums over rows, which add up over shards and domains.

With z the codes and x = a − offset: Zᵀ Z, Zᵀ X, the sums of z, z², x and ‖x‖², how often each feature fires, and the
number of rows. Where there are too many features for Zᵀ Z, the sparse codes themselves are kept and stand for it.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from ..config import UsageError
from .codes import SparseCodes, joined

DENSEST = 8192
"""Features up to which Zᵀ Z is accumulated: 0.5 GB in float64."""
_PENDING = 16  # rows a feature after which codes become part of Zᵀ Z: adding to it costs as much as reading it


class Statistics:
    """Mutable sums; `update` costs O(rows · l0 · (d_in + l0)), without the second l0 where the codes are kept.

    Memory: 8 · d_sae · (d_sae + d_in) bytes up to `DENSEST` features, and on a CPU about 22 · d_sae² for the moment in
    which codes are added to Zᵀ Z; above, 4 · d_sae · d_in, and 16 bytes a code.
    """

    def __init__(self, offset: Float[Tensor, " d_in"], d_sae: int):
        device, d_in = offset.device, len(offset)
        self.offset = offset
        """Near the mean of the rows, so that the sums keep their digits."""
        self.rows = 0
        self.square = 0.0
        self.x = torch.zeros(d_in, dtype=torch.float64, device=device)
        self.z, self.z_square, self.count = torch.zeros(3, d_sae, dtype=torch.float64, device=device)
        dense = d_sae <= DENSEST
        self.zx = torch.zeros(d_sae, d_in, dtype=torch.float64 if dense else torch.float32, device=device)
        self._zz = torch.zeros(d_sae, d_sae, dtype=torch.float64, device=device) if dense else None
        self._codes: list[SparseCodes] = []

    def update(self, a: Float[Tensor, "rows d_in"], z: SparseCodes) -> None:
        x = a - self.offset
        self.rows += len(x)
        self.square += x.double().square().sum().item()
        self.x += x.sum(0, dtype=torch.float64)
        for total, value in ((self.z, z.value), (self.z_square, z.value**2), (self.count, torch.ones_like(z.value))):
            total.index_add_(0, z.index, value.double())
        self.zx += z.moment(x)
        self._codes.append(z)
        if self._zz is not None and sum(map(len, self._codes)) >= _PENDING * z.width:
            self._settle()

    def __add__(self, other: "Statistics") -> "Statistics":
        """The sums over the rows of both."""
        if not torch.equal(self.offset, other.offset) or self.zx.shape != other.zx.shape:
            raise UsageError(
                "Statistics of different autoencoders do not add up: take those of one encoder and decoder."
            )
        both = Statistics(self.offset, len(self.z))
        for part in (self, other):
            both.rows += part.rows
            both.square += part.square
            for name in ("x", "z", "z_square", "count", "zx"):
                getattr(both, name).add_(getattr(part, name))
            if both._zz is not None:
                both._zz += part.gram()
            else:
                both._codes += part._codes
        return both

    def gram(self) -> Float[Tensor, "d_sae d_sae"]:
        """Zᵀ Z in float64; only where it was accumulated."""
        assert self._zz is not None
        self._settle()
        return self._zz

    @property
    def codes(self) -> list[SparseCodes]:
        """The codes that stand for Zᵀ Z; none where it was accumulated."""
        return [] if self._zz is not None else self._codes

    def _settle(self) -> None:
        if self._codes and self._zz is not None:
            self._zz += joined(self._codes).gram()
            self._codes = []
