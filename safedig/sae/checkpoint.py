"""Autoencoders on disk in sae-lens' format, which `sae_lens.SAE.load_from_disk` reads; safetensors and JSON only.

A decoder with a `centre` is the exception: sae-lens cannot subtract one, so it refuses the file by that tensor's name
instead of giving other codes.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from importlib.metadata import version
from os import PathLike
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ..config import UsageError
from ..sites import Site
from ..storage import write_atomically
from . import description
from .files import read_config, read_tensors
from .folding import fold
from .model import Decoder, Encoder, SparseAutoencoder, ThresholdEncoder, TopKEncoder

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
_HASHES = ("encoder_sha256", "decoder_sha256")
_NOTE = "The encoder reads a − centre. sae-lens cannot subtract it and refuses this file by the name of that tensor."
OBJECTIVES = ("reconstruction", "contrast")


def sae_folder(
    root: str | PathLike[str],
    model: str,
    site: Site | str,
    source: str | Sequence[str],
    target: str | Sequence[str] | None = None,
    objective: str | None = None,
) -> Path:
    """`<root>/<model>/<site>/<source>`, or `<source>--<target>.<objective>` beside it for an adapted decoder.

    `model` is a name, a Hub id or a folder, of which the last part is taken; several risks are joined by '+'.
    """
    if (target is None) != (objective is None) or objective not in (None, *OBJECTIVES):
        raise UsageError(
            f"target={target!r} and objective={objective!r}: give both or neither; objectives are "
            f"{' and '.join(OBJECTIVES)}."
        )
    name = _risks(source) if target is None else f"{_risks(source)}--{_risks(target)}.{objective}"
    place = site if isinstance(site, Site) else Site.parse(site)
    return Path(root) / PurePosixPath(model).name / str(place) / name


def _risks(given: str | Sequence[str]) -> str:
    names = [given] if isinstance(given, str) else sorted(set(given))
    for name in names or [""]:
        if not name or name.startswith(".") or "--" in name or set(name) & set("/\\+"):
            raise UsageError(
                f"A risk named '{name}' cannot name a folder: leave out '/', '\\', '+', '--', a first '.'."
            )
    return "+".join(names)


def encoder_sha256(encoder: Encoder) -> str:
    """Equal exactly where the kind of encoder and every byte of its weights are."""
    return _sha256(_kind(encoder), _encoder_tensors(encoder))


def save_sae(sae: SparseAutoencoder, folder: str | PathLike[str]) -> None:
    """Write `cfg.json` and `sae_weights.safetensors` into `folder`, each atomically; loading gives equal bits."""
    folder = Path(folder)
    tensors = _encoder_tensors(sae.encoder) | _decoder_tensors(sae.decoder)
    if "threshold" in tensors and bool((tensors["threshold"] < 0).any()):
        raise UsageError("A threshold is negative, which no JumpReLU file can hold: use clamp(min=0).")
    hashes = dict(zip(_HASHES, (encoder_sha256(sae.encoder), _sha256({}, _decoder_tensors(sae.decoder))), strict=True))
    note = {} if sae.decoder.centre is None else {"note": _NOTE}
    config = _kind(sae.encoder) | {
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        # Without its version sae-lens takes the file for an old one and drops the metadata.
        "metadata": {"sae_lens_version": version("sae-lens"), "safedig": sae.metadata | hashes} | note,
    }
    write_atomically(folder / WEIGHTS, save(tensors))
    write_atomically(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True).encode())


def load_sae(
    folder: str | PathLike[str], *, site: Site | str | None = None, model: str | None = None
) -> SparseAutoencoder:
    """Read such a folder, ours or one of sae-lens, with everything folded into the encoder.

    With `site`, and with `model` (a pipeline's fingerprint), an autoencoder of another one is a `UsageError`.
    """
    folder = Path(folder)
    config = read_config(folder / CONFIG)
    metadata = _metadata(config)
    _check_origin(folder, metadata, {"site": site and str(site), "model": model})
    k, convention = description.k(config, folder / CONFIG), description.convention(config)
    tensors = description.with_threshold(config, read_tensors(folder / WEIGHTS), folder / WEIGHTS)
    tensors = description.for_raw_input(config, tensors, folder / WEIGHTS)
    sae = fold(tensors, folder / WEIGHTS, k=k, convention=convention)
    said = tuple(config.get(name, getattr(sae, name)) for name in ("d_in", "d_sae"))
    if said != (sae.d_in, sae.d_sae):
        raise UsageError(
            f"In '{folder}' {CONFIG} says (d_in, d_sae) = {said} and the tensors have {(sae.d_in, sae.d_sae)}: the two "
            "files do not belong together; copy both again."
        )
    if metadata.get("encoder_sha256", "") not in ("", encoder_sha256(sae.encoder)):
        raise _damaged(folder, "encoder")
    _check_decoder(sae.decoder, metadata, folder)
    return replace(sae, metadata=_without_hashes(metadata))


def load_decoder(folder: str | PathLike[str], beside: SparseAutoencoder) -> SparseAutoencoder:
    """The same encoder object with the decoder and metadata of another folder, which was adapted from it."""
    folder = Path(folder)
    metadata = _metadata(read_config(folder / CONFIG))
    known = encoder_sha256(beside.encoder)
    if metadata.get("encoder_sha256") != known:
        raise UsageError(
            f"The decoder in '{folder}' was fitted for encoder {str(metadata.get('encoder_sha256'))[:12]}… and this is "
            f"{known[:12]}…: load the encoder beside it (load_sae), or adapt this one."
        )
    tensors = read_tensors(folder / WEIGHTS, ("W_dec", "b_dec", "centre"))
    if not {"W_dec", "b_dec"} <= tensors.keys():
        raise UsageError(f"'{folder / WEIGHTS}' has no decoder: copy the file again.")
    decoder = Decoder(tensors["W_dec"], tensors["b_dec"], tensors.get("centre"))
    _check_decoder(decoder, metadata, folder)
    return replace(beside, decoder=decoder, metadata=_without_hashes(metadata))


def _kind(encoder: Encoder) -> dict[str, Any]:
    if isinstance(encoder, TopKEncoder):
        return {"architecture": "topk", "k": encoder.k, "rescale_acts_by_decoder_norm": False}
    return {"architecture": "jumprelu"}


def _encoder_tensors(encoder: Encoder) -> dict[str, Tensor]:
    tensors = {"W_enc": encoder.W_enc, "b_enc": encoder.b_enc}
    if isinstance(encoder, ThresholdEncoder):
        tensors["threshold"] = encoder.threshold
    return _plain(tensors)


def _decoder_tensors(decoder: Decoder) -> dict[str, Tensor]:
    centre = {} if decoder.centre is None else {"centre": decoder.centre}
    return _plain({"W_dec": decoder.W_dec, "b_dec": decoder.b_dec} | centre)


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in tensors.items()}


def _sha256(kind: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    digest = sha256(json.dumps(kind, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().data)
    return digest.hexdigest()


def _metadata(config: Mapping[str, Any]) -> dict[str, Any]:
    return (config.get("metadata") or {}).get("safedig") or {}


def _without_hashes(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """They belong to the file: in memory a decoder is replaced, and they would be another's."""
    return {name: value for name, value in metadata.items() if name not in _HASHES}


def _check_origin(folder: Path, metadata: Mapping[str, Any], expected: Mapping[str, str | None]) -> None:
    for name, wanted in expected.items():
        if wanted is not None and metadata.get(name) != wanted:
            said = f"the {name} '{metadata[name]}'" if metadata.get(name) else f"no {name} that it names"
            raise UsageError(
                f"The SAE in '{folder}' was trained on {said}, and '{wanted}' is asked for: give the folder of that "
                "one, or train it."
            )


def _check_decoder(decoder: Decoder, metadata: Mapping[str, Any], folder: Path) -> None:
    if metadata.get("decoder_sha256", "") not in ("", _sha256({}, _decoder_tensors(decoder))):
        raise _damaged(folder, "decoder")


def _damaged(folder: Path, half: str) -> UsageError:
    return UsageError(
        f"The {half} in '{folder / WEIGHTS}' is not the one that {CONFIG} describes: copy both files again; where "
        f"another program changed it on purpose, delete {half}_sha256 from {CONFIG}."
    )
