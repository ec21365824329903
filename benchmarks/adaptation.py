"""A decoder refitted to a target domain, against 3,000 steps of gradient descent on it and against training anew.

In one run, on a planted dictionary whose atoms partly turn and whose mean moves: all three see the same target rows, a
fifth of each batch is source, and every FVU is of held-out target rows. Training anew is timed over some steps and
counted for as many as the source's SAE was trained. Seconds are of processor time on one thread, so that what else the
machine does is not counted. Peak memory at 24,576 × 3,072 is computed, and measured in a process of its own at fewer
rows.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from machine import machine
from torch import Tensor
from torch.nn.functional import normalize

from safedig.activations.stream import Activations, Batch
from safedig.adaptation import adapt
from safedig.adaptation.descent import descend
from safedig.exit_codes import exit_code
from safedig.sae.model import Decoder, SparseAutoencoder, ThresholdEncoder
from safedig.sae.options import SAEOptions
from safedig.sae.train import train_on
from safedig.sites import Site
from safedig.storage import write_atomically

SITE, TOKENS, BATCH = Site.parse("img.embed"), 64, 1024  # rows of an image and of a batch
HELD_OUT, WATCHED = 8192, 100  # rows that every FVU is of; steps of descent between two looks at them
GOAL = "fvu_ratio <= 1.01, descent_ratio >= 3, retraining_ratio >= 20, source_moved <= 1e-4, peak_GB < 4"
WIDE = (24_576, 3_072)  # d_sae, d_in of the memory


@dataclass(frozen=True)
class Size:
    """One dictionary and how much is done with it."""

    d_in: int
    d_sae: int
    k: int
    atoms: int
    rows: int
    """Of the target; half as many of the source are replayed."""
    train_steps: int
    """Of the source's SAE, and of the one that is trained anew, if all were taken."""
    steps: int = 3000
    timed: int = 20
    """Steps of training anew that are timed."""
    rates: tuple[float, ...] = (3e-4, 1e-3)
    """Step sizes of descent; the best counts."""


SIZES = {
    1_024: Size(128, 1_024, 14, 512, 100_000, 3000, rates=(3e-4, 1e-3, 3e-3)),
    24_576: Size(128, 24_576, 32, 8_192, 65_536, 3000, timed=8, rates=(1e-3,)),
}
SHIFTS = {
    "a quarter of the atoms turned by 60°, mean moved": (0.25, 60.0, 1.0),
    "all atoms turned by 30°": (1.0, 30.0, 0.0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="little of everything: that it runs, not what it says")
    parser.add_argument("--sizes", type=int, nargs="*", default=list(SIZES))
    parser.add_argument("--rows", type=int, default=16_384, help="of the memory's measurement")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "adaptation.json")
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory:
        print(json.dumps(peak(options.rows)))
        return
    result: dict[str, Any] = {"benchmark": "adaptation", "quick": options.quick, "machine": machine(), "goal": GOAL}
    result["sizes"] = {
        str(name): compared(quick(SIZES[name]) if options.quick else SIZES[name]) for name in options.sizes
    }
    result["memory"] = {"on_paper": on_paper(*WIDE, rows=500_000, l0=64)} | in_a_process(
        1024 if options.quick else options.rows
    )
    write_atomically(options.out, f"{json.dumps(result, indent=2)}\n".encode())
    print(json.dumps(result, indent=2))


def quick(size: Size) -> Size:
    return replace(size, rows=8192, train_steps=100, steps=60, timed=2, rates=(1e-3,))


