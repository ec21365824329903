"""The tiny worlds as the Safe Denoiser meets them: prompts, rendered negatives of each hazard, and what was drawn.

What is drawn undenoised is watched once and kept: a picture whose gate never opens along that way is drawn to the very
same bits with the denoiser on, and is not drawn again.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float
from safetensors.torch import load_file, save
from torch import Tensor

from safedig.denoiser import NegationSet, SafeDenoiser
from safedig.denoiser.calibrate import Seen, watch
from safedig.denoiser.kernels import Moment
from safedig.denoiser.mixing import Mixing
from safedig.denoiser.rules import theory
from safedig.pipelines import Drawing, draw, fingerprint, load_pipeline
from safedig.prompts import as_rows
from safedig.storage import write_atomically
from safedig.tiny import judge, prompts
from safedig.tiny.captions import POSTCARD, POSTCARD_CAPTION
from safedig.tiny.concepts import BACKGROUNDS, COLOURS, CONCEPTS, HAZARDS, OBJECTS, PLACES
from safedig.tiny.judge_network import TENSORS, WEIGHTS, load_reader
from safedig.tiny.judgement import CERTAIN
from safedig.tiny.scenes import Placed, Scene, random_pose, render_many

Row = dict[str, Any]
CHUNK = 64  # images whose way is kept in one file
ASKED = ("benign", "calm")  # of these the judge is told what was asked for


@dataclass(frozen=True)
class Budget:
    """How much is drawn, and what is tried."""

    models: tuple[str, ...] = ("tiny-sd3", "tiny-flux")
    hazards: tuple[str, ...] = HAZARDS
    calibrate: int = 512
    """Underspecified prompts of that split: half of them are the reference, the others calibrate."""
    calm: int = 128
    """Benign and near-miss prompts of that split, used likewise."""
    report: int = 960
    benign: int = 200
    naming: int = 6
    """Prompts that name the hazard, of each hazard."""
    long: int = 320
    """Underspecified prompts drawn in 28 steps as well."""
    postcard: int = 24
    """Seeds of the memorised scene."""
    empty: int = 192
    """Drawn from no prompt at all."""
    strengths: tuple[float, ...] = (1.0, 2.0, 4.0)
    floors: tuple[float, ...] = (0.05, 0.2)
    """β from which a gate is open."""
    loss: float = 0.01
    """Of the calm pictures, that may be lost to each hazard's denoiser while strength and floor are chosen."""
    negatives: int = 64
    seed: int = 1
    part: tuple[str, ...] = field(default=("models",), repr=False)
    """Fields that choose among results, and are no part of any."""

    @property
    def sha(self) -> str:
        facts = {name: value for name, value in asdict(self).items() if name not in (*self.part, "part")}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


QUICK = Budget(
    models=("tiny-sd3",),
    hazards=("knife", "skull", "warning"),
    calibrate=192,
    calm=64,
    report=64,
    benign=16,
    naming=2,
    long=16,
    postcard=4,
    empty=16,
    strengths=(4.0,),
    floors=(0.05,),
)


@dataclass(frozen=True, eq=False)
class Drawn:
    """Rows, the way of x̂0 undenoised, and what the judge said of the pictures."""

    rows: list[Row]
    seen: Seen
    judged: list[dict[str, Any]]


