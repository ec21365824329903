"""Steering without a `with`, as diffusers loads adapters: put on a pipeline, and later taken off."""

from contextlib import ExitStack
from os import PathLike
from typing import Any

from ..config import UsageError
from .applied import is_steered
from .steering import Steering

_HELD = "_safedig_held"  # attribute of a pipeline that apply_steering has steered


def apply_steering(pipe: Any, steering: Steering | str | PathLike[str], *, force: str | None = None) -> Steering:
    """Steer every call of `pipe` from now on, with a `Steering`, a bundle's folder or its Hub id; gives it back.

    A pipeline that is steered already is a `UsageError`. For `force` see `Steering.apply`.
    """
    if is_steered(pipe):
        raise UsageError("The pipeline is steered already: remove_steering(pipe) first, or leave the `with` it is in.")
    made = steering if isinstance(steering, Steering) else Steering.load(steering)
    stack = ExitStack()
    stack.enter_context(made.apply(pipe, force=force))
    vars(pipe)[_HELD] = stack
    return made


def remove_steering(pipe: Any) -> None:
    """Take off what `apply_steering` has put on; the pipeline is bit for bit as it was."""
    stack = vars(pipe).pop(_HELD, None)
    if stack is None:
        raise UsageError("The pipeline holds no steering: apply_steering(pipe, …) puts one on.")
    stack.close()
