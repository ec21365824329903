"""Draw prompts and yield what passes the sites, as a stream that can be run again. One pass feeds every site."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from itertools import chain
from itertools import repeat as repeated
from os import PathLike
from typing import Any, Literal

import numpy as np
import torch
from einops import rearrange, reduce, repeat
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from ..config import UsageError
from ..hooks import Context, SigmaClock, attach
from ..pipelines import Drawing, draw, fingerprint, guided, is_flux
from ..progress import track
from ..shadow import listen
from ..sites import Site, of_the_prompt, resolve, transformer
from .filling import fill
from .plan import Part, Plan
from .schedule import steps_at
from .stream import Activations, Batch, Image, Prompts

__all__ = ["Activations", "Batch", "Image", "Prompts", "Rows", "Tokens", "record", "record_once"]

Rows = Literal["cond", "uncond", "all"]
Tokens = Literal["all", "pooled"] | int


def record(
    pipe: Any,
    prompts: Prompts,
    sites: str | Site | Iterable[str | Site],
    *,
    rows: Rows = "cond",
    tokens: Tokens = "all",
    sigmas: Iterable[float] | None = None,
    paired: bool = False,
    store: str | PathLike[str] | None = None,
    drawing: Drawing | None = None,
    batch_size: int = 16,
) -> Activations:
    """What passes `sites` (patterns are understood) while the prompts are drawn; nothing runs before it is iterated.

    A prompt's safe twin is drawn right after it and from the same seed; if `paired`, on the prompt's own latents in
    every step, so that both are recorded at the same x_σ. `tokens` keeps all tokens of an image, their mean
    ("pooled"), or that many, chosen at random by the image's seed and the step: the same in a prompt and its twin,
    and at all sites with as many tokens. `sigmas` are of the real schedule; without it every step is recorded.

    With `store`, a folder or any fsspec address, what is missing there is drawn and written at once, and the stream
    reads it from there; the same call finds it again, and continues or repairs it.
    """
    if isinstance(tokens, int) and tokens < 1:
        raise UsageError(f"tokens={tokens}: expected at least 1, 'all' or 'pooled'.")
    chosen, plan, drawing = resolve(pipe, sites), Plan.of(prompts, batch_size, paired), drawing or Drawing.of(pipe)
    if rows == "uncond" and not guided(pipe, drawing):
        wish = "true_cfg=True and guidance above 1" if is_flux(pipe) else "guidance above 1"
        raise UsageError(f"rows='uncond': nothing is drawn without the prompt here; give a drawing with {wish}.")
    steps = None if sigmas is None else steps_at(pipe, drawing, sigmas)
    run = _Run(pipe, plan, rows, tokens, steps, drawing)
    if store is None:
        return Activations(run, chosen, plan.images, fingerprint(pipe))
    _refuse_edits(pipe)
    return fill(store, run.facts(chosen, batch_size, paired), plan, lambda part: run.draw(part, chosen))


def record_once(pipe: Any, prompts: Prompts, sites: Iterable[Site], drawing: Drawing) -> Activations:
    """In memory. Where only the prompt passes, it is the same in every step, and one step is enough."""
    places = list(sites)
    steps = 1 if all(map(of_the_prompt, places)) else drawing.steps
    return record(pipe, prompts, places, drawing=replace(drawing, steps=steps)).in_memory()


@dataclass(frozen=True)
class _Run:
    """Draws its prompts at every iteration, one batch at a time; the pipeline is hooked only while it draws."""

    pipe: Any
    plan: Plan
    rows: Rows
    tokens: Tokens
    steps: tuple[int, ...] | None
    drawing: Drawing

    def __call__(self, sites: list[Site], ids: set[str]) -> Iterator[Batch]:
        """Draw for these prompts; the batches are always cut alike, so that what else is wanted changes no bit."""
        wanted = [part for part in self.plan.parts if any(row["id"] in ids for row in part.images)]
        for part in track(wanted, "Recording activations"):
            yield from self.draw(part, sites)

    def draw(self, part: Part, sites: list[Site]) -> list[Batch]:
        taking = _Taking(self, part, SigmaClock(self.pipe.scheduler))
        with ExitStack() as stack:
            stack.enter_context(attach(self.pipe, dict.fromkeys(sites, taking.take)))
            stack.enter_context(
                listen(self.pipe.scheduler, "step", before=taking.land, after=taking.step)  # the sentinel comes first
            )
            options = {"drawing": self.drawing, "batch_size": len(part.images)}
            list(draw(self.pipe, part.images, **options, output_type="latent"))
        self.pipe._interrupt = False
        return taking.finished()

    def facts(self, sites: list[Site], batch_size: int, paired: bool) -> dict[str, Any]:
        """All that decides which rows come out: a store is known by these."""
        model: Any = transformer(self.pipe)
        scheduler = {key: value for key, value in dict(self.pipe.scheduler.config).items() if not key.startswith("_")}
        return {
            "model": fingerprint(self.pipe),
            "pipeline": type(self.pipe).__name__,
            "dtype": str(model.dtype).removeprefix("torch."),
            "scheduler": {"class": type(self.pipe.scheduler).__name__} | scheduler,
            "drawing": asdict(self.drawing),
            "sites": [str(site) for site in sites],
            "steps": "all" if self.steps is None else list(self.steps),
            "rows": self.rows,
            "tokens": self.tokens,
            "paired": paired,
            "batch_size": batch_size,
            "batches": len(self.plan.parts),
            "images": self.plan.sha,
        }


@dataclass
class _Taking:
    """Takes the chosen rows of one batch of images as they pass, and lands them in host memory step by step."""

    run: _Run
    part: Part
    clock: SigmaClock
    now: int = 0
    passing: list[Batch] = field(default_factory=list)
    landed: list[Batch] = field(default_factory=list)

    def take(self, x: Float[Tensor, "batch token d"], context: Context) -> None:
        """Copy what is wanted of one site's tensor, on its device; the tensor itself is not kept alive."""
        keep = [at for at, row in enumerate(context.rows) if self.run.rows in ("all", row)]
        text = context.step < 0  # encoded before the first step, at no σ: kept whichever are chosen
        if not keep or not (text or self.run.steps is None or context.step in self.run.steps):
            return
        images = [self.part.images[context.rows[:at].count(context.rows[at])] for at in keep]
        part, token = self._picked(_rows(x, keep), [row["seed"] for row in images], context)
        count = part.shape[1]
        self.passing.append(
            Batch(
                site=context.site,
                step=context.step,
                sigma=context.sigma,
                prompt_ids=_repeated([row["id"] for row in images], count),
                seeds=_repeated([row["seed"] for row in images], count),
                row=tuple(_repeated([context.rows[at] for at in keep], count)),
                token=rearrange(token, "image token -> (image token)"),
                x=rearrange(part, "image token d -> (image token) d"),
            )
        )

    def land(self) -> None:
        """The scheduler is about to step: all that the step has shown leaves the device in one piece."""
        self.now = self.clock.step
        self.landed += _on_host(self.passing)
        self.passing = []

    def step(self, result: Any) -> None:
        """Put the followers on the latents of those they follow; stop once nothing more is wanted."""
        for leader, follower in self.part.followers:
            result[0][follower].copy_(result[0][leader])
        if self.run.steps is not None and self.now >= self.run.steps[-1]:
            self.run.pipe._interrupt = True  # the pipelines' own switch: the remaining steps are passed over

    def finished(self) -> list[Batch]:
        if any(batch.x.is_pinned() for batch in self.landed):
            torch.cuda.synchronize()  # the copies were left to run beside the denoising
            return [replace(batch, x=batch.x.clone()) for batch in self.landed]  # pinned memory is scarce: give it back
        return self.landed

    def _picked(
        self, x: Float[Tensor, "image token d"], seeds: list[int], context: Context
    ) -> tuple[Float[Tensor, "image kept d"], Int[Tensor, "image kept"]]:
        images, count, _ = x.shape
        wanted = self.run.tokens
        if wanted == "pooled" or context.site.stream in ("pooled", "temb"):
            return reduce(x, "image token d -> image 1 d", "mean"), torch.full((images, 1), -1)
        if wanted == "all" or wanted >= count:
            return x.clone(), repeat(torch.arange(count), "token -> image token", image=images)
        token, there = _quota(tuple(seeds), context.step, count, wanted, x.device)
        return x[torch.arange(images, device=x.device)[:, None], there], token


