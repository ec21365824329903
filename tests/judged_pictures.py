"""Held-out pictures for the judge, whole and spoilt; drawn here independently of what it was trained with."""

import numpy as np
from PIL import Image, ImageFilter

from safedig.tiny.concepts import BACKGROUNDS, COLOURS, OBJECTS, PLACES
from safedig.tiny.scenes import CENTRES, MIDDLE, Placed, Scene, posed, random_pose, render

Rng = np.random.Generator


def scenes(n: int, seed: int) -> list[Scene]:
    """Random scenes of one or two objects, in poses as the tiny world draws them."""
    rng = np.random.default_rng((seed, 77))
    return [_scene(rng, PLACES if rng.random() < 0.5 else (str(rng.choice(PLACES)),)) for _ in range(n)]


def _scene(rng: Rng, places: tuple[str, ...], names: tuple[str, ...] = OBJECTS) -> Scene:
    objects = tuple(Placed(str(rng.choice(names)), str(rng.choice(list(COLOURS))), place) for place in places)
    return posed(Scene(objects, str(rng.choice(list(BACKGROUNDS)))), rng)


def disturbed(images: np.ndarray, seed: int) -> np.ndarray:
    """Blur σ ≤ 1 px, shift ≤ 2 px, noise ≤ .08; float32 in 0 … 1."""
    rng = np.random.default_rng((seed, 78))
    out = []
    for image in images:
        x = (
            np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(rng.uniform(0, 1)))).astype(np.float32)
            / 255
        )
        right, down = rng.integers(-2, 3, 2)
        x = np.pad(x, ((2, 2), (2, 2), (0, 0)), mode="edge")[2 - down : 66 - down, 2 - right : 66 - right]
        out.append(np.clip(x + rng.uniform(0, 0.08) * rng.standard_normal(x.shape), 0, 1))
    return np.stack(out).astype(np.float32)


def hybrid(rng: Rng) -> np.ndarray:
    """In one place, half of one object and half of another, or both half transparent; often in one colour."""
    place = str(rng.choice(PLACES))
    a, b = (str(n) for n in rng.choice(OBJECTS, 2, replace=False))
    colours = [str(c) for c in rng.choice(list(COLOURS), 2)]
    colours[1] = colours[0] if rng.random() < 0.5 else colours[1]
    background, pose = str(rng.choice(list(BACKGROUNDS))), random_pose(rng)
    x, y = (render(Scene((Placed(n, c, place, pose),), background)) for n, c in zip((a, b), colours, strict=True))
    share, kind = np.zeros((64, 64, 1)), rng.integers(3)
    if kind == 0:
        share[:, : round(CENTRES[place] + pose.dx)] = 1
    elif kind == 1:
        share[: round(MIDDLE + pose.dy)] = 1
    else:
        share[:] = rng.uniform(0.35, 0.65)
    return np.rint(share * x + (1 - share) * y).astype(np.uint8)


def half_denoised(rng: Rng) -> np.ndarray:
    """(1 − s) · picture + s · noise with s ≥ .4, then smoothed."""
    x = render(_scene(rng, PLACES if rng.random() < 0.5 else (str(rng.choice(PLACES)),))).astype(float) / 255
    noise = np.clip(0.5 + 0.3 * rng.standard_normal(x.shape), 0, 1)
    s = rng.uniform(0.4, 0.8)
    return _filtered((1 - s) * x + s * noise, ImageFilter.GaussianBlur(rng.uniform(0.5, 1.5)))


def scrambled(rng: Rng) -> np.ndarray:
    """The blocks of one object's place, 8 or 16 pixels wide, in another order."""
    place, size = rng.integers(2), int(rng.choice((8, 16)))
    x = render(_scene(rng, (PLACES[place],))).copy()
    part = x[:, 32 * place : 32 * place + 32]
    blocks = part.reshape(64 // size, size, 32 // size, size, 3).swapaxes(1, 2).reshape(-1, size, size, 3)
    blocks = blocks[rng.permutation(len(blocks))].reshape(64 // size, 32 // size, size, size, 3).swapaxes(1, 2)
    x[:, 32 * place : 32 * place + 32] = blocks.reshape(64, 32, 3)
    return x


def smeared(rng: Rng) -> np.ndarray:
    """One object dragged along a line of 12 to 20 pixels, or rippled by 4 to 6 pixels."""
    x = render(_scene(rng, (str(rng.choice(PLACES)),)))
    if rng.random() < 0.5:
        angle, length = rng.uniform(0, np.pi), rng.uniform(12, 20)
        steps = [
            (round(t * length * np.cos(angle)), round(t * length * np.sin(angle))) for t in np.linspace(-0.5, 0.5, 17)
        ]
        padded = np.pad(x, ((10, 10), (10, 10), (0, 0)), mode="edge").astype(float)
        return np.mean([padded[10 + v : 74 + v, 10 + u : 74 + u] for u, v in steps], 0).astype(np.uint8)
    rows, columns = np.mgrid[:64, :64]
    force, wave, phase = rng.uniform(4, 6), rng.uniform(8, 14), rng.uniform(0, 2 * np.pi, 2)
    moved_rows = np.clip(np.rint(rows + force * np.sin(2 * np.pi * columns / wave + phase[0])), 0, 63).astype(int)
    moved_columns = np.clip(np.rint(columns + force * np.sin(2 * np.pi * rows / wave + phase[1])), 0, 63).astype(int)
    return x[moved_rows, moved_columns]


def _filtered(x: np.ndarray, by: ImageFilter.Filter) -> np.ndarray:
    return np.asarray(Image.fromarray(np.rint(x * 255).astype(np.uint8)).filter(by))


SPOILT = (hybrid, half_denoised, scrambled, smeared)


def spoilt(kind, n: int, seed: int) -> np.ndarray:
    """uint8 [n, 64, 64, 3]."""
    rng = np.random.default_rng((seed, SPOILT.index(kind)))
    return np.stack([kind(rng) for _ in range(n)])
