"""Put functions on the sites of a model, whoever calls it: each gets a tensor as tokens and may give back another.

Nothing is known here of pipelines, σ and rows, and nothing is watched over: hooks.py does that.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from .blocks import Port
from .config import UsageError
from .sites import Site, SiteError, architecture, component, ports, transformer

Tap = Callable[[Float[Tensor, "batch token d"]], Float[Tensor, "batch token d"] | None]


@contextmanager
def tap(
    pipe: Any, functions: Mapping[Site, Tap], *, guard: Callable[[Callable], Any] = lambda hook: hook
) -> Iterator[None]:
    """Call each function with what passes its site, `[batch, token, d]`, in every forward of `pipe` or a bare model.

    A pooled vector is one token, a pixel or patch of a 4-D tensor too. What a function returns takes the place of
    `x`, None leaves the very same tensor. `guard` wraps every hook, for compiled models.
    """
    there = ports(pipe)
    for site in functions:
        if site not in there:
            raise SiteError(f"'{site}' is no live site of {type(transformer(pipe)).__name__}: see safedig.sites.sites.")
    with ExitStack() as stack:
        for name in dict.fromkeys(site.component for site in functions):
            model = component(pipe, name)
            here = {site: function for site, function in functions.items() if site.component == name}
            for handle in _hooks(model, {site: there[site] for site in here}, here, guard):
                stack.callback(handle.remove)
        yield


def argument(module: nn.Module, name: str | int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a module was called with; blocks get it by keyword at inference, by position under checkpointing."""
    if isinstance(name, int):
        return args[name] if args else next(iter(kwargs.values()))
    return kwargs[name] if name in kwargs else args[_position(module, name)]


class _Layout:
    """Where text and image lie in the joint sequences of the forward that runs."""

    def __init__(self, model: nn.Module):
        self.row, self.kind = architecture(model), type(model).__name__
        self.text: list[int] = []
        self.image = 0

    def measure(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = inspect.signature(type(model).forward).bind_partial(model, *args, **kwargs).arguments
        assert self.row.lengths is not None
        text, self.image = self.row.lengths(given, model.config)
        self.text = text if isinstance(text, list) else [text]

    def spans(self, x: Shaped[Tensor, "batch token d"], part: str) -> list[slice]:
        """The part's own tokens in each row of `x`."""
        if max(self.text, default=0) + self.image != x.shape[1] or len(x) % len(self.text or [0]):
            raise ValueError(
                f"{self.text} text and {self.image} image tokens were given to {self.kind}, "
                f"but its joint tensor is {tuple(x.shape)}: this version or use of the model is not understood."
            )
        text = self.text * (len(x) // len(self.text))
        if part == "img":
            starts = [n if self.row.joint[0] == "txt" else 0 for n in text]
            return [slice(start, start + self.image) for start in starts]
        start = 0 if self.row.joint[0] == "txt" else self.image
        return [slice(start, start + n) for n in text]

    def take(self, x: Shaped[Tensor, "batch token d"], part: str) -> Shaped[Tensor, "batch part d"]:
        """Only the part; behind a text shorter than the others there are zeros."""
        spans = self.spans(x, part)
        if all(span == spans[0] for span in spans):
            return x[:, spans[0]]
        return nn.utils.rnn.pad_sequence([row[span] for row, span in zip(x, spans, strict=True)], batch_first=True)

    def put(
        self, x: Shaped[Tensor, "batch token d"], part: str, tokens: Shaped[Tensor, "batch part d"]
    ) -> Shaped[Tensor, "batch token d"]:
        """A new tensor with the part replaced."""
        spans = self.spans(x, part)
        if all(span == spans[0] for span in spans):
            return torch.cat([x[:, : spans[0].start], tokens, x[:, spans[0].stop :]], dim=1)
        rows = [
            torch.cat([row[: span.start], new[: span.stop - span.start], row[span.stop :]])
            for row, new, span in zip(x, tokens, spans, strict=True)
        ]
        return torch.stack(rows)


def _hooks(
    model: nn.Module, there: Mapping[Site, Port], functions: Mapping[Site, Tap], guard: Callable[[Callable], Any]
) -> Iterator[Any]:
    """Register everything on one model, one handle at a time."""
    layout = _Layout(model)
    if any(port.part for port in there.values()):
        yield model.register_forward_pre_hook(guard(layout.measure), with_kwargs=True)
    for site, function in functions.items():
        port, module = there[site], model.get_submodule(there[site].module)
        through = partial(_through, site, port, layout, function)
        # transformers collects the hidden states of a text encoder by hooks of its own: ours must come before them.
        first = site.component != "transformer"
        if port.argument is not None:
            hook = guard(partial(_on_input, port.argument, through))
            yield module.register_forward_pre_hook(hook, with_kwargs=True, prepend=first)
        else:
            yield module.register_forward_hook(guard(partial(_on_output, port.element, through)), prepend=first)


def _through(site: Site, port: Port, layout: _Layout, function: Tap, x: Any) -> Any:
    """What the function makes of the tensor (or list of tensors, one an image), in the form in which it came."""
    whole = torch.stack(x) if isinstance(x, list) else x
    tokens = _to_tokens(layout.take(whole, port.part) if port.part else whole)
    changed = function(tokens)
    if changed is None or changed is tokens:
        return None
    if port.read_only:
        raise UsageError(f"'{site}' cannot be edited, only recorded: {port.read_only}. Edit resid_pre or resid_post.")
    if changed.shape != tokens.shape or changed.dtype != tokens.dtype:
        raise ValueError(
            f"The function on {site} returned {tuple(changed.shape)} {changed.dtype}; "
            f"expected {tuple(tokens.shape)} {tokens.dtype} as it was given."
        )
    new = layout.put(whole, port.part, changed) if port.part else _from_tokens(changed, whole)
    return list(new) if isinstance(x, list) else new


def _on_input(
    name: str | int, through: Callable, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    changed = through(argument(module, name, args, kwargs))
    if changed is None:
        return None
    if not args or name in kwargs:
        return args, kwargs | {next(iter(kwargs)) if isinstance(name, int) else name: changed}
    position = name if isinstance(name, int) else _position(module, name)
    return (*args[:position], changed, *args[position + 1 :]), kwargs


def _on_output(element: int | None, through: Callable, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    changed = through(output if element is None else output[element])
    if changed is None or element is None:
        return changed
    if isinstance(output, tuple):
        return (*output[:element], changed, *output[element + 1 :])
    return type(output)(**{key: changed if at == element else value for at, (key, value) in enumerate(output.items())})


def _position(module: nn.Module, name: str) -> int:
    return list(inspect.signature(type(module).forward).parameters).index(name) - 1  # the first one is self


def _to_tokens(x: Shaped[Tensor, "batch *rest"]) -> Shaped[Tensor, "batch token d"]:
    if x.ndim == 2:
        return rearrange(x, "batch d -> batch 1 d")
    return rearrange(x, "batch d ... -> batch (...) d") if x.ndim > 3 else x


def _from_tokens(tokens: Shaped[Tensor, "batch token d"], like: Shaped[Tensor, "batch *rest"]) -> Tensor:
    if like.ndim == 2:
        return rearrange(tokens, "batch 1 d -> batch d")
    return rearrange(tokens, "batch token d -> batch d token").reshape(like.shape) if like.ndim > 3 else tokens
