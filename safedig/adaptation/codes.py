"""Codes as what they are, mostly nothing: products cost O(rows · l0 · d_in), and not O(rows · d_sae · d_in)."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

from ..sae.model import SparseAutoencoder

_DENSE = 2**21  # codes that are held densely at once, 8 MB: what fits a cache, and memory that is used again
_ROWS = 2048  # rows encoded at once at most: what float32 sums before float64 goes on
_BLOCK = 2**25  # codes of a block of columns, held densely while their products are taken, 128 MB


@dataclass(frozen=True, eq=False)
class SparseCodes:
    """Row i holds `value[starts[i]:starts[i + 1]]` at the features `index[starts[i]:starts[i + 1]]`; 8 bytes a code."""

    starts: Int[Tensor, " rows_and_1"]
    index: Int[Tensor, " active"]
    value: Float[Tensor, " active"]
    width: int

    @classmethod
    def of(cls, z: Float[Tensor, "rows d_sae"]) -> "SparseCodes":
        return cls.where(z != 0, z)

    @classmethod
    def where(cls, active: Bool[Tensor, "rows d_sae"], z: Float[Tensor, "rows d_sae"]) -> "SparseCodes":
        """What `z` holds at the codes that are active."""
        place = _where(active.flatten())
        row, index = place // z.shape[1], place % z.shape[1]
        return cls(_starts(row, len(z)), index.int(), z.flatten()[place], z.shape[1])

    def __len__(self) -> int:
        return len(self.starts) - 1

    def times(self, W: Float[Tensor, "d_sae d"]) -> Float[Tensor, "rows d"]:
        """z·W, row by row."""
        value = self.value.to(W.dtype)
        return embedding_bag(self.index, W, self.starts, mode="sum", per_sample_weights=value, include_last_offset=True)

    def moment(self, x: Float[Tensor, "rows d"]) -> Float[Tensor, "d_sae d"]:
        """zᵀ·x, summed over the rows."""
        return self.transposed.times(x)

    def gram(self) -> Float[Tensor, "d_sae d_sae"]:
        """zᵀ·z in float64: on a CPU in O(rows · l0²), by SciPy."""
        if self.value.device.type != "cpu":
            return self._gram_in_blocks().double()
        from scipy.sparse import csr_array

        value, shape = self.value.double().numpy(), (len(self), self.width)
        z = csr_array((value, self.index.numpy(), self.starts.numpy()), shape=shape)
        return torch.from_numpy((z.T @ z).toarray())

    def _gram_in_blocks(self) -> Float[Tensor, "d_sae d_sae"]:
        """In O(rows · l0 · d_sae), a block of columns at a time."""
        gram = torch.empty(self.width, self.width, device=self.value.device)
        row, columns = self.rows(), max(64, _BLOCK // max(len(self), 1))
        for start in range(0, self.width, columns):
            stop = min(start + columns, self.width)
            here = ((self.index >= start) & (self.index < stop)).nonzero()[:, 0]
            dense = torch.zeros(len(self), stop - start, device=self.value.device)
            dense[row[here], (self.index[here] - start).long()] = self.value[here]
            gram[:, start:stop] = self.moment(dense)
        return gram

    def only(self, kept: Bool[Tensor, " d_sae"]) -> "SparseCodes":
        """The codes of these features alone, which are numbered anew."""
        number = torch.cumsum(kept, 0).sub(1).int()
        there = kept[self.index]
        return SparseCodes(
            _starts(self.rows()[there], len(self)), number[self.index[there]], self.value[there], int(kept.sum())
        )

    def at(self, rows: Int[Tensor, " picked"]) -> "SparseCodes":
        """These rows, in this order."""
        count = self.starts.diff()[rows].long()
        starts = _cumulative(count)
        place = torch.arange(int(starts[-1])) - torch.repeat_interleave(starts[:-1] - self.starts[rows], count)
        return SparseCodes(starts.int(), self.index[place], self.value[place], self.width)

    @cached_property
    def transposed(self) -> "SparseCodes":
        order = self.index.argsort(stable=True)
        starts = _starts(self.index.long(), self.width)
        return SparseCodes(starts, self.rows()[order].int(), self.value[order], len(self))

    def rows(self) -> Int[Tensor, " active"]:
        """The row of each code."""
        return torch.repeat_interleave(torch.arange(len(self), device=self.starts.device), self.starts.diff())


def encoded(sae: SparseAutoencoder, a: Float[Tensor, "rows d_in"]) -> Iterator[tuple[Tensor, SparseCodes]]:
    """The rows in float32, on the encoder's device, and their codes, so many at once as are summed in float32."""
    for part in a.split(_ROWS):
        x = part.to(sae.encoder.W_enc.device).float()
        yield x, joined([SparseCodes.where(*sae.fired(some)) for some in x.split(max(1, _DENSE // sae.d_sae))])


def joined(parts: list[SparseCodes]) -> SparseCodes:
    """The rows of all parts, one after the other."""
    if len(parts) == 1:
        return parts[0]
    starts = _cumulative(torch.cat([part.starts.diff() for part in parts])).int()
    index, value = (torch.cat([getattr(part, name) for part in parts]) for name in ("index", "value"))
    return SparseCodes(starts, index, value, parts[0].width)


def _where(mask: Bool[Tensor, " n"]) -> Int[Tensor, " true"]:
    """On a CPU NumPy finds the few that are true many times faster than torch's `nonzero`."""
    if mask.device.type != "cpu":
        return mask.nonzero()[:, 0]
    return torch.from_numpy(mask.numpy().nonzero()[0])


def _starts(row: Int[Tensor, " active"], rows: int) -> Int[Tensor, " rows_and_1"]:
    return _cumulative(torch.bincount(row, minlength=rows)).int()


def _cumulative(count: Int[Tensor, " n"]) -> Int[Tensor, " n_and_1"]:
    return torch.cat([count.new_zeros(1), count.cumsum(0)])
