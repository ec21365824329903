"""A frozen dataclass of tensors, nested or not, as names → tensors and back: so it is saved, and so it is moved."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, get_args, get_type_hints

import torch
from torch import Tensor

T = TypeVar("T")


def equal(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether both are absent, or hold the same numbers."""
    return one is other or (one is not None and other is not None and torch.equal(one, other))


def named(value: Any) -> dict[str, Tensor]:
    """Each tensor by its path, such as `encoder.W_enc`; what is no tensor and holds none is left out."""
    found: dict[str, Tensor] = {}
    for field in fields(value):
        part = getattr(value, field.name)
        if isinstance(part, Tensor):
            found[field.name] = part
        elif is_dataclass(part):
            found |= {f"{field.name}.{name}": tensor for name, tensor in named(part).items()}
    return found


def rebuilt(cls: type[T], tensors: Mapping[str, Tensor], **rest: Any) -> T:
    """The value of which `named` gave these; `rest` are its fields that are no tensors. A `KeyError` names a gap."""
    hints, values = get_type_hints(cls), dict(rest)
    for field in fields(cls):  # type: ignore[arg-type]
        if field.name in rest:
            continue
        inner, optional = _parts(hints[field.name])
        own = {
            name.removeprefix(f"{field.name}."): tensor
            for name, tensor in tensors.items()
            if name.startswith(f"{field.name}.")
        }
        if optional and not own and field.name not in tensors:
            values[field.name] = None
        else:
            values[field.name] = tensors[field.name] if inner is None else rebuilt(inner, own)
    return cls(**values)


def _parts(hint: Any) -> tuple[type | None, bool]:
    """The dataclass that a field holds, if it is no tensor, and whether it may be None."""
    kinds = get_args(hint) or (hint,)
    inner = [kind for kind in kinds if isinstance(kind, type) and is_dataclass(kind)]
    return (inner[0] if inner else None), type(None) in kinds
