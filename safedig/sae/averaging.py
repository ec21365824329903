"""Training shared by several processes: each takes its part of every batch, and they average what they learn.

With codes that are a row's own (TopK) the result is that of one process; BatchTopK picks its winners within each part.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, distributed

from ..activations.processes import Share


class Averaging:
    """What the processes do together around a step of sae-lens' trainer; a process that is alone does nothing."""

    def __init__(self, trainer: Any):
        self.share_of = Share.of_this_process()
        self.trainer = trainer
        self.parameters = [p for p in trainer.sae.parameters() if p.requires_grad]
        self._there = 0
        if self.share_of.world > 1:
            for parameter in self.parameters:
                parameter.register_post_accumulate_grad_hook(self._arrived)

    def share(self, x: Float[Tensor, "rows d_in"]) -> Float[Tensor, "part d_in"]:
        """This process's rows of a batch that all of them have drawn."""
        return x[self.share_of.rank :: self.share_of.world]

    def settle(self) -> None:
        """After a step: a feature is as dead as where it fired last, and the processes' thresholds are averaged."""
        if self.share_of.world > 1:
            distributed.all_reduce(self.trainer.n_forward_passes_since_fired, op=distributed.ReduceOp.MIN)
            for buffer in self.trainer.sae.buffers():
                self._average(buffer)

    def _arrived(self, _: Tensor) -> None:
        """Once the gradients of all parameters are there, and before they are clipped: average them, in order."""
        self._there += 1
        if self._there == len(self.parameters):
            self._there = 0
            for parameter in self.parameters:
                self._average(parameter.grad)

    def _average(self, x: Tensor | None) -> None:
        assert x is not None
        with torch.no_grad():
            distributed.all_reduce(x if x.is_contiguous() else x.t())  # W_enc lies transposed; what is sent may not
            x /= self.share_of.world
