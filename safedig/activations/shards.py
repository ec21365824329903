"""One batch of a recording as one safetensors file, and the checksums that prove it whole.

Rows are checksummed in blocks of about half a mebibyte, so that every read can be proved, a whole shard's or a part's.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Shaped
from safetensors.torch import save
from torch import Tensor

from .address import Address, StoreError
from .stream import Batch

_BLOCK, _GULP = 2**19, 2**23  # bytes that share a checksum; bytes read at once when a file is checked
TOKENS = "/token"
"""What the tensor of token numbers has after its site's name."""


@dataclass(frozen=True)
class Strip:
    """One tensor of a shard, [rows, width]: where its bytes lie, and the checksum of each block of its rows."""

    offset: int
    rows: int
    width: int
    dtype: str
    block_rows: int
    blocks: list[int]

    @property
    def kind(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def row_bytes(self) -> int:
        return self.width * self.kind.itemsize

    def span(self, block: int) -> tuple[int, int]:
        """The first and the last but one row of a block."""
        return block * self.block_rows, min((block + 1) * self.block_rows, self.rows)

    def bytes_of(self, block: int) -> tuple[int, int]:
        """Where a block's bytes begin in the file, and how many they are."""
        start, stop = self.span(block)
        return self.offset + start * self.row_bytes, (stop - start) * self.row_bytes

    def view(self, flat: Shaped[Tensor, " bytes"]) -> Shaped[Tensor, "rows width"]:
        return flat.view(self.kind).view(-1, self.width)


@dataclass(frozen=True)
class Shard:
    """A file of the store, its size in bytes and checksum, and its tensors by name."""

    file: str
    size: int
    checksum: str
    strips: dict[str, Strip]

    @classmethod
    def of(cls, file: str, data: bytes) -> "Shard":
        """Of the bytes of a safetensors file."""
        from xxhash import xxh3_128_hexdigest

        (length,) = struct.unpack("<Q", data[:8])
        header = {name: entry for name, entry in json.loads(data[8 : 8 + length]).items() if name != "__metadata__"}
        strips = {name: _strip(memoryview(data), 8 + length, entry) for name, entry in header.items()}
        return cls(file, len(data), xxh3_128_hexdigest(data), strips)

    def fault(self, address: Address) -> str | None:
        """What is wrong with the file as it lies there, or None; reads all of it."""
        from xxhash import xxh3_128

        size = address.size(self.file)
        if size != self.size:
            return "is missing" if size is None else f"has {size:,} bytes instead of {self.size:,}"
        digest, room = xxh3_128(), memoryview(bytearray(min(_GULP, self.size)))
        for start in range(0, self.size, len(room)):
            part = room[: self.size - start]
            if not address.read_into(self.file, start, part):
                return "is truncated"
            digest.update(part)
        return None if digest.hexdigest() == self.checksum else "differs from its checksum"

    def read(self, address: Address, name: str) -> Shaped[Tensor, "rows width"]:
        """One tensor, in one read."""
        strip = self.strips[name]
        flat = torch.empty(strip.rows * strip.row_bytes, dtype=torch.uint8)
        room = flat.numpy().data
        whole = address.read_into(self.file, strip.offset, room)
        for block in range(len(strip.blocks)):
            start, stop = (row * strip.row_bytes for row in strip.span(block))
            self._prove(address, strip, block, room[start:stop], whole)
        return strip.view(flat)

    def expect_block(self, address: Address, name: str, block: int) -> None:
        """The block will be read soon."""
        address.expect(self.file, *self.strips[name].bytes_of(block))

    def read_block(self, address: Address, name: str, block: int, room: memoryview) -> None:
        """One block of a tensor's rows, into `room`."""
        strip = self.strips[name]
        start, size = strip.bytes_of(block)
        assert len(room) == size
        self._prove(address, strip, block, room, address.read_into(self.file, start, room))

    def _prove(self, address: Address, strip: Strip, block: int, data: memoryview, whole: bool) -> None:
        from xxhash import xxh3_64_intdigest

        if not whole or xxh3_64_intdigest(data) != strip.blocks[block]:
            why = "differs from its checksum" if whole else "is missing or truncated"
            raise StoreError(f"'{address}/{self.file}' {why}: record again, which draws anew what is damaged.")


def _strip(data: memoryview, base: int, entry: Mapping[str, Any]) -> Strip:
    from xxhash import xxh3_64_intdigest

    start, stop = (base + offset for offset in entry["data_offsets"])
    rows, width = [*entry["shape"], 1][:2]
    dtype = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I32": "int32"}[entry["dtype"]]
    row_bytes = width * getattr(torch, dtype).itemsize
    block_rows = max(1, _BLOCK // row_bytes)
    ends = range(start, stop, block_rows * row_bytes)
    blocks = [xxh3_64_intdigest(data[at : min(at + block_rows * row_bytes, stop)]) for at in ends]
    return Strip(start, rows, width, dtype, block_rows, blocks)


def pack(batches: list[Batch]) -> bytes:
    """A shard: for each site one tensor of the rows of all its batches in their order, and one of their tokens."""
    at: dict[str, list[Batch]] = {}
    for batch in batches:
        at.setdefault(str(batch.site), []).append(batch)
    tensors = {name: torch.cat([batch.x for batch in group]) for name, group in at.items()}
    return save(
        tensors | {name + TOKENS: torch.cat([batch.token for batch in group]).int() for name, group in at.items()}
    )
