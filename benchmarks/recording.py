"""What recording to disk adds to drawing: the same prompts, drawn bare and recorded in turns, in one process."""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from machine import machine, spread

from safedig import load_pipeline, record, tiny
from safedig.pipelines import Drawing, draw
from safedig.prompts import as_rows

SITES = ["txt.embed", "transformer_blocks.0.img.resid_post", "single_transformer_blocks.-1.img.resid_post"]
TOKENS, BATCH = 16, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny-flux")
    parser.add_argument("--images", type=int, default=320)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "recording.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pipe = load_pipeline(options.model)
    rows = as_rows(tiny.prompts("benign", split="train", seed=0, n=options.images))
    drawing, stored = Drawing.of(pipe), 0

    def bare() -> float:
        started = time.perf_counter()
        for _ in draw(pipe, rows, drawing=drawing, batch_size=BATCH, output_type="latent"):
            pass
        return time.perf_counter() - started

    def recorded() -> float:
        nonlocal stored
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            activations = record(pipe, rows, SITES, tokens=TOKENS, store=folder, drawing=drawing, batch_size=BATCH)
            seconds = time.perf_counter() - started
            assert activations.store is not None
            stored = activations.store.size
        return seconds

    result = {"benchmark": "recording", "machine": machine()}
    bare(), recorded()  # warm up
    times = []
    for number in range(options.rounds):
        pair = (bare(), recorded()) if number % 2 else (recorded(), bare())[::-1]
        times.append(pair)
    result |= {
        "model": options.model,
        "sites": SITES,
        "tokens": TOKENS,
        "batch": BATCH,
        "images": options.images,
        "steps": drawing.steps,
        "bytes": stored,
        "bare_s": spread([one for one, _ in times]),
        "recorded_s": spread([other for _, other in times]),
        "added": spread([other / one - 1 for one, other in times]),
        "goal": "added.median <= 0.05, the two-image probe and the opening of the store included",
    }
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
