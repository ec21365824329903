"""The same stream in training order, by seed: endless batches straight from a store, or of a sample held in memory."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle, pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from ..config import UsageError
from .shards import Shard
from .stream import Activations

_POOL = 3 * 2**24  # bytes; with torch itself, two of them and a batch stay below 500 MB
_READERS = 4  # blocks that are asked of a remote address at once
_TOLD = 16  # blocks that a local disk is told of before they are read


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


class Shuffled:
    """Endless batches of one site's rows from a store, every row once an epoch; memory of two pools.

    Blocks of about half a mebibyte are read in random order, as many as fill a pool of `pool` bytes, and rows are drawn
    from the pool at random while the next one is read. Blocks are read whole, once an epoch. `state()` is a small table
    of plain numbers from which the same order goes on, `Shuffled(activations, batch_size, state=…)`, at the cost of
    reading one pool.
    """

    def __init__(
        self,
        activations: Activations,
        batch_size: int,
        *,
        seed: int = 0,
        pool: int = _POOL,
        state: dict[str, Any] | None = None,
    ):
        if activations.store is None or len(activations.sites) != 1:
            raise UsageError("Only a store is shuffled, one site at a time: record(…, store=…).at(site).")
        self._store, self._site = activations.store, str(activations.sites[0])
        self._wanted = _wanted(activations)
        self._blocks = _blocks(activations.store.shards, self._site, self._wanted)
        self._rows = int(self._blocks["kept"].sum())
        self._strip = next(iter(activations.store.shards.values())).strips[self._site]
        self._batch_size, self._seed, self._pool = batch_size, seed, pool
        self._batches = 0
        if state is not None:
            self._batches, given = state["batches"], state | {"batches": 0}
            if given != self.state() | {"batches": 0}:
                raise UsageError(
                    f"The state {given} is of another order than {self.state()}: give what it was made with."
                )
        self._readers, self._ahead = ThreadPoolExecutor(_READERS), ThreadPoolExecutor(1)
        self._pools = self._filled(self._batches * batch_size)
        self._x, self._picks = torch.empty(0), torch.empty(0, dtype=torch.long)

    def __iter__(self) -> "Shuffled":
        return self

    def __next__(self) -> Shaped[Tensor, "batch d"]:
        batch, filled = self._strip.view(_memory(self._batch_size * self._strip.row_bytes)), 0
        while filled < self._batch_size:
            if len(self._picks) == 0:
                self._x, self._picks = next(self._pools)
            picks = self._picks[: self._batch_size - filled]
            torch.index_select(self._x, 0, picks, out=batch[filled : filled + len(picks)])
            self._picks, filled = self._picks[len(picks) :], filled + len(picks)
        self._batches += 1
        return batch

    def state(self) -> dict[str, Any]:
        """How far the order has come, with all that decides it."""
        return {
            "store": self._store.identity,
            "site": self._site,
            "rows": self._rows,
            "batch_size": self._batch_size,
            "seed": self._seed,
            "pool": self._pool,
            "batches": self._batches,
        }

    def _filled(self, position: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Pools and the order of their rows, from the row number `position` of the endless order on."""
        most = -(-self._blocks["rows"].sum() // self._pools_an_epoch) + self._blocks["rows"].max()
        size = int(most) * self._strip.row_bytes
        # One is drawn from while the other is filled, for ever: fresh memory costs as much time as reading does.
        rooms = cycle([_memory(size) for _ in range(2)])
        filled = None
        for turn, later in pairwise(self._turns(position)):
            before, filled = filled, self._ahead.submit(self._fill, next(rooms), turn, later)
            if before is not None:
                yield before.result()

    @property
    def _pools_an_epoch(self) -> int:
        return -(-int(self._blocks["rows"].sum()) * self._strip.row_bytes // self._pool)

    def _turns(self, position: int) -> Iterator["_Turn"]:
        """The pools of the endless order, from that row on."""
        epoch, used = divmod(position, self._rows)
        total, pools = int(self._blocks["rows"].sum()), self._pools_an_epoch
        while True:
            blocks = self._blocks[np.random.default_rng([self._seed, epoch]).permutation(len(self._blocks))]
            starts = blocks["rows"].cumsum() - blocks["rows"]
            edges = np.searchsorted(starts * pools // total, np.arange(pools + 1))
            for number in range(pools):
                here = np.sort(blocks[edges[number] : edges[number + 1]], order=("shard", "block"))
                if used < here["kept"].sum():
                    yield _Turn(here, (self._seed, epoch, number + 1), used)
                used = max(0, used - int(here["kept"].sum()))
            epoch += 1

    def _fill(self, room: Shaped[Tensor, " bytes"], turn: "_Turn", later: "_Turn") -> tuple[Tensor, Tensor]:
        """Read the blocks of this turn, and draw the order of the rows that are wanted of them."""
        address, site = self._store.address, self._site
        stops = (turn.blocks["rows"].cumsum() * self._strip.row_bytes).tolist()
        flat = room[: stops[-1]]
        parts = [flat.numpy().data[start:stop] for start, stop in pairwise([0, *stops])]
        blocks = [
            (self._store.shards[shard], block)
            for one in (turn, later)
            for shard, block in zip(one.blocks["shard"].tolist(), one.blocks["block"].tolist(), strict=True)
        ]

        def read(at: int, part: memoryview) -> None:
            for shard, block in blocks[at + _TOLD : at + _TOLD + 1]:
                shard.expect_block(address, site, block)
            shard, block = blocks[at]
            shard.read_block(address, site, block, part)

        list((map if address.local else self._readers.map)(read, range(len(parts)), parts))
        picks = np.arange(turn.blocks["rows"].sum()) if self._wanted is None else self._kept(turn.blocks)
        order = np.random.default_rng(turn.seed).permutation(picks)
        return self._strip.view(flat), torch.from_numpy(order[turn.used :])

    def _kept(self, blocks: Any) -> Any:
        """Where the wanted rows of these blocks lie in their pool."""
        assert self._wanted is not None
        kept = []
        for block in blocks:
            shard = int(block["shard"])
            start, stop = self._store.shards[shard].strips[self._site].span(int(block["block"]))
            kept.append(self._wanted[shard][start:stop])
        return np.concatenate(kept).nonzero()[0]


@dataclass(frozen=True)
class _Turn:
    """Which blocks fill a pool, what decides the order of its rows, and how many of them have been used before."""

    blocks: Any
    seed: tuple[int, ...]
    used: int


def _memory(size: int) -> Shaped[Tensor, " bytes"]:
    """Numpy asks for huge pages, and its allocations, unlike torch's, take the place of freed ones of the same size."""
    return torch.from_numpy(np.empty(size, dtype=np.uint8))


def _wanted(activations: Activations) -> dict[int, Any] | None:
    """Shard by shard, which rows of the site are of the activations' prompts; None if all are."""
    store, ids = activations.store, {row["id"] for row in activations.prompts}
    assert store is not None
    if len(activations.prompts) == store.images:
        return None
    site = activations.sites[0]
    wanted = {number: np.zeros(shard.strips[str(site)].rows, dtype=bool) for number, shard in store.shards.items()}
    for number, lines in store.lines(site):
        for line in lines:
            wanted[number][line["start"] : line["start"] + line["rows"]] = line["prompt_id"] in ids
    return wanted


def _blocks(shards: dict[int, Shard], site: str, wanted: dict[int, Any] | None) -> Any:
    """Every block of the site that holds a wanted row: its shard, its number there, its rows, and those kept."""
    rows = []
    for number, shard in shards.items():
        strip = shard.strips[site]
        for block in range(len(strip.blocks)):
            start, stop = strip.span(block)
            rows.append(
                (number, block, stop - start, stop - start if wanted is None else wanted[number][start:stop].sum())
            )
    blocks = np.array(rows, dtype=[(name, np.int64) for name in ("shard", "block", "rows", "kept")])
    return blocks[blocks["kept"] > 0]
