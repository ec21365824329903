"""Bring a store to completion: draw what is missing or damaged, write it, and merge the index; any number of processes.

Each file appears whole or not at all, and a batch is drawn whole or not at all: an interruption costs the batches in
flight, and what is drawn again has the same bits. Writing is not forced to the platter: after a power cut the checksums
tell what is lost.
"""

import hashlib
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from os import PathLike
from typing import Any

from ..progress import say, track
from .address import Address, StoreError
from .forecast import Forecast
from .index import from_parquet, index_of, joined, shards, to_parquet
from .plan import Part, Plan
from .processes import Share
from .shards import Shard, pack
from .store import INDEX, MANIFEST, PIECES, PROMPTS, committed, identity, open_store, readable
from .stream import Activations, Batch


def fill(
    address: str | PathLike[str], facts: dict[str, Any], plan: Plan, draw: Callable[[Part], list[Batch]]
) -> Activations:
    """Draw what is missing at the address, or damaged there, and give all of it back; processes share the batches."""
    place, share = Address(address, identity(facts)), Share.of_this_process()
    if share.first:
        _sweep(place, "")
        _introduce(place, facts, plan)
    there = committed(place)
    for number in _damaged(place, {number: there[number] for number in share.of(there)}) if there else ():
        _discard(place, number, there.pop(number).file)
    missing = share.of(number for number in range(len(plan.parts)) if number not in there)
    if missing:
        left = sum(len(part.images) for number, part in enumerate(plan.parts) if number not in there)
        _draw(place, share, plan, missing, left, draw)
    share.wait()
    if share.first and readable(place, INDEX) is None:
        _merge(place, len(plan.parts))
    share.wait()
    return open_store(place)


def _introduce(place: Address, facts: dict[str, Any], plan: Plan) -> None:
    prompts = "".join(json.dumps(image, ensure_ascii=False) + "\n" for image in plan.images).encode()
    seal = hashlib.sha256(prompts).hexdigest()
    manifest = json.dumps({"facts": facts, "prompts": seal}, indent=2, ensure_ascii=False).encode()
    for name, data in ((PROMPTS, prompts), (MANIFEST, manifest)):
        if place.size(name) != len(data) or place.read(name) != data:
            place.write(name, data)


def _damaged(place: Address, there: dict[int, Shard]) -> list[int]:
    """The batches whose shard is not what it was; each is named."""
    damaged = []
    for number, shard in track(there.items(), "Checking the store", len(there)):
        if fault := shard.fault(place):
            say(f"'{place}/{shard.file}' {fault}: its images are drawn anew.")
            damaged.append(number)
    return damaged


def _sweep(place: Address, folder: str) -> None:
    """Remove what a killed process was about to put into place."""
    for leftover in place.find(f"{folder}.*.partial"):
        place.remove(leftover)


def _discard(place: Address, number: int, file: str) -> None:
    """A batch stops counting before its rows go."""
    for name in (INDEX, *place.find(f"rank-*/{number:06d}.parquet"), file):
        place.remove(name)


def _draw(
    place: Address, share: Share, plan: Plan, missing: list[int], left: int, draw: Callable[[Part], list[Batch]]
) -> None:
    """One batch is written while the next is drawn; from the first it is told what all of them, `left` images, take."""
    folder = f"rank-{share.rank:03d}"
    _sweep(place, f"{folder}/")

    def commit(number: int, batches: list[Batch]) -> None:
        file = f"{folder}/{number:06d}.safetensors"
        data = pack(batches)
        place.write(file, data)
        place.write(f"{folder}/{number:06d}.parquet", to_parquet(index_of(batches, number, Shard.of(file, data))))

    started = time.perf_counter()
    with ThreadPoolExecutor(1) as writer:
        pending = writer.submit(int)
        for number in track(missing, "Recording activations"):
            batches = draw(plan.parts[number])
            if number == missing[0]:
                seconds, drawn = time.perf_counter() - started, len(plan.parts[number].images)
                forecast = Forecast.of(batches, drawn, seconds, left, share.world)
                if share.first:
                    say(str(forecast))
                forecast.check(place)
            pending.result()
            pending = writer.submit(commit, number, batches)
        pending.result()


def _merge(place: Address, batches: int) -> None:
    pieces = {}
    for name in place.find(PIECES):
        table = from_parquet(place.read(name))
        pieces |= {number: table for number in shards(table)}
    if len(pieces) < batches:
        raise StoreError(f"'{place}' has {len(pieces)} of {batches} batches: record again.")
    place.write(INDEX, to_parquet(joined([pieces[number] for number in sorted(pieces)])))
