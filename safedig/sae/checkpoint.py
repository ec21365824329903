"""Autoencoders on disk in sae-lens' format, which `sae_lens.SAE.load_from_disk` reads; safetensors and JSON only."""

import json
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ..config import UsageError
from ..storage import write_atomically
from .model import Decoder, Encoder, SparseAutoencoder

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
_ARCHITECTURES = ("jumprelu", "standard")


def save_sae(sae: SparseAutoencoder, folder: str | PathLike[str]) -> None:
    """Write `cfg.json` and `sae_weights.safetensors` into `folder`, each atomically; loading gives equal bits."""
    folder = Path(folder)
    tensors = {
        "W_enc": sae.encoder.W_enc,
        "b_enc": sae.encoder.b_enc,
        "threshold": sae.encoder.threshold,
        "W_dec": sae.decoder.W_dec,
        "b_dec": sae.decoder.b_dec,
    }
    config = {
        "architecture": "jumprelu",
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        # Without its version sae-lens takes the file for an old one and drops the metadata.
        "metadata": {"sae_lens_version": version("sae-lens"), "safedig": sae.metadata},
    }
    write_atomically(folder / WEIGHTS, save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}))
    write_atomically(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True).encode())


def load_sae(folder: str | PathLike[str]) -> SparseAutoencoder:
    """Read such a folder, ours or another's JumpReLU (BatchTopK) or standard SAE, `b_dec` folded into the encoder."""
    folder = Path(folder)
    config, tensors = _read(folder)
    if config.get("architecture") not in _ARCHITECTURES:
        raise UsageError(
            f"'{folder}' holds a '{config.get('architecture')}' SAE: expected one of {', '.join(_ARCHITECTURES)}, "
            "whose codes do not depend on other features (train BatchTopK rather than TopK)."
        )
    if config.get("normalize_activations", "none") != "none" or config.get("reshape_activations", "none") != "none":
        raise UsageError(f"'{folder}' normalises or reshapes its input at run time: fold that into the weights first.")
    try:
        W_enc, b_enc, W_dec, b_dec = (tensors[name].float() for name in ("W_enc", "b_enc", "W_dec", "b_dec"))
    except KeyError as error:
        raise UsageError(f"'{folder / WEIGHTS}' has no tensor {error}: copy the file again.") from error
    if config.get("apply_b_dec_to_input", True):
        b_enc = b_enc - b_dec @ W_enc
    threshold = tensors.get("threshold", torch.zeros_like(b_enc)).float()
    metadata = (config.get("metadata") or {}).get("safedig") or {}
    return SparseAutoencoder(Encoder(W_enc, b_enc, threshold), Decoder(W_dec, b_dec), metadata)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        return json.loads((folder / CONFIG).read_text(encoding="utf-8")), load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise UsageError(
            f"'{folder}' is no SAE folder: expected {CONFIG} and {WEIGHTS}, as save_sae writes them ({error})."
        ) from error
