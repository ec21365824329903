"""The σ values that a drawing really takes, asked of the pipeline itself, and the steps at which wanted ones lie."""

from collections.abc import Iterable, Sequence
from typing import Any

from ..config import UsageError
from ..pipelines import Drawing, draw
from ..shadow import listen

_SAME = 5e-4  # a σ may be given with three decimals, as it is shown


def schedule(pipe: Any, drawing: Drawing) -> list[float]:
    """σ of every step, falling from 1. Costs the encoding of one empty prompt; the transformer does not run."""

    def skip_the_steps(_: Any) -> None:
        pipe._interrupt = True  # the pipelines' own switch: they set the schedule and pass over each of its steps

    with listen(pipe, "encode_prompt", after=skip_the_steps):
        list(draw(pipe, [{"prompt": "", "seed": 0}], drawing=drawing, batch_size=1, output_type="latent"))
    pipe._interrupt = False
    return [float(sigma) for sigma in pipe.scheduler.sigmas[: pipe.num_timesteps]]


def steps_at(pipe: Any, drawing: Drawing, sigmas: Iterable[float]) -> tuple[int, ...]:
    """The steps of these σ, in the order of the schedule."""
    levels = schedule(pipe, drawing)
    steps = tuple(sorted({step_of(sigma, levels) for sigma in sigmas}))
    if not steps:
        raise UsageError("sigmas is empty: leave it out to record every step, or name at least one σ.")
    return steps


def step_of(sigma: float, levels: Sequence[float]) -> int:
    """The step of a σ on a schedule; an unknown one is an error that names those that exist."""
    nearest = min(range(len(levels)), key=lambda step: abs(levels[step] - sigma))
    if not abs(levels[nearest] - sigma) <= _SAME:
        there = ", ".join(f"{level:.3f}" for level in levels)
        raise UsageError(f"σ = {sigma:g} is not on the schedule of {len(levels)} steps: choose from {there}.")
    return nearest