def compared(size: Size) -> dict[str, Any]:
    """Source SAE once, then one shift after the other."""
    atoms, often = dictionary(size)
    source, seconds = draw(atoms, often, size.rows // 2, 1), 0.0
    options = SAEOptions(
        expansion=size.d_sae // size.d_in, k=size.k, steps=size.train_steps, batch_size=BATCH, aux=1 / 32
    )
    sae = planted(atoms, often, size) if size.d_sae > 8192 else train_on(source, options)
    sae = SparseAutoencoder(sae.encoder, sae.decoder)
    kept = adapt({SITE: sae}, recording(source), replay=recording(source))[SITE]
    found = {
        "size": asdict(size),
        "source_moved": (kept.decoder.W_dec - sae.decoder.W_dec).norm().item() / sae.decoder.W_dec.norm().item(),
        "source_gain": kept.metadata["adaptation"]["gain"],
        "shifts": {},
    }
    for name, (share, degrees, mean) in SHIFTS.items():
        turned = turn(atoms, share, degrees)
        target, held_out = draw(turned, often, size.rows, 3, mean), draw(turned, often, HELD_OUT, 4, mean)
        started = time.process_time()
        adapted = adapt({SITE: sae}, recording(target), replay=recording(source))[SITE]
        seconds = time.process_time() - started
        slow = {rate: descended(sae, target, source, held_out, size.steps, rate) for rate in size.rates}
        best = min(slow.values(), key=lambda one: one["fvu"])
        anew = retrained(target, replace(options, steps=size.timed)) / size.timed * size.train_steps
        fvu = unexplained(sae, adapted.decoder, held_out)
        found["shifts"][name] = {
            "zero_shot": unexplained(sae, sae.decoder, held_out),
            "fvu": fvu,
            "descent": {str(rate): one for rate, one in slow.items()},
            "fvu_ratio": fvu / best["fvu"],
            "adapt_s": seconds,
            "solver": adapted.metadata["adaptation"]["solver"],
            "iterations": adapted.metadata["adaptation"]["iterations"],
            "descent_ratio": best["seconds"] / seconds,
            "retraining_s": anew,
            "retraining_ratio": anew / seconds,
        }
    return found


def dictionary(size: Size) -> tuple[Tensor, Tensor]:
    """Random unit atoms, and how often each is in a row: Zipf's law."""
    generator = torch.Generator().manual_seed(0)
    atoms = normalize(torch.randn(size.atoms, size.d_in, generator=generator), dim=1)
    often = 1 / torch.arange(1, size.atoms + 1).float().sqrt()
    return atoms, (often * min(8.0, size.k / 2) / often.sum()).clamp(max=0.9)


def draw(atoms: Tensor, often: Tensor, rows: int, seed: int, mean: float = 0.0) -> Tensor:
    """Rows of a few atoms each, neighbours in pairs more often than by chance, 20 dB above the noise."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for start in range(0, rows, 2048):
        count = min(2048, rows - start)
        chosen = torch.rand(count, len(often), generator=generator) < often
        chosen[:, 1::2] |= chosen[:, ::2] & (torch.rand(count, len(often) // 2, generator=generator) < 0.2)
        row, atom = chosen.nonzero(as_tuple=True)
        weight = torch.rand(len(row), generator=generator) + 0.5
        x = torch.zeros(count, atoms.shape[1]).index_add_(0, row, weight[:, None] * atoms[atom])
        noise = torch.randn(x.shape, generator=generator) * 0.1 * x.square().mean().sqrt()
        parts.append(x + noise)
    away = normalize(torch.randn(atoms.shape[1], generator=torch.Generator().manual_seed(9)), dim=0)
    return torch.cat(parts) + mean * away


def turn(atoms: Tensor, share: float, degrees: float) -> Tensor:
    """A share of the atoms, each turned by that angle in a direction of its own."""
    generator = torch.Generator().manual_seed(1)
    aside = torch.randn(atoms.shape, generator=generator)
    aside = normalize(aside - (aside * atoms).sum(1, keepdim=True) * atoms, dim=1)
    angle = torch.tensor(degrees).deg2rad()
    moved = torch.rand(len(atoms), 1, generator=generator) < share
    return torch.where(moved, atoms * angle.cos() + aside * angle.sin(), atoms)


def planted(atoms: Tensor, often: Tensor, size: Size) -> SparseAutoencoder:
    """A wide SAE without hours of training: features read atoms, in noisy copies; other rows fit its decoder."""
    source = draw(atoms, often, 2 * size.rows, 6)
    generator = torch.Generator().manual_seed(5)
    copies = -(-size.d_sae // len(atoms))
    read = atoms.repeat(copies, 1)[: size.d_sae] + 0.5 / size.d_in**0.5 * torch.randn(
        size.d_sae, size.d_in, generator=generator
    )
    W_enc = normalize(read, dim=1).T.contiguous()
    pre = (source[:2048] @ W_enc).flatten()
    threshold = pre.kthvalue(len(pre) - 2048 * size.k).values
    encoder = ThresholdEncoder(W_enc, torch.zeros(size.d_sae), threshold.expand(size.d_sae).clone())
    rough = SparseAutoencoder(encoder, Decoder(W_enc.T / copies, source.mean(0)))
    fitted = adapt({SITE: rough}, recording(source))[SITE]
    return rough.with_decoder(fitted.decoder)


def recording(x: Tensor) -> Activations:
    """These rows as tokens of images, in batches."""
    ids = [f"p{at // TOKENS}" for at in range(len(x))]
    batches = [
        Batch(SITE, 0, 1.0, ids[at : at + 4096], [0] * len(part), ("cond",) * len(part), torch.arange(len(part)), part)
        for at, part in zip(range(0, len(x), 4096), x.split(4096), strict=True)
    ]
    rows = [{"id": name, "seed": 0} for name in dict.fromkeys(ids)]
    return Activations(lambda sites, wanted: batches, [SITE], rows, "dictionary")


def unexplained(sae: SparseAutoencoder, decoder: Decoder, x: Tensor) -> float:
    error = sum((part - decoder(sae.encode(part))).double().square().sum().item() for part in x.split(1024))
    return error / (x - x.mean(0)).double().square().sum().item()


def descended(
    sae: SparseAutoencoder, target: Tensor, source: Tensor, held_out: Tensor, steps: int, rate: float
) -> dict[str, float]:
    """Seconds of all the steps, and the lowest FVU on the way; looking at it is not timed."""
    looked, lowest = 0.0, float("inf")

    def watch(step: int, decoder: Decoder) -> None:
        nonlocal looked, lowest
        if (step + 1) % WATCHED == 0 or step + 1 == steps:
            started = time.process_time()
            lowest = min(lowest, unexplained(sae, decoder, held_out))
            looked += time.process_time() - started

    started = time.process_time()
    descend(sae, target, source, steps=steps, batch_size=BATCH, lr=rate, watch=watch)
    return {"seconds": time.process_time() - started - looked, "fvu": lowest}


def retrained(target: Tensor, options: SAEOptions) -> float:
    """Seconds of training an SAE on the target from nothing, without what comes before the steps and after them."""
    short = timed(lambda: train_on(target[: 4 * BATCH], replace(options, steps=1)))
    return timed(lambda: train_on(target[: 4 * BATCH], replace(options, steps=options.steps + 1))) - short


def timed(call: Callable[[], object]) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started


def on_paper(d_sae: int, d_in: int, rows: int, l0: int) -> dict[str, float]:
    """Gigabytes at the peak of solving by conjugate gradients, term by term."""
    matrix, columns = 4 * d_sae * d_in / 1e9, 4 * d_sae * 512 / 1e9
    terms = {
        "W_enc, W_dec": 2 * matrix,
        "Zᵀ X of target and source": 2 * matrix,
        "new W_dec": matrix,
        "vectors of 512 columns (13)": 13 * columns,
        f"codes of {rows:,} rows, L0 {l0}: as they are, of the features that fire, and transposed": 24
        * rows
        * l0
        / 1e9,
        "held-out rows": 2 * 4096 * d_in * 4 / 1e9,
        "dense codes and products of a block": 6 * 2**21 * 4 / 1e9,
    }
    return {name: round(value, 3) for name, value in terms.items()} | {"together": round(sum(terms.values()), 3)}


def in_a_process(rows: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--memory", "--rows", str(rows)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def peak(rows: int) -> dict[str, Any]:
    """Adapt a random dictionary of full size to noise."""
    d_sae, d_in = WIDE
    generator = torch.Generator().manual_seed(0)
    W_enc = torch.randn(d_in, d_sae, generator=generator).div_(d_in**0.5)
    sae = SparseAutoencoder(
        ThresholdEncoder(W_enc, torch.zeros(d_sae), torch.full((d_sae,), 2.8)),
        Decoder(W_enc.T.contiguous(), torch.zeros(d_in)),
    )
    images = [f"p{at}" for at in range(-(-rows // TOKENS))]

    def stream(shift: float) -> Activations:
        def batches(sites: Any, ids: Any) -> Any:
            noise = torch.Generator().manual_seed(1)
            for start in range(0, rows, 4 * TOKENS):
                names = [images[at // TOKENS] for at in range(start, min(start + 4 * TOKENS, rows))]
                x = torch.randn(len(names), d_in, generator=noise) + shift
                yield Batch(SITE, 0, 1.0, names, [0] * len(x), ("cond",) * len(x), torch.arange(len(x)), x)

        return Activations(batches, [SITE], [{"id": name, "seed": 0} for name in images], "noise")

    before = memory("VmRSS")
    started = time.process_time()
    report = adapt({SITE: sae}, stream(0.01), replay=stream(0.0))[SITE].metadata["adaptation"]
    return {
        "rows": rows,
        "l0": report["domains"]["target"]["zero_shot"]["l0"],
        "solver": report["solver"],
        "iterations": report["iterations"],
        "seconds": time.process_time() - started,
        "before_GB": before,
        "peak_GB": memory("VmHWM"),
    }


def memory(what: str) -> float:
    """VmRSS (now) or VmHWM (at its peak) of this process, in GB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(what)).split()[1]) * 1024 / 1e9


if __name__ == "__main__":
    sys.exit(exit_code(main, Path(__file__).name))
