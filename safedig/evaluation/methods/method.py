"""What a method is to a comparison: it learns from the common lesson, and acts at a strength. One method a file."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from ...hooks import SiteFunction, attach
from ...sites import Site
from .lesson import Lesson


@runtime_checkable
class Applied(Protocol):
    """Something that acts while a `with` lasts and leaves the pipeline as it was; a `Steering` is one."""

    def apply(self, pipe: Any, /) -> AbstractContextManager[Any]: ...


Learnt = Callable[[float], Any]
"""From a strength to what acts at it, an `Applied`."""


@runtime_checkable
class Method(Protocol):
    """A new peer is one file with one of these, and a line in `METHODS`."""

    @property
    def name(self) -> str: ...

    @property
    def unit(self) -> float:
        """The strength that is 1 in the lesson's ladder of strengths; 0 where there is none to choose."""
        ...

    def learn(self, lesson: Lesson, /) -> Learnt: ...


@dataclass(frozen=True)
class AtSites:
    """Functions on sites; one that is to leave a row alone gives its very bits back."""

    functions: Mapping[Site, SiteFunction]

    def apply(self, pipe: Any) -> AbstractContextManager[None]:
        return attach(pipe, self.functions)
