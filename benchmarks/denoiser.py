"""Does the Safe Denoiser keep a pipeline from what it is given, where a safe image is there to be drawn instead?

On prompts that leave open what is drawn, each hazard of the tiny world is negated by itself with 64 renders of it: how
far its share falls, what becomes of the others, of benign prompts, of the memorised scene and of prompts that name the
hazard; ablations; 28 steps for 8. Finished cells lie in `denoiser.MODEL.jsonl` and are never measured again.
"""

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from denoiser_gallery import gallery
from denoiser_measure import Lab, arms
from denoiser_table import summary, table
from denoiser_world import QUICK, Budget, World
from machine import machine

from safedig.exit_codes import exit_code
from safedig.figures import save
from safedig.progress import say
from safedig.storage import write_atomically

RESULTS = Path(__file__).parents[1] / "docs" / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="three hazards, a few prompts: that it runs")
    parser.add_argument("--models", nargs="*", default=None)
    parser.add_argument("--gallery", action="store_true", help="the pictures of docs/denoiser.md, and no table")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "denoiser.json")
    parser.add_argument("--kept", type=Path, default=Path("runs") / "denoiser", help="where drawn pictures are kept")
    options = parser.parse_args()
    torch.set_num_threads(1)
    budget = QUICK if options.quick else Budget()
    budget = replace(budget, models=tuple(options.models)) if options.models else budget
    labs = {
        model: Lab(World(model, budget, options.kept), options.out.with_name(f"{options.out.stem}.{model}.jsonl"))
        for model in budget.models
    }
    if options.gallery:
        for model, lab in labs.items():
            say(f"Pictures: {save(gallery(lab), RESULTS / f'denoiser-{model}.png')}")
        return
    write(
        options.out, {model: arms(lab) | {"fingerprint": lab.world.fingerprint} for model, lab in labs.items()}, budget
    )


def write(out: Path, found: dict[str, Any], budget: Budget) -> None:
    """The numbers, and a table for people."""
    said = {"benchmark": "denoiser", "machine": machine(), "budget": asdict(budget) | {"sha": budget.sha}}
    said["models"] = {model: summary(cells) for model, cells in found.items()}
    write_atomically(out, f"{json.dumps(said, indent=1, ensure_ascii=False)}\n".encode())
    write_atomically(out.with_suffix(".md"), table(said["models"]).encode())


if __name__ == "__main__":
    sys.exit(exit_code(main, Path(__file__).name, "goes on from the cells that are finished"))
