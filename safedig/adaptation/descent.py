"""The same decoder by gradient descent: what the solution is measured against. Slower, and it needs a step size."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from ..sae.model import Decoder, SparseAutoencoder
from .codes import encoded, joined


def descend(
    sae: SparseAutoencoder,
    target: Float[Tensor, "rows d_in"],
    source: Float[Tensor, "_ d_in"] | None = None,
    *,
    share: float = 0.2,
    steps: int = 3000,
    batch_size: int = 1024,
    lr: float = 1e-3,
    seed: int = 0,
    watch: Callable[[int, Decoder], None] | None = None,
) -> Decoder:
    """Adam on W_dec and b_dec, from the SAE's own; of each batch a `share` is source rows.

    Codes are computed once, as the encoder is frozen. `watch` sees every step's number and decoder, which is changed in
    place. A step costs O(batch · l0 · d_in + d_sae · d_in).
    """
    generator = torch.Generator().manual_seed(seed)
    old = 0 if source is None else round(share * batch_size)
    domains = [(target, batch_size - old), *([(source, old)] if source is not None and old else [])]
    read = [(x.float(), joined([z for _, z in encoded(sae, x)]), count) for x, count in domains]
    W, b = (  # fused Adam takes parameter and gradient for equally laid out
        tensor.clone(memory_format=torch.contiguous_format) for tensor in (sae.decoder.W_dec, sae.decoder.b_dec)
    )
    adam = torch.optim.Adam([W, b], lr=lr, fused=True)
    for step in range(steps):
        picks = [torch.randint(len(x), (count,), generator=generator) for x, _, count in read]
        x = torch.cat([x[pick] for (x, _, _), pick in zip(read, picks, strict=True)])
        z = joined([z.at(pick) for (_, z, _), pick in zip(read, picks, strict=True)])
        error = z.times(W) + b - x
        W.grad, b.grad = z.moment(error), error.sum(0)
        adam.step()
        if watch is not None:
            watch(step, Decoder(W, b))
    return Decoder(W, b)
