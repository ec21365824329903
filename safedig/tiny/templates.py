"""Renders taken apart: for every object, size and turn, how much of its colour, of white and of ink is in each pixel.

With the shares of a pixel, its value in any colour before any background is linear in that colour and background.
"""

from functools import cache
from typing import NamedTuple

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from .concepts import BACKGROUNDS, COLOURS, OBJECTS
from .pictograms import INK
from .scenes import CENTRES, MIDDLE, SIZE, Placed, Pose, Scene, render_many

RADII, TURNS = (11.3, 12.25, 13.2), (-10.0, -5.0, 0.0, 5.0, 10.0)  # pixels, degrees
POSES = len(RADII) * len(TURNS)
CELLS, STEP = 20, 2.0  # a window: 20 × 20 samples, 2 pixels apart
SOFTNESS = (1 + 1 / 12) ** 0.5  # pixels: standard deviation of a smoothed edge, the pixel itself included


class Templates(NamedTuple):
    """All templates, objects outermost, then sizes, then turns; and the sums that squared errors are made of."""

    shares: Float[Tensor, "t 3 cells cells"]  # of the object's colour, of white, and of everything in front
    whole: Float[Tensor, "3 t"]  # sums over the window: colour², white², colour·white
    rows: Float[Tensor, "3 cells t"]  # sums over each row: everything², everything·colour, everything·white


@cache
def templates() -> Templates:
    """Render every object in two colours before two backgrounds and solve for the shares: half a second, once."""
    pair = (("red", "day"), ("blue", "field"))
    poses = [Pose(SIZE / 2 - CENTRES["left"], SIZE / 2 - MIDDLE, radius, turn) for radius in RADII for turn in TURNS]
    away, tones = [], []
    for colour, background in pair:
        behind = pixels([Scene((), background)])
        scenes = [Scene((Placed(name, colour, "left", pose),), background) for name in OBJECTS for pose in poses]
        away.append(pixels(scenes) - behind)
        hue, white = (colours() - ink())[list(COLOURS).index(colour)], 1 - ink()
        flat = torch.stack([hue, white], 1)
        tones.append(torch.cat([repeat(flat, "c s -> y c s", y=SIZE), (ink() - behind[0, :, :, 0].T)[..., None]], 2))
    solve = torch.linalg.pinv(torch.cat(tones, 1))  # for each row of pixels: shares from the six channels
    shares = smoothed(torch.einsum("ysc,tcyx->tsyx", solve, torch.cat(away, 1)).clamp(0, 1))
    shares = sampled(shares, centre_of_mass(shares[:, 2]))
    colour, white, everything = shares.unbind(1)
    whole = torch.stack([(a * b).sum((1, 2)) for a, b in ((colour, colour), (white, white), (colour, white))])
    rows = torch.stack([(everything * other).sum(2).T for other in (everything, colour, white)])
    return Templates(shares.contiguous(), whole, rows)


@cache
def bands() -> Float[Tensor, "backgrounds 2 3"]:
    """The colours of sky and ground."""
    return torch.tensor([[b.sky, b.ground] for b in BACKGROUNDS.values()]) / 255


def sky_share(row: Float[Tensor, "..."], horizon: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """How much of a row of a smoothed picture is sky; row `horizon` is the first of the ground."""
    return torch.special.ndtr((horizon - 0.5 - row) / SOFTNESS)


@cache
def colours() -> Float[Tensor, "colours 3"]:
    """What the objects can be painted with, 0 … 1."""
    return torch.tensor(list(COLOURS.values())) / 255


@cache
def ink() -> Float[Tensor, " 3"]:
    """What outlines are drawn with, 0 … 1."""
    return torch.tensor(INK) / 255


@cache
def offsets() -> Float[Tensor, " cells"]:
    """Where a window's samples lie, in cells off its middle."""
    return torch.arange(CELLS) - (CELLS - 1) / 2


def sampled(x: Float[Tensor, "m c 64 64"], centre: Float[Tensor, "m 2"]) -> Float[Tensor, "m c cells cells"]:
    """A window of each picture around its centre (x, y; pixels); beyond the border lies the border's own colour."""
    at = (centre[:, :, None] + offsets() * STEP + 0.5) * 2 / SIZE - 1
    across, down = repeat(at[:, 0], "m x -> m y x", y=CELLS), repeat(at[:, 1], "m y -> m y x", x=CELLS)
    return F.grid_sample(x, torch.stack([across, down], -1), padding_mode="border", align_corners=False)


def centre_of_mass(mass: Float[Tensor, "m h w"]) -> Float[Tensor, "m 2"]:
    """x and y, pixels."""
    total = mass.sum((1, 2)).clamp_min(1e-6)
    x, y = (mass.sum(dim) @ torch.arange(mass.shape[3 - dim], dtype=mass.dtype) for dim in (1, 2))
    return torch.stack([x, y], 1) / total[:, None]


def smoothed(x: Float[Tensor, "n c 64 64"]) -> Float[Tensor, "n c 64 64"]:
    """A Gaussian blur of σ = 1 pixel, against noise and aliasing."""
    return _smoothing() @ x @ _smoothing().T


@cache
def _smoothing() -> Float[Tensor, "64 64"]:
    """One axis of that blur; beyond the border lies the border's own colour."""
    around = torch.arange(-8, SIZE + 8)
    weights = torch.softmax(-(torch.arange(SIZE)[:, None] - around).float().square() / 2, 1)
    return torch.zeros(SIZE, SIZE).index_add_(1, around.clamp(0, SIZE - 1), weights)


def pixels(scenes: list[Scene]) -> Float[Tensor, "n 3 64 64"]:
    """Renders, 0 … 1."""
    return rearrange(torch.from_numpy(render_many(scenes)), "n h w c -> n c h w").float() / 255
