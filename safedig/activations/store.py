"""The stream on disk, found again by what it is a recording of. Only reads; filling.py writes.

<address>/<identity>/manifest.json                 what was recorded: the identity is the hash of these facts
                     prompts.jsonl                 the rows, in the order of the plan
                     rank-000/000042.safetensors   one batch of the plan
                     rank-000/000042.parquet       its lines of the index; the batch counts from here on
                     index.parquet                 all lines, once all batches are there
"""

import hashlib
import json
from collections.abc import Iterator
from functools import cached_property
from itertools import groupby
from os import PathLike
from typing import TYPE_CHECKING, Any

from ..progress import say, track
from ..sites import Site
from .address import Address, StoreError
from .index import from_parquet, numbers, shards
from .shards import TOKENS, Shard
from .stream import Activations, Batch

if TYPE_CHECKING:
    from pyarrow import Table

MANIFEST, PROMPTS, INDEX, PIECES = "manifest.json", "prompts.jsonl", "index.parquet", "rank-*/*.parquet"


class Store:
    """A finished recording; iterates over its batches as they were recorded, each proved by its checksum."""

    def __init__(self, address: Address, facts: dict[str, Any], shards: dict[int, Shard], images: int):
        self.address = address
        self.facts = facts
        self.shards = shards
        self.images = images

    @property
    def identity(self) -> str:
        return identity(self.facts)

    @property
    def size(self) -> int:
        """Bytes of all shards."""
        return sum(shard.size for shard in self.shards.values())

    @cached_property
    def index(self) -> "Table":
        """A line for each image at each site in each step, with where its rows lie."""
        try:
            return from_parquet(self.address.read(INDEX))
        except (OSError, ValueError) as error:
            raise StoreError(f"'{self.address}/{INDEX}' is damaged ({error}): record again.") from error

    def lines(self, site: Site | None = None) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """The lines of the index, at one site if given, shard by shard."""
        from pyarrow.compute import equal  # type: ignore[attr-defined]

        index = self.index if site is None else self.index.filter(equal(self.index["site"], str(site)))
        ends = numbers(index, "batch")
        for number in self.shards:
            start, stop = ends.searchsorted(number), ends.searchsorted(number, side="right")
            yield number, index.slice(start, stop - start).to_pylist()

    def __call__(self, sites: list[Site], ids: set[str]) -> Iterator[Batch]:
        """The batches that hold any of these prompts, at these sites; other tensors are not read."""
        names = {str(site): site for site in sites}
        for number, lines in self.lines():
            wanted = [line for line in lines if line["site"] in names]
            if ids.isdisjoint(line["prompt_id"] for line in wanted):
                continue
            shard = self.shards[number]
            read = {name: shard.read(self.address, name) for name in names}
            tokens = {name: shard.read(self.address, name + TOKENS)[:, 0].long() for name in names}
            for _, firing in groupby(wanted, key=lambda line: line["firing"]):
                yield _batch(list(firing), names, read, tokens)


def open_store(address: str | PathLike[str] | Address) -> Activations:
    """The finished recording at an address, or the only one below it, without the model that was recorded."""
    place = _place(Address(address))
    facts, prompts = _introduction(place)
    index = readable(place, INDEX)
    if index is None:
        raise StoreError(
            f"'{place}' is unfinished: {len(committed(place))} of {facts['batches']} batches are there. Record again."
        )
    store = Store(place, facts, index, len(prompts))
    return Activations(store, [Site.parse(name) for name in facts["sites"]], prompts, facts["model"], store)


def verify(address: str | PathLike[str]) -> dict[str, str]:
    """What is wrong with the recording at an address, by file; nothing, if all of it is there to the last bit."""
    place = _place(Address(address))
    facts, _ = _introduction(place)
    there = committed(place)
    faults = {shard.file: shard.fault(place) for shard in track(there.values(), "Checking the store")}
    lost = {f"batch {number}": "is missing" for number in range(facts["batches"]) if number not in there}
    if readable(place, INDEX) is None:
        lost[INDEX] = "is missing or damaged"
    return {name: fault for name, fault in (faults | lost).items() if fault}


def identity(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _introduction(place: Address) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The facts and the prompts, both proved."""
    try:
        manifest, prompts = json.loads(place.read(MANIFEST)), place.read(PROMPTS)
        sound = identity(manifest["facts"]) == place.root.rpartition("/")[2]
        sound = sound and hashlib.sha256(prompts).hexdigest() == manifest["prompts"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"'{place}' has no readable manifest ({error}): record again, its rows are kept.") from error
    if not sound:
        raise StoreError(f"The {MANIFEST} or {PROMPTS} of '{place}' is damaged: record again, its rows are kept.")
    return manifest["facts"], [json.loads(line) for line in prompts.splitlines()]


def _place(address: Address) -> Address:
    """The address itself if a recording lies there, else the only one below it."""
    if address.size(MANIFEST) is not None:
        return address
    found = [name.split("/")[0] for name in address.find(f"*/{MANIFEST}")]
    if len(found) == 1:
        return Address(address, found[0])
    raise StoreError(
        f"'{address}' holds {len(found)} recordings{': ' if found else ''}{', '.join(found)}; expected one. "
        + ("Give the folder of one of them." if found else "Give the store of a recording, or record one there.")
    )


def committed(place: Address) -> dict[int, Shard]:
    """The batches that are there, by the merged index, else by its pieces."""
    merged = readable(place, INDEX)
    if merged is not None:
        return merged
    pieces = [readable(place, name) for name in place.find(PIECES)]
    return dict(sorted((number, shard) for piece in pieces if piece for number, shard in piece.items()))


def readable(place: Address, name: str) -> dict[int, Shard] | None:
    """The shards that an index file is about; None if it is not there, or is damaged, which is said."""
    try:
        return shards(from_parquet(place.read(name)))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        say(f"'{place}/{name}' is damaged ({error}): it does not count.")
        return None


def _batch(lines: list[dict[str, Any]], sites: dict[str, Site], x: dict[str, Any], token: dict[str, Any]) -> Batch:
    """One firing of a site, of its lines in the index."""
    first, name = lines[0], lines[0]["site"]
    rows = slice(first["start"], lines[-1]["start"] + lines[-1]["rows"])
    return Batch(
        site=sites[name],
        step=first["step"],
        sigma=first["sigma"],
        prompt_ids=[line["prompt_id"] for line in lines for _ in range(line["rows"])],
        seeds=[line["seed"] for line in lines for _ in range(line["rows"])],
        row=tuple(line["row"] for line in lines for _ in range(line["rows"])),
        token=token[name][rows],
        x=x[name][rows],
    )
