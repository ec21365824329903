"""Train autoencoders from a stream, several a site from one reading of it: a store's rows, or what a pipeline gives.

Sites are trained one after the other, so that only one site's weights are held at a time.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from os import PathLike
from typing import Any, overload

import torch
from jaxtyping import Float
from torch import Tensor

from ..activations.processes import Share
from ..activations.record import Activations
from ..config import UsageError
from ..progress import say, track
from ..sites import Site
from . import rows
from .doctor import compared, diagnose
from .fitting import Run
from .metrics import measure, measure_by_sigma
from .model import SparseAutoencoder
from .options import Limits, SAEOptions
from .resume import Checkpoint, checkpoint_folder, remove_checkpoints
from .rows import Standard
from .survey import Survey, picked, survey

__all__ = ["Limits", "SAEOptions", "train", "train_on"]

_SAMPLE = 2**16  # rows that are measured; of a store also those that centre and scale are fitted to
_CHECKED = 2**12  # held-out rows that are measured on the way
_TOLD, _KEPT = 5, 20  # times that progress is told, and that a checkpoint is written


@overload
def train(
    activations: Activations,
    sites: Iterable[Site] | None = ...,
    options: SAEOptions | None = ...,
    *,
    held_out: Activations | None = ...,
    checkpoints: str | PathLike[str] | None = ...,
    keep_checkpoints: bool = ...,
    device: str | torch.device = ...,
) -> dict[Site, SparseAutoencoder]: ...
@overload
def train(
    activations: Activations,
    sites: Iterable[Site] | None,
    options: Sequence[SAEOptions],
    *,
    held_out: Activations | None = ...,
    checkpoints: str | PathLike[str] | None = ...,
    keep_checkpoints: bool = ...,
    device: str | torch.device = ...,
) -> dict[Site, list[SparseAutoencoder]]: ...
def train(
    activations: Activations,
    sites: Iterable[Site] | None = None,
    options: SAEOptions | Sequence[SAEOptions] | None = None,
    *,
    held_out: Activations | None = None,
    checkpoints: str | PathLike[str] | None = None,
    keep_checkpoints: bool = False,
    device: str | torch.device = "cpu",
) -> Any:
    """One autoencoder for each site, by default for every recorded one; with several options, one for each of them.

    `held_out`, the same sites under other prompts, is what is measured; without it, a sample of the training rows is.
    What interrupts the training costs what was done since the last of twenty checkpoints, if there is a folder for
    `checkpoints`: the same call goes on from there, to the same losses. They are removed at the end; with
    `keep_checkpoints` the same call finds everything trained until `remove_checkpoints` is called. Under `accelerate
    launch` the processes share every batch.
    """
    runs = [options or SAEOptions()] if not isinstance(options, Sequence) else list(options)
    if not runs:
        raise UsageError("There are no options to train with: give at least one SAEOptions, or none at all.")
    chosen = list(sites if sites is not None else activations.sites)
    stored = activations.store is not None
    size = min(_SAMPLE, runs[0].buffer) if stored else max(one.buffer for one in runs)
    found = survey(activations, chosen, size, runs[0].seed)
    asked = survey(held_out, chosen, _SAMPLE, runs[0].seed) if held_out is not None else {}
    trained = {}
    for site in chosen:
        task = _Task(activations, found[site], asked.get(site), runs, device)
        if checkpoints is not None:
            task.checkpoint = Checkpoint(checkpoint_folder(checkpoints, site), task.identity())
        trained[site] = task.fit()
    if checkpoints is not None:
        _finish(checkpoints, chosen, keep_checkpoints)
    return trained if isinstance(options, Sequence) else {site: saes[0] for site, saes in trained.items()}


def train_on(
    x: Float[Tensor, "rows d_in"],
    options: SAEOptions,
    *,
    description: str = "Training SAE",
    device: str | torch.device = "cpu",
    **metadata: Any,
) -> SparseAutoencoder:
    """Train on rows that are already there. The result depends on `x` and the options; the global generator is kept."""
    options.d_sae(x.shape[1])
    standard = Standard.of(x, options.limits or Limits())
    run = Run(x.shape[1], options, device)
    on_device = standard.to(device)
    batches = islice(rows.in_memory(x, options.batch_size, options.seed), options.steps)
    for batch in track(batches, description, options.steps):
        run.step(on_device(batch))
    sae = run.sae(standard)
    quality = measure(sae, x[picked(len(x), _SAMPLE, options.seed)].split(_CHECKED))
    told = {"options": asdict(options), "curve": run.curve}
    return SparseAutoencoder(sae.encoder, sae.decoder, metadata | quality | told)


def _finish(checkpoints: str | PathLike[str], sites: Iterable[Site], keep: bool) -> None:
    """No process removes what another still reads, or finds what another is about to remove."""
    share = Share.of_this_process()
    share.wait()
    if share.first and not keep:
        remove_checkpoints(checkpoints, sites)
    share.wait()


class _Task:
    """The runs at one site, in lockstep: those that ask for the same batches get the very same ones."""

    def __init__(
        self,
        activations: Activations,
        found: Survey,
        asked: Survey | None,
        options: Sequence[SAEOptions],
        device: str | torch.device,
    ):
        self.activations, self.found, self.asked = activations.at(found.site), found, asked
        self.options, self.device = options, device
        self.checkpoint: Checkpoint | None = None
        self.standards = [Standard.of(found.x, one.limits or Limits()) for one in options]
        d_in = found.x.shape[1]
        if asked is not None and asked.x.shape[1] != d_in:
            raise UsageError(
                f"'{found.site}': d_in={d_in} to train on, {asked.x.shape[1]} held out: record them alike."
            )
        self.runs = [Run(d_in, one, device) for one in options]

    def identity(self) -> dict[str, Any]:
        return {
            "model": self.activations.model,
            "site": str(self.found.site),
            "data": self.found.data,
            "options": [asdict(one) for one in self.options],
        }

    def fit(self) -> list[SparseAutoencoder]:
        if self.checkpoint is not None and self.checkpoint.load(self.runs):
            say(f"{self.found.site}: going on from step {max(run.done for run in self.runs)}.")
        for _ in track(self._lockstep(), f"Training SAE at {self.found.site}", max(o.steps for o in self.options)):
            lead = max(self.runs, key=lambda run: run.options.steps)
            if lead.due(_TOLD):
                self._tell(lead)
            if self.checkpoint is not None and lead.due(_KEPT) and lead.averaging.share_of.first:
                self.checkpoint.save(self.runs)
        return [self._finished(run, standard) for run, standard in zip(self.runs, self.standards, strict=True)]

    def _lockstep(self) -> Iterator[int]:
        """One step of every run that is not finished; all of them are equally far."""
        done = max(run.done for run in self.runs)
        if all(run.finished for run in self.runs):
            return
        orders = {key: self._batches(*key, done) for key in {(o.batch_size, o.seed) for o in self.options}}
        standards = [standard.to(self.device) for standard in self.standards]
        while not all(run.finished for run in self.runs):
            drawn = {key: next(order) for key, order in orders.items()}
            for run, standard in zip(self.runs, standards, strict=True):
                if not run.finished:
                    run.step(standard(drawn[run.options.batch_size, run.options.seed]))
            done += 1
            yield done

    def _batches(self, batch_size: int, seed: int, done: int) -> Iterator[Tensor]:
        if self.activations.store is not None:
            return rows.from_store(self.activations, batch_size, seed, done)
        return rows.in_memory(self.found.x, batch_size, seed, done)

    def _tell(self, lead: Run) -> None:
        """How far each run is, on the rows it learns from and on those it does not."""
        for run, standard in zip(self.runs, self.standards, strict=True):
            now = {name: column[-1] for name, column in run.curve.items()}
            held_out = ""
            if self.asked is not None and run.done == lead.done:
                here = picked(len(self.asked.x), _CHECKED, run.options.seed)
                check = measure(run.sae(standard), [self.asked.x[here]])
                run.checks.append({"step": run.done} | check)
                held_out = f", held out FVU {check['fvu']:.4f}"
            who = f"{self.found.site} ×{run.options.expansion} k {run.options.k}"
            say(f"  {who}, step {run.done}: FVU {now['fvu']:.4f}, L0 {now['l0']:.1f}, dead {now['dead']:.1%}{held_out}")

    def _finished(self, run: Run, standard: Standard) -> SparseAutoencoder:
        sae, seen = run.sae(standard), self.asked or self.found
        here = picked(len(seen.x), _SAMPLE, run.options.seed)
        quality = measure_by_sigma(sae, seen.x[here], seen.sigma[here])
        diagnosis = diagnose(self.found.x, run.options.expansion, run.options.k, run.options.seed)
        metadata = {
            "model": self.activations.model,
            "site": str(self.found.site),
            "stream": self.found.site.stream,
            "measured_on": "held-out prompts" if self.asked is not None else "training rows",
            "options": asdict(run.options),
            "data": self.found.facts(),
            "preprocessing": {"scale": standard.scale, "reach": standard.reach, "clip": standard.clip},
            "doctor": asdict(diagnosis) | compared(diagnosis, quality),
            "curve": run.curve,
            "checks": run.checks,
        }
        return SparseAutoencoder(sae.encoder, sae.decoder, json.loads(json.dumps(quality | metadata)))
