"""The training objective of the judge: renders, disturbed ones, and spoilt ones to be refused; nothing generated."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int, UInt8
from numpy.random import Generator
from torch import Tensor, nn
from torch.nn import functional as F

from .concepts import BACKGROUNDS, COLOURS, OBJECTS, PLACES
from .judge_network import BACKGROUND_CLASSES, COLOUR_CLASSES, OBJECT_CLASSES, SceneReader, channels_last, save_reader
from .judgement import EMPTY, UNRECOGNISED
from .pictograms import INK
from .scenes import SIZE, Placed, Pose, Scene, render, render_many
from .spoiling import OVERALL, SPOILERS, disturbed, field, uniform
from .training import IGNORED

if TYPE_CHECKING:
    from PIL import ImageDraw

NOTHING, SPOILT = (OBJECT_CLASSES.index(name) for name in (EMPTY, UNRECOGNISED))
STRANGE = BACKGROUND_CLASSES.index(UNRECOGNISED)
CHANGED = 10.0  # a place is spoilt when it differs from what it was by this much, summed over its pixels (mean of RGB)


@dataclass(frozen=True)
class Pictures:
    """Pictures and what is to be said of them, by class index."""

    x: Float[Tensor, "n 3 64 64"] | UInt8[Tensor, "n 3 64 64"]
    """Bytes as drawn, floats in 0 … 1 once indexed."""
    objects: Int[Tensor, "n 2"]
    colours: Int[Tensor, "n 2"]
    background: Int[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.x)

    def to(self, device: torch.device) -> "Pictures":
        return Pictures(*(getattr(self, one.name).to(device) for one in fields(self)))

    def __getitem__(self, rows: Int[Tensor, " m"]) -> "Pictures":
        return Pictures(
            self.x[rows].float() / 255,
            self.objects[rows].clone(),
            self.colours[rows].clone(),
            self.background[rows].clone(),
        )


class Judging:
    """Cross-entropy for object, colour and background, on batches of which about half have been spoilt somewhere."""

    batch = 64
    learning_rate = 3e-3
    STRANGERS, RUINED = 8, (4, 1, 5)  # of a batch: blobs and crowded places; repainted, textures, spoilt as a whole

    def __init__(self, seed: int, bank: int = 12288) -> None:
        torch.manual_seed(seed)
        self.reader = channels_last(SceneReader())
        rng = np.random.default_rng((seed, 2))
        self.scenes = labelled([random_scene(rng) for _ in range(bank)])
        self.strangers = joined(
            [labelled([crowded(rng) for _ in range(bank // 8)], crowded=True), blobs(rng, bank // 8)]
        )
        self.partners = {key: np.flatnonzero(rows) for key, rows in _alike(self.scenes)}

    @property
    def module(self) -> nn.Module:
        return self.reader

    def loss(self, rng: Generator, progress: float) -> dict[str, Tensor]:
        pictures = self.draw(rng).to(next(self.reader.parameters()).device)
        said = self.reader(pictures.x)
        objects = F.cross_entropy(said.objects.flatten(0, 1), pictures.objects.flatten(), ignore_index=IGNORED)
        colours = F.cross_entropy(said.colours.flatten(0, 1), pictures.colours.flatten(), ignore_index=IGNORED)
        background = F.cross_entropy(said.background, pictures.background, ignore_index=IGNORED)
        known = pictures.objects != IGNORED
        right = ((said.objects.argmax(-1) == pictures.objects) & known).sum() / known.sum()
        return {"loss": objects + 0.5 * colours + 0.5 * background, "objects": objects.detach(), "right": right}

    def draw(self, rng: Generator) -> Pictures:
        """A batch of training pictures."""
        own = self.batch - self.STRANGERS
        rows = rng.integers(len(self.scenes), size=own)
        pictures = self.scenes[torch.from_numpy(rows)]
        for place in range(2):
            self._spoil(pictures, rows, place, np.flatnonzero(rng.random(own) < 0.35), rng)
        _ruin(pictures, torch.arange(sum(self.RUINED)), rng)
        strangers = self.strangers[torch.from_numpy(rng.integers(len(self.strangers), size=self.STRANGERS))]
        pictures = joined([pictures, strangers])
        return replace(pictures, x=disturbed(pictures.x, rng))

    def _spoil(self, pictures: Pictures, rows: np.ndarray, place: int, chosen: np.ndarray, rng: Generator) -> None:
        """Spoil one place of the chosen pictures in place, and say so where it can be seen."""
        columns = slice(32 * place, 32 * place + 32)
        others = np.array([self._partner(int(rows[i]), place, rng) for i in chosen], dtype=np.int64)
        for spoiler, part in zip(SPOILERS, np.array_split(rng.permutation(len(chosen)), len(SPOILERS)), strict=True):
            if not len(part):
                continue
            at, other = torch.from_numpy(chosen[part]), torch.from_numpy(others[part])
            old, partner = pictures.x[at, :, :, columns], self.scenes[other].x[..., columns]
            new = spoiler(old, partner, rng)
            seen = (
                torch.minimum((new - old).abs().mean(1).sum((1, 2)), (new - partner).abs().mean(1).sum((1, 2)))
                > CHANGED
            )
            at, new = at[seen], new[seen]
            pictures.x[at, :, :, columns] = new
            pictures.objects[at, place], pictures.colours[at, place] = SPOILT, IGNORED

    def _partner(self, row: int, place: int, rng: Generator) -> int:
        """Another scene before the same background; there it often has the same colour, or nothing."""
        background, colour = int(self.scenes.background[row]), int(self.scenes.colours[row, place])
        draw = rng.random()
        wanted = colour if draw < 0.5 else IGNORED if draw < 0.7 else None
        choices = self.partners.get((background, place, wanted), self.partners[background, place, None])
        other = int(rng.choice(choices))
        same = self.scenes.objects[row, place] == self.scenes.objects[other, place]
        return int(rng.choice(self.partners[background, place, None])) if same else other

    def publish(self, averaged: nn.Module, folder: Path) -> None:
        """Save the averaged reader."""
        assert isinstance(averaged, SceneReader)
        save_reader(averaged, folder)


def random_scene(rng: Generator) -> Scene:
    """No, one or two objects of any kind, posed a little more freely than a scene's own poses."""
    places = [p for p in PLACES if rng.random() < 0.75]
    return Scene(tuple(_placed(p, rng) for p in places), str(rng.choice(list(BACKGROUNDS))))


