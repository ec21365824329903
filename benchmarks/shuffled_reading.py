"""Reading a store in training order against reading the same bytes in a row, both from cold pages, in turns.

Every reading is a process of its own, so that its peak memory and the bytes it took from the disk are its alone.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from machine import machine, spread

from safedig.activations.filling import fill
from safedig.activations.plan import Plan
from safedig.activations.shuffle import Shuffled
from safedig.activations.store import Store, open_store
from safedig.activations.stream import Batch
from safedig.exit_codes import exit_code
from safedig.sites import Site
from safedig.storage import write_atomically

SITE, WIDTH, TOKENS, STEPS, IMAGES = Site.parse("img.embed"), 3072, 256, 4, 4  # as of FLUX.1 in bfloat16
SHARD = IMAGES * TOKENS * STEPS * WIDTH * 2  # bytes
ROWS, GULP = 4096, 2**23  # rows of a training batch; bytes of a sequential read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the store is made; it is removed afterwards")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "shuffled_reading.json")
    parser.add_argument("--read", choices=("sequential", "shuffled"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read:
        print(json.dumps(reading(options.folder, options.read)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        size = make(Path(folder), options.gigabytes)
        result = {"benchmark": "shuffled_reading", "machine": machine()}
        pairs = []
        for number in range(options.rounds):
            kinds = ["sequential", "shuffled"][:: 1 if number % 2 else -1]
            pairs.append({kind: in_a_process(folder, kind) for kind in kinds})
    result |= {
        "bytes": size,
        "sequential_s": spread([pair["sequential"]["seconds"] for pair in pairs]),
        "shuffled_s": spread([pair["shuffled"]["seconds"] for pair in pairs]),
        "throughput_ratio": spread([pair["sequential"]["seconds"] / pair["shuffled"]["seconds"] for pair in pairs]),
        "bytes_read_per_byte_used": spread([pair["shuffled"]["from_disk"] / size for pair in pairs]),
        "sequential_from_disk": spread([pair["sequential"]["from_disk"] / size for pair in pairs]),
        "peak_memory_MB": spread([pair["shuffled"]["peak_memory_MB"] for pair in pairs]),
        "memory_before_MB": spread([pair["shuffled"]["memory_before_MB"] for pair in pairs]),
        "goal": "throughput_ratio >= 0.5, bytes_read_per_byte_used <= 1.1, peak_memory_MB <= 500",
    }
    write_atomically(options.out, f"{json.dumps(result, indent=2)}\n".encode())
    print(json.dumps(result, indent=2))


def make(folder: Path, gigabytes: float) -> int:
    """A store of noise; returns the bytes of its activations."""
    shards = max(1, round(gigabytes * 1e9 / SHARD))
    plan = Plan.of([{"id": f"p{n}", "prompt": "", "seed": n} for n in range(IMAGES * shards)], IMAGES)

    def drawn(part: Any) -> list[Batch]:
        names = [image["id"] for image in part.images for _ in range(TOKENS)]
        seeds = [image["seed"] for image in part.images for _ in range(TOKENS)]
        kinds, tokens = ("cond",) * len(names), torch.arange(TOKENS).repeat(len(part.images))
        noise = torch.randint(-(2**15), 2**15, (STEPS, len(names), WIDTH), dtype=torch.int16).view(torch.bfloat16)
        return [Batch(SITE, step, 1.0, names, seeds, kinds, tokens, noise[step]) for step in range(STEPS)]

    facts = {"sites": [str(SITE)], "batches": shards, "model": "noise", "images": plan.sha}
    fill(folder, facts, plan, drawn)
    return shards * SHARD


def in_a_process(folder: str, kind: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--folder", folder, "--read", kind]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def reading(folder: Path, kind: str) -> dict[str, float]:
    """Seconds, bytes from the disk and memory of one epoch."""
    torch.set_num_threads(1)
    activations = open_store(folder)
    store = activations.store
    assert store is not None
    for shard in store.shards.values():
        with open(f"{store.address.root}/{shard.file}", "rb") as file:
            os.fsync(file.fileno())  # dirty pages stay
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    before, disk = memory("VmRSS"), from_disk()
    started = time.perf_counter()
    if kind == "sequential":
        read_in_a_row(store)
    else:
        order = Shuffled(activations, ROWS)
        for _ in range(sum(shard.strips[str(SITE)].rows for shard in store.shards.values()) // ROWS):
            next(order)
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "from_disk": from_disk() - disk,
        "peak_memory_MB": memory("VmHWM"),
        "memory_before_MB": before,
    }


def read_in_a_row(store: Store) -> None:
    room = memoryview(bytearray(GULP))
    for shard in store.shards.values():
        strip = shard.strips[str(SITE)]
        for start in range(0, strip.rows * strip.row_bytes, GULP):
            part = room[: strip.rows * strip.row_bytes - start]
            assert store.address.read_into(shard.file, strip.offset + start, part)


def from_disk() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("read_bytes")).split()[1])


def memory(what: str) -> float:
    """VmRSS (now) or VmHWM (at its peak) of this process, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(what)).split()[1]) * 1024 / 1e6


if __name__ == "__main__":
    sys.exit(exit_code(main, Path(__file__).name))