class World:
    """One model and what is drawn from it undenoised."""

    def __init__(self, model: str, budget: Budget, folder: Path):
        self.model, self.budget, self.folder = model, budget, folder
        self.pipe = load_pipeline(model)
        self.drawing = Drawing.of(self.pipe)
        self.fingerprint = fingerprint(self.pipe)
        self._reader = load_reader()

    def key(self, arm: str) -> dict[str, str]:
        """What tells a cell from all others."""
        seer = hashlib.sha256((WEIGHTS / TENSORS).read_bytes()).hexdigest()[:16]
        options = self.budget.sha
        return {"model": self.model, "fingerprint": self.fingerprint, "judge": seer, "options": options, "arm": arm}

    # ---- what is asked

    def rows(self, name: str) -> list[Row]:
        """By use: `long` are of `report`, `calm` are benign ones to calibrate on, `postcard tried` has other seeds."""
        budget = self.budget
        if name in ("calibrate", "report", "long"):
            split = "calibrate" if name == "calibrate" else "report"
            count = budget.calibrate if name == "calibrate" else budget.report
            return as_rows(prompts("underspecified", split, budget.seed, count))[: getattr(budget, name)]
        if name in ("benign", "calm"):
            half, split = getattr(budget, name) // 2, "report" if name == "benign" else "calibrate"
            return [row for kind in ("benign", "near-miss") for row in as_rows(prompts(kind, split, budget.seed, half))]
        if name == "naming":
            return [row for hazard in budget.hazards for row in self._naming(hazard)]
        words, count = ("", budget.empty) if name == "empty" else (POSTCARD_CAPTION, budget.postcard)
        first = 1000 if name == "postcard tried" else 0
        return [{"id": f"{name}-{seed}", "prompt": words, "seed": seed} for seed in range(first, first + count)]

    def _naming(self, hazard: str) -> list[Row]:
        wanted = as_rows(prompts("harmful", "report", 2, 128, risk=CONCEPTS[hazard].risk, twins=False))
        named = [row for row in wanted if hazard in [one["name"] for one in json.loads(row["objects"])]]
        return named[: self.budget.naming]

    # ---- what is not to be drawn

    def negatives(self, hazard: str, count: int) -> NegationSet:
        """Renders of one hazard alone: every background, place and colour in turn, in free poses."""
        rng = np.random.default_rng((self.budget.seed, HAZARDS.index(hazard)))
        kinds = list(product(BACKGROUNDS, PLACES, COLOURS))
        kinds = [kinds[int(at)] for at in rng.permutation(len(kinds))]
        kinds = (kinds * (count // len(kinds) + 1))[:count]
        return self.encoded([Scene((Placed(hazard, c, p, random_pose(rng)),), b) for b, p, c in kinds])

    def postcard(self, backgrounds: Sequence[str] = (POSTCARD.background,)) -> NegationSet:
        """The memorised scene, with its objects before each of these."""
        return self.encoded([replace(POSTCARD, background=one) for one in backgrounds])

    def encoded(self, scenes: Sequence[Scene]) -> NegationSet:
        return NegationSet.of(rearrange(torch.from_numpy(render_many(scenes)), "n h w c -> n c h w"), self.pipe)

    # ---- what is seen in a latent

    def hazards(self, latents: Float[Tensor, "n *latent"]) -> Float[Tensor, "n hazards"]:
        """How surely the judge's network sees each hazard in the picture of these latents, wherever."""
        return self._read(latents).softmax(-1)[..., [OBJECTS.index(one) for one in HAZARDS]].amax(1)

    def objects(self, latents: Float[Tensor, "n *latent"]) -> Float[Tensor, "n objects"]:
        """What it sees of everything: each object's log-probability, wherever."""
        return self._read(latents).log_softmax(-1).clamp(min=-8).amax(1)

    def _read(self, latents: Float[Tensor, "n *latent"]) -> Float[Tensor, "n place objects"]:
        if latents.ndim == 3:
            side = self.drawing.height, self.drawing.width
            latents = self.pipe._unpack_latents(latents, *side, self.pipe.vae_scale_factor)
        pictures = (self.pipe.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
        return self._reader(pictures).objects

    # ---- what is drawn

    @cached_property
    def _kept(self) -> dict[str, Drawn]:
        return {}

    def undenoised(self, name: str, steps: int | None = None) -> Drawn:
        """Drawn once, and kept on disk with the way it went."""
        place = f"{name}-{steps or self.drawing.steps}"
        if place not in self._kept:
            rows = self.rows(name)
            seen = along([self._watched(part, steps) for part in chunks(rows)])
            asked = rows if name in ASKED else None
            self._kept[place] = Drawn(rows, seen, judge(seen.images, asked=asked))
        return self._kept[place]

    def _watched(self, rows: list[Row], steps: int | None) -> Seen:
        """A few rows at a time, so that an interrupted run goes on where it was."""
        file = self.folder / f"{self.model}-{steps or self.drawing.steps}-{self._told(rows)}.safetensors"
        if not file.exists():
            seen = watch(self.pipe, rows, drawing=self._drawing(steps))
            held = {f"x0/{at}": one.x0 for at, one in enumerate(seen.moments)} | {"images": seen.images}
            sigmas = {"sigmas": json.dumps([one.mixing.sigma for one in seen.moments])}
            write_atomically(file, save(held, sigmas | {"shape": json.dumps(seen.moments[0].shape)}))
        return _read(file)

    def denoised(
        self, made: SafeDenoiser | None, drawn: Drawn, opened: Bool[Tensor, " n"], name: str, steps: int | None = None
    ) -> list[tuple[int, dict[str, Any], Tensor]]:
        """Those of the pictures whose gate opens, drawn again: place in the rows, judgement, picture."""
        places = opened.nonzero()[:, 0].tolist()
        rows = [drawn.rows[at] for at in places]
        if made is None or not rows:
            return []
        with made.apply(self.pipe):
            images = torch.cat([part for _, part in draw(self.pipe, rows, drawing=self._drawing(steps))])
        told = judge(images, asked=rows if name in ASKED else None)
        return list(zip(places, told, images, strict=True))

    def _drawing(self, steps: int | None) -> Drawing:
        return self.drawing if steps is None else replace(self.drawing, steps=steps)

    def _told(self, rows: list[Row]) -> str:
        facts = [self.fingerprint, *(f"{row['seed']} {row['prompt']}" for row in rows)]
        return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:12]


def chunks(rows: list[Row]) -> list[list[Row]]:
    return [rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK)]


def along(parts: Sequence[Seen]) -> Seen:
    """The ways of several groups of images, taken by the same steps, as one."""
    moments = [
        replace(same[0], x=torch.cat([at.x for at in same]), x0=torch.cat([at.x0 for at in same]))
        for same in zip(*(one.moments for one in parts), strict=True)
    ]
    return Seen(moments, torch.cat([one.images for one in parts]))


def opens(made: SafeDenoiser, seen: Seen) -> Bool[Tensor, " n"]:
    """Whether the gate opens anywhere along the undenoised way; modes without a gate always act."""
    if made.mode != "theory":
        return torch.ones(len(seen.images), dtype=torch.bool)
    low, high = made.sigmas
    inside = [at for at in seen.moments if low <= at.mixing.sigma <= high]
    betas = torch.stack([theory(at, replace(made._sizes, strength=1.0)).beta for at in inside])
    return (betas > 0).any(0)


def shows(judgement: dict[str, Any], hazard: str) -> tuple[bool, bool]:
    """Whether either eye sees the hazard (the second check, where it is certain), and whether the second check does."""
    first = any(one["name"] == hazard for one in judgement["objects"])
    named = [one["misfit"] for one in judgement["second"]["objects"] if one["name"] == hazard]
    return first or any(misfit < CERTAIN for misfit in named), bool(named)


def _read(file: Path) -> Seen:
    from safetensors import safe_open

    held = load_file(file)
    with safe_open(file, framework="pt") as opened:
        facts = {name: json.loads(text) for name, text in opened.metadata().items()}
    moments = [
        Moment(held[f"x0/{at}"], held[f"x0/{at}"], Mixing(1 - sigma, sigma, "velocity"), tuple(facts["shape"]))
        for at, sigma in enumerate(facts["sigmas"])
    ]
    return Seen(moments, held["images"])
