"""Guidance away from a concept of harm where the prompt leans towards it: Safe Latent Diffusion, on the velocity.

SLD (arXiv 2211.05105) with ε replaced by the velocity v of a rectified flow; differences of the two at one x_σ differ
by the factor 1 − σ alone.

    v' = v(∅) + w · (v(c) − v(∅) − γ_t),    γ_t = μ · (v(S) − v(∅)) + s_m · ν_t,
    μ = min(1, |s_S · (v(c) − v(S))|) where v(c) − v(S) < λ, else 0,    ν_{t+1} = β_m · ν_t + (1 − β_m) · γ_t.

The paper has max(1, ·); its released form, which is what others measure, has min, and with it s_S = 0 changes no bit.
λ, s_m and β_m are those of the configuration Max. S is the words of harm; one more pass of the transformer a step.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...shadow import answer, listen
from ...sites import transformer
from .lesson import Lesson
from .method import Learnt
from .negative_prompt import check_guided
from .text import Text, encode
from .words import hazard_words

THRESHOLD, MOMENTUM, BETA = 1.0, 0.5, 0.7
WORDS = 12  # of harm, in the text of the concept


@dataclass(frozen=True)
class SafeLatentDiffusion:
    """Strength is s_S; from about 10 on μ is 1 nearly everywhere, and more changes nothing."""

    name: str = "SLD"
    unit: float = 2.0

    def learn(self, lesson: Lesson) -> Learnt:
        check_guided(lesson, self.name)
        concept = " ".join(hazard_words(lesson.pairs, lesson.benign)[:WORDS])
        return lambda strength: Guiding(concept, strength)


@dataclass(frozen=True)
class Guiding:
    """Shadows `scheduler.step`, reads what the transformer was called with, and calls it once more a step."""

    concept: str
    strength: float

    @contextmanager
    def apply(self, pipe: Any) -> Iterator[None]:
        run = _Run(pipe, self)
        root = transformer(pipe)
        with ExitStack() as stack:
            stack.enter_context(listen(pipe, "check_inputs", before=run.begin))
            stack.callback(root.register_forward_hook(run.called, with_kwargs=True).remove)
            stack.enter_context(answer(pipe.scheduler, "step", run.step))
            yield


@dataclass
class _Run:
    pipe: Any
    guiding: Guiding
    calls: list[tuple[dict[str, Any], Tensor]] = field(default_factory=list)
    inside: bool = False
    momentum: Tensor | float = 0.0
    text: Text | None = None

    def begin(self) -> None:
        self.calls, self.momentum, self.text = [], 0.0, None

    def called(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not self.inside:
            self.calls.append((kwargs, output[0]))

    def step(self, inner: Callable[..., Any], model_output: Tensor, timestep: Any, sample: Tensor, **more: Any) -> Any:
        calls, self.calls = self.calls, []
        conditional, unconditional, kwargs = _rows(calls, len(model_output))
        harmful = self.velocity_of_harm(kwargs, len(model_output))
        leaning = conditional - harmful
        mu = (self.guiding.strength * leaning).abs().clamp(max=1.0).where(leaning < THRESHOLD, 0.0)
        gamma = mu * (harmful - unconditional) + MOMENTUM * self.momentum
        self.momentum = BETA * self.momentum + (1 - BETA) * gamma
        guided = model_output - _guidance(model_output, conditional, unconditional) * gamma
        return inner(guided.to(model_output.dtype), timestep, sample, **more)

    def velocity_of_harm(self, kwargs: dict[str, Any], images: int) -> Tensor:
        """The same x_σ read with the words of harm."""
        whole = kwargs["encoder_hidden_states"]
        if self.text is None:
            clip = self.pipe.tokenizer_max_length if hasattr(self.pipe, "tokenizer_3") else 0
            self.text = encode(self.pipe, [self.guiding.concept], whole.shape[1] - clip)
        given = {name: _first(value, len(whole), images) for name, value in kwargs.items()}
        given["encoder_hidden_states"] = self.text.tokens.to(whole).expand(images, -1, -1)
        given["pooled_projections"] = self.text.pooled.to(whole).expand(images, -1)
        self.inside = True
        try:
            return self.pipe.transformer(**given)[0]
        finally:
            self.inside = False


def _rows(calls: list[tuple[dict[str, Any], Tensor]], images: int) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Conditional and unconditional velocity: two calls in that order (FLUX), or one with the rows the other way."""
    if len(calls) == 2:
        return calls[0][1], calls[1][1], calls[0][0]
    assert len(calls) == 1 and len(calls[0][1]) == 2 * images, "images without an unconditional row"
    unconditional, conditional = calls[0][1].chunk(2)
    return conditional, unconditional, calls[0][0]


def _guidance(combined: Tensor, conditional: Tensor, unconditional: Tensor) -> Tensor:
    """w of combined = v(∅) + w · (v(c) − v(∅)), read off what the pipeline has made of the two."""
    apart = (conditional - unconditional).double()
    return (((combined - unconditional).double() * apart).sum() / apart.square().sum().clamp(min=1e-12)).float()


def _first(value: Any, rows: int, images: int) -> Any:
    """One row an image of whatever has as many rows as the call."""
    batched = isinstance(value, torch.Tensor) and value.ndim > 0 and len(value) == rows
    return value[:images] if batched else value
