"""Frozen dataclasses ⇄ TOML. An override is a line of TOML; an unknown key is an error that names the nearest one."""

import dataclasses
import difflib
import json
import math
import tomllib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


class UsageError(ValueError):
    """The caller's mistake, told in one line: what was given, what was expected, what to do next."""


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """A sentence that points from a wrong name to the nearest known one, or lists what there is."""
    known = sorted(known)
    near = difflib.get_close_matches(given, known, n=1, cutoff=0.5)
    if near:
        return f"Did you mean '{near[0]}'?"
    return f"Expected one of: {', '.join(known)}."


def check_choices(owner: Any, path: str = "") -> None:
    """A `UsageError` where a field of a dataclass that is a `Literal` holds something else; it names the nearest."""
    for name, hint in typing.get_type_hints(type(owner)).items():
        if typing.get_origin(hint) is typing.Literal:
            _checked(getattr(owner, name), hint, f"{path}{name}")


def check_numbers(owner: Any, path: str, names: Iterable[str], *, least: float = 0, above: bool = False) -> None:
    """A `UsageError` where one of these fields is below `least`, or at it if `above`, or infinite, or no number."""
    for name in names:
        value = getattr(owner, name)
        if value is None or (math.isfinite(value) and (value > least or (value == least and not above))):
            continue
        raise UsageError(
            f"{path}{name}={value}: expected a number {'above' if above else 'from'} {least:g}{'' if above else ' on'}."
        )


def from_toml(cls: type[T], text: str, overrides: Iterable[str] = ()) -> T:
    """Build the dataclass `cls` from TOML text; each override, such as `sae.k=8`, is one more line of it."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"This is not valid TOML: {error}.") from error
    for override in overrides:
        table = _merged(table, parse_override(override))
    return build(cls, table)


def to_toml(value: Any) -> str:
    """Write a dataclass as TOML that `from_toml` reads back to an equal value; fields that are None are left out."""
    return "\n".join(_lines(dataclasses.asdict(value), prefix="")) + "\n"


def parse_override(text: str) -> dict[str, Any]:
    """Read `key=value` as a line of TOML; a value that is no TOML, such as `tiny-flux`, is a bare string."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip() or not value.strip() or "\n" in text:
        raise UsageError(f"'{text}' is no override: expected key=value, for example sae.k=8.")
    for line in (f"{key}={value}", f"{key}={_quoted(value.strip())}"):
        try:
            return tomllib.loads(line)
        except tomllib.TOMLDecodeError:
            continue
    raise UsageError(f"'{key}' is no key: expected letters, digits, '-' and '_' joined by dots, for example sae.k=8.")


def keys_of(override: str) -> list[str]:
    """The keys that an override gives, each in full: `sae.k=8` and `sae={k=8}` both give `sae.k`."""
    return list(_leaves(parse_override(override), path=""))


def build(cls: type[T], table: Mapping[str, Any], path: str = "") -> T:
    """Fill the dataclass `cls` from a table, checking every key and type; `path` leads the keys named in errors."""
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    for key in table:
        if key not in fields:
            raise UsageError(f"Unknown key '{path}{key}'. {_nearest_key(key, fields, path)}")
    missing = [name for name, field in fields.items() if name not in table and _required(field)]
    if missing:
        raise UsageError(f"'{path}{missing[0]}' is missing: give {path}{missing[0]}=VALUE.")
    values = {key: _checked(value, hints[key], f"{path}{key}") for key, value in table.items()}
    return cls(**values)


def _checked(value: Any, hint: Any, key: str) -> Any:
    """`value` as the annotated type `hint`, or an error naming the key; converts only int → float, list → tuple."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, hint):
            return value
        if isinstance(value, Mapping):
            return build(hint, value, f"{key}.")
    elif origin in (typing.Union, types.UnionType):
        return _first_that_fits(value, [argument for argument in arguments if argument is not type(None)], hint, key)
    elif origin is typing.Literal:
        if value in arguments:
            return value
        raise UsageError(f"{key}={_shown(value)}: {did_you_mean(str(value), map(str, arguments))}")
    elif origin in (tuple, list) and isinstance(value, list | tuple):
        item = arguments[0] if arguments else Any
        return origin(_checked(entry, item, f"{key}[{index}]") for index, entry in enumerate(value))
    elif origin is dict and isinstance(value, Mapping):
        return {name: _checked(entry, arguments[1], f"{key}.{name}") for name, entry in value.items()}
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif hint is Any or (isinstance(hint, type) and type(value) is hint):
        return value
    raise UsageError(f"{key}={_shown(value)}: expected {_named(hint)}.")


def _first_that_fits(value: Any, hints: list[Any], whole: Any, key: str) -> Any:
    for hint in hints:
        try:
            return _checked(value, hint, key)
        except UsageError:
            if len(hints) == 1:
                raise
    raise UsageError(f"{key}={_shown(value)}: expected {_named(whole)}.")


def _nearest_key(key: str, fields: Iterable[str], path: str) -> str:
    return did_you_mean(f"{path}{key}", [f"{path}{name}" for name in fields])


def _required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def _leaves(table: Mapping[str, Any], path: str) -> Iterator[str]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}"


def _lines(table: Mapping[str, Any], prefix: str) -> list[str]:
    """Scalars first, then one [section] for each nested table, as TOML demands."""
    present = {key: value for key, value in table.items() if value is not None}
    lines = [f"{_key(key)} = {_toml(value)}" for key, value in present.items() if not isinstance(value, dict)]
    for key, value in present.items():
        if isinstance(value, dict):
            section = f"{prefix}{_key(key)}"
            lines += ["", f"[{section}]", *_lines(value, prefix=f"{section}.")]
    return lines


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_key(key)} = {_toml(entry)}" for key, entry in value.items()) + " }"
    raise AssertionError(f"{type(value).__name__} has no TOML form")


def _quoted(text: str) -> str:
    """JSON's string is TOML's basic string, except that TOML also escapes DEL."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _key(key: str) -> str:
    bare = key and all(character.isascii() and (character.isalnum() or character in "-_") for character in key)
    return key if bare else _quoted(key)


def _shown(value: Any) -> str:
    return _toml(value) if isinstance(value, bool | int | float | str | list | tuple) else type(value).__name__


def _named(hint: Any) -> str:
    names = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}
    if dataclasses.is_dataclass(hint):
        return "a table"
    if typing.get_origin(hint) in (tuple, list):
        return "a list"
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_named(part) for part in typing.get_args(hint) if part is not type(None))
    return names.get(hint, str(hint))
