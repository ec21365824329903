"""What people are told by a command, on stderr: a bar on a terminal, elsewhere a line at the start and one at the end.

stdout stays free.
"""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TypeVar

from .config import UsageError

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


def exit_code(command: Callable[[], object], name: str, again: str = "starts again") -> int:
    """Run a command: 0, or 2 for the caller's mistake and 130 for an interruption, each with one line.

    `again` says what the same command does after an interruption.
    """
    try:
        command()
    except UsageError as error:
        say(f"{name}: {' '.join(str(error).split())}")
        return 2
    except KeyboardInterrupt:
        say(f"{name}: interrupted; the same command {again}.")
        return 130
    return 0


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
