"""Put functions on sites for the duration of a `with`, tell them σ and the rows, and make sure that they ran.

Steering fails closed: a site that did not fire exactly as often as the schedule says raises `SafetyBypassError`
before the image is finished. Functions get copies of nothing and must return new tensors; see record.py for copying.
"""

import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from .config import UsageError
from .shadow import listen
from .sites import Port, Site, SiteError, ports, transformer

Row = Literal["cond", "uncond"]

# Diffusers' names for the hooks that replay a block's old output or skip it, and our hooks with it.
_STEP_CACHES = re.compile("fbc|mag_cache|sea_cache|taylorseer|faster_cache|pyramid_attention|text_kv|layer_skip")


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
    """What a function on a site is told: where and when it runs, and what each row of the batch is."""

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
    live = ports(pipe)
    for site in functions:
        if site not in live:
            raise SiteError(f"'{site}' is no live site of {type(transformer(pipe)).__name__}: see safedig.sites.sites.")
    _refuse_step_caches(pipe)
    watch = _Watch(pipe, {site: live[site] for site in functions}, strict)
    guard = torch.compiler.disable if _drop_compiled_graphs(pipe) else lambda hook: hook
    with ExitStack() as stack:
        stack.enter_context(listen(pipe, "check_inputs", before=watch.start))
        stack.enter_context(listen(pipe, "encode_prompt", after=watch.encoded))
        stack.enter_context(listen(pipe.scheduler, "step", before=watch.step))
        stack.enter_context(listen(pipe, "maybe_free_model_hooks", after=watch.end))
        for handle in _hooks(transformer(pipe), watch, functions, guard):
            stack.callback(handle.remove)
        yield


