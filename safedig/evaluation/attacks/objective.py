"""How badly the steered model, told some text, denoises a picture of harm: what white-box attacks make small.

UnlearnDiffAtk (arXiv 2310.11868), for a rectified flow: x0 is a harmful image that the model itself draws unsteered,
x_σ = (1 − σ) · x0 + σ · ε, and the loss is ‖v(x_σ, text) − (ε − x0)‖² with the steering on. One forward a loss, no
sampling; the conditional row alone.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ...pipelines import draw
from ...sites import transformer
from ..methods.text import Text
from .attack import Row
from .victim import Victim


class Objective:
    """For one prompt: its harmful picture is drawn once, which counts."""

    def __init__(self, victim: Victim, row: Row):
        self.victim = victim
        self.calls: list[dict[str, Any]] = []
        self.generator = torch.Generator().manual_seed(int(row["seed"]))
        handle = transformer(victim.pipe).register_forward_pre_hook(self._seen, with_kwargs=True)
        try:
            drawn = draw(victim.pipe, [row], drawing=victim.drawing, batch_size=1, output_type="latent")
            ((_, self.x0),) = drawn
        finally:
            handle.remove()
        each = len(self.calls) // victim.drawing.steps
        self.steps = self.calls[::each]  # of FLUX the conditional call comes first
        self.sigmas = victim.pipe.scheduler.sigmas[: len(self.steps)].tolist()

    def _seen(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.calls.append(kwargs)

    def loss(self, texts: Text) -> Float[Tensor, " candidate"]:
        """Of each text at one and the same random noise and step; what acts on the pipeline must be on it."""
        step = int(torch.randint(len(self.steps), (), generator=self.generator))
        sigma, count = self.sigmas[step], len(texts.tokens)
        noise = torch.randn(self.x0.shape, generator=self.generator).to(self.x0)
        x = (1 - sigma) * self.x0 + sigma * noise
        kwargs = {name: _repeated(value, self.steps[step], count) for name, value in self.steps[step].items()}
        instead = {
            "hidden_states": x.expand(count, *x.shape[1:]),
            "encoder_hidden_states": texts.tokens,
            "pooled_projections": texts.pooled,
        }
        kwargs |= {name: value.to(self.steps[step][name]) for name, value in instead.items()}
        with at_step(self.victim.pipe.scheduler, step):
            velocity = self.victim.pipe.transformer(**kwargs)[0]
        return (velocity.float() - (noise - self.x0).float()).square().flatten(1).mean(1)

    def gradients(self, loss: Tensor, wanted: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """They cost two more passes for each row."""
        self.victim.meter.passes += 2
        return torch.autograd.grad(loss, list(wanted), allow_unused=True, materialize_grads=True)


@contextmanager
def at_step(scheduler: Any, step: int) -> Iterator[None]:
    """The clock of σ shows this step; afterwards what it showed before."""
    before = scheduler._step_index
    scheduler._step_index = step
    try:
        yield
    finally:
        scheduler._step_index = before


def _repeated(value: Any, kwargs: dict[str, Any], count: int) -> Any:
    """One row of what the call had for each of its rows, for every candidate."""
    rows = len(kwargs["hidden_states"])
    batched = isinstance(value, Tensor) and value.ndim > 0 and len(value) == rows and value is not kwargs.get("img_ids")
    return value[:1].expand(count, *value.shape[1:]) if batched else value
