"""Processes that run together, as threads of one: what `accelerate` would have them exchange, they exchange here."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Barrier
from typing import Any

from safedig.activations.processes import Share


@dataclass
class Exchange:
    """What is being summed, a slot for each."""

    world: int
    slots: list[Any] = field(default_factory=list)

    def __post_init__(self):
        self.slots, self.barrier = [None] * self.world, Barrier(self.world, timeout=60)


@dataclass(frozen=True)
class Together(Share):
    exchange: Exchange = field(default_factory=lambda: Exchange(1))

    def summed(self, x):
        self.exchange.slots[self.rank] = x
        self.exchange.barrier.wait()
        total = sum(self.exchange.slots[1:], self.exchange.slots[0].clone())
        self.exchange.barrier.wait()
        return total


def together(world: int, work: Callable[[Share], Any]) -> list[Any]:
    """What each of so many processes makes of its share."""
    exchange = Exchange(world)
    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(work, [Together(rank, world, exchange) for rank in range(world)]))
