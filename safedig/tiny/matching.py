"""The second check: which render explains each place best, and how badly; it shares nothing with the network."""

from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from .concepts import BACKGROUNDS, COLOURS, OBJECTS
from .judgement import EMPTY, UNRECOGNISED
from .scenes import SIZE
from .templates import (
    CELLS,
    POSES,
    RADII,
    STEP,
    TURNS,
    bands,
    centre_of_mass,
    colours,
    ink,
    offsets,
    sampled,
    sky_share,
    smoothed,
    templates,
)

CANDIDATES = 3  # objects whose templates are registered, after all have been compared
REACH = (0.7, 0.7, 0.7, 0.7, 0.25)  # the most one registration corrects: x, y, turn and size (cells), blur
ARM = 8  # cells from the middle at which turn and size are measured
RETRIES = ((2.5, 2.5), (-2.5, 2.5), (2.5, -2.5), (-2.5, -2.5))  # x and y, pixels off the first guess
LOUD = 0.003  # energy per pixel of smoothed white noise of standard deviation .11
MISFIT = 0.7  # the most that is accepted: error over that of the next best object
GOOD, FAR = 0.027, 0.2  # errors: of 99 % of renders; with which nothing is accepted
HOPELESS = 1.0  # the misfit of what is not accepted for other reasons
PRESENT = 40.0  # pixels of foreground that are something
SAME, MOST = 0.13, 0.5  # RGB distance at which a pixel is still background; share of both bands that must be
SLACK = 4  # pixels the horizon may be off
FRAME = 2  # pixels at the border that are not looked at: a shift may have left anything there
CHUNK = 64  # pictures compared at once: more fall out of the cache


class Match(NamedTuple):
    """The best explanation of one place: an object's name, `empty` or `unrecognised`; its colour; how badly it fits."""

    name: str = EMPTY
    colour: str = ""
    misfit: float = 0.0


class Places(NamedTuple):
    """Occupied places, each with its smoothed picture."""

    x: Float[Tensor, "m 3 64 64"]
    own: Float[Tensor, "m 64 64"]  # 1 for the place's own pixels
    bands: Float[Tensor, "m 2 3"]  # sky and ground
    horizon: Float[Tensor, " m"]  # the first row of ground
    threshold: Float[Tensor, " m"]  # distance from the background that noise does not reach
    noise: Float[Tensor, " m"]  # its energy, per pixel

    def at(self, rows: Int[Tensor, " k"]) -> "Places":
        return Places(*(field[rows] for field in self))


class Window(NamedTuple):
    """Samples around one centre in each place."""

    d: Float[Tensor, "m 3 cells cells"]  # minus the background
    own: Float[Tensor, "m 1 cells cells"]
    backdrop: Float[Tensor, "m 3 cells"]  # of each row


class Posed(NamedTuple):
    """One template for each place."""

    object: Int[Tensor, " m"]
    colour: Int[Tensor, " m"]
    pose: Int[Tensor, " m"]

    def shares(self) -> Float[Tensor, "m 3 cells cells"]:
        return templates().shares[self.object * POSES + self.pose]


class Fit(NamedTuple):
    """A registered template: the squared error left, how it was moved, and its own energy and area (cells)."""

    error: Float[Tensor, " m"]
    moved: Float[Tensor, "m 5"]
    energy: Float[Tensor, " m"]
    area: Float[Tensor, " m"]


class Found(NamedTuple):
    """What was registered best in each place. An error is squared, over √(energy · area) of the template."""

    posed: Posed
    error: Float[Tensor, " m"]
    other: Float[Tensor, " m"]  # the least error of another object


def closest_renders(images: Float[Tensor, "n 3 64 64"]) -> list[tuple[Match, Match, str]]:
    """For each picture (0 … 1): what stands left, what stands right, and the background's name or `unrecognised`."""
    return [seen for part in images.split(CHUNK) for seen in _look(part)]


