"""Put functions on sites for the duration of a `with`, tell them σ and the rows, and make sure that they ran.

Steering fails closed: a site that did not fire exactly as often as the schedule says raises `SafetyBypassError`
before the image is finished. Functions get the model's own tensors: they clone what they keep and change none in place.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .detours import drop_compiled_graphs, may_have_graphs, refuse_checkpointing, refuse_step_caches, refuse_unheard
from .shadow import amend, listen
from .sites import Site, architecture, component, ports, transformer
from .taps import argument, tap

Row = Literal["cond", "uncond"]


class SafetyBypassError(RuntimeError):
    """A function was put on a site and the model ran around it: the image would not have been steered."""


class SigmaClock:
    """Which step of the schedule comes next, and its noise level σ, read from the scheduler itself."""

    def __init__(self, scheduler: Any):
        self._scheduler = scheduler

    @property
    def step(self) -> int:
        index = self._scheduler.step_index
        return int(index if index is not None else self._scheduler.begin_index or 0)

    @property
    def sigma(self) -> float:
        return float(self._scheduler.sigmas[self.step])


@dataclass(frozen=True)
class Context:
    """What a function on a site is told: where and when it runs, and what each row of the batch is.

    Text is encoded before the first step: there `step` is −1 and `sigma` 1.
    """

    site: Site
    step: int
    sigma: float
    rows: tuple[Row, ...]


SiteFunction = Callable[[Float[Tensor, "batch token d"], Context], Float[Tensor, "batch token d"] | None]


@contextmanager
def attach(pipe: Any, functions: Mapping[Site, SiteFunction], *, strict: bool = True) -> Iterator[None]:
    """Run each function on what passes its site, in every call of `pipe` inside the `with`.

    A function gets `x [batch, token, d]` (one token for a pooled vector, pixels for a 4-D tensor) and a `Context`;
    what it returns takes the place of `x`, None leaves the very same tensor. `strict=False` only reads: no
    `SafetyBypassError`. Compiled graphs of the whole process are dropped, for they would run without the functions.
    """
    refuse_step_caches(pipe)
    refuse_unheard(pipe)
    there, root = ports(pipe), transformer(pipe)
    watch = _Watch(pipe, {site: there[site].module for site in functions if site in there}, strict)
    encoders = [name for name in watch.components if name != "transformer"]
    if watch.compiled:
        drop_compiled_graphs()
    guard: Any = torch.compiler.disable if watch.compiled else lambda hook: hook
    with ExitStack() as stack:
        stack.enter_context(listen(pipe, "check_inputs", before=watch.start))
        stack.enter_context(amend(pipe, "encode_prompt", watch.encoding))
        stack.enter_context(listen(pipe, "encode_prompt", after=watch.encoded))
        stack.enter_context(listen(pipe.scheduler, "step", before=watch.step))
        stack.enter_context(listen(pipe, "maybe_free_model_hooks", after=watch.end))
        for name in encoders:
            hook = component(pipe, name).register_forward_pre_hook(guard(partial(watch.read, name)))
            stack.callback(hook.remove)
        stack.callback(root.register_forward_pre_hook(guard(watch.enter), with_kwargs=True).remove)
        stack.enter_context(
            tap(pipe, {site: partial(watch.fire, site, function) for site, function in functions.items()}, guard=guard)
        )
        stack.callback(root.register_forward_hook(guard(watch.leave), always_call=True).remove)
        yield


@dataclass
class _Watch:
    """The sentinel: follows each pipeline call from start to end and compares what fired with what was due."""

    pipe: Any
    armed: dict[Site, str]
    """Each site, and the path of its module in its component."""
    strict: bool
    running: bool = False
    steps: int = 0
    forwards: int = 0
    moment: tuple[int, float, tuple[Row, ...]] | None = None
    due: Counter[Site] = field(default_factory=Counter)
    fired: Counter[Site] = field(default_factory=Counter)
    reads: Counter[str] = field(default_factory=Counter)
    read_prompts: set[str] = field(default_factory=set)
    """The text encoders that prompts have passed in this call, not negative ones alone."""
    embedded: bool = False
    """Whether the prompts being encoded came as embeddings."""
    known: list[tuple[Row, Tensor]] = field(default_factory=list)
    labels: list[tuple[Tensor, tuple[Row, ...]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.clock = SigmaClock(self.pipe.scheduler)
        self.components = list(dict.fromkeys(["transformer", *(site.component for site in self.armed)]))
        self.modules = self._modules()
        self.compiled = self._compiled()

    def start(self) -> None:
        """A pipeline call begins: forget the last one, whatever became of it."""
        self.running, self.steps = True, 0
        self.known.clear()
        self.labels.clear()
        self.reads.clear()
        self.read_prompts.clear()
        self._next_step()
        if self._modules() != self.modules:
            self._alarm("a module with an armed site was replaced after the functions were attached")
        if self._compiled() and not self.compiled:
            self._alarm("the model was compiled after the functions were attached")
        refuse_step_caches(self.pipe)

    def encoding(self, given: dict[str, Any]) -> None:
        """Prompts are about to be encoded: of those that came as embeddings only the negative ones are read."""
        self.embedded = given.get("prompt_embeds") is not None

    def encoded(self, result: tuple[Any, ...]) -> None:
        """Keep the text embeddings, to know them again: FLUX is asked for one a call, others return the negative ones
        beside them, as SD3 does (cond, uncond, …) and AuraFlow (cond, mask, uncond, mask).
        """
        if not self.running:
            return
        cond = result[0]
        uncond = next((one for one in result[1:] if _alike(one, cond)), None)
        if uncond is not None:
            self.known.extend((("uncond", uncond), ("cond", cond)))
        else:
            self.known.append(("uncond" if self.known else "cond", cond))

    def read(self, name: str, *_: Any) -> None:
        """A text encoder is called: its sites are due once more."""
        self.reads[name] += 1
        if self.running:
            self.due.update(site for site in self.armed if site.component == name)
            if self._read(name) == "cond":
                self.read_prompts.add(name)

    def enter(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The transformer is called: read the clock and the rows once, for all sites."""
        skipped = kwargs.get("skip_layers") or ()
        self.forwards += 1
        here = (site for site in self.armed if site.component == "transformer")
        self.due.update(site for site in here if not (site.family and site.index in skipped))
        rows = self._rows(argument(root, architecture(root).text, args, kwargs))
        self.moment = (self.clock.step, self.clock.sigma, rows)

    def leave(self, *_: Any) -> None:
        self.moment = None

    def fire(self, site: Site, function: SiteFunction, x: Tensor) -> Tensor | None:
        """One site is passed; what no step and no prompt of this call asked for (recomputation) is left alone."""
        moment = self.moment if site.component == "transformer" else self._reading(site.component, len(x))
        if moment is None:
            return None
        self.fired[site] += 1
        changed = function(x, Context(site, *moment))
        if changed is not None and changed is not x and site.family and torch.is_grad_enabled():
            refuse_checkpointing(component(self.pipe, site.component), site)
        return changed

    def _reading(self, name: str, count: int) -> tuple[int, float, tuple[Row, ...]] | None:
        rows = (self._read(name),)
        return (-1, 1.0, rows * count) if self.running else None

    def _read(self, name: str) -> Row:
        """What the encoder is reading. Every pipeline encodes the prompts before it encodes the negative ones."""
        return "uncond" if self.known or self.embedded or self.reads[name] > 1 else "cond"

    def step(self) -> None:
        """The scheduler is about to use the model's output: everything due must have fired by now."""
        if self.forwards == 0:
            self._alarm("the model ran without calling its hooks")
        for site in self.armed:
            if self.steps == 0 and site.component not in {"transformer", *self.read_prompts}:
                self._alarm(f"no prompt was read at '{site}', as where embeddings are given instead of one")
            if self.fired[site] != self.due[site]:
                self._alarm(f"'{site}' fired {self.fired[site]} of {self.due[site]} times in step {self.steps}")
        self.steps += 1
        self._next_step()

    def end(self, _: None) -> None:
        """The pipeline call is over: it must have taken every step of its schedule under watch."""
        if self.running and not interrupted(self.pipe) and self.steps != (due := steps_due(self.pipe)):
            self._alarm(f"{self.steps} of {due} steps were seen")
        self.running = False

    def _next_step(self) -> None:
        self.forwards, self.moment = 0, None
        self.due.clear()
        self.fired.clear()

    def _rows(self, embeddings: Tensor | list[Tensor]) -> tuple[Row, ...]:
        """Label the rows of what the transformer reads by what `encode_prompt` returned; the unknown count as cond."""
        if isinstance(embeddings, list):
            return ("cond",) * len(embeddings)
        for seen, rows in self.labels:
            if seen is embeddings:
                return rows
        rows = _label(embeddings, self.known)
        self.labels.append((embeddings, rows))
        return rows

    def _modules(self) -> list[nn.Module]:
        armed = ((component(self.pipe, site.component), path) for site, path in self.armed.items())
        return [transformer(self.pipe), *(model.get_submodule(path) for model, path in armed)]

    def _compiled(self) -> bool:
        return any(may_have_graphs(self.pipe, name) for name in self.components)

    def _alarm(self, what: str) -> None:
        if self.strict and self.armed:
            raise SafetyBypassError(
                f"Armed but not fired: {what}. The image is not safe to use. Attach after compiling, wrapping, "
                "caching or replacing parts of the pipeline, or leave those out."
            )


def interrupted(pipe: Any) -> bool:
    """Whether someone has asked the call that runs to end before its last step; not every pipeline can be asked."""
    return getattr(pipe, "interrupt", False)


def steps_due(pipe: Any) -> int:
    """Of the call that runs, or the last one."""
    return getattr(pipe, "num_timesteps", len(pipe.scheduler.timesteps))


def _alike(one: Any, other: Tensor) -> bool:
    """Whether both may be embeddings of texts; a mask, a pooled vector or ids differ in rank or width."""
    return isinstance(one, Tensor) and one.ndim == other.ndim and one.shape[-1] == other.shape[-1]


def _label(embeddings: Tensor, known: list[tuple[Row, Tensor]]) -> tuple[Row, ...]:
    """Identity first (an empty prompt encodes like the negative one), else the known tensors as consecutive rows."""
    for row, tensor in known:
        if tensor is embeddings:
            return (row,) * len(embeddings)
    labels: list[Row] = []
    for row, tensor in known:
        part = embeddings[len(labels) : len(labels) + len(tensor)]
        if part.shape == tensor.shape and torch.equal(part, tensor):
            labels.extend(row for _ in tensor)
    return tuple(labels) if len(labels) == len(embeddings) else ("cond",) * len(embeddings)
