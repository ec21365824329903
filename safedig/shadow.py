"""Listen to one method of one object, or amend what it is given, from outside: the object is restored exactly."""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def listen(
    owner: Any, method: str, *, before: Callable[[], None] | None = None, after: Callable[[Any], None] | None = None
) -> Iterator[None]:
    """Call `before()` and `after(result)` around every `owner.method(...)`.

    Several may listen to one method and may leave in any order; with the last one the object is as it was.
    """
    with _joined(owner, method, "listeners", (before, after)):
        yield


@contextmanager
def amend(owner: Any, method: str, change: Callable[[dict[str, Any]], dict[str, Any] | None]) -> Iterator[None]:
    """Let `change(arguments by name)` give other values for some arguments of every `owner.method(...)`.

    With None or {} the call goes on with the very arguments it came with. Several may amend one method, each sees what
    those before it have made, and they and listeners, who are called once all have, may leave in any order.
    """
    with _joined(owner, method, "amenders", change):
        yield


@contextmanager
def _joined(owner: Any, method: str, party: str, member: Any) -> Iterator[None]:
    wrapper = vars(owner).get(method)
    if not hasattr(wrapper, "listeners"):
        wrapper = _wrapper(owner, method)
        setattr(owner, method, wrapper)
    members: list[Any] = getattr(wrapper, party)
    members.append(member)
    try:
        yield
    finally:
        members.remove(member)
        if not wrapper.listeners and not wrapper.amenders and vars(owner).get(method) is wrapper:
            _restore(owner, method, wrapper)


@contextmanager
def answer(owner: Any, method: str, function: Callable[..., Any]) -> Iterator[None]:
    """Have `function(inner, ...)` answer every `owner.method(...)`, where `inner` is the method as it was before.

    Whoever came last is asked first, and must leave first.
    """
    was_own, inner = method in vars(owner), getattr(owner, method)

    @functools.wraps(inner, updated=())  # a listener's list is its own
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(inner, *args, **kwargs)

    setattr(owner, method, wrapper)
    try:
        yield
    finally:
        assert vars(owner).get(method) is wrapper, f"something else on {method} has not been taken off"
        if was_own:
            setattr(owner, method, inner)
        else:
            delattr(owner, method)


def _wrapper(owner: Any, method: str) -> Any:
    inner = getattr(owner, method)
    listeners: list[tuple[Callable | None, Callable | None]] = []
    amenders: list[Callable[[dict[str, Any]], dict[str, Any] | None]] = []

    @functools.wraps(inner)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        present = tuple(listeners)
        for change in tuple(amenders):
            args, kwargs = _amended(inner, args, kwargs, change)
        for before, _ in present:
            if before is not None:
                before()
        result = inner(*args, **kwargs)
        for _, after in present:
            if after is not None:
                after(result)
        return result

    wrapper.listeners = listeners  # type: ignore[attr-defined]
    wrapper.amenders = amenders  # type: ignore[attr-defined]
    wrapper.was_own = method in vars(owner)  # type: ignore[attr-defined]
    return wrapper


def _amended(inner: Any, args: Any, kwargs: Any, change: Callable) -> tuple[Any, Any]:
    """The arguments of the call with what `change` wants otherwise, given as the method's signature has them."""
    given = inspect.signature(inner).bind(*args, **kwargs)
    other = change(dict(given.arguments))
    if not other:
        return args, kwargs
    given.arguments.update(other)
    return given.args, given.kwargs


def _restore(owner: Any, method: str, wrapper: Any) -> None:
    if wrapper.was_own:
        setattr(owner, method, wrapper.__wrapped__)
    else:
        delattr(owner, method)
