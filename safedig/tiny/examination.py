"""The judge's examination: fresh renders, disturbed ones and garbled ones; nothing here is used to train a judge."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from .concepts import BACKGROUNDS, COLOURS, OBJECTS, PLACES
from .scenes import CENTRES, MIDDLE, SIZE, Placed, Scene, posed, render_many

Rng = np.random.Generator
Images = Float[Tensor, "n 3 64 64"]
BLUR, NOISE, SHIFT = 1.0, 0.08, 2  # the most a picture is disturbed by: σ and pixels; standard deviation of 0 … 1


def fresh_scenes(n: int, seed: int) -> list[Scene]:
    """Scenes of one or two objects of any kind, each a lottery of its own, posed as the tiny world poses."""
    rng = np.random.default_rng((seed, 101))
    return [_scene(PLACES if rng.random() < 0.5 else (str(rng.choice(PLACES)),), rng) for _ in range(n)]


def _scene(places: Sequence[str], rng: Rng) -> Scene:
    objects = tuple(Placed(str(rng.choice(OBJECTS)), str(rng.choice(list(COLOURS))), place) for place in places)
    return posed(Scene(objects, str(rng.choice(list(BACKGROUNDS)))), rng)


def pictures(scenes: Sequence[Scene]) -> Images:
    """Scenes drawn, as float32 in 0 … 1."""
    return rearrange(torch.from_numpy(render_many(scenes)), "n h w c -> n c h w").float() / 255


def disturbed(images: Images, seed: int) -> Images:
    """Each picture blurred, shifted and made noisy by up to `BLUR`, `SHIFT` and `NOISE`; all stay recognisable."""
    rng = np.random.default_rng((seed, 102))
    return torch.cat([_disturbed(image[None], rng) for image in images])


def _disturbed(image: Float[Tensor, "1 3 64 64"], rng: Rng) -> Float[Tensor, "1 3 64 64"]:
    right, down = rng.integers(-SHIFT, SHIFT + 1, 2)
    image = _moved(_blurred(image, rng.uniform(0.05, BLUR)), int(right), int(down))
    noise = torch.from_numpy(rng.standard_normal(image.shape, dtype=np.float32))
    return (image + rng.uniform(0, NOISE) * noise).clamp(0, 1)


def hybrid(rng: Rng) -> Images:
    """At one place, one half of one object and the other half of another, cut upright or level."""
    place, background = str(rng.choice(PLACES)), str(rng.choice(list(BACKGROUNDS)))
    names, colour = rng.choice(OBJECTS, 2, replace=False), str(rng.choice(list(COLOURS)))
    one, other = pictures([posed(Scene((Placed(str(n), colour, place),), background), rng) for n in names])
    cut = torch.zeros(1, SIZE, SIZE)
    if rng.random() < 0.5:
        cut[:, :, round(CENTRES[place]) :] = 1
    else:
        cut[:, round(MIDDLE) :] = 1
    return torch.lerp(one, other, cut)[None]


def half_denoised(rng: Rng) -> Images:
    """Between a picture and noise, of the grain of pixels or of the pipelines' latents."""
    x, cells = pictures([_scene(PLACES, rng)]), int(rng.choice((SIZE, SIZE // 4)))
    noise = torch.from_numpy(rng.standard_normal((1, 3, cells, cells), dtype=np.float32))
    noise = F.interpolate(0.5 + 0.3 * noise, (SIZE, SIZE), mode="bilinear").clamp(0, 1)
    return _blurred(torch.lerp(x, noise, rng.uniform(0.5, 0.8)), rng.uniform(0.5, 1.5))


def scrambled(rng: Rng) -> Images:
    """The blocks of a picture in another order."""
    x, side = pictures([_scene(PLACES, rng)]), int(rng.choice((8, 16)))
    blocks = rearrange(x, "1 c (a p) (b q) -> (a b) c p q", p=side, q=side)
    return rearrange(blocks[rng.permutation(len(blocks))], "(a b) c p q -> 1 c (a p) (b q)", a=SIZE // side)


def smeared(rng: Rng) -> Images:
    """A picture dragged along a line of 12 to 20 pixels."""
    x, angle, length = pictures([_scene(PLACES, rng)]), rng.uniform(0, np.pi), rng.uniform(12, 20)
    steps = np.outer(np.linspace(-0.5, 0.5, 21) * length, (np.cos(angle), np.sin(angle))).round().astype(int)
    return torch.stack([_moved(x, int(right), int(down)) for right, down in steps]).mean(0)


GARBLED: dict[str, Callable[[Rng], Images]] = {
    "hybrid": hybrid,
    "half-denoised": half_denoised,
    "scrambled": scrambled,
    "smeared": smeared,
}


def garbled(kind: str, n: int, seed: int) -> Images:
    """Pictures that show nothing known: one of the kinds of `GARBLED`."""
    rng = np.random.default_rng((seed, 103, list(GARBLED).index(kind)))
    return torch.cat([GARBLED[kind](rng) for _ in range(n)])


def _blurred(x: Images, sigma: float) -> Images:
    """Gaussian blur; the border is repeated."""
    taps = torch.exp(-(torch.arange(-6.0, 7.0) ** 2) / (2 * sigma**2))
    taps = (taps / taps.sum()).expand(3, 1, 1, -1)
    across = F.conv2d(F.pad(x, (6, 6, 0, 0), mode="replicate"), taps, groups=3)
    return F.conv2d(F.pad(across, (0, 0, 6, 6), mode="replicate"), taps.mT, groups=3)


def _moved(x: Images, right: int, down: int) -> Images:
    """Shifted by whole pixels, the border repeated."""
    reach = max(abs(right), abs(down))
    padded = F.pad(x, (reach,) * 4, mode="replicate")
    return padded[..., reach - down : reach - down + SIZE, reach - right : reach - right + SIZE]
