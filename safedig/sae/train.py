"""Train one autoencoder a site from a recorded stream, with sae-lens' own trainer and BatchTopK.

What comes out is folded: standardisation, decoder norms and `b_dec` are in the weights, so that codes are a function
of the raw activation and the encoder alone.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..activations.record import Activations
from ..activations.shuffle import Reservoir, endless
from ..config import UsageError
from ..progress import track
from ..sites import Site
from .metrics import measure
from .model import Decoder, Encoder, SparseAutoencoder


@dataclass(frozen=True)
class SAEOptions:
    """How to train; the same for every site of one call."""

    expansion: int = 8
    """d_sae / d_in."""
    k: int = 20
    """Active features a row, on average."""
    steps: int = 1000
    batch_size: int = 512
    lr: float = 1e-3
    """Adam's step size; falls linearly to 0 over the last fifth."""
    aux: float = 1 / 32
    """Weight of the loss that revives features which have not fired for a tenth of the run."""
    seed: int = 0
    buffer: int = 2**18
    """Rows of a site held in memory: a uniform sample of the stream, d_in · 4 bytes each."""


def train(
    activations: Activations, sites: Iterable[Site] | None = None, options: SAEOptions | None = None
) -> dict[Site, SparseAutoencoder]:
    """One pass over the stream, then one autoencoder for each site, by default for every recorded one."""
    options = options or SAEOptions()
    reservoirs = {site: Reservoir(options.buffer, options.seed) for site in sites or activations.sites}
    for site in reservoirs:
        activations.at(site)  # names what was recorded if this was not
    stream = activations if len(reservoirs) > 1 else activations.at(next(iter(reservoirs)))
    for batch in stream:
        if batch.site not in reservoirs:
            continue
        if not batch.x.isfinite().all():
            raise UsageError(f"'{batch.site}' holds NaN or infinity in step {batch.step}: load the model in bfloat16.")
        reservoirs[batch.site].add(batch.x)
    return {
        site: train_on(
            reservoir.rows(), options, description=f"Training SAE at {site}", site=str(site), model=activations.model
        )
        for site, reservoir in reservoirs.items()
    }


def train_on(
    x: Float[Tensor, "rows d_in"], options: SAEOptions, *, description: str = "Training SAE", **metadata: Any
) -> SparseAutoencoder:
    """Train on rows that are already there. The result depends on `x` and the options; the global generator is kept."""
    if options.k > options.expansion * x.shape[1]:
        raise UsageError(f"k={options.k} of {options.expansion * x.shape[1]} features: lower k or raise expansion.")
    centre = x.double().mean(0).float()
    scale = (x.float() - centre).square().mean().sqrt().clamp(min=1e-8)  # one scalar: directions keep their lengths
    with _seeded(options.seed):
        raw = _fit(endless(x, options.batch_size, options.seed), centre, scale, options, description)
    sae = _fold(raw, centre, scale)
    quality = measure(sae, x[: 2**16].split(4096))
    return SparseAutoencoder(sae.encoder, sae.decoder, metadata | quality | {"options": asdict(options)})


def _fit(
    batches: Iterator[Tensor], centre: Tensor, scale: Tensor, options: SAEOptions, description: str
) -> dict[str, Tensor]:
    """The weights of sae-lens' inference model, with unit decoder rows, in standardised units."""
    from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, SAETrainer
    from sae_lens.config import SAETrainerConfig

    d_in = len(centre)
    sae = BatchTopKTrainingSAE(
        BatchTopKTrainingSAEConfig(
            d_in=d_in,
            d_sae=options.expansion * d_in,
            k=options.k,
            topk_threshold_lr=0.05,
            aux_loss_coefficient=options.aux,
            device=str(centre.device),
        )
    )
    trainer = SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=options.steps * options.batch_size,
            train_batch_size_samples=options.batch_size,
            lr=options.lr,
            lr_end=options.lr,
            lr_decay_steps=options.steps // 5,
            dead_feature_window=max(options.steps // 10, 1),
            device=str(centre.device),
        ),
        sae=sae,
        data_provider=iter(()),  # only fit() reads it; step() is given its batch
    )
    for _ in track(range(options.steps), description):
        trainer.step((next(batches).float() - centre) / scale)
        trainer.n_training_steps += 1
    weights = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    sae.process_state_dict_for_saving_inference(weights)
    return {name: tensor.detach().float() for name, tensor in weights.items()}


def _fold(raw: dict[str, Tensor], centre: Tensor, scale: Tensor) -> SparseAutoencoder:
    """From p = ((a − μ)/s − b_dec)·W_enc + b_enc to p = a·W_enc' + b_enc', and the decoder back to raw units."""
    length = raw["W_dec"].norm(dim=1).clamp(min=1e-8) * scale
    W_enc = raw["W_enc"] / scale
    b_enc = raw["b_enc"] - centre @ W_enc - raw["b_dec"] @ raw["W_enc"]
    encoder = Encoder(W_enc * length, b_enc * length, raw["threshold"].clamp(min=0) * length)
    return SparseAutoencoder(encoder, Decoder(raw["W_dec"] * (scale / length)[:, None], raw["b_dec"] * scale + centre))


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """sae-lens draws its first weights from the global generator: seed it, and put it back."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
