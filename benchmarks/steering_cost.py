"""What a steering costs: a steered image beside an unsteered one, and its rule beside a whole SAE at the same site.

First the same prompts, drawn unsteered and under the demo's bundle in turns, in one process. Then what one call of a
rule of 32 harmful features adds on an autoencoder of 3,072 → 12,288, beside stock sae-lens' encode and decode there.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from machine import machine, spread

from safedig.exit_codes import exit_code
from safedig.hooks import Context
from safedig.pipelines import draw, load_pipeline
from safedig.prompts import as_rows
from safedig.sae.model import ThresholdEncoder
from safedig.sites import Site
from safedig.steering.edits import Repel
from safedig.steering.gate import Gate
from safedig.steering.material import Material
from safedig.steering.rule import Rule
from safedig.steering.steering import Steering
from safedig.storage import write_atomically
from safedig.tiny import prompts

D_IN, D_SAE, FEATURES, TOKENS = 3072, 12288, 32, 512
RUNS = Path(__file__).parents[1] / "runs" / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=["tiny-flux", "tiny-sd3"])
    parser.add_argument("--bundles", type=Path, default=RUNS, help="MODEL/steering below it, of `safedig demo --out`")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "steering_cost.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = {
        "benchmark": "steering_cost",
        "machine": machine(),
        "images": {
            model: drawn(model, options.bundles / model / "steering", options.rounds, options.images)
            for model in options.models
        },
        "rule": called(options.rounds),
        "goal": "steered_over_unsteered.median <= 1.05; rule.times_less.median >= 50",
    }
    write_atomically(options.out, f"{json.dumps(result, indent=2)}\n".encode())
    print(json.dumps(result, indent=2))


def drawn(model: str, bundle: Path, rounds: int, n: int) -> dict[str, Any]:
    """Seconds of the processor for a third of the prompts harmful, the others benign, in turns."""
    pipe, steering = load_pipeline(model), Steering.load(bundle)
    rows = as_rows(prompts("harmful", "calibrate", 0, n // 3, twins=False))
    rows += as_rows(prompts("benign", "calibrate", 0, n - n // 3))

    def once(steered: bool) -> float:
        with steering.apply(pipe) if steered else nullcontext():
            return seconds(lambda: [None for _ in draw(pipe, rows)])

    once(True)
    pairs = []
    for number in range(rounds):
        first = once(bool(number % 2))
        second = once(not number % 2)
        pairs.append((second, first) if number % 2 else (first, second))
    return {
        "n": len(rows),
        "unsteered_s": spread([bare for bare, _ in pairs]),
        "steered_s": spread([steered for _, steered in pairs]),
        "steered_over_unsteered": spread([steered / bare for bare, steered in pairs]),
    }


def called(rounds: int) -> dict[str, Any]:
    """What one call adds to what passes: by the rule, its gate open for every token, and by a whole stock SAE."""
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig

    torch.manual_seed(0)
    x = torch.randn(1, TOKENS, D_IN)
    W_enc, W_dec = torch.randn(D_IN, D_SAE) / D_IN**0.5, torch.randn(D_SAE, D_IN) / D_IN**0.5
    stock = JumpReLUSAE(JumpReLUSAEConfig(d_in=D_IN, d_sae=D_SAE))
    with torch.no_grad():
        stock.W_enc.copy_(W_enc), stock.W_dec.copy_(W_dec), stock.threshold.fill_(1.0)
    index = torch.arange(FEATURES)
    encoder = ThresholdEncoder(W_enc[:, index].contiguous(), torch.zeros(FEATURES), torch.ones(FEATURES))
    rule = Rule(index, encoder, Material(W_dec[index]), Gate(-1.0), (Repel(1.0),))
    context = Context(Site.parse("transformer_blocks.9.img.resid_post"), 0, 0.5, ("cond",))
    with torch.no_grad():
        pairs = [
            (seconds(lambda: stock.decode(stock.encode(x))), seconds(lambda: rule(x, context), 10) / 10)
            for _ in range(rounds + 1)
        ][1:]
    return {
        "d_in": D_IN,
        "d_sae": D_SAE,
        "features": FEATURES,
        "tokens": TOKENS,
        "whole_sae_s": spread([whole for whole, _ in pairs]),
        "rule_s": spread([rows for _, rows in pairs]),
        "times_less": spread([whole / rows for whole, rows in pairs]),
    }


def seconds(work: Callable[[], Any], times: int = 1) -> float:
    started = time.process_time()
    for _ in range(times):
        work()
    return time.process_time() - started


if __name__ == "__main__":
    sys.exit(exit_code(main, Path(__file__).name))
