"""The training objective of the tiny autoencoder."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from .models import build_vae
from .scenes import clutter, render_many


class Autoencoding:
    """L1 + 3·MSE + gradient + KL on cluttered scenes, random crops first and whole pictures at the end.

    Plain L1 on sparse scenes learns the shapes and loses the fill colours: hence the clutter and the squared term.
    """

    batch = 32
    learning_rate = 2e-3
    CROP, CROP_UNTIL = 32, 0.75  # pixels, share of the training

    def __init__(self, seed: int, bank: int = 8192) -> None:
        torch.manual_seed(seed)
        vae: Any = build_vae()
        self.vae = vae.to(memory_format=torch.channels_last)
        rng = np.random.default_rng((seed, 1))
        self.bank = render_many([clutter(rng, int(rng.choice((1, 2, 5, 5, 5, 6)))) for _ in range(bank)])

    @property
    def module(self) -> nn.Module:
        return self.vae

    def loss(self, rng: np.random.Generator, progress: float) -> dict[str, Tensor]:
        x = to_signed(self.bank[rng.integers(len(self.bank), size=self.batch)])
        if progress < self.CROP_UNTIL:
            top, left = rng.integers(0, x.shape[-1] - self.CROP, 2)
            x = x[..., top : top + self.CROP, left : left + self.CROP]
        x = x.to(self.vae.device).contiguous(memory_format=torch.channels_last)
        posterior = self.vae.encode(x).latent_dist
        noise = torch.from_numpy(rng.standard_normal(posterior.mean.shape, dtype=np.float32)).to(x.device)
        y = self.vae.decode(posterior.mean + posterior.std * noise).sample
        mse = F.mse_loss(y, x)
        loss = F.l1_loss(y, x) + 3 * mse + 0.25 * _gradient_l1(y, x) + 1e-4 * posterior.kl().mean() / x[0].numel() * 64
        return {"loss": loss, "psnr": 10 * torch.log10(4 / mse.detach())}

    def publish(self, averaged: Any, folder: Path) -> None:
        """Save the averaged autoencoder with unit latents."""
        unit_variance(averaged, to_signed(self.bank[:512]))
        averaged.to(memory_format=torch.contiguous_format)
        averaged.save_pretrained(folder)


def to_signed(images: np.ndarray) -> Float[Tensor, "n 3 h w"]:
    """uint8 [n, h, w, 3] → float32 in −1 … 1."""
    return rearrange(torch.from_numpy(np.ascontiguousarray(images)), "n h w c -> n c h w").float() / 127.5 - 1


def _gradient_l1(y: Tensor, x: Tensor) -> Tensor:
    return sum((F.l1_loss(y.diff(dim=d), x.diff(dim=d)) for d in (-1, -2)), x.new_zeros(()))


@torch.no_grad()
def unit_variance(vae: Any, images: Float[Tensor, "n 3 h w"]) -> None:
    """Fold each latent channel's standard deviation into the two convolutions around the latent.

    diffusers has one scalar factor for all channels, and theirs differ twofold.
    """
    std = torch.cat([vae.encode(part.to(vae.device)).latent_dist.mean for part in images.split(64)]).std(dim=(0, 2, 3))
    out, into, c = vae.encoder.conv_out, vae.decoder.conv_in, len(std)
    out.weight[:c] /= std[:, None, None, None]
    out.bias[:c] /= std
    out.bias[c:] -= 2 * std.log()
    into.weight *= std[None, :, None, None]
