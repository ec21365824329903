"""What --quick lowers: never above what a recipe says, and never what was given by hand in the same command."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from safedig.progress import say
from safedig.verbs import Options

Section = TypeVar("Section")


def lowered(section: Section, most: Mapping[str, int], options: Options, path: str = "") -> Section:
    """A section of a recipe with these of its numbers at most so large; `path` leads to it, such as `attack.`."""
    there: Any = section
    changes = {
        name: limit
        for name, limit in most.items()
        if getattr(there, name) > limit and not options.by_hand(f"{path}{name}")
    }
    if changes:
        say(f"--quick: {', '.join(f'{path}{name}={limit}' for name, limit in changes.items())}")
    return dataclasses.replace(there, **changes)
