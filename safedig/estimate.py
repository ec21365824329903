"""What a recording will take, before anything is loaded: rows and bytes to the last one, memory, operations, hours.

The models run once, without weights, so that what passes each site is measured by the hooks that will record it.
"""

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .config import UsageError
from .pipelines import Drawing, guided, is_flux
from .recipes import Recipe, Recording
from .sites import Site, component, resolve, stage, transformer
from .skeleton import schedule, skeleton
from .taps import tap

TERA, GIGA, HOUR = 1e12, 1e9, 3600  # operations, bytes, seconds
DTYPES = ("float32", "bfloat16")


def estimate(recipe: Recipe, prompts: int | None = None) -> dict[str, Any]:
    """What recording takes: sites, rows, bytes, memory of the weights, forward passes, operations, hours.

    `prompts`, the number of images, is the recipe's unless given. Bytes are those of the activations as they are
    stored. Hours are those of the transformer at `record.tflops`; text encoders and decoder come on top.
    """
    pipe, record = skeleton(recipe.model), recipe.record or Recording()
    drawing, images = recipe.drawing_of(pipe), record.prompts if prompts is None else prompts
    levels = schedule(pipe, drawing)
    steps = record.steps(levels)
    seen = _forward(pipe, drawing, resolve(pipe, recipe.sites))
    dtype = recipe.dtype or "float32"
    sites: dict[str, dict[str, Any]] = {
        str(site): {"stage": stage(site, pipe)}
        | _kept(tokens, width, record, images * (len(steps) if _is_denoised(site) else 1), dtype)
        for site, (tokens, width) in seen.passed.items()
    }
    forwards = images * drawing.steps * (2 if is_flux(pipe) and guided(pipe, drawing) else 1)
    return {
        "model": recipe.model,
        "class": type(pipe).__name__,
        "dtype": dtype,
        "drawing": asdict(drawing),
        "prompts": images,
        "sigmas": [round(levels[step], 4) for step in steps],
        "sites": sites,
        "rows": sum(site["rows"] for site in sites.values()),
        "bytes": sum(site["bytes"] for site in sites.values()),
        "weights": _weights(pipe),
        "forwards": forwards,
        "tflop_per_forward": seen.operations / TERA,
        "tflops": record.tflops,
        "hours": forwards * seen.operations / TERA / record.tflops / HOUR,
    }


@dataclass(frozen=True)
class _Seen:
    """One pass for one image: what passed the sites, as (tokens, width), and the transformer's operations."""

    passed: dict[Site, tuple[int, int]]
    operations: int


def _kept(tokens: int, width: int, record: Recording, moments: int, dtype: str) -> dict[str, Any]:
    """`moments` are images × σ, or images where a text is encoded once for all σ.

    A vector that stands for the whole image is one row, whatever the quota.
    """
    kept = {"all": tokens, "pooled": 1}.get(str(record.tokens), record.tokens)
    rows = moments * min(tokens, int(kept))
    size = rows * width * getattr(torch, dtype).itemsize
    return {"d_in": width, "tokens": tokens, "rows": rows, "bytes": size}


def _is_denoised(site: Site) -> bool:
    return site.component == "transformer"


def _forward(pipe: Any, drawing: Drawing, sites: list[Site]) -> _Seen:
    from torch.utils.flop_counter import FlopCounterMode

    passed: dict[Site, tuple[int, int]] = {}

    def note(site: Site, x: Float[Tensor, "batch token d"]) -> None:
        passed[site] = (x.shape[1], x.shape[2])

    encoders = [name for name in dict.fromkeys(site.component for site in sites) if name != "transformer"]
    with torch.no_grad(), tap(pipe, {site: partial(note, site) for site in sites}):
        for name in encoders:
            component(pipe, name)(**_text(component(pipe, name), drawing))
        with FlopCounterMode(display=False) as counter:
            transformer(pipe)(**_arguments(pipe, drawing))
    return _Seen({site: passed[site] for site in sites}, counter.get_total_flops())


def _text(encoder: Any, drawing: Drawing) -> dict[str, Tensor]:
    """What the pipeline gives a text encoder for one prompt: CLIP's full length, or as much as T5 is asked to read."""
    length = getattr(encoder.config, "max_position_embeddings", drawing.max_sequence_length)
    return {"input_ids": torch.zeros(1, length, dtype=torch.long, device="meta")}


def _arguments(pipe: Any, drawing: Drawing) -> dict[str, Tensor]:
    """What the pipeline gives its transformer for one image, as shapes; guidance makes two rows of it in SD3."""
    model: Any = transformer(pipe)
    config, patch = model.config, 2 * pipe.vae_scale_factor
    height, width = drawing.height // patch, drawing.width // patch

    def shape(*size: int) -> Tensor:
        return torch.empty(*size, device="meta")

    if type(model).__name__ == "FluxTransformer2DModel":
        rows, text, image = 1, drawing.max_sequence_length, shape(1, height * width, config.in_channels)
        own = {"img_ids": shape(height * width, 3), "txt_ids": shape(text, 3)}
        own |= {"guidance": shape(1)} if config.guidance_embeds else {}
    elif type(model).__name__ == "SD3Transformer2DModel":
        rows, clip = 2 if drawing.guidance > 1 else 1, pipe.text_encoder.config.max_position_embeddings
        text, image, own = (
            clip + drawing.max_sequence_length,
            shape(rows, config.in_channels, 2 * height, 2 * width),
            {},
        )
    else:
        raise UsageError(f"There is no plan for {type(model).__name__}: FLUX.1 and Stable Diffusion 3 have one.")
    return own | {
        "hidden_states": image,
        "encoder_hidden_states": shape(rows, text, config.joint_attention_dim),
        "pooled_projections": shape(rows, config.pooled_projection_dim),
        "timestep": shape(rows),
    }


def _weights(pipe: Any) -> dict[str, Any]:
    """Parameters of every model of the pipeline, and the bytes of all and of the largest, which offload needs."""
    models = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    counts = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    sizes = {name: getattr(torch, name).itemsize for name in DTYPES}
    return {
        "parameters": counts,
        "bytes": {name: size * sum(counts.values()) for name, size in sizes.items()},
        "bytes_of_the_largest": {name: size * max(counts.values()) for name, size in sizes.items()},
    }