@dataclass
class _Watch:
    """The sentinel: follows each pipeline call from start to end and compares what fired with what was due."""

    pipe: Any
    armed: dict[Site, Port]
    strict: bool
    running: bool = False
    steps: int = 0
    forwards: int = 0
    moment: tuple[int, float, tuple[Row, ...]] | None = None
    due: Counter[Site] = field(default_factory=Counter)
    fired: Counter[Site] = field(default_factory=Counter)
    known: list[tuple[Row, Tensor]] = field(default_factory=list)
    labels: list[tuple[Tensor, tuple[Row, ...]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.clock = SigmaClock(self.pipe.scheduler)
        self.modules = self._modules()

    def start(self) -> None:
        """A pipeline call begins: forget the last one, whatever became of it."""
        self.running, self.steps = True, 0
        self.known.clear()
        self.labels.clear()
        self._next_step()
        if self._modules() != self.modules:
            self._alarm("a module with an armed site was replaced after the functions were attached")

    def encoded(self, result: tuple[Any, ...]) -> None:
        """Keep the text embeddings, to know them again: SD3 returns (cond, uncond, …), FLUX is asked for one a call."""
        if not self.running:
            return
        both = len(result) == 4
        later = self.known and not both
        self.known.append(("uncond" if later else "cond", result[0]))
        if both and result[1] is not None:
            self.known.insert(0, ("uncond", result[1]))

    def enter(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The transformer is called: read the clock and the rows once, for all sites."""
        skipped = kwargs.get("skip_layers") or ()
        self.forwards += 1
        self.due.update(site for site in self.armed if not (site.family and site.index in skipped))
        rows = self._rows(_argument(root, "encoder_hidden_states", args, kwargs))
        self.moment = (self.clock.step, self.clock.sigma, rows)

    def leave(self, *_: Any) -> None:
        self.moment = None

    def fire(self, site: Site, function: SiteFunction, x: Tensor) -> Tensor | None:
        """One site is passed inside the transformer; anything outside (text encoding, recomputation) is left alone."""
        if self.moment is None:
            return None
        self.fired[site] += 1
        tokens = _to_tokens(x)
        changed = function(tokens, Context(site, *self.moment))
        if changed is None or changed is tokens:
            return None
        if changed.shape != tokens.shape or changed.dtype != tokens.dtype:
            raise ValueError(
                f"The function on {site} returned {tuple(changed.shape)} {changed.dtype}; "
                f"expected {tuple(tokens.shape)} {tokens.dtype} as it was given."
            )
        return _from_tokens(changed, x)

    def step(self) -> None:
        """The scheduler is about to use the model's output: everything due must have fired by now."""
        if self.forwards == 0:
            self._alarm("the model ran without calling its hooks")
        for site in self.armed:
            if self.fired[site] != self.due[site]:
                self._alarm(f"'{site}' fired {self.fired[site]} of {self.due[site]} times in step {self.steps}")
        self.steps += 1
        self._next_step()

    def end(self, _: None) -> None:
        """The pipeline call is over: it must have taken every step of its schedule under watch."""
        if self.running and not self.pipe.interrupt and self.steps != self.pipe.num_timesteps:
            self._alarm(f"{self.steps} of {self.pipe.num_timesteps} steps were seen")
        self.running = False

    def _next_step(self) -> None:
        self.forwards, self.moment = 0, None
        self.due.clear()
        self.fired.clear()

    def _rows(self, embeddings: Tensor) -> tuple[Row, ...]:
        """Label the rows of what the transformer reads by what `encode_prompt` returned; the unknown count as cond."""
        for seen, rows in self.labels:
            if seen is embeddings:
                return rows
        rows = _label(embeddings, self.known)
        self.labels.append((embeddings, rows))
        return rows

    def _modules(self) -> list[nn.Module]:
        root = transformer(self.pipe)
        return [root, *(root.get_submodule(port.module) for port in self.armed.values())]

    def _alarm(self, what: str) -> None:
        if self.strict and self.armed:
            raise SafetyBypassError(
                f"Armed but not fired: {what}. The image is not safe to use. Attach after compiling, wrapping, "
                "caching or replacing parts of the pipeline, or leave those out."
            )


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


def _hooks(root: nn.Module, watch: _Watch, functions: Mapping[Site, SiteFunction], guard: Callable) -> Iterator[Any]:
    """Register everything on the model, one handle at a time."""
    yield root.register_forward_pre_hook(guard(watch.enter), with_kwargs=True)
    for site, function in functions.items():
        port, fire = watch.armed[site], partial(watch.fire, site, function)
        module = root.get_submodule(port.module)
        if port.argument:
            yield module.register_forward_pre_hook(guard(partial(_on_input, port.argument, fire)), with_kwargs=True)
        else:
            yield module.register_forward_hook(guard(partial(_on_output, port.element, fire)))
    yield root.register_forward_hook(guard(watch.leave), always_call=True)


def _on_input(name: str, fire: Callable, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    changed = fire(_argument(module, name, args, kwargs))
    if changed is None:
        return None
    if name in kwargs:
        return args, kwargs | {name: changed}
    position = _position(module, name)
    return (*args[:position], changed, *args[position + 1 :]), kwargs


def _on_output(element: int | None, fire: Callable, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    changed = fire(output if element is None else output[element])
    if changed is None or element is None:
        return changed
    if isinstance(output, tuple):
        return (*output[:element], changed, *output[element + 1 :])
    return type(output)(**{key: changed if at == element else value for at, (key, value) in enumerate(output.items())})


def _argument(module: nn.Module, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Blocks are called by keyword at inference and by position under gradient checkpointing."""
    return kwargs[name] if name in kwargs else args[_position(module, name)]


def _position(module: nn.Module, name: str) -> int:
    return list(inspect.signature(type(module).forward).parameters).index(name) - 1  # the first one is self


def _to_tokens(x: Shaped[Tensor, "batch *rest"]) -> Shaped[Tensor, "batch token d"]:
    if x.ndim == 2:
        return rearrange(x, "batch d -> batch 1 d")
    return rearrange(x, "batch d h w -> batch (h w) d") if x.ndim == 4 else x


def _from_tokens(tokens: Shaped[Tensor, "batch token d"], like: Shaped[Tensor, "batch *rest"]) -> Tensor:
    if like.ndim == 2:
        return rearrange(tokens, "batch 1 d -> batch d")
    return rearrange(tokens, "batch (h w) d -> batch d h w", h=like.shape[2]) if like.ndim == 4 else tokens


def _drop_compiled_graphs(pipe: Any) -> bool:
    """torch.compile skips hooks that a graph has not seen, by default and silently; True if there may be graphs."""
    modules = transformer(pipe).modules()
    compiled = pipe.transformer is not transformer(pipe) or any(
        hasattr(module, "_orig_mod") or vars(module).get("_compiled_call_impl") for module in modules
    )
    if compiled:
        import torch._dynamo

        torch._dynamo.config.skip_nnmodule_hook_guards = False
        torch.compiler.reset()
    return compiled


def _refuse_step_caches(pipe: Any) -> None:
    for module in transformer(pipe).modules():
        for name in getattr(getattr(module, "_diffusers_hook", None), "hooks", {}):
            if _STEP_CACHES.match(name):
                raise UsageError(
                    f"The transformer has the step cache '{name}', which replays old activations past the hooks: "
                    "call pipe.transformer.disable_cache() first."
                )
