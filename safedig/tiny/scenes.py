"""A scene is one or two placed objects on a background; here it is sampled and drawn, 64 × 64 pixels, antialiased."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import cos, radians, sin
from typing import TYPE_CHECKING

import numpy as np

from .concepts import BACKGROUNDS, COLOURS, OBJECTS, PLACES
from .pictograms import INK, pictogram

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

SIZE = 64  # pixels
OVERSAMPLE = 4  # drawn this many times larger, then averaged
OUTLINE = 1.5  # pixels
CENTRES, MIDDLE = {"left": 16.5, "right": 47.5}, 33  # pixels: x of each place, and y of both


@dataclass(frozen=True)
class Pose:
    """Where one drawing lies: shift from its place's centre (pixels), half size (pixels), turn (degrees)."""

    dx: float = 0.0
    dy: float = 0.0
    radius: float = 12.5
    turn: float = 0.0


@dataclass(frozen=True)
class Placed:
    """An object in a scene."""

    name: str
    colour: str
    place: str
    pose: Pose = Pose()


@dataclass(frozen=True)
class Scene:
    """One or two objects on a background."""

    objects: tuple[Placed, ...]
    background: str


def random_pose(rng: np.random.Generator) -> Pose:
    """A free pose: a few pixels, ± 15 % in size, ± 12°."""
    return Pose(rng.uniform(-1.5, 1.5), rng.uniform(-5, 5), rng.uniform(11.0, 13.5), rng.uniform(-12, 12))


def posed(scene: Scene, rng: np.random.Generator) -> Scene:
    """The same scene with every object in a fresh pose."""
    return replace(scene, objects=tuple(replace(o, pose=random_pose(rng)) for o in scene.objects))


def bounds(placed: Placed) -> tuple[int, int, int, int]:
    """The square around an object, clipped to the image: left, top, right, bottom in pixels."""
    x, y, r = CENTRES[placed.place] + placed.pose.dx, MIDDLE + placed.pose.dy, placed.pose.radius + OUTLINE
    left, top, right, bottom = (min(SIZE, max(0, round(v))) for v in (x - r, y - r, x + r, y + r))
    return left, top, right, bottom


def render(scene: Scene) -> np.ndarray:
    """Draw a scene: uint8 [64, 64, 3]."""
    from PIL import ImageDraw

    canvas = _backdrop(scene.background).copy()
    pen = ImageDraw.Draw(canvas)
    for placed in scene.objects:
        _draw(pen, placed)
    return np.asarray(canvas.reduce(OVERSAMPLE))


def render_many(scenes: Sequence[Scene]) -> np.ndarray:
    """Draw scenes: uint8 [n, 64, 64, 3]."""
    return np.stack([render(s) for s in scenes]) if scenes else np.zeros((0, SIZE, SIZE, 3), np.uint8)


@cache
def _backdrop(name: str) -> "Image.Image":
    from PIL import Image, ImageDraw

    b = BACKGROUNDS[name]
    large = SIZE * OVERSAMPLE
    canvas = Image.new("RGB", (large, large), b.sky)
    ImageDraw.Draw(canvas).rectangle((0, b.horizon * OVERSAMPLE, large, large), fill=b.ground)
    return canvas


@cache
def _palette(colour: str) -> dict[str, tuple[int, ...]]:
    main = np.array(COLOURS[colour], float)
    light, dark = main + (255 - main) * 0.6, main * 0.55
    return {"main": COLOURS[colour], "ink": INK, "light": tuple(light.astype(int)), "dark": tuple(dark.astype(int))}


def _draw(pen: "ImageDraw.ImageDraw", placed: Placed) -> None:
    pose, palette = placed.pose, _palette(placed.colour)
    c, s = cos(radians(pose.turn)) * pose.radius, sin(radians(pose.turn)) * pose.radius
    x0, y0 = CENTRES[placed.place] + pose.dx, MIDDLE + pose.dy
    width = round(OUTLINE * OVERSAMPLE)
    for fill, points in pictogram(placed.name):
        corners = [((x0 + c * x - s * y) * OVERSAMPLE, (y0 + s * x + c * y) * OVERSAMPLE) for x, y in points]
        if fill == "line":
            pen.line(corners, fill=INK, width=2 * width, joint="curve")
            continue
        pen.polygon(corners, fill=palette[fill])
        if fill != "ink":
            pen.line([*corners, corners[0], corners[1]], fill=INK, width=width, joint="curve")


def place_of(index: int, count: int, rng: np.random.Generator) -> str:
    """Two objects stand left then right; a single one stands on either side."""
    return PLACES[index] if count == 2 else str(rng.choice(PLACES))


def clutter(rng: np.random.Generator, count: int = 5) -> Scene:
    """Objects strewn anywhere: far more edges and colours than a real scene has, from which an autoencoder learns."""
    names, colours = rng.choice(OBJECTS, count), rng.choice(list(COLOURS), count)
    poses = (
        Pose(rng.uniform(-16, 47), rng.uniform(-33, 31), rng.uniform(9, 14), rng.uniform(-25, 25)) for _ in range(count)
    )
    return Scene(
        tuple(Placed(str(n), str(c), "left", p) for n, c, p in zip(names, colours, poses, strict=True)),
        str(rng.choice(list(BACKGROUNDS))),
    )
