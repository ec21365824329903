"""A pipeline without its weights: real classes on the meta device, from configuration files alone; and its schedule."""

from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import model_folders
from .config import UsageError, did_you_mean
from .pipelines import Drawing, is_flux


def skeleton(name_or_path: str | PathLike[str]) -> Any:
    """The pipeline of a released or local model with its weights left out: every model on the meta device.

    Released models are known by their embedded configurations, so that no network is needed. It has no tokenizers.
    """
    import diffusers
    import transformers

    name = str(name_or_path)
    folder = model_folders.on_disk(name) or model_folders.described(name)
    if folder is None and model_folders.is_hub_id(name):
        known = did_you_mean(name, model_folders.released())
        raise UsageError(f"The configuration of '{name}' is not embedded. {known} Or give a local folder.")
    if folder is None:
        raise UsageError(model_folders.no_such_model(name))
    libraries = {"diffusers": diffusers, "transformers": transformers}
    try:
        parts = {
            part: _without_weights(folder / part, getattr(libraries[library], kind))
            for part, (library, kind) in model_folders.parts(folder).items()
        }
        pipe = getattr(diffusers, model_folders.class_name(folder))(**parts)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(f"'{name}' cannot be built from its configuration files: {error}") from error
    pipe.register_to_config(_name_or_path=str(folder))
    return pipe


def schedule(pipe: Any, drawing: Drawing) -> list[float]:
    """σ at the start of every step, as the pipeline would set them for images of this size; nothing runs."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    options: dict[str, Any] = {}
    if scheduler.config.get("use_dynamic_shifting"):
        ends = (("base_image_seq_len", 256), ("max_image_seq_len", 4096), ("base_shift", 0.5), ("max_shift", 1.15))
        patch = 2 * pipe.vae_scale_factor  # pixels; FLUX packs 2 × 2 latents, SD3 has patches of that size
        tokens = (drawing.height // patch) * (drawing.width // patch)
        options["mu"] = calculate_shift(tokens, *(scheduler.config.get(key, default) for key, default in ends))
    if is_flux(pipe):
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / drawing.steps, drawing.steps).tolist(), **options)
    else:
        scheduler.set_timesteps(drawing.steps, **options)
    return [float(sigma) for sigma in scheduler.sigmas[: drawing.steps]]


def _without_weights(folder: Path, kind: Any) -> Any:
    """One part of a pipeline from its configuration alone; None for what only reads text or images."""
    if (folder / "scheduler_config.json").is_file():
        return kind.from_config(kind.load_config(folder))
    if not (folder / "config.json").is_file():
        return None
    with torch.device("meta"):
        if hasattr(kind, "load_config"):
            return kind.from_config(kind.load_config(folder))
        return kind(kind.config_class.from_pretrained(folder))
