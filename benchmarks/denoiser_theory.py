"""The theory of the Safe Denoiser on mixtures of Gaussians: none, half, all and twice of β*, in numbers and picture."""

import argparse
import io
import json
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from safedig.denoiser import Exact, NegationSet, SafeDenoiser, SafeDensity
from safedig.denoiser.theory import ExactPipeline, GaussianMixture, inside, wasserstein
from safedig.denoiser_figures import theory_figure
from safedig.exit_codes import exit_code
from safedig.storage import write_atomically

WORLDS = {  # the last component is the unsafe one
    "1-D": GaussianMixture.of([0.35, 0.35, 0.3], [[-2.2], [2.2], [0.0]], [0.4, 0.4, 0.3]),
    "2-D": GaussianMixture.of([0.25, 0.25, 0.5], [[-1.75, -0.3], [1.65, 0.5], [0.0, 0.0]], [0.35, 0.35, 0.25]),
}
SHARES = {"no denoiser": 0.0, "β* / 2": 0.5, "β*": 1.0, "2 β*": 2.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer samples: that it runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "denoiser_theory.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    n, negatives, steps = (200, 200, 20) if options.quick else (1500, 1500, 60)
    worlds = {name: measured(data, n, negatives, steps) for name, data in WORLDS.items()}
    told = {
        name: {
            "w1_of_two_safe_samples": world["between"],
            "unsafe_mass_of_the_safe_posterior": world["floor"],
            "drawn": {
                share: {key: one[key] for key in ("leaked", "w1", "away")} for share, one in world["drawn"].items()
            },
        }
        for name, world in worlds.items()
    }
    facts = {"benchmark": "denoiser_theory", "samples": n, "negatives": negatives, "steps": steps, "worlds": told}
    write_atomically(options.out, f"{json.dumps(facts, indent=1, ensure_ascii=False)}\n".encode())
    png = io.BytesIO()
    theory_figure(worlds).savefig(png, format="png", metadata={"Software": None})
    write_atomically(options.out.with_suffix(".png"), png.getvalue())
    print(json.dumps(told, indent=1, ensure_ascii=False))


def measured(data: GaussianMixture, n: int, negatives: int, steps: int) -> dict[str, Any]:
    """Drawn by the exact velocity and diffusers' own scheduler; the unsafe ball has three standard deviations."""
    unsafe = torch.arange(len(data.weights)) == len(data.weights) - 1
    safe, harm = data.part(~unsafe), data.part(unsafe)
    centre, radius = data.means[-1], 3 * float(data.std[-1])
    wanted, images = safe.sample(n, seeded(1)), NegationSet(harm.sample(negatives, seeded(2)))
    threshold = SafeDensity(safe.log_p, float(data.weights[unsafe].sum() / data.weights[~unsafe].sum()))
    drawn = {}
    for name, share in SHARES.items():
        pipe = ExactPipeline(data, FlowMatchEulerDiscreteScheduler())
        made = SafeDenoiser(images, share, kernel=Exact(), threshold=threshold, limit=1e4, floor=0.0)
        with made.apply(pipe):
            x = pipe(n, steps=steps, generator=seeded(3)).images
        away = float((x - centre).norm(dim=1).mean() - (wanted - centre).norm(dim=1).mean())
        drawn[name] = {"x": x, "leaked": inside(x, centre, radius), "w1": wasserstein(x, wanted), "away": away}
    return {
        "safe": safe,
        "centre": centre,
        "radius": radius,
        "drawn": drawn,
        "between": wasserstein(safe.sample(n, seeded(4)), wanted),
        "floor": inside(safe.sample(100_000, seeded(5)), centre, radius),
    }


def seeded(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


if __name__ == "__main__":
    sys.exit(exit_code(main, Path(__file__).name))
