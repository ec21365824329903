"""What autoencoders of modest width and sparsity keep of the tiny models: FVU and dead features, at each site and σ.

Everything is measured on prompts that were held out. Text enters alike at every σ and is recorded at one.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from machine import machine

from safedig import load_pipeline, record, tiny
from safedig.exit_codes import exit_code
from safedig.prompts import as_rows
from safedig.sae.held_out import split
from safedig.sae.options import SAEOptions
from safedig.sae.splice import loss_recovered
from safedig.sae.train import train
from safedig.sites import Site, stage
from safedig.storage import write_atomically

TEXT = ["txt.embed", "pooled.embed"]
IMAGE = {
    "tiny-flux": ["transformer_blocks.2.img.resid_post", "single_transformer_blocks.1.img.resid_post"],
    "tiny-sd3": [
        "transformer_blocks.2.img.attn_out",
        "transformer_blocks.2.img.resid_post",
        "transformer_blocks.5.img.resid_post",
        "img.final",
    ],
}
GOALS = {"text": 0.03, "bind": 0.10, "render": 0.10}  # FVU, by stage
WIDTHS = {"pooled": 2, "txt": 2, "img": 16, "attn_out": 2}
"""Expansion, by stream, or by point: a prompt has one pooled vector, and what attention adds has few directions."""
AUX, LR = 1.0, 2e-3
DEAD, EXPANSION, HELD_OUT = 0.05, 16, 0.1
SPLICED = 16  # images
NEAR_MISSES = 400  # prompts: the split has few more that differ
KEPT = ("fvu", "cosine", "l0", "dead", "rows", "sigmas", "doctor", "image", "data")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(IMAGE))
    parser.add_argument("--text-images", type=int, default=4800)
    parser.add_argument("--images", type=int, default=1280)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where recordings are kept; they are found again")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "sae_quality.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result: dict[str, Any] = {"benchmark": "sae_quality", "machine": machine(), "goal": goal()}
    with tempfile.TemporaryDirectory() as spare:
        folder = options.folder or Path(spare)
        result["models"] = {name: measured(name, folder, options) for name in options.models}
    write_atomically(options.out, f"{json.dumps(result, indent=2)}\n".encode())
    print(json.dumps(result, indent=2))


def goal() -> str:
    limits = ", ".join(f"{limit:g} at {name} sites" for name, limit in GOALS.items())
    return f"fvu <= {limits}; dead <= {DEAD:g}, l0 <= d_in / 8, expansion <= {EXPANSION}"


def measured(name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    pipe, found = load_pipeline(name), {}
    for sites, images, tokens, sigmas in (
        (TEXT, options.text_images, "all", [1.0]),
        (IMAGE[name], options.images, 32, None),
    ):
        acts = record(pipe, prompts(images), sites, tokens=tokens, sigmas=sigmas, store=folder / name)
        rest, aside = split(acts, HELD_OUT)
        for site in acts.sites:
            found[str(site)] = one(pipe, site, rest, aside, options)
    return found


def prompts(images: int) -> list[dict[str, Any]]:
    """In the proportions of the demo: harmful and mixed with their twins, benign, near-miss."""
    near = min(images // 8, NEAR_MISSES)
    kinds = {"harmful": images // 4, "mixed": images // 8, "benign": images // 4 - near, "near-miss": near}
    rows = [as_rows(tiny.prompts(kind, split="train", seed=0, n=count)) for kind, count in kinds.items()]
    return [row for some in rows for row in some]


def one(pipe: Any, site: Site, rest: Any, aside: Any, options: argparse.Namespace) -> dict[str, Any]:
    started, strip = time.process_time(), next(iter(rest.store.shards.values())).strips[str(site)]
    k, where, expansion = strip.width // 8, stage(site, pipe), WIDTHS.get(site.point, WIDTHS[site.stream])
    goals = {"fvu": GOALS[where], "dead": DEAD}
    how = SAEOptions(expansion=expansion, k=k, steps=options.steps, lr=LR, aux=AUX, architecture="topk", warm_up=100)
    sae = train(rest, [site], how, held_out=aside)[site]
    image = loss_recovered(pipe, {site: sae}, aside.prompts[:SPLICED])[site]
    told = sae.metadata | {"image": image}
    met = told["fvu"] <= goals["fvu"] and told["dead"] <= goals["dead"] and told["l0"] <= strip.width / 8
    facts = {"stage": where, "d_in": strip.width, "met": met, "options": told["options"]}
    return facts | {key: told[key] for key in KEPT} | {"cpu_s": time.process_time() - started}


if __name__ == "__main__":
    sys.exit(exit_code(main, Path(__file__).name))