def _look(images: Tensor) -> list[tuple[Match, Match, str]]:
    x = smoothed(F.pad(images[..., FRAME:-FRAME, FRAME:-FRAME], (FRAME,) * 4, mode="replicate"))
    background, known, horizon = _background(x)
    rows = torch.arange(SIZE, dtype=torch.float32)
    away = (x - _backdrop(bands()[background], rows, horizon)[..., None]).square().sum(1).sqrt()
    threshold = 0.03 + 1.2 * away[:, ::2, ::2].flatten(1).median(1).values
    front = _ramp(away, threshold, 0.08)
    behind = (front == 0).float()
    noise = (away.square() * behind).sum((1, 2)) / behind.sum((1, 2)).clamp_min(1)
    left = _belongs_left(front)
    framed = ((rows >= FRAME) & (rows < SIZE - FRAME)).float()
    own = torch.stack([left, 1 - left], 1) * framed * framed[:, None]
    clear = _ramp(away, torch.full_like(threshold, 0.12), 0.12)[:, None] * own
    which, place = (clear.sum((2, 3)) > PRESENT).nonzero(as_tuple=True)
    places = Places(x[which], own[which, place], *(v[which] for v in (bands()[background], horizon, threshold, noise)))
    best, misfit = _explain(places, front[which] * places.own, clear[which, place])
    rooms = [
        tuple(BACKGROUNDS)[b] if k else UNRECOGNISED for b, k in zip(background.tolist(), known.tolist(), strict=True)
    ]
    seen = [[Match(), Match()] for _ in rooms]
    for i, side, o, c, bad in zip(*(v.tolist() for v in (which, place, best.object, best.colour, misfit)), strict=True):
        seen[i][side] = Match(OBJECTS[o], tuple(COLOURS)[c], bad) if bad < MISFIT else Match(UNRECOGNISED, "", bad)
    return [(left, right, room) for (left, right), room in zip(seen, rooms, strict=True)]


def _explain(places: Places, front: Tensor, clear: Tensor) -> tuple[Posed, Float[Tensor, " m"]]:
    """Register templates around each place's centre of mass and, where nothing fits well, around others.

    Clear foreground that lies above or below the window is not explained by any, and nothing is in loud noise.
    """
    centre = centre_of_mass(front)
    found = _register(places, centre)
    for offset in RETRIES:
        rows = (found.error > GOOD).nonzero()[:, 0]
        _improve(found, rows, _register(places.at(rows), centre[rows] + torch.tensor(offset)))
    beyond = (torch.arange(SIZE) - centre[:, 1:]).abs() > CELLS * STEP / 2
    missed = (clear.sum(2) * beyond).sum(1) > PRESENT
    misfit = (found.error / found.other.clamp_min(1e-4)).clamp_max(HOPELESS)
    misfit[missed | (places.noise > LOUD) | (found.error > FAR)] = HOPELESS
    return found.posed, misfit


def _improve(found: Found, rows: Int[Tensor, " k"], again: Found) -> None:
    """Take over what fits better; the next best object is the best of all others that were tried."""
    better, differs = again.error < found.error[rows], again.posed.object != found.posed.object[rows]
    worse = torch.maximum(again.error, found.error[rows]).where(differs, torch.inf)
    found.other[rows] = torch.stack([found.other[rows], again.other, worse]).amin(0)
    for kept, new in zip((*found.posed, found.error), (*again.posed, again.error), strict=True):
        kept[rows[better]] = new[better]


def _register(places: Places, centre: Float[Tensor, "m 2"]) -> Found:
    """Register the templates of the few likeliest objects; then the best of them again, from where it came to lie."""
    first, trials = _window(places, centre), []
    for posed in _likeliest(first):
        start = centre - STEP * _heaviest(_painted(posed, first.backdrop) * first.own, places.threshold)
        trials.append((start, *posed, *_refined(_window(places, start), posed)))
    error = torch.stack([trial[4] for trial in trials])
    start, o, c, pose, _, moved, *_ = (
        torch.stack(field)[error.argmin(0), torch.arange(len(centre))] for field in zip(*trials, strict=True)
    )
    posed = Posed(o, c, _stepped(pose, moved))
    fit = _refined(_window(places, start - STEP * moved[:, :2]), posed)
    size = (fit.energy * fit.area).sqrt().clamp_min(1)
    best, other = ((e - places.noise * CELLS**2).clamp_min(0) / size for e in (fit.error, error.sort(0).values[1]))
    return Found(posed, best, other)


