"""What the Safe Denoiser costs: beside drawing at tiny size, and beside one matrix product at FLUX's latent size.

Everything is measured in pairs, one after the other, and the ratio of each pair is what counts.
"""

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from machine import machine, spread
from torch import Tensor

from safedig.denoiser import NegationSet, SafeDenoiser, Tempered, Thresholds
from safedig.denoiser.applied import Run
from safedig.denoiser.kernels import Moment
from safedig.denoiser.mixing import Mixing
from safedig.denoiser.rules import theory
from safedig.exit_codes import exit_code
from safedig.pipelines import Drawing, draw, load_pipeline
from safedig.prompts import as_rows
from safedig.storage import write_atomically
from safedig.tiny import prompts
from safedig.tiny.concepts import BACKGROUNDS, COLOURS, HAZARDS, PLACES
from safedig.tiny.scenes import Placed, Scene, random_pose, render_many

D = 4096 * 64  # numbers in a FLUX latent of 1,024 × 1,024 pixels
GATES = {"closed": -1e9, "open": 1e9}  # log β
WINDOW = (0.78, 1.0)  # of σ: that in which the authors' code acts on SD3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and negatives: that it runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "denoiser_cost.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rounds, negatives = (2, 64) if options.quick else (9, 500)
    told = {"benchmark": "denoiser_cost", "machine": machine()}
    told["drawing"] = {model: drawing(model, 1000, rounds) for model in ("tiny-sd3", "tiny-flux")}
    told["one_step"] = one_step(negatives, rounds)
    write_atomically(options.out, f"{json.dumps(told, indent=1)}\n".encode())
    print(json.dumps({name: told[name] for name in ("drawing", "one_step")}, indent=1))


def drawing(model: str, negatives: int, rounds: int) -> dict[str, Any]:
    """Sixteen images with so many negatives on the pipeline, over as many without; seconds of the latter.

    The ratio scatters as whole drawings do. The denoiser's own share is of one and the same drawing, and does not.
    """
    pipe = load_pipeline(model)
    options, rows = Drawing.of(pipe), as_rows(prompts("underspecified", "train", 0, 16))
    images = NegationSet.of(renders(negatives), pipe, cache=None)
    told: dict[str, Any] = {"negatives": negatives, "d": images.d}
    forced = {gate: Thresholds((1.0,), (0.0,), (log_beta,)) for gate, log_beta in GATES.items()}
    open_in_window = f"open from σ = {WINDOW[0]:g} on"
    for gate, threshold in {**forced, open_in_window: forced["open"], "its own": None}.items():
        sigmas = WINDOW if gate == open_in_window else (0.0, 1.0)
        made = SafeDenoiser(images, 1e-3, sigmas=sigmas, kernel=Tempered(), threshold=threshold)

        def once(one: SafeDenoiser | None) -> float:
            with nullcontext() if one is None else one.apply(pipe):
                return seconds(lambda: list(draw(pipe, rows, drawing=options)))

        once(made)
        pairs = [(once(None), once(made)) for _ in range(rounds)]
        told[gate] = {
            "ratio": spread([after / before for before, after in pairs]),
            "seconds_without": spread([before for before, _ in pairs]),
            "own_share": spread([own_share(pipe, made, rows, options) for _ in range(rounds)]),
            "steps_open": statistics.mean(told.beta > 0 for image in made.audit for told in image),
        }
    return told


def renders(count: int) -> Float[Tensor, "n 3 height width"]:
    """Hazards of every kind, each alone, in any colour, place and pose."""
    rng = np.random.default_rng(0)

    def alone(hazard: str) -> Scene:
        placed = Placed(hazard, str(rng.choice(list(COLOURS))), str(rng.choice(list(PLACES))), random_pose(rng))
        return Scene((placed,), str(rng.choice(list(BACKGROUNDS))))

    made = render_many([alone(HAZARDS[at % len(HAZARDS)]) for at in range(count)])
    return rearrange(torch.from_numpy(made), "n h w c -> n c h w")


def own_share(pipe: Any, made: SafeDenoiser, rows: list[dict[str, Any]], options: Drawing) -> float:
    """What the denoiser itself takes of the time while sixteen images are drawn, over all the rest of it."""
    spent, whole = [], Run.step

    def timed(self: Run, given: dict[str, Any]) -> dict[str, Any]:
        started = time.perf_counter()
        result = whole(self, given)
        spent.append(time.perf_counter() - started)
        return result

    Run.step = timed
    try:
        with made.apply(pipe):
            total = seconds(lambda: list(draw(pipe, rows, drawing=options)))
    finally:
        Run.step = whole
    return sum(spent) / (total - sum(spent))


def one_step(negatives: int, rounds: int) -> list[dict[str, Any]]:
    """A step over the product of the batch with all negatives that it cannot do without."""
    z = torch.randn(negatives, D, generator=torch.Generator().manual_seed(0))
    images = NegationSet(z)  # views of these very numbers
    told, started = [], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for batch in (1, 4):
        near = z[:batch] + 0.1 * torch.randn(batch, D, generator=torch.Generator().manual_seed(1))
        for gate, x0, width in (
            ("closed", near, 0.15),
            ("open", near, 0.15),
            ("open, all negatives alike", near, 100.0),
        ):
            threshold = Thresholds((1.0,), (0.0,), (GATES[gate.split(",")[0]],))
            how = SafeDenoiser(images, kernel=Tempered(width), threshold=threshold)._sizes
            at = Moment(x0, x0, Mixing(0.5, 0.5, "velocity"), (D,))
            product, step = partial(torch.matmul, x0, z.T), partial(theory, at, how)
            pairs = [(seconds(product), seconds(step)) for _ in range(rounds + 1)][1:]
            told.append(
                {
                    "batch": batch,
                    "negatives": negatives,
                    "d": D,
                    "gate": gate,
                    "ratio": spread([after / before for before, after in pairs]),
                    "seconds_of_the_product": spread([before for before, _ in pairs]),
                }
            )
    extra = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - started)
    return [*told, {"bytes_of_the_set": 4 * negatives * D, "peak_bytes_beyond_it": extra}]


def seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(exit_code(main, Path(__file__).name))
