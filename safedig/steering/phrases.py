"""Unknown words side by side are one thing: a thing for each of them would be drawn as often as it has words."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from ..features.counterparts import Known
from .bank import mean_of

STRONG = 0.5  # of the median of what harm has added: a weaker word is hardly harm's, as in a benign prompt let through


def as_one(
    a: Float[Tensor, "batch token d_in"],
    delta: Float[Tensor, "batch token d_in"],
    unknown: Bool[Tensor, "batch token"],
    harm: Known,
    nearest: int,
) -> Float[Tensor, "batch token d_in"]:
    """The delta, with a stand-in where the strongest token of a phrase goes, and with padding where its others go.

    A phrase: unknown tokens side by side, two at least, that `delta` moves by half as far as the known `harm` or more.
    The stand-in is the mean of the `nearest` to where the strongest token would have gone, of what stood in safe twins;
    padding is what the text's last token is, and a text without any, whose phrase lasts to its end, is left as it is.
    Cost O(phrase · known · d_in).
    """
    if not len(harm.tokens):
        return delta
    norm = delta.norm(dim=2)
    run = _runs(unknown & (norm > STRONG * harm.delta.norm(dim=1).median()))
    nothing = norm.new_zeros(len(run), run.shape[1] + 1)
    size = nothing.scatter_add(1, run, torch.ones_like(norm)).gather(1, run)
    strongest = nothing.scatter_reduce(1, run, norm, "amax").gather(1, run)
    phrase = (run > 0) & (size > 1) & (run != run[:, -1:])
    head = phrase & (norm == strongest)
    gone = torch.where((phrase & ~head)[..., None], a[:, -1:] + delta[:, -1:] - a, delta)
    if head.any():
        stand_ins = harm.tokens - harm.delta
        near = torch.cdist((a + delta)[head], stand_ins).topk(min(nearest, len(stand_ins)), largest=False).indices
        gone[head] = mean_of(stand_ins, near) - a[head]
    return gone


def _runs(of: Bool[Tensor, "batch token"]) -> Int[Tensor, "batch token"]:
    """Tokens side by side have one number, from 1 on in each image; all others 0."""
    starts = of & ~pad(of[:, :-1], (1, 0))
    return starts.cumsum(1) * of