def _likeliest(window: Window) -> list[Posed]:
    """The objects whose templates T come closest, ‖d − T‖² over all colours and poses at once, each with its best."""
    bank, d, m = templates(), window.d * window.own, len(window.d)
    hue, white, behind = colours() - ink(), 1 - ink(), ink()[:, None] - window.backdrop
    by_share = [rearrange(bank.shares[:, i], "t h w -> (h w) t") for i in range(3)]
    product = hue @ (rearrange(d, "m c h w -> (m c) (h w)") @ by_share[0]).view(m, 3, len(bank.shares))
    product += ((d * white[:, None, None]).sum(1).flatten(1) @ by_share[1])[:, None]
    product += ((d * behind[..., None]).sum(1).flatten(1) @ by_share[2])[:, None]
    square = bank.whole[0] * hue.square().sum(1)[:, None] + 2 * (hue @ white)[:, None] * bank.whole[2]
    square = square + (bank.whole[1] * white.square().sum() + behind.square().sum(1) @ bank.rows[0])[:, None]
    square += 2 * ((hue @ behind) @ bank.rows[1] + (white @ behind @ bank.rows[2])[:, None])
    error, pose = (square - 2 * product).view(m, len(COLOURS), len(OBJECTS), POSES).min(3)
    error, colour = error.min(1)
    objects = error.topk(CANDIDATES, dim=1, largest=False).indices
    chosen = colour.gather(1, objects)
    poses = pose[torch.arange(m)[:, None], chosen, objects]
    return [Posed(*one) for one in zip(objects.unbind(1), chosen.unbind(1), poses.unbind(1), strict=True)]


def _refined(window: Window, posed: Posed) -> Fit:
    """One Gauss–Newton step in position, turn, size and blur."""
    painted = _painted(posed, window.backdrop)
    error = ((window.d - painted) * window.own).flatten(1)[..., None]
    down, across = torch.gradient(painted, dim=(2, 3))
    x, y = offsets() / ARM, offsets()[:, None] / ARM
    slopes = torch.stack([across, down, x * down - y * across, x * across + y * down, _laplacian(painted)], 1)
    slopes = (slopes * window.own[:, None]).flatten(2)
    reach = torch.tensor(REACH)[:, None]
    moved = torch.linalg.solve(slopes @ slopes.mT + 0.05 * torch.eye(len(REACH)), slopes @ error).clamp(-reach, reach)
    left = (error - slopes.mT @ moved).square().sum((1, 2))
    area = (posed.shares()[:, 2:] * window.own).sum((1, 2, 3))
    return Fit(left, moved[..., 0], (painted * window.own).square().sum((1, 2, 3)), area)


