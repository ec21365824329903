"""Pixels → latents as the pipeline's scheduler sees them: (mode − shift) · scale of its VAE, packed by the pipeline."""

import hashlib
import inspect
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..config import UsageError
from ..pipelines import Drawing


def frame_of(pipe: Any, height: int | None, width: int | None) -> tuple[int, int]:
    """Height and width of the images, pixels: those given, else those the pipeline draws in by default."""
    step = pipe.image_processor.config.vae_scale_factor
    step = max(step, pipe.vae_scale_factor * getattr(pipe, "patch_size", 1))
    if hasattr(pipe, "unet"):
        usual = (pipe.unet.config.sample_size * pipe.vae_scale_factor,) * 2
    else:
        drawing = Drawing.of(pipe)
        usual = (drawing.height, drawing.width)
    height, width = int(usual[0] if height is None else height), int(usual[1] if width is None else width)
    if height < 1 or width < 1 or height % step or width % step:
        raise UsageError(f"height={height}, width={width}: expected multiples of {step} pixels, as the pipeline draws.")
    return height, width


def check_vae(pipe: Any) -> Any:
    """The pipeline's VAE; a `UsageError` where it has none of the kind that is understood."""
    vae = getattr(pipe, "vae", None)
    if vae is None:
        raise UsageError(
            f"{type(pipe).__name__} has no VAE, so that images cannot become latents: load the pipeline with its VAE, "
            "or give NegationSet(latents) what you have encoded elsewhere."
        )
    if type(vae).__name__ != "AutoencoderKL":
        raise UsageError(
            f"The VAE is a {type(vae).__name__}, and only AutoencoderKL is understood: give NegationSet(latents) what "
            "the scheduler of your pipeline sees."
        )
    return vae


@torch.no_grad()
def encode(pipe: Any, pixels: Float[Tensor, "n 3 height width"]) -> Float[Tensor, "n *latent"]:
    """Latents in float32 on the CPU, of the shape that the scheduler steps."""
    vae = check_vae(pipe)
    x = pixels.to(getattr(pipe, "_execution_device", vae.device), vae.dtype) * 2 - 1
    mode = vae.encode(x).latent_dist.mode().float()
    latents = (mode - (vae.config.get("shift_factor") or 0.0)) * vae.config.scaling_factor
    pack = getattr(pipe, "_pack_latents", None)
    if pack is None:
        return latents.cpu()
    if len(inspect.signature(pack).parameters) != 5:
        raise UsageError(
            f"{type(pipe).__name__} packs its latents in a way that is not understood: give NegationSet(latents) what "
            "its scheduler sees."
        )
    return pack(latents, *latents.shape).cpu()


def vae_digest(pipe: Any) -> str:
    """What tells this VAE, its precision and the packing from others."""
    vae = check_vae(pipe)
    digest = hashlib.sha256(f"{vae.config.scaling_factor} {vae.config.get('shift_factor')} {vae.dtype}".encode())
    digest.update(b"packed" if hasattr(pipe, "_pack_latents") else b"plain")
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
