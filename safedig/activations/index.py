"""The index of a store: a line for each image at each site in each step, and in the footer the checksums of the shards.

An index is as proved as the rows it speaks of: a seal in the footer covers the lines and the checksums. What of pyarrow
would bring pandas in (`read_table`, `to_numpy`, `field`) is left alone: that costs a second, and 80 MB of memory.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np

from .shards import Shard, Strip
from .stream import Batch

if TYPE_CHECKING:
    from pyarrow import Schema, Table

_TEXT = ["file", "site", "prompt_id", "row"]
"""The columns of strings, each of a few that repeat."""


def index_of(batches: list[Batch], number: int, shard: Shard) -> "Table":
    """The lines of one shard, which holds the batch `number` of the plan."""
    from pyarrow import Table, string

    lines, before = [], {batch.site: 0 for batch in batches}
    for firing, batch in enumerate(batches):
        where = {"batch": number, "file": shard.file, "firing": firing, "site": str(batch.site)}
        when = {"step": batch.step, "sigma": batch.sigma}
        for (prompt_id, seed), row, rows in batch.segments():
            whose = {"prompt_id": prompt_id, "seed": seed, "row": row}
            span = {"start": before[batch.site] + rows.start, "rows": rows.stop - rows.start}
            lines.append(where | when | whose | span)
        before[batch.site] += len(batch.x)
    return _sealed(Table.from_pylist(lines, schema=_schema(string())), {str(number): asdict(shard)})


def joined(tables: "list[Table]") -> "Table":
    """One index of several."""
    from pyarrow import concat_tables

    facts = {number: facts for table in tables for number, facts in _facts(table).items()}
    return _sealed(concat_tables([table.replace_schema_metadata() for table in tables]), facts)


def to_parquet(index: "Table") -> bytes:
    from pyarrow.parquet import write_table

    write_table(index, buffer := BytesIO(), compression="zstd")
    return buffer.getvalue()


def from_parquet(data: bytes) -> "Table":
    """The index that these bytes hold; ValueError where they are damaged."""
    from pyarrow import ArrowException, dictionary, int32, string
    from pyarrow.parquet import ParquetFile

    try:
        table = ParquetFile(BytesIO(data), read_dictionary=_TEXT).read(use_threads=False)
        table.validate(full=True)
        sound = table.schema == _schema(dictionary(int32(), string()))
        sound = sound and _seal(table) == (table.schema.metadata or {}).get(b"seal")
    except (ArrowException, OSError, KeyError) as error:
        raise ValueError(str(error).split("\n")[0]) from error
    if not sound:
        raise ValueError("its seal is broken")
    return table


def numbers(index: "Table", column: str) -> Any:
    """A column of numbers, without copies."""
    return np.from_dlpack(index[column].combine_chunks())


def shards(index: "Table") -> dict[int, Shard]:
    """The shards that an index is about, by the number of the batch that each holds."""
    return {
        int(number): Shard(
            facts["file"],
            facts["size"],
            facts["checksum"],
            {name: Strip(**strip) for name, strip in facts["strips"].items()},
        )
        for number, facts in _facts(index).items()
    }


def _schema(text: Any) -> "Schema":
    import pyarrow as pa

    number = pa.int32()
    return pa.schema(
        {
            "batch": number,
            "file": text,
            "firing": number,
            "site": text,
            "step": number,
            "sigma": pa.float64(),
            "prompt_id": text,
            "seed": pa.int64(),
            "row": text,
            "start": pa.int64(),
            "rows": pa.int64(),
        }
    )


def _facts(index: "Table") -> dict[str, Any]:
    return json.loads(index.schema.metadata[b"shards"])


def _sealed(index: "Table", facts: Mapping[str, Any]) -> "Table":
    index = index.replace_schema_metadata({b"shards": json.dumps(facts).encode()})
    return index.replace_schema_metadata({**index.schema.metadata, b"seal": _seal(index)})


def _seal(index: "Table") -> bytes:
    """A checksum of every value and of the shards' facts, however Parquet lays them out."""
    from pyarrow import string
    from xxhash import xxh3_64

    seal = xxh3_64((index.schema.metadata or {}).get(b"shards", b""))
    for name in index.schema.names:
        column = index[name]
        seal.update("\0".join(column.cast(string()).to_pylist()).encode() if name in _TEXT else numbers(index, name))
    return seal.hexdigest().encode()
