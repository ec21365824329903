"""What a recording draws and how it is cut into batches, fixed before it begins: the batches never depend on progress.

A batch that is drawn again, later or by another process, is therefore drawn in the same company, to the same bits.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from ..config import UsageError
from .stream import Prompts


@dataclass(frozen=True)
class Part:
    """The images of one batch, and in paired mode which of them (the second) follows which (the first)."""

    images: list[dict[str, Any]]
    followers: list[tuple[int, int]]


@dataclass(frozen=True)
class Plan:
    """Every row once, a safe twin right after the prompt it belongs to and with that prompt's seed."""

    parts: list[Part]

    @property
    def images(self) -> list[dict[str, Any]]:
        return [image for part in self.parts for image in part.images]

    @property
    def sha(self) -> str:
        """Tells recordings of other prompts, seeds or company apart; labels such as `risk` do not count."""
        what = [
            [[image["id"], image["prompt"], image["seed"]] for image in part.images] + part.followers
            for part in self.parts
        ]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()

    @classmethod
    def of(cls, prompts: Prompts, batch_size: int, paired: bool = False) -> "Plan":
        """Batches of `batch_size` images; in paired mode a prompt and its twin are never parted."""
        if batch_size < 1 + paired:
            raise UsageError(f"batch_size={batch_size}: expected at least {1 + paired} images.")
        units = _units(_checked(prompts), paired)
        if paired:
            return cls(_packed(units, batch_size))
        images = [image for unit in units for image in unit]
        return cls([Part(images[at : at + batch_size], []) for at in range(0, len(images), batch_size)])


def _checked(prompts: Prompts) -> list[dict[str, Any]]:
    given = [dict(row) for row in prompts]
    if not given:
        raise UsageError("There are no prompts to record: give at least one row with an id, a prompt and a seed.")
    first_use: dict[str, int] = {}
    for number, row in enumerate(given, start=1):
        if lacking := {"id", "prompt", "seed"} - row.keys():
            raise UsageError(f"Row {number} has no {min(lacking)}: give prompts as load_prompts returns them.")
        first = given[first_use.setdefault(row["id"], number) - 1]
        if row["prompt"] != first["prompt"]:
            raise UsageError(
                f"Row {number}, column id: '{row['id']}' is taken by another prompt in row {first_use[row['id']]}."
            )
    return given


def _units(given: list[dict[str, Any]], paired: bool) -> list[list[dict[str, Any]]]:
    """Prompts alone or with their twins; an image, which is an id and a seed, comes up once."""
    by_id = {row["id"]: row for row in given}
    twins = {row["twin"] for row in given if row.get("twin") in by_id}
    seen: set[tuple[str, int]] = set()
    units = []
    for row in given:
        if row["id"] in twins and not row.get("twin"):
            continue
        unit = [row]
        if row.get("twin") in by_id:
            unit.append(by_id[row["twin"]] | {"seed": row["seed"]})
        fresh = [image for image in unit if (image["id"], image["seed"]) not in seen]
        if paired and len(fresh) == 1 < len(unit):
            shared = next(image for image in unit if image not in fresh)
            raise UsageError(
                f"In paired mode '{shared['id']}' with seed {shared['seed']} cannot be the image of two pairs: "
                "give prompts that share a safe twin different seeds."
            )
        seen |= {(image["id"], image["seed"]) for image in fresh}
        units.append(fresh)
    return [unit for unit in units if unit]


def _packed(units: list[list[dict[str, Any]]], batch_size: int) -> list[Part]:
    """Units in their order, as many as fit into a batch."""
    parts: list[Part] = []
    for unit in units:
        if not parts or len(parts[-1].images) + len(unit) > batch_size:
            parts.append(Part([], []))
        part = parts[-1]
        if len(unit) == 2:
            part.followers.append((len(part.images), len(part.images) + 1))
        part.images.extend(unit)
    return parts
