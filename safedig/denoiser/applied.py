"""A safe denoiser on a pipeline: what it does at each step, and the sentinel that no step went around it."""

import threading
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..config import UsageError
from ..hooks import SafetyBypassError, interrupted, steps_due
from .kernels import Moment, flat
from .mixing import mixing
from .rules import HOLDING, RULES, Sizes, held


@dataclass(frozen=True)
class Told:
    """What was done to one image in one step."""

    image: int
    """Its place in the batch of the call."""
    step: int
    sigma: float
    beta: float
    """Strength included; 0: the gate was closed."""
    moved: float
    """‖x̂0′ − x̂0‖ / ‖x̂0‖."""


class Run:
    """Counts the steps of each call of the pipeline and amends what its scheduler is given."""

    def __init__(self, pipe: Any, how: Sizes, sigmas: tuple[float, float], mode: str):
        self.pipe, self.scheduler, self.how, self.sigmas, self.mode = pipe, pipe.scheduler, how, sigmas, mode
        self.running, self.steps, self.thread = False, 0, 0
        self._told: list[tuple[int, float, Tensor, Tensor]] = []

    def begin(self, given: dict[str, Any]) -> None:
        """A pipeline call begins: forget the last one, whatever became of it."""
        frame, height, width = self.how.negation.frame, given.get("height"), given.get("width")
        if frame is not None and None not in (height, width) and (height, width) != frame:
            raise UsageError(
                f"The negation set was encoded for {frame[0]} × {frame[1]} pixels (height × width) and the image is to "
                f"have {height} × {width}: encode it with NegationSet.of(…, height={height}, width={width})."
            )
        self.running, self.steps, self.thread = True, 0, threading.get_ident()
        self._told = []

    def step(self, given: dict[str, Any]) -> dict[str, Any]:
        """The scheduler is about to take a step: another model output where a gate is open, else no change at all."""
        if "model_output" not in given or "sample" not in given:
            raise SafetyBypassError("scheduler.step was shadowed by something that hides its arguments: take that off.")
        if self.running and threading.get_ident() != self.thread:
            raise SafetyBypassError(
                "Another thread steps this pipeline's scheduler: give each thread its own pipeline."
            )
        self.steps += 1
        how, output, sample = self.how, given["model_output"], given["sample"]
        now = mixing(self.scheduler, given["timestep"])
        inside = self.sigmas[0] <= now.sigma <= self.sigmas[1]
        if not inside or not len(how.negation) or not (how.strength or self.mode == "renoise-only"):
            return {}
        self._check(sample)
        x = flat(sample)
        at = Moment(x, now.x0(x, flat(output)), now, tuple(sample.shape[1:]))
        with torch.no_grad():
            push = RULES[self.mode](at, self._on(x.device))
        open_ = push.beta > 0
        if not open_.any():
            self._told.append((self.steps - 1, now.sigma, push.beta, torch.zeros_like(push.beta)))
            return {}
        delta = push.x0 - at.x0
        self._told.append(
            (self.steps - 1, now.sigma, push.beta, delta.norm(dim=1) / at.x0.norm(dim=1).clamp(min=1e-12))
        )
        changed = held(at, push) if self.mode in HOLDING else flat(output) + now.output(delta)
        changed = changed.unflatten(1, at.shape).to(output.dtype)
        return {"model_output": torch.where(open_.reshape(-1, *[1] * (output.ndim - 1)), changed, output)}

    def end(self, _: Any) -> None:
        """The pipeline call is over: every step of its schedule must have been seen."""
        if self.running and not interrupted(self.pipe) and self.steps != (due := steps_due(self.pipe)):
            raise SafetyBypassError(
                f"Armed but not run: {self.steps} of {due} steps passed the safe denoiser. The "
                "image is not safe to use. Apply it after the scheduler has been replaced or wrapped."
            )
        self.running = False

    def told_by_image(self) -> list[list[Told]]:
        """Each image of the last call, the steps inside the window in order."""
        found: list[list[Told]] = []
        for step, sigma, betas, shares in self._told:
            for image, (beta, share) in enumerate(zip(betas.tolist(), shares.tolist(), strict=True)):
                found += [[] for _ in range(image + 1 - len(found))]
                found[image].append(Told(image, step, sigma, beta, share))
        return found

    def _on(self, device: torch.device) -> Sizes:
        moved = self.how.negation.to(device)
        if moved is not self.how.negation:
            self.how = replace(self.how, negation=moved)
        return self.how

    def _check(self, sample: Tensor) -> None:
        if tuple(sample.shape[1:]) != self.how.negation.shape:
            raise UsageError(
                f"The pipeline draws latents of shape {tuple(sample.shape[1:])} and the negation set holds "
                f"{self.how.negation.shape}: encode it for this pipeline, at this height and width (NegationSet.of)."
            )
