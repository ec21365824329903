"""Adam in one kernel for weights that lie transposed in memory, which the kernel as it is would copy at every step."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .memory import Memory


class RowAdam(torch.optim.Adam):
    """The fused Adam; it is shown the transpose of every matrix that lies transposed when it is made.

    Gradients of matrices that are done with go back to the `memory` they came from.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, betas: tuple[float, float], memory: Memory | None = None
    ):
        self.memory = memory
        self.given = [param for param in params if param.requires_grad]
        self.turned = [param.ndim == 2 and not param.is_contiguous() for param in self.given]
        super().__init__([nn.Parameter(part) for part in self._shown("data")], lr, betas, fused=True)

    def step(self, closure: Any = None) -> Any:
        shown = self.param_groups[0]["params"]
        for param, data, grad in zip(shown, self._shown("data"), self._shown("grad"), strict=True):
            param.data = data
            param.grad = None if grad is None else grad.contiguous()  # the kernel takes it for granted
        return super().step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        done = [grad for grad in self._shown("grad") if grad is not None and grad.ndim == 2]
        super().zero_grad(set_to_none)
        for param in self.given:
            param.grad = None
        if self.memory is not None:
            for grad in done:
                self.memory.give_back(grad)

    def _shown(self, name: str) -> list[Any]:
        parts = zip((getattr(param, name) for param in self.given), self.turned, strict=True)
        return [part.t() if turned and part is not None else part for part, turned in parts]
