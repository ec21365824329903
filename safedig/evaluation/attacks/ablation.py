"""One site of the steering off: what a bug, a cache or an insider would leave of it. Not a prompt's doing."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from ...steering.steering import Steering
from ..methods.method import AtSites
from .attack import Candidate, Row
from .victim import Victim


@dataclass(frozen=True)
class OneSiteOff:
    """Each site in turn, then again from other seeds; what acts nowhere by name is attacked as it is."""

    white_box: ClassVar[bool] = True
    tiny_world: ClassVar[bool] = False
    name: str = "one site off"

    def candidates(self, victim: Victim, row: Row) -> Iterator[list[Candidate]]:
        left, seed = without_one(victim.acting), row["seed"]
        while True:
            for acting in left:
                yield [Candidate(row["prompt"], seed, acting=acting)]
            seed = (seed + 104729) % 2**31


def without_one(acting: Any) -> list[Any]:
    """The same without each of its sites."""
    if isinstance(acting, Steering):
        rules = acting.rules
        return [Steering.of_rules(acting.model, {s: r for s, r in rules.items() if s != off}) for off in rules]
    if isinstance(acting, AtSites):
        functions = acting.functions
        return [AtSites({site: one for site, one in functions.items() if site != off}) for off in functions]
    return [acting]
