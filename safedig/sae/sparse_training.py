"""Autoencoders to train and a trainer for them: sae-lens' own, with sparse steps and a fused optimiser."""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..config import UsageError
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
    bf16_encoder: bool = False,
    device: str | torch.device = "cpu",
) -> "TrainingSAE[Any]":
    """A sae-lens autoencoder to be trained, its first weights drawn from the global generator.

    `aux` weighs the loss that revives dead features, `threshold_lr` is the step of BatchTopK's moving threshold,
    `widths` are Matryoshka's levels (by default a quarter, a half and all), `bf16_encoder` looks for active codes in
    bfloat16 and scores them in float32. JumpReLU is sae-lens' own, its L0 drawn to `k`.
    """
    if architecture not in ARCHITECTURES:
        raise UsageError(f"There is no architecture '{architecture}': expected one of {', '.join(ARCHITECTURES)}.")
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
    sae.bf16_encoder = bf16_encoder
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


def trainer_for(
    sae: "TrainingSAE[Any]",
    *,
    lr: float,
    steps: int,
    batch_size: int,
    warm_up: int = 0,
    decay: int = 0,
    dead_window: int = 1000,
    data: Iterator[Tensor] | None = None,
) -> "SAETrainer[Any, Any]":
    """sae-lens' trainer with a fused Adam; give its `step` the batches, or `data` and call `fit`.

    `warm_up`, `decay` and `dead_window` (of silence, after which a feature counts as dead) are in steps.
    """
    from sae_lens import SAETrainer
    from sae_lens.config import SAETrainerConfig

    trainer = SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=steps * batch_size,
            train_batch_size_samples=batch_size,
            lr=lr,
            lr_end=lr,
            lr_warm_up_steps=warm_up,
            lr_decay_steps=decay,
            dead_feature_window=dead_window,
            device=str(sae.device),
        ),
        sae=sae,
        data_provider=iter(()) if data is None else data,
    )
    fused_adam(trainer)
    return trainer


def fused_adam(trainer: "SAETrainer[Any, Any]") -> None:
    """Put one kernel in the place of the trainer's optimiser, and the trainer's schedule on it."""
    from sae_lens.training.optim import get_lr_scheduler

    cfg = trainer.cfg
    betas = (cfg.adam_beta1, cfg.adam_beta2)
    trainer.optimizer = RowAdam(trainer.sae.parameters(), lr=cfg.lr, betas=betas)
    trainer.lr_scheduler = get_lr_scheduler(
        cfg.lr_scheduler_name,
        lr=cfg.lr,
        optimizer=trainer.optimizer,
        warm_up_steps=cfg.lr_warm_up_steps,
        decay_steps=cfg.lr_decay_steps,
        training_steps=cfg.total_training_steps,
        lr_end=cfg.lr_end or cfg.lr,
        num_cycles=cfg.n_restart_cycles,
    )
