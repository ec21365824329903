"""What recording to disk adds to drawing: the same prompts, drawn bare and recorded batch by batch in turns.

Two pipelines in two threads of one process, of which one works while the other waits: a batch drawn bare, one
recorded, and so on. What else the machine does meets both alike. All that a recording does counts as its own: the
opening and the closing of the store, and the fingerprint of the model.
"""

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from machine import machine, spread

from safedig import load_pipeline, record, tiny
from safedig.exit_codes import exit_code
from safedig.pipelines import Drawing, draw
from safedig.prompts import as_rows
from safedig.shadow import listen
from safedig.storage import write_atomically

SITES = ["txt.embed", "transformer_blocks.0.img.resid_post", "single_transformer_blocks.-1.img.resid_post"]
TOKENS, BATCH = 16, 16


class Turns:
    """Threads that work one at a time and hand over at every batch; the seconds that each has worked."""

    def __init__(self, *names: str):
        self.seconds = dict.fromkeys(names, 0.0)
        self._waiting, self._one = list(names), threading.Condition()
        self._since = time.perf_counter()

    def hand_over(self, name: str) -> None:
        """Called by whose turn it is: counts what it has worked, and goes on when its turn comes again."""
        with self._one:
            self._count(name)
            self._waiting.append(self._waiting.pop(0))
            self._one.notify_all()
            self._wait(name)

    def work(self, name: str, call: Callable[[], None]) -> None:
        """The whole of a thread's work, from its first turn on; then the others have theirs."""
        with self._one:
            self._wait(name)
        try:
            call()
        finally:
            with self._one:
                self._count(name)
                self._waiting.remove(name)
                self._one.notify_all()

    def _count(self, name: str) -> None:
        self.seconds[name] += time.perf_counter() - self._since

    def _wait(self, name: str) -> None:
        self._one.wait_for(lambda: self._waiting[0] == name)
        self._since = time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny-flux")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "recording.json")
    options = parser.parse_args()
    plain, watched = load_pipeline(options.model), load_pipeline(options.model)
    rows = as_rows(tiny.prompts("benign", split="train", seed=0, n=options.images))
    drawing, stored = Drawing.of(plain), 0

    def bare() -> None:
        torch.set_num_threads(options.threads)  # it is a thread's own
        for _ in draw(plain, rows, drawing=drawing, batch_size=BATCH, output_type="latent"):
            pass

    def recorded() -> None:
        nonlocal stored
        torch.set_num_threads(options.threads)
        with tempfile.TemporaryDirectory() as folder:
            activations = record(watched, rows, SITES, tokens=TOKENS, store=folder, drawing=drawing, batch_size=BATCH)
            assert activations.store is not None
            stored = activations.store.size

    times = [in_turns(plain, bare, watched, recorded) for _ in range(1 + options.rounds)][1:]  # the first warms up
    result = {
        "benchmark": "recording",
        "machine": machine(),
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
        "added_in_all": sum(other for _, other in times) / sum(one for one, _ in times) - 1,
        "goal": "added.median <= 0.05, the opening and the closing of the store included",
    }
    write_atomically(options.out, f"{json.dumps(result, indent=2)}\n".encode())
    print(json.dumps(result, indent=2))


def in_turns(plain: Any, bare: Callable[[], None], watched: Any, recorded: Callable[[], None]) -> tuple[float, float]:
    """Seconds of drawing and of recording; whoever sets the timesteps of a batch lets the other go first."""
    turns = Turns("bare", "recorded")
    with (
        listen(plain.scheduler, "set_timesteps", before=lambda: turns.hand_over("bare")),
        listen(watched.scheduler, "set_timesteps", before=lambda: turns.hand_over("recorded")),
        ThreadPoolExecutor() as pool,
    ):
        both = [pool.submit(turns.work, name, call) for name, call in (("bare", bare), ("recorded", recorded))]
        for one in both:
            one.result()
    return turns.seconds["bare"], turns.seconds["recorded"]


if __name__ == "__main__":
    sys.exit(exit_code(main, Path(__file__).name))
