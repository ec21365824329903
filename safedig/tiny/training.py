"""One training loop for all that the tiny world learns (an `Objective`): resumable, logged, with averaged weights."""

import json
import time
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import PARAM_LIST, AveragedModel

from ..config import UsageError
from ..progress import track
from ..storage import write_atomically

SAVE_EVERY = 120.0  # seconds
LOG_EVERY = 200  # steps
EMA_DECAY = 0.999
IGNORED = -100  # a label that is not learnt from, as torch marks it
WARM_UP, CONSTANT = 100, 0.45  # steps; share of the training before the cosine decay


@runtime_checkable
class Objective(Protocol):
    """Something to learn: a module, its loss on a random batch, and how the result is saved."""

    batch: int
    learning_rate: float

    @property
    def module(self) -> nn.Module: ...

    def loss(self, rng: np.random.Generator, progress: float) -> dict[str, Tensor]: ...

    def publish(self, averaged: nn.Module, folder: Path) -> None: ...


def fit(
    objective: Objective, *, name: str, samples: int, folder: Path, work: Path, seed: int, device: str = "cpu"
) -> dict[str, Any]:
    """Train `objective` on `samples` samples and publish the averaged weights to `folder`.

    An interrupted run goes on from its state in `work` (two minutes old at most) and draws the same batches as an
    undisturbed one.
    Going on with another seed is a `UsageError`: the two halves would come from different runs.
    Returns the log, also written to `folder/training.json`: loss, samples, seconds, device.
    """
    objective.module.to(device)
    run = _Run(objective, samples, work / name, seed)
    steps = range(run.step, -(-samples // objective.batch))
    try:
        for step in track(steps, f"train {name}", total=len(steps)):
            run.advance(np.random.default_rng((seed, step)))
    finally:
        run.save()
    objective.publish(run.averaged.module, folder)
    log = {
        "name": name,
        "samples": samples,
        "batch": objective.batch,
        "seed": seed,
        "device": device,
        "threads": torch.get_num_threads(),
        "seconds": round(run.seconds),
        "parameters": sum(p.numel() for p in objective.module.parameters()),
        "log": run.log,
    }
    _write_json(folder / "training.json", log)
    return log


class _Run:
    """The state of a training run, on disk in safetensors and JSON."""

    def __init__(self, objective: Objective, samples: int, work: Path, seed: int) -> None:
        self.objective, self.samples, self.work, self.seed = objective, samples, work, seed
        self.averaged = AveragedModel(objective.module, multi_avg_fn=_warm_average)
        self.optimizers = _optimizers(objective.module, objective.learning_rate)
        self.step, self.seconds, self.log = 0, 0.0, []
        self.saved = self.started = time.monotonic()
        self.recent: list[dict[str, float]] = []
        if (work / "state.json").exists():
            self._load()

    def advance(self, rng: np.random.Generator) -> None:
        progress = self.step * self.objective.batch / self.samples
        scale = min(1.0, (self.step + 1) / WARM_UP) * _decay(progress)
        terms = self.objective.loss(rng, progress)
        terms["loss"].backward()
        nn.utils.clip_grad_norm_(self.objective.module.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.averaged.update_parameters(self.objective.module)
        self.step += 1
        self.recent.append({k: float(v.detach()) for k, v in terms.items()})
        if self.step % LOG_EVERY == 0:
            self._note()
        if time.monotonic() - self.saved > SAVE_EVERY:
            self.save()

    def _note(self) -> None:
        terms = dict.fromkeys(k for r in self.recent for k in r)  # a term may come or go in the course of a training
        means = {k: round(float(np.mean([r[k] for r in self.recent if k in r])), 5) for k in terms}
        self.log.append({"samples": self.step * self.objective.batch, "seconds": round(self._elapsed()), **means})
        self.recent = []

    def _elapsed(self) -> float:
        return self.seconds + time.monotonic() - self.started

    def save(self) -> None:
        """Write the whole state: first the tensors, then the JSON that names them, each atomically."""
        self.work.mkdir(parents=True, exist_ok=True)
        tensors = {f"module.{k}": v for k, v in self.objective.module.state_dict().items()}
        tensors |= {f"averaged.{k}": v for k, v in self.averaged.state_dict().items()}
        for i, optimizer in enumerate(self.optimizers):
            for p, state in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{i}.{p}.{k}": torch.as_tensor(v) for k, v in state.items()}
        name = f"state-{self.step}.safetensors"
        part = self.work / f"{name}.part"
        save_file({k: v.detach().clone().contiguous() for k, v in tensors.items()}, part)
        part.replace(self.work / name)
        self.seconds, self.started = self._elapsed(), time.monotonic()
        state = {"tensors": name, "seed": self.seed, "step": self.step, "seconds": self.seconds, "log": self.log}
        _write_json(self.work / "state.json", state)
        for old in self.work.glob("state-*"):
            if old.name != name:
                old.unlink()
        self.saved = time.monotonic()

    def _load(self) -> None:
        state = json.loads((self.work / "state.json").read_text())
        if state["seed"] != self.seed:
            raise UsageError(
                f"The training in '{self.work}' was begun with seed {state['seed']}, not {self.seed}: "
                "go on with that seed, or give another --work."
            )
        tensors = load_file(self.work / state["tensors"])
        self.step, self.seconds, self.log = state["step"], state["seconds"], state["log"]
        self.objective.module.load_state_dict(_under(tensors, "module."))
        self.averaged.load_state_dict(_under(tensors, "averaged."))
        for i, optimizer in enumerate(self.optimizers):
            states: dict[int, dict[str, Tensor]] = {}
            for key, value in _under(tensors, f"optimizer.{i}.").items():
                p, k = key.split(".", 1)
                states.setdefault(int(p), {})[k] = value
            optimizer.load_state_dict(optimizer.state_dict() | {"state": states})


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


@torch.no_grad()
def _warm_average(averaged: PARAM_LIST, current: PARAM_LIST, count: Tensor | int) -> None:
    """Exponential moving average whose memory grows with the run: a constant one would long keep the random start."""
    torch._foreach_lerp_(averaged, current, 1 - min(EMA_DECAY, (1 + int(count)) / (10 + int(count))))


def _decay(progress: float) -> float:
    return 1.0 if progress < CONSTANT else 0.5 * (1 + np.cos(np.pi * min(1.0, (progress - CONSTANT) / (1 - CONSTANT))))


def _optimizers(module: nn.Module, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of transformer blocks, AdamW for everything else."""
    matrices = [p for n, p in module.named_parameters() if p.ndim == 2 and "blocks." in n and "norm" not in n]
    chosen = {id(p) for p in matrices}
    rest = [p for p in module.parameters() if id(p) not in chosen]
    groups: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=learning_rate, betas=(0.9, 0.97), weight_decay=0.01, fused=True)
    ]
    if matrices:
        groups.append(torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
    for optimizer in groups:
        for group in optimizer.param_groups:
            group["peak"] = learning_rate
    return groups


def _write_json(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, indent=1).encode())
