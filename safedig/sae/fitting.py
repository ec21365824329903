"""One autoencoder in training, with sae-lens' own trainer: takes standardised batches, keeps its curve, is folded.

What comes out is folded: standardisation, decoder norms and `b_dec` are in the weights, so that codes are a function
of the raw activation and the encoder alone.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..config import UsageError
from .averaging import Averaging
from .model import Decoder, Encoder, SparseAutoencoder, ThresholdEncoder, TopKEncoder
from .options import SAEOptions
from .rows import Standard
from .sparse_training import trainer_for, training_sae

POINTS = 200  # of a curve, at most
CURVE = ("step", "loss", "fvu", "l0", "dead", "lr")
"""The columns of a curve; `dead` is the share of features that have not fired for a tenth of the run."""


class Run:
    """The weights, the optimiser and the curve of one autoencoder on its way."""

    def __init__(self, d_in: int, options: SAEOptions, device: str | torch.device = "cpu"):
        self.options = options
        with _seeded(options.seed):
            sae = training_sae(
                options.architecture or "batchtopk",
                d_in,
                options.d_sae(d_in),
                options.k,
                aux=options.aux,
                encoder_dtype=options.encoder_dtype,
                device=device,
            )
        self.trainer: Any = trainer_for(
            sae,
            lr=options.lr,
            steps=options.steps,
            batch_size=options.batch_size,
            share=options.rate,
            dead_window=max(options.steps // 10, 1),
        )
        self.averaging = Averaging(self.trainer)
        self.curve: dict[str, list[float]] = {name: [] for name in CURVE}
        self.checks: list[dict[str, float]] = []
        """What was measured on rows that are not trained on, on the way."""

    @property
    def done(self) -> int:
        return self.trainer.n_training_steps

    @property
    def finished(self) -> bool:
        return self.done >= self.options.steps

    def due(self, times: int) -> bool:
        """Whether a thing that is to happen so many times, evenly spread over the steps, is to happen now."""
        return self.done * times // self.options.steps > (self.done - 1) * times // self.options.steps

    def step(self, x: Float[Tensor, "rows d_in"]) -> None:
        """One step of the optimiser; a loss that is no number is an error before it is written anywhere."""
        output = self.trainer.step(self.averaging.share(x))
        self.averaging.settle()
        self.trainer.n_training_steps += 1
        if self.due(POINTS):
            self._note(output)

    def sae(self, standard: Standard) -> SparseAutoencoder:
        """As it stands now, for raw activations, on the CPU."""
        weights = {name: tensor.detach().clone() for name, tensor in self.trainer.sae.state_dict().items()}
        self.trainer.sae.process_state_dict_for_saving_inference(weights)
        k = self.options.k if self.options.architecture == "topk" else None
        return _fold({name: tensor.float().cpu() for name, tensor in weights.items()}, standard.to("cpu"), k)

    def _note(self, output: Any) -> None:
        told = self.trainer.build_train_step_log_dict(output, self.trainer.n_training_samples)
        loss, dead = told["losses/overall_loss"], told["sparsity/dead_features"] / self.trainer.sae.cfg.d_sae
        if not math.isfinite(loss):
            raise UsageError(
                f"The loss is no number after {self.done} steps with lr={self.options.lr:g}: lower it. The last "
                "checkpoint is from before."
            )
        fvu, l0, lr = 1 - told["metrics/explained_variance"], told["metrics/l0"], self.options.rate(self.done - 1)
        for name, value in zip(CURVE, (self.done, loss, fvu, l0, dead, lr * self.options.lr), strict=True):
            self.curve[name].append(value)


def _fold(raw: dict[str, Tensor], standard: Standard, k: int | None) -> SparseAutoencoder:
    """From p = ((a − μ)/s − b_dec)·W_enc + b_enc to p = a·W_enc' + b_enc', and the decoder back to raw units."""
    centre, scale = standard.centre, standard.scale
    length = raw["W_dec"].norm(dim=1).clamp(min=1e-8) * scale  # all norms are 1 for TopK: its order is not changed
    W_enc = raw["W_enc"] / scale
    b_enc = raw["b_enc"] - centre @ W_enc - raw["b_dec"] @ raw["W_enc"]
    weights = (W_enc * length).contiguous(), b_enc * length
    encoder: Encoder
    if k is None:
        encoder = ThresholdEncoder(*weights, raw["threshold"].clamp(min=0) * length)
    else:
        encoder = TopKEncoder(*weights, k)
    return SparseAutoencoder(encoder, Decoder(raw["W_dec"] * (scale / length)[:, None], raw["b_dec"] * scale + centre))


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """sae-lens draws its first weights from the global generator: seed it, and put it back."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
