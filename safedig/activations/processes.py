"""How many processes record together, and which of them this is. The door to `accelerate`."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

_PATIENCE = timedelta(days=7)  # the first to finish waits for the last, and nothing else is said meanwhile


@dataclass(frozen=True)
class Share:
    """Whole batches, dealt out in turn."""

    rank: int
    world: int

    @classmethod
    def of_this_process(cls) -> "Share":
        """Its part of what `accelerate launch` has started; a process that is alone does not ask accelerate."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls(0, 1)
        state = _state()
        return cls(state.process_index, state.num_processes)

    @property
    def first(self) -> bool:
        """Whether this process does what must be done once."""
        return self.rank == 0

    def of(self, numbers: Iterable[int]) -> list[int]:
        return [number for number in numbers if number % self.world == self.rank]

    def wait(self) -> None:
        """Until every process has come this far."""
        if self.world > 1:
            _state().wait_for_everyone()

    def summed(self, x: Tensor) -> Tensor:
        """The sum of what every process has, the same in all of them."""
        if self.world == 1:
            return x
        there = x.to(device(), copy=True)
        torch.distributed.all_reduce(there)
        return there.to(x.device)

    def joined(self, x: Tensor, size: int) -> Tensor:
        """The `size` rows of all processes, of which each has its own, dealt out in turn: they keep their bits."""
        every = x.new_zeros(size, *x.shape[1:])
        every[self.of(range(size))] = x
        return self.summed(every)


def device() -> Any:
    """Where this process should compute."""
    return _state().device


def _state() -> Any:
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not _accelerated()
    return PartialState(cpu=cpu, timeout=_PATIENCE)


def _accelerated() -> bool:
    return torch.cuda.is_available() or torch.xpu.is_available() or torch.backends.mps.is_available()