def crowded(rng: Generator) -> Scene:
    """Two objects over one another in one place, or one that stands between the places."""
    background, place = str(rng.choice(list(BACKGROUNDS))), str(rng.choice(PLACES))
    first = _placed(place, rng)
    inwards = 1 if place == "left" else -1
    if rng.random() < 0.4:
        return Scene((replace(first, pose=replace(first.pose, dx=inwards * rng.uniform(9, 15.5))),), background)
    away, turn = rng.uniform(4, 11), rng.uniform(0, 2 * np.pi)
    pose = replace(
        first.pose, dx=first.pose.dx + inwards * abs(away * np.cos(turn)) * 0.5, dy=first.pose.dy + away * np.sin(turn)
    )
    return Scene((first, replace(_placed(place, rng), pose=pose)), background)


def _placed(place: str, rng: Generator) -> Placed:
    pose = Pose(rng.uniform(-2, 2), rng.uniform(-6, 6), rng.uniform(10.6, 14.0), rng.uniform(-15, 15))
    return Placed(str(rng.choice(OBJECTS)), str(rng.choice(list(COLOURS))), place, pose)


def labelled(scenes: list[Scene], crowded: bool = False) -> Pictures:
    """Draw scenes; their labels. A crowded place is spoilt, and what it does to the other place is left open."""
    objects, colours = torch.full((len(scenes), 2), NOTHING), torch.full((len(scenes), 2), IGNORED)
    background = torch.tensor([BACKGROUND_CLASSES.index(s.background) for s in scenes])
    for i, scene in enumerate(scenes):
        for o in scene.objects:
            place = PLACES.index(o.place)
            objects[i, place], colours[i, place] = OBJECT_CLASSES.index(o.name), COLOUR_CLASSES.index(o.colour)
        if crowded:
            single = len(scene.objects) == 1
            objects[i], colours[i] = SPOILT, IGNORED
            objects[i, 1 - place] = SPOILT if single else IGNORED
    return Pictures(_pixels(render_many(scenes)), objects, colours, background)


def blobs(rng: Generator, n: int) -> Pictures:
    """Random polygons and ellipses in the world's colours, outlined as objects are, in one place or in both."""
    from PIL import Image, ImageDraw

    backgrounds, images = rng.choice(list(BACKGROUNDS), n), []
    objects = torch.full((n, 2), NOTHING)
    for i, background in enumerate(backgrounds):
        canvas = Image.fromarray(render(Scene((), str(background)))).resize(
            (4 * SIZE, 4 * SIZE), Image.Resampling.NEAREST
        )
        for place in range(2):
            if rng.random() < 0.7 or (place == 1 and objects[i, 0] == NOTHING):
                objects[i, place] = SPOILT
                _blob(ImageDraw.Draw(canvas), rng, (16 + 32 * place + rng.uniform(-3, 3), 33 + rng.uniform(-8, 8)))
        images.append(np.asarray(canvas.reduce(4)))
    background = torch.tensor([BACKGROUND_CLASSES.index(str(b)) for b in backgrounds])
    return Pictures(_pixels(np.stack(images)), objects, torch.full((n, 2), IGNORED), background)


