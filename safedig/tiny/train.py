"""python -m safedig.tiny.train: train the autoencoder, both pipelines and the judge again, from nothing."""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from ..config import UsageError
from ..exit_codes import exit_code
from ..progress import say
from ..storage import check_writable
from .training import fit

WEIGHTS = Path(__file__).parent / "weights"
WORK = Path("runs") / "training"
SCENES = 122_880  # encoded once and drawn from again and again, each time under a fresh caption
SAMPLES = {"vae": 36_000, "tiny-flux": 955_200, "tiny-sd3": 944_000, "judge": 560_000}


def main(argv: Sequence[str] | None = None) -> int:
    """Train what is named. Exit code 2 is a mistake, 130 an interruption, after which the same command goes on."""
    parser = argparse.ArgumentParser(prog="python -m safedig.tiny.train", description=__doc__)
    parser.add_argument("what", choices=[*SAMPLES, "all"], help="all: one after the other, in this order")
    parser.add_argument("--samples", type=int, help="training samples (default: as the shipped weights)")
    parser.add_argument(
        "--scenes", type=int, default=SCENES, help="scenes encoded for the pipelines (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="where to train: cpu, cuda, … (default: %(default)s)")
    parser.add_argument(
        "--weights", type=Path, default=WEIGHTS, help="where the result goes (default: into the package)"
    )
    parser.add_argument(
        "--work", type=Path, default=WORK, help="checkpoints, to go on after an interruption (default: %(default)s)"
    )
    given = parser.parse_args(argv)
    return exit_code(lambda: _run(given), "safedig.tiny.train", "goes on from the last checkpoint")


def _run(given: argparse.Namespace) -> None:
    _check(given)
    for name in SAMPLES if given.what == "all" else (given.what,):
        _train(name, given)


def _check(given: argparse.Namespace) -> None:
    """What would otherwise come out after hours."""
    for flag in ("samples", "scenes"):
        if getattr(given, flag) is not None and getattr(given, flag) < 1:
            raise UsageError(f"--{flag} {getattr(given, flag)}: expected an integer from 1 on.")
    vae = _autoencoder(given)
    if given.what.startswith("tiny-") and not (vae / "config.json").is_file():
        raise UsageError(f"There is no trained autoencoder in {vae}: run `python -m safedig.tiny.train vae` first.")
    try:
        torch.empty(0, device=given.device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {given.device} cannot be used here ({str(error).splitlines()[0]}).") from error
    check_writable(given.weights, "--weights")
    check_writable(given.work, "--work")


def _autoencoder(given: argparse.Namespace) -> Path:
    return given.work / "autoencoder"


def _train(name: str, given: argparse.Namespace) -> None:
    vae = _autoencoder(given)
    folder = vae if name == "vae" else given.weights / name
    if name == "vae":
        from .autoencoding import Autoencoding

        objective = Autoencoding(given.seed)
    elif name == "judge":
        from .judge_training import Judging

        objective = Judging(given.seed)
    else:
        objective = _flow_matching(name, vae, given)
    fit(
        objective,
        name=name,
        samples=given.samples or SAMPLES[name],
        folder=folder,
        work=given.work,
        seed=given.seed,
        device=given.device,
    )
    if name.startswith("tiny-"):
        shutil.copy(vae / "training.json", folder / "vae" / "training.json")
    say(f"{name} is in {folder}")


def _flow_matching(name: str, vae: Path, given: argparse.Namespace):
    from diffusers import AutoencoderKL

    from .flow_matching import FlowMatching
    from .latents import training_latents

    data = training_latents(vae, given.work, n=given.scenes, seed=given.seed)
    return FlowMatching(name, data, AutoencoderKL.from_pretrained(vae), given.seed)


if __name__ == "__main__":
    sys.exit(main())
