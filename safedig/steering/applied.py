"""A steering while it is on a pipeline: what its rules see and do there is counted, and no two calls are mixed.

A pipeline keeps the state of a call in itself (its scheduler does), so that a second thread cannot use it at the same
time: that thread's call is refused, and the one that runs goes on untouched. One after the other they may.
"""

import sys
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.linalg import vector_norm

from ..config import UsageError
from ..hooks import Context, Row, SafetyBypassError, attach
from ..shadow import listen
from ..sites import Site, of_the_prompt
from .rule import Rule
from .tensors import equal

_ON = "_safedig_applied"  # attribute of a steered pipeline: what is on it
_LOCK = threading.Lock()
_TINY = 1e-12  # so that nothing added to nothing is 0, and not no number


@dataclass(frozen=True, eq=False)
class Touch:
    """What a rule did to one image in one step."""

    image: int
    """Its place in the batch of the call."""
    row: Row
    site: Site
    step: int
    sigma: float
    open: Bool[Tensor, " token"]
    """The tokens that the gate has opened for."""
    moved: float
    """‖a′ − a‖ / ‖a‖ over all tokens of the image."""


class Opened:
    """The images that gates of one steering have opened for, in the pass through the model that is under way.

    A site that is passed for the second time, or another step or batch, begins a new pass. `edited` are the sites that
    others are watched for; one that is passed after all of them is a `UsageError`, for it could open none.
    """

    def __init__(self, edited: Collection[Site] = ()) -> None:
        self._edited = frozenset(edited)
        self._pass: tuple[int, tuple[Row, ...]] | None = None
        self._sites: set[Site] = set()
        self._images: Bool[Tensor, " batch"] | None = None

    def before(self, context: Context) -> Bool[Tensor, " batch"] | None:
        """Those at the sites that this pass has come by; None at its first."""
        now = (context.step, context.rows)
        if self._pass != now or context.site in self._sites:
            self._pass, self._sites, self._images = now, set(), None
        return self._images

    def add(self, context: Context, images: Bool[Tensor, " batch"]) -> None:
        """Those that this site's gate has opened for join them."""
        if self._edited and context.site not in self._edited and self._edited <= self._sites:
            raise UsageError(
                f"'{context.site}' is watched, and is passed after {', '.join(map(str, self._edited))}, whose gates it "
                "should open: watch a site that comes before, or none (watch=[])."
            )
        self._sites.add(context.site)
        self._images = images if self._images is None else self._images.to(images.device) | images


class Live:
    """A rule on a running pipeline: goes to where the activations are, counts, and keeps the audit of the last call."""

    def __init__(self, rule: Rule, opened: Opened | None = None):
        self.rule = rule
        self.opened = opened or Opened()
        """What the rules of one steering share."""
        self.passed = 0
        self.touched: int | Tensor = 0
        self._seen: list[tuple[Context, Tensor, Tensor, Tensor]] = []
        self._last: tuple[Tensor, tuple[Row, ...], list[bool], Tensor | None, Tensor, Tensor] | None = None

    def begin(self) -> None:
        """A call of the pipeline begins."""
        self._seen = []

    def __call__(self, x: Float[Tensor, "batch token d"], context: Context) -> Float[Tensor, "batch token d"] | None:
        steered = sum(self.rule.gate.steered(context))
        if not steered:
            return None
        self.rule = self.rule.to(x.device)
        open_, delta = self._decided(x, context)
        out = self.rule.applied(x, open_, delta)
        self.opened.add(context, open_.any(1))
        self.passed += steered * x.shape[1]
        self.touched = self.touched + open_.sum()
        self._seen.append((context, open_, delta.norm(dim=-1), vector_norm(x, dim=-1, dtype=torch.float32)))
        return out

    def _decided(self, x: Float[Tensor, "batch token d"], context: Context) -> tuple[Tensor, Tensor]:
        """What the rule decides; where only the prompt passes, it is the same in every step and is decided once.

        A guard reads σ, and a decision made for gradients belongs to its own graph: neither is kept.
        """
        once = of_the_prompt(context.site) and self.rule.guard is None and not torch.is_grad_enabled()
        steered, last = self.rule.gate.steered(context), self._last if once else None
        opened = self.opened.before(context)
        opened = None if opened is None else opened.to(x.device)
        if last is not None and last[1:3] == (context.rows, steered) and equal(last[0], x) and equal(last[3], opened):
            return last[4:]
        open_, delta = self.rule.decided(x, context, opened)
        if once:
            self._last = (x, context.rows, steered, opened, open_, delta)
        return open_, delta

    def touches(self) -> Iterator[Touch]:
        """Each image in each step of the last call, in the rows that are steered."""
        for context, open_, added, before in self._seen:
            steered = self.rule.gate.steered(context)
            moved = torch.where(open_, added, 0.0).norm(dim=-1) / before.norm(dim=-1).clamp(min=_TINY)
            for at, (row, share) in enumerate(zip(context.rows, moved.tolist(), strict=True)):
                if steered[at]:
                    image = context.rows[:at].count(row)
                    yield Touch(image, row, context.site, context.step, context.sigma, open_[at].cpu(), share)


