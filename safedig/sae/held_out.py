"""Prompts that are kept out of training, so that what is measured on them was not seen; twins stay together."""

import hashlib

from ..activations.record import Activations
from ..config import UsageError


def split(activations: Activations, share: float, seed: int = 0) -> tuple[Activations, Activations]:
    """The stream of the prompts to train on, and of those held out, which their ids and the seed alone decide."""
    key = {row["id"]: str(row.get("twin") or row["id"]) for row in activations.prompts}
    groups = sorted(set(key.values()), key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())
    if not 0 < share < 1 or len(groups) < 2:
        raise UsageError(
            f"A share of {share} of {len(groups)} prompts cannot be held out: give a share between 0 and 1, and record "
            "at least two prompts that are not each other's twins."
        )
    aside = set(groups[: min(max(1, round(share * len(groups))), len(groups) - 1)])
    parts = [[row for row in activations.prompts if (key[row["id"]] in aside) == out] for out in (False, True)]
    return activations.of(parts[0]), activations.of(parts[1])
