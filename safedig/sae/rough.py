"""Scores in bfloat16, to look for winners that are then scored in float32: a sixth of the time of the exact product."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .memory import Memory

_PAD = 32  # columns beside the weights, the first of which holds the bias; so many keep rows aligned
_SLICE = 256  # features at once, so that what is scaled is still in the cache when it is rounded


def rough_scores(
    x: Float[Tensor, "batch d_in"],
    weight: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, " d_sae"],
    length: Float[Tensor, " d_sae"],
    memory: Memory,
) -> Int[Tensor, "batch d_sae"]:
    """(x · weightᵀ + bias) · length with every factor and the result rounded, as the bits of bfloat16.

    As whole numbers they are compared faster and, where they are positive, have the same order. Bias and length go into
    the product: the bias as the weight of an input that is always 1.
    """
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
    return torch.mm(inputs, scaled.t(), out=found).view(torch.int16)
