"""Which prompts a causal check tries, at which σ, and what that costs; their order has no say in it."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..activations.stream import Prompts
from ..config import UsageError

FEWEST = 12  # pairs; a budget rather costs σ than more of them
HARMFUL = ("harmful", "mixed", "underspecified")
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Trial:
    """How much is tried; `forwards` is its cost in rows, known beforehand."""

    sites: int
    pairs: int
    benign: int
    steps: tuple[int, ...]
    doubled: bool
    """Whether each drawn image takes an unconditional row beside the conditional one."""

    @property
    def forwards(self) -> int:
        drawn = (2 * self.pairs + self.benign) * (self.steps[-1] + 1) * (1 + self.doubled)
        tried = self.pairs * (2 + 2 * self.sites) + self.benign * (1 + self.sites)
        return drawn + len(self.steps) * tried

    @classmethod
    def within(
        cls, budget: int | None, *, sites: int, pairs: int, benign: int, sigmas: int, steps: int, doubled: bool
    ) -> "Trial":
        """The largest trial of at most these sizes that costs at most `budget` rows: first pairs go, then σ."""
        sizes = [(s, p) for s in range(sigmas, 0, -1) for p in range(pairs, min(pairs, FEWEST) - 1, -1)]
        sizes += [(1, p) for p in range(min(pairs, FEWEST) - 1, 1, -1)]
        for count, p in sizes:
            trial = cls(sites, p, min(benign, -(-p // 2)), spread(steps, count), doubled)
            if budget is None or trial.forwards <= budget:
                return trial
        raise UsageError(
            f"A budget of {budget} rows is too small for {sites} sites: two pairs at one σ take {trial.forwards}; "
            "raise the budget, or name fewer sites."
        )


def spread(steps: int, count: int) -> tuple[int, ...]:
    """The middle steps of `count` equal parts of a schedule."""
    count = min(count, steps)
    return tuple(int((part + 0.5) * steps / count) for part in range(count))


def chosen(prompts: Prompts, pairs: int) -> tuple[Rows, Rows, Rows]:
    """Harmful prompts, their safe twins, and benign prompts: those that are nobody's twin, if there are any."""
    by_id = {row["id"]: dict(row) for row in prompts}
    paired = [row for row in by_id.values() if row.get("twin") in by_id]
    if len(paired) < 2:
        raise UsageError(
            f"{len(paired)} of {len(by_id)} prompts have a safe twin among them: expected at least 2, for activations "
            "are swapped with the twin's; give the twins, or route without the causal check."
        )
    harmful = _in_turn(paired)[:pairs]
    safe = [by_id[row["twin"]] | {"seed": row["seed"]} for row in harmful]
    taken = {row["twin"] for row in paired}
    plain = [row for row in by_id.values() if not row.get("risk") and row.get("kind") not in HARMFUL]
    alone = [row for row in plain if row["id"] not in taken]
    return harmful, safe, _in_turn(alone or plain)


def _in_turn(rows: Rows) -> Rows:
    """One of each risk domain after the other, each domain's in the order of a hash of their ids."""
    domains: dict[str, Rows] = {}
    for row in sorted(rows, key=lambda row: hashlib.sha256(str(row["id"]).encode()).digest()):
        domains.setdefault(str(row.get("risk") or ""), []).append(row)
    placed = [(at, risk, row) for risk, members in domains.items() for at, row in enumerate(members)]
    return [row for _, _, row in sorted(placed, key=lambda entry: entry[:2])]


def counted(harmful: Rows, source: Iterable[str]) -> list[bool]:
    """Which pairs make the direction that is removed."""
    wanted = set(source)
    counted = [not wanted or row.get("risk") in wanted for row in harmful]
    if sum(counted) < 2:
        there = sorted({str(row.get("risk")) for row in harmful})
        raise UsageError(
            f"{sum(counted)} of the pairs that are tried are of {', '.join(sorted(wanted))}: expected at "
            f"least 2; raise the budget, or give more of them: there are pairs of {', '.join(there)}."
        )
    return counted


def chunks(count: int, size: int) -> list[range]:
    return [range(at, min(at + size, count)) for at in range(0, count, size)]
