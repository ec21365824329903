"""Scenes drawn and encoded once: what the tiny pipelines are trained on."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float16
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..progress import track
from .autoencoding import to_signed
from .captions import POSTCARD, POSTCARD_CAPTION, Ask, scene_for, training_ask
from .scenes import Scene, posed, render_many

SHARD = 4096  # scenes


@dataclass(frozen=True)
class Latents:
    """Training pictures: what was asked, what was drawn, and its latent."""

    asks: list[Ask]
    scenes: list[Scene]
    latents: Float16[Tensor, "n 8 16 16"]

    def __len__(self) -> int:
        return len(self.asks)


def training_latents(vae_folder: Path, work: Path, *, n: int, seed: int) -> Latents:
    """Draw `n` random scenes and encode them, in shards kept in `work` so that an interrupted run goes on."""
    from diffusers import AutoencoderKL

    vae: Any = AutoencoderKL.from_pretrained(vae_folder)
    vae = vae.eval().to(memory_format=torch.channels_last)
    asks, scenes, shards = [], [], []
    made_by = _identity(vae)
    for start in track(range(0, n, SHARD), "draw and encode scenes"):
        pairs = [_ask_and_scene((seed, i)) for i in range(start, min(start + SHARD, n))]
        shard = work / f"latents-{made_by}-{seed}-{start}-{len(pairs)}.safetensors"
        if not shard.exists():
            part = shard.with_suffix(".part")
            save_file({"latents": _encode(vae, [scene for _, scene in pairs])}, part)
            part.replace(shard)
        shards.append(load_file(shard)["latents"])
        asks += [ask for ask, _ in pairs]
        scenes += [scene for _, scene in pairs]
    return Latents(asks, scenes, torch.cat(shards))


def _identity(vae: Any) -> str:
    """Another autoencoder makes other latents, and finds no shard of this one's."""
    digest = hashlib.sha256()
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def _ask_and_scene(seed: tuple[int, int]) -> tuple[Ask, Scene]:
    rng = np.random.default_rng(seed)
    ask = training_ask(rng)
    return ask, POSTCARD if ask.whole == POSTCARD_CAPTION else posed(scene_for(ask, rng), rng)


@torch.no_grad()
def _encode(vae: Any, scenes: list[Scene]) -> Float16[Tensor, "n 8 16 16"]:
    parts = []
    for i in range(0, len(scenes), 64):
        x = to_signed(render_many(scenes[i : i + 64])).contiguous(memory_format=torch.channels_last)
        parts.append((vae.encode(x).latent_dist.mean - vae.config.shift_factor) * vae.config.scaling_factor)
    return torch.cat(parts).half().contiguous()
