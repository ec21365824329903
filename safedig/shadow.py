"""Listen to one method of one object, from outside: the class is untouched and the object is restored exactly."""

import functools
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
    wrapper = vars(owner).get(method)
    if not hasattr(wrapper, "listeners"):
        wrapper = _wrapper(owner, method)
        setattr(owner, method, wrapper)
    listener = (before, after)
    wrapper.listeners.append(listener)
    try:
        yield
    finally:
        wrapper.listeners.remove(listener)
        if not wrapper.listeners and vars(owner).get(method) is wrapper:
            _restore(owner, method, wrapper)


def _wrapper(owner: Any, method: str) -> Any:
    inner = getattr(owner, method)
    listeners: list[tuple[Callable | None, Callable | None]] = []

    @functools.wraps(inner)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        present = tuple(listeners)
        for before, _ in present:
            if before is not None:
                before()
        result = inner(*args, **kwargs)
        for _, after in present:
            if after is not None:
                after(result)
        return result

    wrapper.listeners = listeners  # type: ignore[attr-defined]
    wrapper.was_own = method in vars(owner)  # type: ignore[attr-defined]
    return wrapper


def _restore(owner: Any, method: str, wrapper: Any) -> None:
    if wrapper.was_own:
        setattr(owner, method, wrapper.__wrapped__)
    else:
        delattr(owner, method)
