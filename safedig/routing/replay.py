"""What a pipeline gives its transformer at a few steps, caught while it draws, to call it again with the same."""

import inspect
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..config import UsageError
from ..hooks import Context, SigmaClock, attach
from ..pipelines import Drawing, draw
from ..shadow import listen
from ..sites import Site, transformer
from ..taps import Tap, tap

VELOCITY = Site.parse("velocity")


@dataclass(frozen=True)
class Inputs:
    """Arguments of the transformer for some rows, which may be of several images and steps; kept in host memory."""

    each: dict[str, Tensor | list[Any]]
    """One entry a row."""
    shared: dict[str, Any]
    device: torch.device

    def __len__(self) -> int:
        return len(next(iter(self.each.values())))

    def of(self, rows: Sequence[int]) -> "Inputs":
        """These rows, in this order."""
        return Inputs({name: _picked(value, rows) for name, value in self.each.items()}, self.shared, self.device)

    def arguments(self) -> dict[str, Any]:
        """What to call the transformer with."""
        return {
            name: value.to(self.device) if isinstance(value, Tensor) else value for name, value in self.each.items()
        } | self.shared

    @classmethod
    def joined(cls, parts: Sequence["Inputs"]) -> "Inputs":
        """The rows of all parts, one after the other."""
        each = {name: _joined([part.each[name] for part in parts]) for name in parts[0].each}
        return cls(each, parts[0].shared, parts[0].device)


@dataclass
class Replay:
    """Calls the transformer with caught inputs, directly, and counts the rows of all that it was called with."""

    pipe: Any
    drawing: Drawing
    rows: int = 0

    def catch(self, images: list[dict[str, Any]], steps: Sequence[int], twins: int = 0) -> list[Inputs]:
        """Draw these images together as far as the last of `steps`, and keep the conditional rows' inputs at each.

        The last `twins` images are kept on the latents of the first, in every step.
        """
        catching = _Catching(self, tuple(steps), twins)
        root = transformer(self.pipe)
        with ExitStack() as stack:
            stack.enter_context(attach(self.pipe, {VELOCITY: catching.keep}))
            stack.callback(root.register_forward_pre_hook(catching.see, with_kwargs=True).remove)
            stack.enter_context(listen(self.pipe.scheduler, "step", before=catching.look, after=catching.follow))
            list(draw(self.pipe, images, drawing=self.drawing, batch_size=len(images), output_type="latent"))
        self.pipe._interrupt = False
        return [catching.caught[step] for step in steps]

    @torch.no_grad()
    def velocity(self, inputs: Inputs, functions: Mapping[Site, Tap] | None = None) -> Float[Tensor, "row n"]:
        """What the transformer answers with these functions on its sites, in float32 on the host."""
        fired: list[Site] = []

        def counted(site: Site, function: Tap) -> Tap:
            def through(x: Tensor) -> Tensor | None:
                fired.append(site)
                return function(x)

            return through

        wanted = {site: counted(site, function) for site, function in (functions or {}).items()}
        with tap(self.pipe, wanted):
            answer = transformer(self.pipe)(**inputs.arguments())
        self.rows += len(inputs)
        if passed := [site for site in wanted if fired.count(site) != 1]:
            raise UsageError(
                f"'{passed[0]}' was passed {fired.count(passed[0])} times in one forward, expected once: load the "
                "pipeline anew, without compiled graphs and step caches."
            )
        v = torch.stack(answer[0]) if isinstance(answer[0], list) else answer[0]
        return v.flatten(1).float().cpu()


@dataclass
class _Catching:
    """Follows one drawing: sees the arguments of each forward, and knows behind it which rows are conditional."""

    replay: Replay
    steps: tuple[int, ...]
    twins: int
    given: dict[str, Any] = field(default_factory=dict)
    now: int = 0
    caught: dict[int, Inputs] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.clock = SigmaClock(self.replay.pipe.scheduler)

    def see(self, root: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = inspect.signature(type(root).forward).bind_partial(root, *args, **kwargs).arguments
        self.given = {name: value for name, value in bound.items() if name != "self"}

    def keep(self, x: Float[Tensor, "batch token d"], context: Context) -> None:
        self.replay.rows += len(x)
        conditional = [at for at, row in enumerate(context.rows) if row == "cond"]
        if context.step not in self.steps or not conditional:
            return
        each = {name: value for name, value in self.given.items() if _by_row(name, value, len(x))}
        shared = {name: value for name, value in self.given.items() if name not in each}
        kept = {name: _picked(value, conditional) for name, value in each.items()}
        host = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in kept.items()}
        self.caught[context.step] = Inputs(host, shared, x.device)

    def look(self) -> None:
        self.now = self.clock.step

    def follow(self, result: Any) -> None:
        if self.twins:
            result[0][-self.twins :].copy_(result[0][: self.twins])
        if self.now >= self.steps[-1]:
            self.replay.pipe._interrupt = True  # the pipelines' own switch: the remaining steps are passed over


def _by_row(name: str, value: Any, rows: int) -> bool:
    """Whether an argument has an entry for each row; positions in two dimensions are the same for all of them."""
    if isinstance(value, Tensor):
        return value.ndim > 0 and len(value) == rows and not (name.endswith("_ids") and value.ndim == 2)
    return isinstance(value, list) and len(value) == rows


def _picked(value: Tensor | list[Any], rows: Sequence[int]) -> Tensor | list[Any]:
    return value[list(rows)] if isinstance(value, Tensor) else [value[row] for row in rows]


def _joined(values: list[Any]) -> Any:
    return torch.cat(values) if isinstance(values[0], Tensor) else [entry for value in values for entry in value]
