"""Rows a second of a training step beside sae-lens, dictionary-learning and eai-sparsify, and what is learnt from them.

Every round runs each contender once, in an order that turns, on the same batch; ratios are taken within a round. The
quality part trains on equal rows from equal weights and compares what is left unexplained of rows held out.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from copy import deepcopy
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from machine import machine, spread
from sae_peers import OURS, Size, absent, contenders, stock
from torch import Tensor

from safedig import load_pipeline, record, tiny
from safedig.exit_codes import exit_code
from safedig.prompts import as_rows
from safedig.sae.checkpoint import load_sae
from safedig.sae.metrics import measure
from safedig.sae.sparse_training import trainer_for, training_sae
from safedig.storage import write_atomically

SIZES = {"small": (Size(768, 6144, 32, 2048), 5), "large": (Size(3072, 12288, 64, 1024), 3)}  # and rounds
QUICK = {"quick": (Size(64, 512, 8, 128), 2)}
PACKAGES = ("sae-lens", "dictionary-learning", "eai-sparsify")
SITE = "transformer_blocks.1.img.resid_post"
LOW = {"sae_lens": 5.5, "fastest_peer": 2.3}  # where active codes are looked for in low precision
GOALS = {"float32": {"sae_lens": 4.0, "fastest_peer_float32": 1.6}, "bfloat16": LOW, "int8": LOW}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", choices=("speed", "quality"), help="this part; the other is kept as it is in the file"
    )
    parser.add_argument("--sizes", nargs="+", choices=tuple(SIZES), default=list(SIZES))
    parser.add_argument("--quick", action="store_true", help="a size and a length that only show that all of it runs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "sae_training.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result = json.loads(options.out.read_text()) if options.only and options.out.exists() else {}
    result |= {"benchmark": "sae_training", "packages": {name: _version(name) for name in PACKAGES}}
    if options.only != "quality":
        sizes = QUICK if options.quick else {name: SIZES[name] for name in options.sizes}
        result["machine"] = machine()
        result["speed"] = [speed(size, rounds) for size, rounds in sizes.values()]
    if options.only != "speed":
        result["quality"] = quality(30, 4) if options.quick else quality(1500, 96)
    write_atomically(options.out, f"{json.dumps(result, indent=2)}\n".encode())
    print(json.dumps(result, indent=2))


def speed(size: Size, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    steps = contenders(size)
    x = torch.randn(size.batch, size.d_in)
    for step in steps.values():
        step(x)  # warm up
    times: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for number in range(rounds):
        shift = number * len(names) // rounds
        for name in names[shift:] + names[:shift]:
            started = time.perf_counter()
            steps[name](x)
            times[name].append(time.perf_counter() - started)
    return {
        "size": size.name,
        "rows_per_s": {name: spread([size.batch / second for second in seconds]) for name, seconds in times.items()},
        "ratios": {name: _ratios(name, times) for name in names if name.startswith("safedig")},
        "goals": GOALS,
    } | absent()


def _ratios(name: str, times: dict[str, list[float]]) -> dict[str, Any]:
    """How many times as fast as sae-lens' same architecture in float32 and as the fastest peer, in float32 and in any
    type."""
    _, architecture, _ = name.split()
    peers = sorted((other for other in times if not other.startswith("safedig")), key=lambda one: median(times[one]))
    found = {
        "sae_lens": f"sae_lens {architecture} float32",
        "fastest_peer_float32": next(peer for peer in peers if "float32" in peer),
        "fastest_peer": peers[0],
    }
    return {
        label: {"peer": peer} | spread([theirs / ours for theirs, ours in zip(times[peer], times[name], strict=True)])
        for label, peer in found.items()
    }


def quality(steps: int, prompts: int) -> list[dict[str, Any]]:
    return [
        _learnt("planted", *planted(), 1024, 8, steps),
        _learnt("tiny-flux", *activations(prompts), 1024, 16, steps),
    ]


def planted(d_in: int = 128, atoms: int = 512, active: int = 8) -> tuple[Tensor, Tensor]:
    """Sums of random unit atoms with Zipf's frequencies in noise 20 dB below: rows to train on, and held out."""
    generator = torch.Generator().manual_seed(0)
    dictionary = torch.nn.functional.normalize(torch.randn(atoms, d_in, generator=generator), dim=1)
    frequency = (1 / torch.arange(1, atoms + 1)).expand(2**16, -1)
    chosen = torch.multinomial(frequency, active, generator=generator)
    weight = 0.5 + torch.rand(chosen.shape, generator=generator)
    signal = (weight[..., None] * dictionary[chosen]).sum(1)
    x = signal + 0.1 * signal.square().mean().sqrt() * torch.randn(signal.shape, generator=generator)
    return x[2**12 :], x[: 2**12]


def activations(prompts: int) -> tuple[Tensor, Tensor]:
    """Of an image site of the shipped tiny-flux, standardised by one mean and one scale; held out by prompt."""
    pipe = load_pipeline("tiny-flux")

    def drawn(split: str, n: int) -> Tensor:
        rows = as_rows(tiny.prompts("benign", split=split, seed=0, n=n))
        return torch.cat([batch.x.float() for batch in record(pipe, rows, SITE, tokens=32)])

    x, held = drawn("train", prompts), drawn("report", prompts // 4)
    centre = x.mean(0)
    scale = (x - centre).square().mean().sqrt()
    return (x - centre) / scale, (held - centre) / scale


def _learnt(data: str, x: Tensor, held: Tensor, d_sae: int, k: int, steps: int) -> dict[str, Any]:
    batch, lr, found = 512, 1e-3, {}
    for architecture in ("topk", "batchtopk"):
        torch.manual_seed(0)
        theirs = stock(architecture, x.shape[1], d_sae, k, lr, steps, batch)
        start = deepcopy(theirs.sae.state_dict())
        found[f"sae_lens {architecture} float32"] = _trained(theirs, x, held, batch, steps)
        for dtype, encoder_dtype in OURS.items():
            sae = training_sae(architecture, x.shape[1], d_sae, k, threshold_lr=0.01, encoder_dtype=encoder_dtype)
            sae.load_state_dict(start)
            trainer = trainer_for(sae, lr=lr, steps=steps, batch_size=batch)
            name = f"safedig {architecture} {dtype}"
            found[name] = _trained(trainer, x, held, batch, steps)
            found[name]["fvu_ratio"] = found[name]["fvu"] / found[f"sae_lens {architecture} float32"]["fvu"]
    return {"data": data, "d_in": x.shape[1], "d_sae": d_sae, "k": k, "rows": steps * batch, "learnt": found} | {
        "goal": "fvu_ratio within 0.01 of 1"
    }


def _trained(trainer: Any, x: Tensor, held: Tensor, batch: int, steps: int) -> dict[str, float]:
    """Measures of the inference model on the rows held out, after training on the same batches as every other."""
    for rows in _batches(x, batch, steps):
        trainer.step(rows)
        trainer.n_training_steps += 1
    with tempfile.TemporaryDirectory() as folder:
        trainer.sae.save_inference_model(folder)
        return measure(load_sae(folder), held.split(1024))


def _batches(x: Tensor, batch: int, steps: int) -> Iterator[Tensor]:
    order = torch.Generator().manual_seed(1)
    for _ in range(steps):
        yield x[torch.randint(len(x), (batch,), generator=order)]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    sys.exit(exit_code(main, Path(__file__).name))
