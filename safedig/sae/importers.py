"""Autoencoders that other projects published, brought into our form: codes are as their own code computes them.

Each format is one function from a folder to an autoencoder. Nothing is fetched, and no pickle that runs code is read.
"""

import pickle
from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import UsageError, did_you_mean
from .checkpoint import CONFIG, WEIGHTS, load_sae
from .description import SCALER
from .files import read_config, read_tensors
from .folding import Convention, fold
from .model import SparseAutoencoder

_SPARSIFY_WEIGHTS = "sae.safetensors"
_UNBOX_CONFIG, _UNBOX_WEIGHTS = "config.json", "state_dict.pth"
FILES = (CONFIG, WEIGHTS, SCALER, _SPARSIFY_WEIGHTS, _UNBOX_CONFIG, _UNBOX_WEIGHTS)
"""All that any format needs of a folder."""
_ON_CENTRED_INPUT = Convention(subtract_b_dec=True)


def import_sae(folder: str | PathLike[str], format: str | None = None, **metadata: Any) -> SparseAutoencoder:
    """Read a folder of `format` ("sae-lens", "sparsify", "saeuron", "sdxl-unbox"), by default the one its files show.

    `metadata` is added, such as `site=` and `model=`: what steering needs to know and these formats do not say.
    """
    folder = Path(folder)
    name = _recognised(folder) if format is None else format
    if name not in _FORMATS:
        raise UsageError(f"There is no format '{name}'. {did_you_mean(name, _FORMATS)}")
    sae = _FORMATS[name](folder)
    return replace(sae, metadata=sae.metadata | {"imported_from": name} | metadata)


def _recognised(folder: Path) -> str:
    there = {file for file in FILES if (folder / file).is_file()}
    if {CONFIG, WEIGHTS} <= there:
        return "sae-lens"
    if {CONFIG, _SPARSIFY_WEIGHTS} <= there:
        return "saeuron" if "sample_topk" in read_config(folder / CONFIG) else "sparsify"
    if {_UNBOX_CONFIG, _UNBOX_WEIGHTS} <= there:
        return "sdxl-unbox"
    raise UsageError(
        f"'{folder}' holds no SAE of a known format: expected {CONFIG} with {WEIGHTS} (sae-lens) or with "
        f"{_SPARSIFY_WEIGHTS} (sparsify, SAeUron), or {_UNBOX_CONFIG} with {_UNBOX_WEIGHTS} (sdxl-unbox)."
    )


def _sparsify(folder: Path) -> SparseAutoencoder:
    """EleutherAI/sparsify, `sparse_coder.py`: the k highest of relu((x − b_dec)·encoderᵀ + bias)."""
    config, file = read_config(folder / CONFIG), folder / _SPARSIFY_WEIGHTS
    _refuse(folder, config, {"activation": "topk", "signed": False, "transcode": False, "skip_connection": False})
    _refuse(folder, config, {"embed_skip": False, "gram_lookup": False})
    return _linear(file, read_tensors(file), config, {"W_enc": "encoder.weight", "b_enc": "encoder.bias"})


def _saeuron(folder: Path) -> SparseAutoencoder:
    """cywinski/SAeUron, `SAE/sae.py`: as sparsify. It trains on the k·n highest of a batch and applies k a row."""
    config, file = read_config(folder / CONFIG), folder / _SPARSIFY_WEIGHTS
    _refuse(folder, config, {"input_unit_norm": False})
    return _linear(file, read_tensors(file), config, {"W_enc": "encoder.weight", "b_enc": "encoder.bias"})


def _sdxl_unbox(folder: Path) -> SparseAutoencoder:
    """surkovv/sdxl-unbox, `SAE/sae.py`: relu(topk((x − pre_bias)·encoderᵀ + latent_bias)).

    x is what a block of the U-Net adds: its output minus its input.
    """
    config, file = read_config(folder / _UNBOX_CONFIG), folder / _UNBOX_WEIGHTS
    tensors = _unpickled(file)
    names = {"W_enc": "encoder.weight", "b_enc": "latent_bias", "b_dec": "pre_bias"}
    if "decoder.weight" in tensors:
        tensors["W_dec"] = tensors["decoder.weight"].T.contiguous()
    return _linear(file, tensors, config, names)


_FORMATS = {"sae-lens": load_sae, "sparsify": _sparsify, "saeuron": _saeuron, "sdxl-unbox": _sdxl_unbox}


def _linear(
    file: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], names: Mapping[str, str]
) -> SparseAutoencoder:
    """A TopK autoencoder whose encoder is a torch `Linear` [d_sae, d_in] on a − b_dec; `names` are those not ours."""
    if not isinstance(config.get("k"), int):
        raise UsageError(f"The configuration in '{file.parent}' gives k={config.get('k')!r}: expected a whole number.")
    found = dict(tensors)
    for ours, theirs in names.items():
        if theirs not in tensors:
            raise UsageError(f"'{file}' has no tensor '{theirs}': copy the file again.")
        found[ours] = tensors[theirs]
    found["W_enc"] = found["W_enc"].T.contiguous()
    return fold(found, file, k=config["k"], convention=_ON_CENTRED_INPUT)


def _refuse(folder: Path, config: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for option, wanted in expected.items():
        if config.get(option, wanted) != wanted:
            raise UsageError(
                f"The SAE in '{folder}' has {option}={config[option]!r}: only {option}={wanted!r} can be written as an "
                "encoder and a decoder; take another checkpoint."
            )


def _unpickled(file: Path) -> dict[str, Tensor]:
    """The tensors of a state dict, read without running what a pickle may hold."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UsageError(
            f"'{file}' is refused: reading it would run code that it carries, or it is damaged. Ask for its tensors "
            "as safetensors."
        ) from error
    except (OSError, RuntimeError, EOFError) as error:
        raise UsageError(f"'{file}' is damaged or was copied in part ({error}): copy it again.") from error
    content = content.get("state_dict", content) if isinstance(content, dict) else {}
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}
