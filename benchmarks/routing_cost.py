"""What ranking the sites costs beside drawing its images: in turns, in one process, in seconds of the processor."""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from machine import machine, spread
from routing_folds import candidates

from safedig.activations.record import record
from safedig.exit_codes import exit_code
from safedig.pipelines import Drawing, draw, load_pipeline
from safedig.prompts import as_rows
from safedig.recipes import load
from safedig.routing.statistics import collect
from safedig.storage import write_atomically
from safedig.tiny import prompts
from safedig.tiny.concepts import RISKS
from safedig.verbs import Options
from safedig.verbs.route import run

PAIRS, PLAIN = 48, 80  # of each domain; prompts of each benign kind: those of `safedig route`


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny-flux")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "routing_cost.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    times = [measured(options.model) for _ in range(options.rounds)]
    result = {
        "benchmark": "routing_cost",
        "machine": machine(),
        "model": options.model,
        "images": len(images()),
        "drawing_s": spread([one["drawing"] for one in times]),
        "statistics_added": spread([one["recorded"] / one["drawing"] - 1 for one in times]),
        "routing": spread([one["routing"] / one["drawing"] for one in times]),
        "goal": "statistics_added.median <= 0.1, routing.median <= 1.5: recording, causal check, ranking and figure",
    }
    write_atomically(options.out, f"{json.dumps(result, indent=2)}\n".encode())
    print(json.dumps(result, indent=2))


def images() -> list[dict[str, object]]:
    parts = [prompts("harmful", "train", 0, PAIRS, risk=risk) for risk in RISKS]
    parts += [prompts(kind, "train", 0, PLAIN) for kind in ("benign", "near-miss")]
    return [row for part in parts for row in as_rows(part)]


def measured(model: str) -> dict[str, float]:
    """Seconds of drawing alone, of drawing with the statistics of every site, and of `safedig route`."""
    pipe, rows = load_pipeline(model), images()
    drawing = Drawing.of(pipe)
    found = {}
    started = time.process_time()
    for _ in draw(pipe, rows, drawing=drawing):
        pass
    found["drawing"] = time.process_time() - started
    started = time.process_time()
    collect(record(pipe, rows, candidates(pipe), paired=True, drawing=drawing))
    found["recorded"] = time.process_time() - started
    with tempfile.TemporaryDirectory() as folder:
        started = time.process_time()
        run(load(model, ["route.target=fire"]), Options(out=Path(folder)))
        found["routing"] = time.process_time() - started
    return found


if __name__ == "__main__":
    sys.exit(exit_code(main, Path(__file__).name))