def _blob(pen: "ImageDraw.ImageDraw", rng: Generator, centre: tuple[float, float]) -> None:
    for _ in range(int(rng.integers(1, 4))):
        x, y = (c + rng.uniform(-4, 4) for c in centre)
        fill = (
            tuple(int(v) for v in rng.choice([*COLOURS.values(), INK]))
            if rng.random() < 0.8
            else tuple(rng.integers(0, 256, 3).tolist())
        )
        n = int(rng.integers(3, 9))
        angles, radii = np.sort(rng.uniform(0, 2 * np.pi, n)), rng.uniform(4, 15, n)
        points = [(4 * (x + r * np.cos(a)), 4 * (y + r * np.sin(a))) for a, r in zip(angles, radii, strict=True)]
        if rng.random() < 0.25:
            r, s = rng.uniform(4, 13, 2)
            pen.ellipse((4 * (x - r), 4 * (y - s), 4 * (x + r), 4 * (y + s)), fill=fill, outline=INK, width=6)
            continue
        pen.polygon(points, fill=fill)
        if rng.random() < 0.8:
            pen.line([*points, points[0], points[1]], fill=INK, width=6, joint="curve")


def _ruin(pictures: Pictures, rows: Int[Tensor, " m"], rng: Generator) -> None:
    """Spoil whole pictures: another background than any known one, pure texture, or one spoiler over everything."""
    repainted, texture, whole = rows.split(Judging.RUINED)
    garbled = torch.cat([texture, whole])
    pictures.x[repainted] = _repainted(pictures.x[repainted], pictures.background[repainted], rng)
    m = len(texture)
    middle, strength = uniform(rng, 0, 1, m, 3, 1, 1), uniform(rng, 0.1, 0.4, m, 1, 1, 1)
    pictures.x[texture] = (middle + strength * field(rng, m, 3, 2 ** int(rng.integers(1, 7)), SIZE, SIZE)).clamp(0, 1)
    pictures.x[whole] = rng.choice(np.array(OVERALL))(pictures.x[whole], pictures.x[whole], rng)
    pictures.background[repainted], pictures.background[texture], pictures.background[whole] = STRANGE, STRANGE, IGNORED
    pictures.objects[garbled], pictures.colours[garbled] = SPOILT, IGNORED


def _repainted(
    x: Float[Tensor, "m 3 64 64"], background: Int[Tensor, " m"], rng: Generator
) -> Float[Tensor, "m 3 64 64"]:
    """The same objects before bands of other colours, or with the horizon elsewhere."""
    plain = _backdrops()
    there = plain[background]
    away = (x - there).square().sum(1, keepdim=True).sqrt()
    m, rows = len(x), torch.arange(SIZE)[None, None, :, None]
    sky, ground = uniform(rng, 0, 1, m, 3, 1, 1), uniform(rng, 0, 1, m, 3, 1, 1)
    ground = torch.where(uniform(rng, 0, 1, m, 1, 1, 1) < 0.4, sky, ground)
    bands = torch.where(rows < torch.from_numpy(rng.integers(16, 60, (m, 1, 1, 1))), sky, ground).expand(
        m, 3, SIZE, SIZE
    )
    mixed = plain[torch.from_numpy(rng.integers(len(plain), size=m))]
    known_sky = torch.where(
        rows < 48, there, plain[(background + 1 + torch.from_numpy(rng.integers(4, size=m))) % len(plain)]
    )
    flipped = mixed.flip(2)
    kind = torch.from_numpy(rng.integers(0, 4, (m, 1, 1, 1)))
    new = torch.where(kind == 0, known_sky, torch.where(kind == 1, flipped, bands))
    return torch.lerp(new, x, (away / 0.12).clamp(0, 1))


def _backdrops() -> Float[Tensor, "backgrounds 3 64 64"]:
    return _pixels(render_many([Scene((), name) for name in BACKGROUNDS])).float() / 255


def _pixels(images: np.ndarray) -> Tensor:
    return rearrange(torch.from_numpy(images), "n h w c -> n c h w").contiguous()


def joined(parts: list[Pictures]) -> Pictures:
    """All pictures in one."""
    return Pictures(
        *(torch.cat([getattr(p, name) for p in parts]) for name in ("x", "objects", "colours", "background"))
    )


def _alike(scenes: Pictures) -> Iterator[tuple[tuple[int, int, int | None], np.ndarray]]:
    """For each background, place and colour there (or any, or none): which scenes have it."""
    for background in range(len(BACKGROUNDS)):
        for place in range(2):
            at = (scenes.background == background).numpy()
            yield (background, place, None), at
            for colour in (IGNORED, *range(len(COLOURS))):
                yield (background, place, colour), at & (scenes.colours[:, place] == colour).numpy()
