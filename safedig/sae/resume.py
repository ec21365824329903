"""Training put down and taken up again to the same losses: the whole state of a site's runs as safetensors and JSON."""

import json
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ..config import UsageError
from ..sites import Site
from ..storage import write_atomically
from .fitting import Run

STATE, FORMAT = "state.json", 1


class Checkpoint:
    """One folder with the last good state of the runs at a site; `identity` says what they are training on and how."""

    def __init__(self, folder: Path, identity: dict[str, Any]):
        self.folder = folder
        self.identity: dict[str, Any] = json.loads(json.dumps(identity | {"format": FORMAT}))

    def save(self, runs: Sequence[Run]) -> None:
        """Tensors first; the state counts from the moment its JSON names them."""
        name = f"step-{max(run.done for run in runs):09d}.safetensors"
        tensors = {f"{at}.{key}": x for at, run in enumerate(runs) for key, x in _tensors(run).items()}
        facts = {"identity": self.identity, "tensors": name, "runs": [_numbers(run) for run in runs]}
        write_atomically(self.folder / name, save({key: x.detach().cpu().contiguous() for key, x in tensors.items()}))
        write_atomically(self.folder / STATE, json.dumps(facts).encode())
        for old in self.folder.glob("step-*.safetensors"):
            if old.name != name:
                old.unlink()

    def load(self, runs: Sequence[Run]) -> bool:
        """Bring the runs to where they were; False if nothing was put down here, an error if it is of other runs."""
        if not (self.folder / STATE).is_file():
            return False
        try:
            facts = json.loads((self.folder / STATE).read_text(encoding="utf-8"))
            self._check(facts["identity"])
            tensors = load_file(self.folder / facts["tensors"])
            for at, (run, numbers) in enumerate(zip(runs, facts["runs"], strict=True)):
                own = {key.removeprefix(f"{at}."): x for key, x in tensors.items() if key.startswith(f"{at}.")}
                _restore(run, own, numbers)
        except (OSError, SafetensorError, KeyError, json.JSONDecodeError, RuntimeError) as error:
            raise UsageError(
                f"The checkpoint in '{self.folder}' is damaged ({error}): remove it, and training starts anew."
            ) from error
        return True

    def remove(self) -> None:
        for file in [self.folder / STATE, *self.folder.glob("step-*.safetensors")]:
            file.unlink(missing_ok=True)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _check(self, found: dict[str, Any]) -> None:
        other = [key for key in self.identity if self.identity[key] != found.get(key)]
        if other:
            raise UsageError(
                f"'{self.folder}' holds the checkpoint of another training: its {other[0]} is {found.get(other[0])}, "
                f"here it is {self.identity[other[0]]}. Give another folder, or remove that one."
            )


def checkpoint_folder(root: str | PathLike[str], site: Site) -> Path:
    return Path(root) / str(site).replace(":", ".")


def remove_checkpoints(root: str | PathLike[str], sites: Iterable[Site]) -> None:
    """What `train` has put down at these sites; for one process alone, once what was trained is kept elsewhere."""
    for site in sites:
        Checkpoint(checkpoint_folder(root, site), {}).remove()


def _tensors(run: Run) -> dict[str, Tensor]:
    trainer = run.trainer
    tensors = {f"sae.{name}": x for name, x in trainer.sae.state_dict().items()}
    for at, parameter in enumerate(_parameters(trainer)):
        tensors |= {f"adam.{at}.{name}": x for name, x in trainer.optimizer.state[parameter].items()}
    return tensors | {"unfired": trainer.n_forward_passes_since_fired, "fired": trainer.act_freq_scores}


def _parameters(trainer: Any) -> list[Tensor]:
    """Those that the optimiser knows, which need not be the autoencoder's own objects."""
    return [parameter for group in trainer.optimizer.param_groups for parameter in group["params"]]


def _numbers(run: Run) -> dict[str, Any]:
    trainer = run.trainer
    return {
        "steps": trainer.n_training_steps,
        "samples": trainer.n_training_samples,
        "active_samples": trainer.n_frac_active_samples,
        "coefficients": {name: one.state_dict() for name, one in trainer.coefficient_schedulers.items()},
        "curve": run.curve,
        "checks": run.checks,
    }


def _restore(run: Run, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
    trainer, adam = run.trainer, run.trainer.optimizer
    trainer.sae.load_state_dict({key.removeprefix("sae."): x for key, x in tensors.items() if key.startswith("sae.")})
    for at, parameter in enumerate(_parameters(trainer)):
        given = {name: tensors[f"adam.{at}.{name}"] for name in ("step", "exp_avg", "exp_avg_sq")}
        adam.state[parameter] = {
            name: x.to(parameter.device) if x.ndim == 0 else torch.empty_like(parameter).copy_(x)  # in its own layout
            for name, x in given.items()
        }
    trainer.n_forward_passes_since_fired.copy_(tensors["unfired"])
    trainer.act_freq_scores.copy_(tensors["fired"])
    trainer.n_training_steps, trainer.n_training_samples = numbers["steps"], numbers["samples"]
    trainer.n_frac_active_samples = numbers["active_samples"]
    for name, state in numbers["coefficients"].items():
        trainer.coefficient_schedulers[name].load_state_dict(state)
    trainer.lr_scheduler.set(numbers["steps"])
    run.curve, run.checks = numbers["curve"], numbers["checks"]