@lru_cache(maxsize=2)  # the sites of a step share it
def _quota(
    seeds: tuple[int, ...], step: int, count: int, quota: int, device: torch.device
) -> tuple[Int[Tensor, "image kept"], Int[Tensor, "image kept"]]:
    """For each image `quota` of `count` tokens, in order, here and on the device; by its seed and the step alone."""
    keys = np.array([(seed % 2**64, step % 2**64) for seed in seeds], dtype=np.uint64)  # the text encoders' step is −1
    lots = np.stack([np.random.Generator(np.random.Philox(key=key)).random(count, dtype=np.float32) for key in keys])
    token = torch.from_numpy(np.sort(np.argpartition(lots, quota - 1)[:, :quota]))
    return token, token.to(device, non_blocking=True)


def _repeated(labels: list[Any], count: int) -> list[Any]:
    """Each label as often as its image has rows."""
    return list(chain.from_iterable(repeated(label, count) for label in labels))


def _rows(x: Float[Tensor, "batch token d"], keep: list[int]) -> Float[Tensor, "image token d"]:
    """Without a copy where the rows are adjacent, as those of one kind always are."""
    return x[keep[0] : keep[-1] + 1] if keep[-1] + 1 - keep[0] == len(keep) else x[keep]


def _on_host(batches: list[Batch]) -> list[Batch]:
    """The same batches in host memory, copied at once for all sites of one device and dtype."""
    kinds = dict.fromkeys((batch.x.device, batch.x.dtype) for batch in batches)
    pieces = {}
    for kind in kinds:
        group = [batch.x.flatten() for batch in batches if (batch.x.device, batch.x.dtype) == kind]
        pieces[kind] = iter(_copied(torch.cat(group)).split([len(x) for x in group]))
    return [replace(batch, x=next(pieces[batch.x.device, batch.x.dtype]).view(batch.x.shape)) for batch in batches]


def _copied(flat: Shaped[Tensor, " n"]) -> Shaped[Tensor, " n"]:
    if flat.device.type != "cuda":
        return flat.cpu()
    return torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True).copy_(flat, non_blocking=True)


def _refuse_edits(pipe: Any) -> None:
    """A store is known by its model: what it holds must be what that model computes by itself."""
    hooked = [name or "the transformer" for name, module in transformer(pipe).named_modules() if _has_hooks(module)]
    shadowed = [name for owner, name in ((pipe.scheduler, "step"), (pipe, "encode_prompt")) if name in vars(owner)]
    if hooked or shadowed:
        raise UsageError(
            f"The pipeline is being edited or watched (at {(hooked + shadowed)[0]}), which a store cannot know again: "
            "leave the steering first, or record without store."
        )


def _has_hooks(module: torch.nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)
