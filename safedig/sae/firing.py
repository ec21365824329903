"""The codes of a batch as sae-lens' trainer reads them: it asks twice which features fired; that is counted once."""

import torch
from jaxtyping import Float
from torch import Tensor

from .sparse_ops import Support


def codes(values: Float[Tensor, " entries"], support: Support) -> Tensor:
    """A sparse [batch, d_sae] tensor, whose `bool()` is all that the trainer calls; the sums of one take 4 ms each."""
    found, firing = support.coo(values), Firing(values, support)
    found.bool = lambda: firing  # pyright: ignore[reportAttributeAccessIssue]
    return found


class Firing:
    """Where codes are above zero, as ones that need only be summed over rows or over features."""

    def __init__(self, values: Float[Tensor, " entries"], support: Support):
        self._ones, self._support = (values > 0).float(), support

    def float(self) -> "Firing":
        return self

    def sum(self, dim: int) -> Tensor:
        """How often each feature fired (dimension 0 or -2), or how many fired in each row (1 or -1)."""
        over_rows = dim in (0, -2)
        index = self._support.columns if over_rows else self._support.rows
        count = self._support.d_sae if over_rows else self._support.batch
        return torch.zeros(count).index_add_(0, index, self._ones)
