"""Which codes are active: the exact largest of each row or of the whole batch, without sorting what cannot win.

A code can be among the n largest only if the largest of its group is among the n largest of their kind. So groups
are narrowed down first, in turn by groups of theirs, and a fraction of the codes is compared in earnest.
"""

import torch
from einops import rearrange
from jaxtyping import Float, Int, Shaped
from torch import Tensor

GROUP = 8  # codes that share one maximum; they lie d_sae / 8 apart, so that the maxima are taken along memory
NARROW = 4  # groups for each winner below which there is nothing left to gain


def top_of_rows(scores: Shaped[Tensor, "batch d_sae"], k: int) -> Int[Tensor, "batch k"]:
    """The columns of the k largest of each row, in no order; O(batch · d_sae) reads, O(batch · k) comparisons."""
    width = scores.shape[1] // GROUP
    if scores.shape[1] % GROUP or width < NARROW * k // 2:
        return _largest(scores, k)
    maxima = rearrange(scores, "batch (group width) -> batch group width", group=GROUP).amax(1)
    columns = rearrange(_members(top_of_rows(maxima, k), width), "batch k group -> batch (k group)")
    return columns.gather(1, _largest(scores.gather(1, columns), k))


def top_of_batch(scores: Shaped[Tensor, "batch d_sae"], n: int) -> Int[Tensor, " n"]:
    """Where in `scores.flatten()` the n largest of all are, in no order."""
    # By topk throughout: prompts share tokens, so that rows are alike and codes tie, and which of them wins decides how
    # a training goes on.
    batch, d_sae = scores.shape
    width = d_sae // GROUP
    if d_sae % GROUP or batch * width < NARROW * n // 2 or n == 0:
        return scores.flatten().topk(n, sorted=False).indices
    maxima = rearrange(scores, "batch (group width) -> batch group width", group=GROUP).amax(1)
    best = top_of_batch(maxima, n)
    floor = maxima.flatten().index_select(0, best).min()  # n groups reach it, so n codes do
    places = _members(best // width * d_sae + best % width, width).flatten()
    values = scores.flatten().index_select(0, places)
    if not floor.isnan():
        able = (values >= floor).nonzero().flatten()
        places, values = places.index_select(0, able), values.index_select(0, able)
    return places.index_select(0, values.topk(n, sorted=False).indices)


def _largest(scores: Shaped[Tensor, "row n"], k: int) -> Int[Tensor, "row k"]:
    """Where the k largest of each row are, in no order.

    On a CPU numbers of 16 and 32 bits are partitioned with their places in the lower half of numbers twice as long:
    NumPy does that with vector instructions, in half the time of `topk`.
    """
    n, bits = scores.shape[1], torch.iinfo(torch.int16).bits if scores.dtype == torch.int16 else 32
    fits = scores.device.type == "cpu" and scores.dtype in (torch.int16, torch.float32) and 0 < k < n <= 2**bits
    if not fits or (scores.is_floating_point() and scores.sum().isnan()):  # a NaN counts as the largest there is
        return scores.topk(k, sorted=False).indices
    keys = scores.to(torch.int32) if bits == 16 else _in_order(scores).long()
    keys = keys.bitwise_left_shift_(bits).bitwise_or_(torch.arange(n, dtype=keys.dtype)).numpy()
    keys.partition(n - k, axis=1)
    return torch.from_numpy(keys[:, n - k :] & (2**bits - 1)).long()


def _in_order(numbers: Float[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """The bits of floats as whole numbers of the same order."""
    bits = numbers.contiguous().view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _members(group: Int[Tensor, "*groups"], width: int) -> Int[Tensor, "*groups group"]:
    return group[..., None] + width * torch.arange(GROUP, device=group.device)
