"""The same stream in training order: a uniform sample of bounded size, then endless batches from it, all by seed."""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor


class Reservoir:
    """Keeps a uniform random sample of at most `size` of the rows it is shown; memory O(size · d)."""

    def __init__(self, size: int, seed: int = 0):
        self.size = size
        self.seen = 0
        self._generator = torch.Generator().manual_seed(seed)
        self._parts: list[Tensor] = []
        self._rows: Tensor | None = None

    def add(self, x: Float[Tensor, "rows d"]) -> None:
        """Vitter's algorithm R: row number i (from 0) replaces a kept one with probability size / (i + 1)."""
        room = max(self.size - self.seen, 0)
        if room:
            self._parts.append(x[:room].clone())
        late = x[room:]
        number = torch.arange(len(late)) + max(self.seen, self.size) + 1
        self.seen += len(x)
        slot = (torch.rand(len(late), generator=self._generator, dtype=torch.float64) * number).long()
        last = {place: at for at, place in enumerate(slot.tolist()) if place < self.size}
        if last:
            self.rows()[list(last)] = late[list(last.values())]

    def rows(self) -> Float[Tensor, "rows d"]:
        """The sample; the reservoir's own tensor."""
        if self._parts:
            self._rows = torch.cat(self._parts if self._rows is None else [self._rows, *self._parts])
            self._parts = []
        if self._rows is None:
            raise ValueError("The reservoir is empty: nothing was added to it.")
        return self._rows


def endless(x: Float[Tensor, "rows d"], batch_size: int, seed: int) -> Iterator[Float[Tensor, "batch d"]]:
    """Batches of distinct rows, shuffled anew in every epoch, for ever; a batch may span two epochs."""
    generator = torch.Generator().manual_seed(seed)
    pending = torch.empty(0, dtype=torch.long)
    while True:
        while len(pending) < batch_size:
            pending = torch.cat([pending, torch.randperm(len(x), generator=generator)])
        yield x[pending[:batch_size]]
        pending = pending[batch_size:]