def _stepped(pose: Tensor, moved: Float[Tensor, "m 5"]) -> Int[Tensor, " m"]:
    """The pose nearest to what registration found."""
    size = torch.tensor(RADII)[pose // len(TURNS)] * (1 - moved[:, 3] / ARM)
    turn = torch.tensor(TURNS)[pose % len(TURNS)] - (moved[:, 2] / ARM).rad2deg()
    nearest = [(v[:, None] - torch.tensor(choices)).abs().argmin(1) for v, choices in ((size, RADII), (turn, TURNS))]
    return nearest[0] * len(TURNS) + nearest[1]


def _painted(posed: Posed, backdrop: Float[Tensor, "m 3 cells"]) -> Float[Tensor, "m 3 cells cells"]:
    """Templates in their colours, minus the background."""
    colour, white, everything = posed.shares()[:, :, None].unbind(1)
    hue, behind = (colours() - ink())[posed.colour][..., None, None], (ink()[:, None] - backdrop)[..., None]
    return colour * hue + white * (1 - ink())[:, None, None] + everything * behind


def _heaviest(painted: Tensor, threshold: Float[Tensor, " m"]) -> Float[Tensor, "m 2"]:
    """Where a template's centre of mass lies off its window's middle (x, y; cells); ink at night weighs nothing."""
    return centre_of_mass(_ramp(painted.square().sum(1).sqrt(), threshold, 0.08)) - (CELLS - 1) / 2


def _window(places: Places, centre: Float[Tensor, "m 2"]) -> Window:
    samples = sampled(torch.cat([places.x, places.own[:, None]], 1), centre)
    x, y = (centre[:, :, None] + offsets() * STEP).unbind(1)
    inside = ((y >= 0) & (y <= SIZE - 1))[:, :, None] & ((x >= 0) & (x <= SIZE - 1))[:, None]
    backdrop = _backdrop(places.bands, y, places.horizon)
    return Window(samples[:, :3] - backdrop[..., None], samples[:, 3:] * inside[:, None], backdrop)


def _background(x: Float[Tensor, "n 3 64 64"]) -> tuple[Int[Tensor, " n"], Bool[Tensor, " n"], Float[Tensor, " n"]]:
    """The background that most pixels agree with; whether enough of both its bands do; and its horizon."""
    middle = next(iter(BACKGROUNDS.values())).horizon
    top, bottom = middle - SLACK - 2, middle + SLACK + 2
    same = x[:, None] - _backdrop(bands(), torch.arange(float(SIZE)), torch.tensor(float(middle)))[..., None]
    same = (same.square().sum(2).sqrt() < SAME).float()
    index = same.mean((2, 3)).argmax(1)
    chosen = same[torch.arange(len(x)), index]
    known = (chosen[:, :top].mean((1, 2)) > MOST) & (chosen[:, bottom:].mean((1, 2)) > MOST)
    horizons = torch.arange(middle - SLACK, middle + SLACK + 0.5, 0.5)
    near, rows = x[:, None, :, top:bottom, ::2], torch.arange(float(top), float(bottom))
    tried = _backdrop(bands()[index][:, None], rows, horizons)[..., None]
    misses = (near - tried).square().sum(2).clamp_max(SAME**2).mean((2, 3))
    return index, known, horizons[misses.argmin(1)]


def _backdrop(
    bands: Float[Tensor, "... 2 3"], rows: Float[Tensor, "... rows"], horizon: Float[Tensor, "..."]
) -> Float[Tensor, "... 3 rows"]:
    """The colour of each row of empty pictures."""
    share = sky_share(rows, horizon[..., None])[..., None, :]
    return torch.lerp(bands[..., 1, :, None], bands[..., 0, :, None], share)


def _belongs_left(front: Float[Tensor, "n 64 64"]) -> Float[Tensor, "n 64 64"]:
    """1 where a pixel is the left place's: its half; but what crosses the middle by ≤ 5 pixels stays with its owner."""
    half, on = SIZE // 2, front > 0.3
    from_left, from_right = (part.long().cumprod(2).bool() for part in (on[:, :, :half].flip(2), on[:, :, half:]))
    left, right = from_left.sum(2, keepdim=True), from_right.sum(2, keepdim=True)
    lost, won = from_left & (right > left) & (left <= 5), from_right & (left > right) & (right <= 5)
    return torch.cat([~lost.flip(2), won], 2).float()


def _ramp(x: Float[Tensor, "n h w"], start: Float[Tensor, " n"], width: float) -> Float[Tensor, "n h w"]:
    """0 up to `start`, 1 from `start` + `width` on."""
    return ((x - start[:, None, None]) / width).clamp(0, 1)


def _laplacian(x: Float[Tensor, "m 3 h w"]) -> Float[Tensor, "m 3 h w"]:
    p = F.pad(x, (1, 1, 1, 1))
    return p[..., 2:, 1:-1] + p[..., :-2, 1:-1] + p[..., 1:-1, 2:] + p[..., 1:-1, :-2] - 4 * x
