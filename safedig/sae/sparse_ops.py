"""Sparse decoding and sparse gradients on a CPU: what they cost goes with the codes that are not zero.

The products are those of `torch.embedding_bag`, called by hand: a bag is a row of the batch in one direction and a
feature in the other. Its own backward for dense weights is many times slower. Gradients of weights come from MKL's
sparse product where there is one, which adds in the same order and writes into memory that is there already. What
reads rows of a weight goes through the entries by column, so that it reads each row once.
"""

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd import Function

from .memory import Memory

SUM = 0  # embedding_bag's number for it


@dataclass(frozen=True, eq=False)
class Support:
    """Where codes are not zero: entry e is code `columns[e]` of row `rows[e]`, rows in ascending order."""

    rows: Int[Tensor, " entries"]
    columns: Int[Tensor, " entries"]
    batch: int
    d_sae: int

    @classmethod
    def of_rows(cls, columns: Int[Tensor, "batch k"], d_sae: int) -> "Support":
        batch, k = columns.shape
        rows = torch.arange(batch, device=columns.device).repeat_interleave(k)
        return cls(rows, columns.flatten(), batch, d_sae)

    @classmethod
    def of_batch(cls, places: Int[Tensor, " entries"], batch: int, d_sae: int) -> "Support":
        """Of places in the flattened [batch, d_sae], in any order."""
        places = places.sort().values
        return cls(places // d_sae, places % d_sae, batch, d_sae)

    @cached_property
    def places(self) -> Int[Tensor, " entries"]:
        """The entries' numbers in the flattened [batch, d_sae]."""
        return self.rows * self.d_sae + self.columns

    @cached_property
    def row_starts(self) -> Int[Tensor, " batch_plus_1"]:
        return _starts(self.rows, self.batch)

    @cached_property
    def by_column(self) -> Int[Tensor, " entries"]:
        """The entries in the order of their columns; narrow numbers are sorted many times faster."""
        narrow = torch.int16 if self.d_sae <= 2**15 else torch.int32
        return self.columns.to(narrow).argsort(stable=True)

    @cached_property
    def column_starts(self) -> Int[Tensor, " d_sae_plus_1"]:
        return _starts(self.columns, self.d_sae)

    @cached_property
    def rows_by_column(self) -> Int[Tensor, " entries"]:
        return self.rows[self.by_column]

    def coo(self, values: Float[Tensor, " entries"]) -> Tensor:
        """The codes as a sparse [batch, d_sae], each entry once; sorting those of a row has no use."""
        at = torch.stack([self.rows, self.columns])
        return torch.sparse_coo_tensor(at, values, (self.batch, self.d_sae), check_invariants=False, is_coalesced=True)


def _starts(sorted_by: Int[Tensor, " entries"], count: int) -> Int[Tensor, " count_plus_1"]:
    return torch.cat([sorted_by.new_zeros(1), sorted_by.bincount(minlength=count).cumsum(0)])


def scored(
    x: Float[Tensor, "batch d_in"], weight: Float[Tensor, "d_sae d_in"], support: Support
) -> Float[Tensor, " entries"]:
    """⟨x[row], weight[column]⟩ of every entry."""
    order = support.by_column
    args = (weight.detach(), support.columns[order], support.column_starts[:-1], support.rows_by_column)
    found = torch.ops.aten._embedding_bag_per_sample_weights_backward(x.detach(), *args, SUM)
    return torch.empty_like(found).index_copy_(0, order, found)


def summed(
    values: Float[Tensor, " entries"], weight: Float[Tensor, "d_sae d_in"], support: Support
) -> Float[Tensor, "batch d_in"]:
    """Σ values · weight[column] over the entries of each row."""
    return _bags(weight.detach(), support.columns, support.row_starts, values.detach())


def spread_back(
    values: Float[Tensor, " entries"], x: Float[Tensor, "batch d_in"], support: Support, memory: Memory | None = None
) -> Float[Tensor, "d_sae d_in"]:
    """Σ values · x[row] over the entries of each column: the gradient of either weight, in what `memory` lends."""
    parts = support.rows_by_column, support.column_starts, values[support.by_column]
    if not torch.backends.mkl.is_available():
        return _bags(x, *parts)
    out = (memory or Memory()).lend((support.d_sae, x.shape[1]))
    return torch.addmm(out, _csr(*parts, len(x)), x, beta=0, out=out)


def _bags(table: Tensor, index: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    # A table of a layout other than rows, or an odd type, would take a path that is many times slower.
    return torch.nn.functional.embedding_bag(
        index, table.contiguous(), starts, mode="sum", per_sample_weights=weights, include_last_offset=True
    )


def _csr(index: Tensor, starts: Tensor, weights: Tensor, width: int) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the layout being in beta
        size = (len(starts) - 1, width)
        return torch.sparse_csr_tensor(starts.int(), index.int(), weights, size, check_invariants=False)


class _Encoding(Function):
    """Preactivations that are known already, with the gradients of how they came about."""

    @staticmethod
    def forward(ctx: Any, known: Tensor, x: Tensor, W_enc: Tensor, b_enc: Tensor, b_in: Tensor, *rest: Any):
        ctx.save_for_backward(x, W_enc)
        ctx.support, ctx.memory = rest
        return known.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        (x, W_enc), (grad,), support = ctx.saved_tensors, grads, ctx.support
        of_weight = spread_back(grad, x, support, ctx.memory).t() if ctx.needs_input_grad[2] else None
        of_bias = grad.new_zeros(support.d_sae).index_add_(0, support.columns, grad)
        of_input_bias = -(W_enc @ of_bias) if ctx.needs_input_grad[4] else None  # one product of a matrix and a vector
        return None, None, of_weight, of_bias, of_input_bias, None, None


class _Decoding(Function):
    """values · W_dec."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec: Tensor, support: Support, memory: Memory | None):
        ctx.save_for_backward(values, W_dec)
        ctx.support, ctx.memory = support, memory
        return summed(values, W_dec, support)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        (values, W_dec), support = ctx.saved_tensors, ctx.support
        grad = grads[0].contiguous()
        of_values = scored(grad, W_dec, support) if ctx.needs_input_grad[0] else None
        of_weight = spread_back(values, grad, support, ctx.memory) if ctx.needs_input_grad[1] else None
        return of_values, of_weight, None, None


class _SquaredError(Function):
    """Two passes over what is compared forward, and one back."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, a: Tensor, memory: Memory):
        ctx.error, ctx.memory = torch.sub(out, a, out=memory.kept("error", tuple(a.shape), a.dtype)), memory
        return ctx.error.flatten().dot(ctx.error.flatten()) / len(a)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        error = ctx.error
        room = ctx.memory.kept("gradient of error", tuple(error.shape), error.dtype)
        return torch.mul(error, 2 * grads[0] / len(error), out=room), None, None


def squared_error(
    out: Float[Tensor, "batch d_in"], a: Float[Tensor, "batch d_in"], memory: Memory | None = None
) -> Float[Tensor, ""]:
    """‖out − a‖², on average over rows; `a` needs no gradient.

    With a `memory` the difference lies there until the next call, by which its gradient must have been asked for.
    """
    return _SquaredError.apply(out, a, memory or Memory())  # pyright: ignore[reportReturnType]


def encoding(
    known: Float[Tensor, " entries"],
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    b_in: Float[Tensor, " d_in"],
    support: Support,
    memory: Memory | None = None,
) -> Float[Tensor, " entries"]:
    """`known`, as what it is: ⟨x, W_enc⟩ + b_enc at the support, where x = a − b_in and `a` needs no gradient.

    O(entries · d_in) for the gradients, and O(d_sae · d_in) to write them, in what `memory` lends.
    """
    return _Encoding.apply(known, x, W_enc, b_enc, b_in, support, memory)  # pyright: ignore[reportReturnType]


def decoding(
    values: Float[Tensor, " entries"],
    W_dec: Float[Tensor, "d_sae d_in"],
    support: Support,
    memory: Memory | None = None,
) -> Float[Tensor, "batch d_in"]:
    """The codes times W_dec, O(entries · d_in) in both directions."""
    return _Decoding.apply(values, W_dec, support, memory)  # pyright: ignore[reportReturnType]
