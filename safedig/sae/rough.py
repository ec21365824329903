"""Scores in low precision, to look for winners that are then scored in float32.

In bfloat16 they take a sixth of the time of the exact product where there are matrix units for it, and half of it
elsewhere; in whole numbers of 8 bits a quarter to a third on a processor with dot products of them (VNNI).
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .memory import Memory
from .options import EncoderDtype

_PAD = 32  # columns beside the weights, the first of which holds the bias; so many keep rows aligned
_SLICE = 256  # features at once, so that what is scaled is still in the cache when it is rounded
_SLICE_OF_PRODUCT = 1024  # likewise, with the product itself, which is then in the cache when it is scaled
_LEVELS = 127  # of 8 bits, on either side of zero
_LEAST = 1e-12  # stands for the largest of what is all zero


def rough_scores(
    x: Float[Tensor, "batch d_in"],
    weight: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, " d_sae"],
    length: Float[Tensor, " d_sae"],
    dtype: EncoderDtype,
    memory: Memory,
) -> Int[Tensor, "batch d_sae"]:
    """(x · weightᵀ + bias) · length with every factor and the result rounded, as the bits of bfloat16.

    As whole numbers they are compared faster and, where they are positive, have the same order.
    """
    found = {"bfloat16": _in_bfloat16, "int8": _in_int8}[dtype](x, weight, bias, length, memory)
    return found.view(torch.int16)


def _in_bfloat16(x: Tensor, weight: Tensor, bias: Tensor, length: Tensor, memory: Memory) -> Tensor:
    """Bias and length go into the product: the bias as the weight of an input that is always 1."""
    d_sae, d_in = weight.shape
    inputs = memory.kept("rough inputs", (len(x), d_in + _PAD), torch.bfloat16)
    inputs[:, :d_in], inputs[:, d_in:] = x, 0
    inputs[:, d_in] = 1
    scaled = memory.kept("rough weights", (d_sae, d_in + _PAD), torch.bfloat16)
    for start in range(0, d_sae, _SLICE):
        here = slice(start, start + _SLICE)
        scaled[here, :d_in] = weight[here] * length[here, None]
    scaled[:, d_in:] = 0
    scaled[:, d_in] = bias * length
    found = memory.kept("rough scores", (len(x), d_sae), torch.bfloat16)
    return torch.mm(inputs, scaled.t(), out=found)


def _in_int8(x: Tensor, weight: Tensor, bias: Tensor, length: Tensor, memory: Memory) -> Tensor:
    """One scale for the inputs, one for each feature's weights.

    Before that every channel's largest input is made as large as its largest weight, so that a channel far out does not
    take all levels for itself (SmoothQuant, arXiv 2211.10438, equation 4 with α = 1/2).
    """
    (batch, d_in), d_sae = x.shape, len(weight)
    some = weight[:: max(1, d_sae // _SLICE)]  # which tell how large a channel's weights are
    spread = (_largest(x, 0) / _largest(some, 0)).sqrt_()
    even = torch.div(x, spread, out=memory.kept("even inputs", (batch, d_in), torch.float32))
    step = _largest(even.view(1, -1), 1) / _LEVELS
    inputs = memory.kept("rough inputs", (batch, d_in), torch.int8).copy_(even.div_(step).round_())
    found = memory.kept("rough scores", (batch, d_sae), torch.bfloat16)
    for start in range(0, d_sae, _SLICE_OF_PRODUCT):
        here = slice(start, min(start + _SLICE_OF_PRODUCT, d_sae))
        n = here.stop - start
        scaled = torch.mul(weight[here], spread, out=memory.kept("scaled weights", (n, d_in), torch.float32))
        steps = _largest(scaled, 1) / _LEVELS
        rounded = memory.kept("rough weights", (n, d_in), torch.int8).copy_(scaled.div_(steps[:, None]).round_())
        product = torch._int_mm(inputs, rounded.t(), out=memory.kept("product", (batch, n), torch.int32))
        exact = memory.kept("product in float32", (batch, n), torch.float32).copy_(product)
        found[:, here] = torch.addcmul(bias[here] * length[here], exact, step * steps * length[here], out=exact)
    return found


def _largest(x: Tensor, dim: int) -> Tensor:
    return torch.maximum(x.amax(dim), -x.amin(dim)).clamp_(min=_LEAST)
