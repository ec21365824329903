"""Pictures spoilt until they show nothing known: hybrids, half-denoised, scrambled, smeared; and only disturbed.

A spoiler takes one place of some pictures, `x`, the same place of others before the same background, `y`, and a
generator. Labels are given elsewhere.
"""

from collections.abc import Callable
from math import pi

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from numpy.random import Generator
from torch import Tensor
from torch.nn import functional as F

CENTRE = (16.0, 33.0)  # x and y of a place's middle in its own 32 columns, pixels
Spoiler = Callable[[Tensor, Tensor, Generator], Tensor]


def uniform(rng: Generator, low: float, high: float, *shape: int) -> Tensor:
    """float32 numbers from `low` to `high`."""
    return torch.from_numpy(rng.random(shape, dtype=np.float32)) * (high - low) + low


def normal(rng: Generator, *shape: int) -> Tensor:
    """float32 standard normal numbers."""
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))


def blurred(x: Float[Tensor, "n c h w"], sigma: Float[Tensor, " n"]) -> Float[Tensor, "n c h w"]:
    """Gaussian blur, one σ (pixels) a picture; the border is not darkened."""
    down, across = (_smoothing(size, sigma)[:, None] for size in x.shape[-2:])
    return down @ x @ across.mT


def _smoothing(size: int, sigma: Tensor) -> Tensor:
    apart = torch.arange(size)[:, None] - torch.arange(size)
    squares = apart.square() / (2 * sigma.clamp_min(0.05).square())[:, None, None]
    weights = torch.exp(-squares.clamp_max(30))  # no denormal numbers: they are slow
    return weights / weights.sum(-1, keepdim=True)


