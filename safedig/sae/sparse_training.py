"""Autoencoders to train and a trainer for them: sae-lens' own, with sparse steps and a fused optimiser."""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from ..config import UsageError, did_you_mean
from .options import EncoderDtype
from .row_adam import RowAdam
from .sparse_step import SparseBatchStep, SparseMatryoshkaStep, SparseStep

if TYPE_CHECKING:
    from sae_lens import SAETrainer
    from sae_lens.saes.sae import TrainingSAE

ARCHITECTURES = ("topk", "batchtopk", "matryoshka", "jumprelu")


def training_sae(
    architecture: str,
    d_in: int,
    d_sae: int,
    k: int,
    *,
    aux: float = 1 / 32,
    threshold_lr: float = 0.05,
    widths: Sequence[int] | None = None,
    encoder_dtype: str | None = None,
    device: str | torch.device = "cpu",
) -> "TrainingSAE[Any]":
    """A sae-lens autoencoder to be trained, its first weights drawn from the global generator.

    `aux` weighs the loss that revives dead features, `threshold_lr` is the step of BatchTopK's moving threshold,
    `widths` are Matryoshka's levels (by default a quarter, a half and all), `encoder_dtype` is what active codes are
    looked for in, on a CPU, before they are scored in float32. JumpReLU is sae-lens' own, its L0 drawn to `k`.
    """
    if architecture not in ARCHITECTURES:
        raise UsageError(f"There is no architecture '{architecture}': expected one of {', '.join(ARCHITECTURES)}.")
    if encoder_dtype not in (None, *get_args(EncoderDtype)):
        raise UsageError(f"encoder_dtype='{encoder_dtype}': {did_you_mean(encoder_dtype, get_args(EncoderDtype))}")
    if not 0 < k <= d_sae:
        raise UsageError(f"k={k} of {d_sae} features: expected 1 to {d_sae}; lower k or raise expansion.")
    sae_class, config_class = _classes()[architecture]
    settings: dict[str, Any] = {"d_in": d_in, "d_sae": d_sae, "device": str(device)}
    if architecture == "jumprelu":
        return sae_class(config_class(**settings, jumprelu_sparsity_loss_mode="quadratic", target_l0=k))
    settings |= {"k": k, "aux_loss_coefficient": aux}
    if architecture != "topk":
        settings["topk_threshold_lr"] = threshold_lr
    if architecture == "matryoshka":
        settings["matryoshka_widths"] = list(widths or sorted({d_sae // 4, d_sae // 2, d_sae} - {0}))
    sae = sae_class(config_class(**settings))
    sae.encoder_dtype = encoder_dtype
    return sae


@cache
def _classes() -> dict[str, tuple[Any, Any]]:
    import sae_lens as lens

    def sparse(step: type, theirs: type, config: type) -> tuple[type, type]:
        return type(f"Sparse{theirs.__name__}", (step, theirs), {"__module__": __name__}), config

    return {
        "topk": sparse(SparseStep, lens.TopKTrainingSAE, lens.TopKTrainingSAEConfig),
        "batchtopk": sparse(SparseBatchStep, lens.BatchTopKTrainingSAE, lens.BatchTopKTrainingSAEConfig),
        "matryoshka": sparse(
            SparseMatryoshkaStep, lens.MatryoshkaBatchTopKTrainingSAE, lens.MatryoshkaBatchTopKTrainingSAEConfig
        ),
        "jumprelu": (lens.JumpReLUTrainingSAE, lens.JumpReLUTrainingSAEConfig),
    }


class Rate:
    """In the place of a scheduler: sets the step size for the step that comes; knows nothing but its number."""

    def __init__(self, optimizer: torch.optim.Optimizer, lr: float, share: Callable[[int], float]):
        self.optimizer, self.lr, self.share = optimizer, lr, share
        self.set(0)

    def set(self, step: int) -> None:
        self.at = step
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * self.share(step)

    def step(self) -> None:
        self.set(self.at + 1)

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.set(state["at"])


def trainer_for(
    sae: "TrainingSAE[Any]",
    *,
    lr: float,
    steps: int,
    batch_size: int,
    share: Callable[[int], float] = lambda step: 1.0,
    dead_window: int = 1000,
    data: Iterator[Tensor] | None = None,
) -> "SAETrainer[Any, Any]":
    """sae-lens' trainer with a fused Adam; give its `step` the batches, or `data` and call `fit`.

    `share` of a step, counted from 0, is what its step size is of `lr`; after `dead_window` steps of silence a feature
    counts as dead.
    """
    from sae_lens import SAETrainer
    from sae_lens.config import SAETrainerConfig

    trainer = SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=steps * batch_size,
            train_batch_size_samples=batch_size,
            lr=lr,
            lr_end=lr,
            dead_feature_window=dead_window,
            device=str(sae.device),
        ),
        sae=sae,
        data_provider=iter(()) if data is None else data,
    )
    betas = (trainer.cfg.adam_beta1, trainer.cfg.adam_beta2)
    memory = getattr(sae, "memory", None)
    trainer.optimizer = RowAdam(sae.parameters(), lr=lr, betas=betas, memory=memory)
    trainer.lr_scheduler = Rate(trainer.optimizer, lr, share)  # pyright: ignore[reportAttributeAccessIssue]
    return trainer
