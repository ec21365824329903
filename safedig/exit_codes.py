"""How a command ends: with what code, and what it says to whoever called it wrongly or stopped it."""

from collections.abc import Callable

from .config import UsageError
from .progress import say


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
