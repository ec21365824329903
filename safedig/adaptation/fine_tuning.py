"""The other way to a new domain, for those who can let the codes change: train encoder and decoder on, warm.

What comes out is not an adapted decoder but another SAE: features may mean other things, and what was found with the
old codes (harmful features, thresholds, prototypes) does not hold for it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..activations.record import Activations
from ..activations.shuffle import Reservoir, endless
from ..progress import track
from ..sae.model import Decoder, Encoder, SparseAutoencoder, ThresholdEncoder, TopKEncoder
from ..sites import Site

_SMOOTHING = 0.05  # of the running mean of the threshold's factor


@dataclass(frozen=True)
class FineTuning:
    """How to train on; step sizes are in units of the rows' root mean square."""

    steps: int = 1000
    batch_size: int = 1024
    lr: float = 3e-4
    share: float = 0.2
    """Source rows of each batch, where there is a replay."""
    buffer: int = 2**17
    """Rows of each domain that are held in memory, sampled evenly."""
    seed: int = 0


def fine_tune(
    saes: Mapping[Site, SparseAutoencoder],
    target: Activations,
    *,
    replay: Activations | None = None,
    options: FineTuning | None = None,
) -> dict[Site, SparseAutoencoder]:
    """SAEs trained on from these, encoder and all, keeping their L0: the codes change. Needs one pass over the data.

    Cost O(steps · batch · d_in · d_sae).
    """
    options = options or FineTuning()
    tuned = {}
    for site, sae in saes.items():
        rows = [_rows(target.at(site), options)]
        if replay is not None and options.share > 0:
            rows.append(_rows(replay.at(site), options))
        tuned[site] = fine_tune_on(sae, *rows, options=options)
    return tuned


def fine_tune_on(
    sae: SparseAutoencoder,
    target: Float[Tensor, "rows d_in"],
    source: Float[Tensor, "_ d_in"] | None = None,
    *,
    options: FineTuning,
) -> SparseAutoencoder:
    """The same from rows that are already there."""
    centre = target.double().mean(0).float()
    scale = (target.float() - centre).square().mean().sqrt().clamp(min=1e-8)
    W_enc, W_dec = (  # fused Adam takes parameter and gradient for equally laid out
        tensor.clone(memory_format=torch.contiguous_format) for tensor in (sae.encoder.W_enc, sae.decoder.W_dec)
    )
    b_enc, b_dec = (sae.encoder.b_enc + centre @ W_enc) / scale, (sae.decoder.b_dec - centre) / scale
    weights = [tensor.requires_grad_() for tensor in (W_enc, b_enc, W_dec, b_dec)]
    with torch.no_grad():
        active = int((sae.encode(target[:4096].float()) > 0).sum()) / len(target[:4096])
    firing = _Firing(sae.encoder, scale, active)
    adam = torch.optim.Adam(weights, lr=options.lr, fused=True)
    batches = _batches(target, source, options)
    for _ in track(range(options.steps), "Fine-tuning"):
        x = (next(batches).float() - centre) / scale
        pre = x @ W_enc + b_enc
        z = torch.where(firing(pre.detach()), pre, 0.0)
        (z @ W_dec + b_dec - x).square().sum(1).mean().backward()
        adam.step()
        adam.zero_grad()
    W_enc, b_enc, W_dec, b_dec = (tensor.detach() for tensor in weights)
    encoder = firing.encoder(W_enc, b_enc * scale - centre @ W_enc)
    metadata = sae.metadata | {"objective": "fine_tune", "codes_equal": False}
    return SparseAutoencoder(encoder, Decoder(W_dec, b_dec * scale + centre), metadata)


class _Firing:
    """Which preactivations fire while training: so many of a batch (a row, for TopK) as fired before.

    The batch's highest are those that exceed their own threshold by the largest factor; the running mean of the factor
    that was needed scales the thresholds of the result.
    """

    def __init__(self, encoder: Encoder, scale: Float[Tensor, ""], active: float):
        self.old, self.active, self.factor = encoder, active, 1.0
        threshold = encoder.threshold if isinstance(encoder, ThresholdEncoder) else torch.zeros_like(encoder.b_enc)
        self.threshold = threshold / scale

    def __call__(self, pre: Float[Tensor, "batch d_sae"]) -> Bool[Tensor, "batch d_sae"]:
        if isinstance(self.old, TopKEncoder):
            chosen = torch.zeros_like(pre, dtype=torch.bool).scatter_(1, pre.topk(self.old.k, dim=1).indices, True)
            return chosen & (pre > 0)
        if not (self.threshold > 0).all():
            return pre > self.threshold  # without a threshold there is nothing to scale
        factor = (pre / self.threshold).flatten()
        wanted = max(1, round(self.active * len(pre)))
        needed = max(factor.kthvalue(len(factor) - wanted + 1).values.item(), 0.0)
        self.factor += _SMOOTHING * (needed - self.factor)
        return pre >= needed * self.threshold

    def encoder(self, W_enc: Float[Tensor, "d_in d_sae"], b_enc: Float[Tensor, " d_sae"]) -> Encoder:
        if isinstance(self.old, TopKEncoder):
            return TopKEncoder(W_enc, b_enc, self.old.k)
        assert isinstance(self.old, ThresholdEncoder)
        return ThresholdEncoder(W_enc, b_enc, self.old.threshold * self.factor)


def _rows(activations: Activations, options: FineTuning) -> Float[Tensor, "rows d_in"]:
    reservoir = Reservoir(options.buffer, options.seed)
    for batch in activations:
        reservoir.add(batch.x[batch.x.isfinite().all(1)])
    return reservoir.rows()


def _batches(
    target: Float[Tensor, "rows d_in"], source: Float[Tensor, "_ d_in"] | None, options: FineTuning
) -> Iterator[Float[Tensor, "batch d_in"]]:
    if source is None or options.share == 0:
        yield from endless(target, options.batch_size, options.seed)
        return
    old = max(1, round(options.share * options.batch_size))
    new = endless(target, options.batch_size - old, options.seed)
    for one, other in zip(new, endless(source, old, options.seed + 1), strict=True):
        yield torch.cat([one, other.to(one)])