def field(rng: Generator, n: int, channels: int, cells: int, height: int, width: int) -> Float[Tensor, "n c h w"]:
    """A smooth random field of about unit variance, `cells` bumps high."""
    coarse = normal(rng, n, channels, cells, max(2, cells * width // height))
    smooth = F.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)
    return smooth / smooth[..., ::2, ::2].std(dim=(1, 2, 3), keepdim=True).clamp_min(1e-3)


def warped(x: Float[Tensor, "n c h w"], shift: Float[Tensor, "n 2 h w"]) -> Float[Tensor, "n c h w"]:
    """Move every pixel by its own shift (x, y; pixels)."""
    h, w = x.shape[-2:]
    ys, xs = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
    at = torch.stack([(xs + shift[:, 0]) * 2 / w - 1, (ys + shift[:, 1]) * 2 / h - 1], dim=-1)
    return F.grid_sample(x, at, padding_mode="border", align_corners=False)


def halves(x: Tensor, y: Tensor, rng: Generator) -> Tensor:
    """One side of x, the other of y, cut through the middle: upright, level or at any angle."""
    n, h, w = len(x), x.shape[-2], x.shape[-1]
    angle = torch.where(
        uniform(rng, 0, 1, n) < 0.7, torch.from_numpy(rng.integers(0, 4, n)) * pi / 2, uniform(rng, 0, 2 * pi, n)
    )
    right = (torch.arange(w) - CENTRE[0])[None, None] + uniform(rng, -2, 2, n, 1, 1)
    below = (torch.arange(h) - CENTRE[1])[None, :, None] + uniform(rng, -4, 4, n, 1, 1)
    across = right * angle.cos()[:, None, None] + below * angle.sin()[:, None, None]
    share = torch.sigmoid(across / uniform(rng, 0.1, 1.0, n, 1, 1))[:, None]
    return torch.lerp(x, y, share)


def patchwork(x: Tensor, y: Tensor, rng: Generator) -> Tensor:
    """Irregular pieces of x and y."""
    share = torch.sigmoid(field(rng, len(x), 1, 10, *x.shape[-2:]) * 8)
    return torch.lerp(x, y, share)


def ghosts(x: Tensor, y: Tensor, rng: Generator) -> Tensor:
    """Both at once, each half transparent."""
    return torch.lerp(x, y, uniform(rng, 0.33, 0.67, len(x), 1, 1, 1))


def half_denoised(x: Tensor, y: Tensor, rng: Generator) -> Tensor:
    """Mixed with noise of any grain, then smoothed."""
    n, (h, w) = len(x), x.shape[-2:]
    grain = 2 ** int(rng.integers(2, 7))
    noise = 0.5 + uniform(rng, 0.2, 0.5, n, 1, 1, 1) * field(rng, n, 3, min(grain, h), h, w)
    return blurred(torch.lerp(x, noise, uniform(rng, 0.4, 0.95, n, 1, 1, 1)), uniform(rng, 0, 2, n))


def fogged(x: Tensor, y: Tensor, rng: Generator) -> Tensor:
    """Blurred beyond recognition."""
    return blurred(x, uniform(rng, 3.0, 6.0, len(x)))


def scrambled(x: Tensor, y: Tensor, rng: Generator) -> Tensor:
    """Blocks of 8 or 16 pixels in another order, of the whole place or of its middle."""
    size = int(rng.choice((8, 16)))
    top, bottom = (0, x.shape[-2]) if rng.random() < 0.5 else (16, 48)
    blocks = rearrange(x[:, :, top:bottom], "n c (a p) (b q) -> n (a b) c p q", p=size, q=size)
    order = uniform(rng, 0, 1, len(x), blocks.shape[1]).argsort(1)
    blocks = blocks[torch.arange(len(x))[:, None], order]
    out = x.clone()
    out[:, :, top:bottom] = rearrange(blocks, "n (a b) c p q -> n c (a p) (b q)", b=x.shape[-1] // size)
    return out


def smeared(x: Tensor, y: Tensor, rng: Generator) -> Tensor:
    """Dragged along a line, or pulled about by a strong random displacement."""
    n, (h, w) = len(x), x.shape[-2:]
    if rng.random() < 0.5:
        shift = uniform(rng, 3.0, 6.0, n, 1, 1, 1) * field(rng, n, 2, int(rng.integers(6, 14)), h, w)
        return warped(x, shift)
    angle, length = uniform(rng, 0, pi, n), uniform(rng, 10, 22, n)
    step = torch.stack([angle.cos(), angle.sin()], 1)[:, :, None, None].expand(n, 2, h, w) * length[:, None, None, None]
    return torch.stack([warped(x, step * t) for t in torch.linspace(-0.5, 0.5, 9).tolist()]).mean(0)


SPOILERS: tuple[Spoiler, ...] = (
    *(halves, halves, halves, halves, patchwork, ghosts, ghosts),
    *(half_denoised, fogged, scrambled, smeared, smeared),
)
OVERALL: tuple[Spoiler, ...] = (*(half_denoised,) * 3, fogged, scrambled, smeared)  # for whole pictures


def moved(x: Tensor, rng: Generator) -> Tensor:
    """Shifted by up to 3 px and pulled about by up to a pixel or so: lines drawn by a hand that is not quite steady."""
    shift = torch.from_numpy(rng.integers(-3, 4, (len(x), 2, 1, 1))).float()
    wobble = field(rng, len(x), 2, int(rng.integers(6, 17)), *x.shape[-2:])
    return warped(x, shift + uniform(rng, 0, 1.1, len(x), 1, 1, 1) * wobble)


def smudged(x: Tensor, rng: Generator) -> Tensor:
    """Blurred by σ ≤ 2 px here, tinted by up to a third there: as a model draws what it half knows."""
    n, (h, w) = len(x), x.shape[-2:]
    here, there = (torch.sigmoid(4 * field(rng, n, 1, 10, h, w) - 3) for _ in range(2))
    x = torch.lerp(x, blurred(x, uniform(rng, 1, 2, n)), here)
    return torch.lerp(x, uniform(rng, 0, 1, n, 3, 1, 1).expand_as(x), there * uniform(rng, 0, 0.35, n, 1, 1, 1))


def bled(x: Tensor, rng: Generator) -> Tensor:
    """Colours run by σ ≤ 2 px, and small casts that vary over the picture."""
    grey = x.mean(1, keepdim=True)
    cast = uniform(rng, 0, 0.05, len(x), 1, 1, 1) * field(rng, len(x), 3, int(rng.integers(4, 20)), *x.shape[-2:])
    return grey + blurred(x - grey, uniform(rng, 0, 2, len(x))) + cast


def softened(x: Tensor, rng: Generator) -> Tensor:
    """Blurred, σ ≤ 1.2 px."""
    return blurred(x, uniform(rng, 0, 1.2, len(x)))


def relit(x: Tensor, rng: Generator) -> Tensor:
    """Contrast ± 6 % and brightness ± .04 in each colour."""
    gain, lift = uniform(rng, 0.94, 1.06, len(x), 3, 1, 1), uniform(rng, -0.04, 0.04, len(x), 3, 1, 1)
    return (x - 0.5) * gain + 0.5 + lift


def grainy(x: Tensor, rng: Generator) -> Tensor:
    """White noise, standard deviation ≤ .1."""
    return x + uniform(rng, 0, 0.1, len(x), 1, 1, 1) * normal(rng, *x.shape)


DISTURBANCES: tuple[tuple[float, Callable[[Tensor, Generator], Tensor]], ...] = (
    (0.6, moved), (0.4, smudged), (0.4, bled), (0.6, softened), (0.6, relit), (0.6, grainy),
)  # fmt: skip


def disturbed(x: Float[Tensor, "n 3 h w"], rng: Generator) -> Float[Tensor, "n 3 h w"]:
    """The same pictures as a good autoencoder might give them back: each disturbed in some ways, all recognisable."""
    x = x.clone()
    for share, disturb in DISTURBANCES:
        rows = torch.from_numpy(np.flatnonzero(rng.random(len(x)) < share))
        if len(rows):
            x[rows] = disturb(x[rows], rng)
    return x.clamp(0, 1)
