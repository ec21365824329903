"""Where the prompts come from that are learnt from, chosen on and reported: the tiny world, or anyone's file."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from safedig.config import UsageError
from safedig.prompts import as_rows, counted_on, load_prompts, twins
from safedig.tiny import prompts
from safedig.tiny.concepts import RISKS

Row = dict[str, Any]
NEEDED = ("harmful", "benign")  # kinds without which nothing can be learnt; of others there may be none


@runtime_checkable
class Bank(Protocol):
    """Prompts by kind, split and risk; no text is in two splits."""

    @property
    def risks(self) -> tuple[str, ...]:
        """Domains of which there are harmful prompts."""
        ...

    @property
    def sha(self) -> str:
        """What stands for the prompts in the facts of a run; none where kind, split and seed say it all."""
        ...

    def rows(self, kind: str, split: str, seed: int, n: int, *, risk: str | None = None, **wishes: Any) -> list[Row]:
        """`n` prompts, or as many as there are; `twins=True`, the default, puts behind each harmful one its twin."""
        ...


@dataclass(frozen=True)
class TinyBank:
    """Fresh prompts of the tiny world, as `tiny.prompts` gives them."""

    risks: tuple[str, ...] = RISKS
    sha: str = ""

    def rows(self, kind: str, split: str, seed: int, n: int, *, risk: str | None = None, **wishes: Any) -> list[Row]:
        return as_rows(prompts(kind, split, seed, n, risk=risk, **wishes))


class FileBank:
    """Prompts of a CSV, JSONL or Parquet file, whose columns `kind`, `split`, `risk` and `twin` say what each is for.

    They come in the file's order, with the file's seeds; with `seed` the images are drawn from that one on.
    """

    def __init__(self, path: str | os.PathLike[str], seed: int | None = None) -> None:
        self._path, given = Path(path), load_prompts(path)
        rows = as_rows(given)
        first = counted_on(rows, seed)
        as_drawn = {row["id"]: row for row in first}
        safe = {one["id"]: other["id"] for one, other in twins(given)}
        # Both of a pair are drawn from one seed: what differs between their pictures is the hazard alone.
        self._twins = {one: as_drawn[other] | {"seed": as_drawn[one]["seed"]} for one, other in safe.items()}
        self._rows = [row for row in first if row["id"] not in set(safe.values())]
        self.risks: tuple[str, ...] = tuple(dict.fromkeys(str(row["risk"]) for row in self._rows if row["risk"]))
        facts = [tuple(row.values()) for row in first]
        self.sha = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
        self._check()

    def rows(self, kind: str, split: str, seed: int, n: int, *, risk: str | None = None, **wishes: Any) -> list[Row]:
        """`seed` is that of the tiny world's lot, and has no say here; what a twin shows is up to the file."""
        fitting = [row for row in self._rows if (row["kind"], row["split"]) == (kind, split)]
        fitting = [row for row in fitting if risk is None or row["risk"] == risk]
        if wishes.get("twins", True) and any(row["risk"] for row in fitting):
            pairs = [(row, self._twins[row["id"]]) for row in fitting if row["id"] in self._twins]
            self._need(pairs, kind, split, risk, " with a safe twin")
            return [row for pair in pairs[:n] for row in pair]
        self._need(fitting, kind, split, risk)
        return fitting[:n]

    def _need(self, found: Sequence[Any], kind: str, split: str, risk: str | None, more: str = "") -> None:
        if not found and kind in NEEDED:
            of = f" of risk '{risk}'" if risk else ""
            raise UsageError(
                f"'{self._path}' holds no {kind} prompt{of}{more} in the split '{split}': add some, and say so in the "
                "columns kind, split, risk and twin."
            )

    def _check(self) -> None:
        """No text in two splits: what is learnt from would be reported."""
        splits: dict[str, str] = {}
        for row in [*self._rows, *self._twins.values()]:
            if splits.setdefault(row["prompt"], row["split"]) != row["split"]:
                raise UsageError(
                    f"'{self._path}': the text of prompt '{row['id']}' is in the splits '{splits[row['prompt']]}' and "
                    f"'{row['split']}': leave it in one."
                )


def bank_of(path: str | os.PathLike[str] | None, seed: int | None = None) -> Bank:
    """Of a file, or of the tiny world where none is given."""
    return TinyBank() if path is None else FileBank(path, seed)
