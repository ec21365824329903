"""What sae-lens' JSON says of the tensors beside it, whatever version wrote it, in training or after."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import UsageError
from .files import read_config
from .folding import Convention

_ARCHITECTURES = ("standard", "jumprelu", "topk", "batchtopk", "matryoshka_batchtopk")
SCALER = "activation_scaler.json"
"""What training multiplies its input by, while that is not yet folded into the weights."""
_FOLDED_LATE = ("expected_average_only_in", "covariance_whitening")  # when training ends
_IDENTITY = ("none", None, False, True, *_FOLDED_LATE)  # at run time


def convention(config: Mapping[str, Any]) -> Convention:
    return Convention(
        subtract_b_dec=bool(config.get("apply_b_dec_to_input", True)),
        scale_by_norm=bool(config.get("rescale_acts_by_decoder_norm", False)),
    )


def with_threshold(config: Mapping[str, Any], tensors: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    """The tensors with the threshold named as such; a `UsageError` where codes are made in a way that is not known."""
    architecture, activation = config.get("architecture", "standard"), _activation(config)
    if architecture not in _ARCHITECTURES or activation not in ("relu", "topk"):
        raise UsageError(
            f"'{file.parent}' holds a '{architecture}' SAE with activation '{activation}': expected one of "
            f"{', '.join(_ARCHITECTURES)} with relu or topk."
        )
    scaling = tensors.get("scaling_factor", torch.ones(1))
    unscaled = torch.equal(scaling, torch.ones_like(scaling))
    normalised = config.get("normalize_activations") not in _IDENTITY
    if normalised or config.get("reshape_activations", "none") != "none" or not unscaled:
        raise UsageError(f"'{file.parent}' normalises or reshapes its input at run time: fold that into the weights.")
    if "log_threshold" in tensors:
        return {**tensors, "threshold": tensors["log_threshold"].exp()}
    if "topk_threshold" in tensors and "b_enc" in tensors:  # training kept a running mean, one for all features
        return {**tensors, "threshold": tensors["topk_threshold"].expand(tensors["b_enc"].shape)}
    if architecture == "standard" and "b_enc" in tensors:
        return {**tensors, "threshold": torch.zeros_like(tensors["b_enc"])}
    return dict(tensors)


def for_raw_input(config: Mapping[str, Any], tensors: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    """The tensors with the input's scale folded in, where training was not over when they were written."""
    scaler = file.with_name(SCALER)
    if config.get("normalize_activations") not in _FOLDED_LATE or not scaler.is_file():
        return dict(tensors)
    said = read_config(scaler)
    scale = said.get("scaling_factor")
    if said.get("has_whitening", False):
        raise UsageError(f"'{file.parent}' was written while whitening was not yet folded in: take the finished SAE.")
    if scale is None:
        return dict(tensors)
    if not isinstance(scale, int | float) or not 0 < scale < float("inf"):
        raise UsageError(f"'{scaler}' has scaling_factor={scale!r}: expected a number above 0; copy it again.")
    factors = {"W_enc": scale, "W_dec": 1 / scale, "b_dec": 1 / scale}
    if convention(config).scale_by_norm:  # such a threshold is in units of the decoder rows' length
        factors["threshold"] = 1 / scale
    return {name: tensor * factors.get(name, 1) for name, tensor in tensors.items()}


def k(config: Mapping[str, Any], file: Path) -> int | None:
    """Active features a row of a TopK SAE; `None` for all others."""
    old = _activation(config) == "topk"
    if config.get("architecture") != "topk" and not old:
        return None
    given = (config.get("activation_fn_kwargs") or {}).get("k") if old else config.get("k")
    if not isinstance(given, int):
        raise UsageError(f"'{file}' describes a TopK SAE with k={given!r}: expected a whole number; copy it again.")
    return given


def _activation(config: Mapping[str, Any]) -> str:
    """Before sae-lens 6 the configuration named it, and TopK was a standard SAE of that activation."""
    return config.get("activation_fn", config.get("activation_fn_str", "relu"))