class _Session:
    """The rules of one steering on one pipeline, and the thread whose turn it is."""

    def __init__(self, pipe: Any, live: Mapping[Site, Live]):
        self.pipe, self.live = pipe, live
        self.thread = self.turn = threading.get_ident()

    def begin(self) -> None:
        """A call of the pipeline begins: if another thread is inside one, this one may not."""
        with _LOCK:
            me = threading.get_ident()
            if self.turn != me and _calling(self.turn, self.pipe):
                raise SafetyBypassError(
                    "Another thread is drawing with this steered pipeline, which holds the state of one call: draw one "
                    "after the other, or give each thread a pipeline of its own."
                )
            self.turn = me
        for live in self.live.values():
            live.begin()

    def function(self, live: Live) -> Any:
        def run(x: Tensor, context: Context) -> Tensor | None:
            if threading.get_ident() != self.turn:
                raise SafetyBypassError(
                    f"'{context.site}' was passed by a thread whose call had begun before the steering was put on, or "
                    "that called a part of the pipeline by itself: its images would be steered in part."
                )
            return live(x, context)

        return run


@contextmanager
def put_on(pipe: Any, live: Mapping[Site, Live]) -> Iterator[None]:
    """Run the rules at their sites in every call of `pipe`, beside those at other sites that are on it already."""
    session = _Session(pipe, live)
    with _LOCK:
        there: list[_Session] = vars(pipe).setdefault(_ON, [])
        try:
            _refuse(session, there)
        except (UsageError, SafetyBypassError):
            _clear(pipe)
            raise
        there.append(session)
    functions = {site: session.function(one) for site, one in live.items()}
    try:
        with listen(pipe, "check_inputs", before=session.begin), attach(pipe, functions):
            yield
    finally:
        with _LOCK:
            there.remove(session)
            _clear(pipe)


def is_steered(pipe: Any) -> bool:
    return bool(vars(pipe).get(_ON))


def _refuse(new: _Session, there: list[_Session]) -> None:
    for old in there:
        if old.thread != new.thread:
            raise SafetyBypassError(
                "Another thread has put a steering on this pipeline, and two would act on one another's images: give "
                "each thread a pipeline of its own, or put both on from one thread."
            )
        if both := old.live.keys() & new.live.keys():
            raise UsageError(
                f"The pipeline is steered at '{min(map(str, both))}' already, and a gate there would read what was "
                "edited: leave that steering first (or remove_steering(pipe)), or make one Steering with all edits."
            )


def _clear(pipe: Any) -> None:
    if not vars(pipe).get(_ON):
        vars(pipe).pop(_ON, None)


def _calling(thread: int, pipe: Any) -> bool:
    """Whether the thread is inside a call of the pipeline; one that failed or has ended is not."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if frame.f_code.co_name == "__call__" and frame.f_locals.get("self") is pipe:
            return True
        frame = frame.f_back
    return False
