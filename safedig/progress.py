"""Progress on stderr: a bar on a terminal, elsewhere one line at the start and one at the end; stdout stays free."""

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

T = TypeVar("T")


def track(iterable: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yield from `iterable` while showing how far it is; `total` is its length where it does not know its own."""
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    shown = _bar if sys.stderr.isatty() else _lines
    yield from shown(iterable, description, total)


def say(message: str) -> None:
    """One line to whoever is watching."""
    print(message, file=sys.stderr, flush=True)


def _bar(iterable: Iterable[T], description: str, total: int | None) -> Iterator[T]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(file=sys.stderr)) as progress:
        yield from progress.track(iterable, total=total, description=description)


def _lines(iterable: Iterable[T], description: str, total: int | None) -> Iterator[T]:
    say(f"{description} …" if total is None else f"{description} (0/{total}) …")
    started, done = time.perf_counter(), 0
    try:
        for item in iterable:
            yield item
            done += 1
    finally:
        counted = f"{done}" if total is None else f"{done}/{total}"
        say(f"{description}: {counted} in {time.perf_counter() - started:.1f} s")
