"""Draw prompts and yield what passes the sites, as a stream that can be run again. One pass feeds every site."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from einops import rearrange, reduce
from jaxtyping import Float, Int
from torch import Tensor

from ..config import UsageError
from ..hooks import Context, Row, attach
from ..pipelines import Drawing, draw, fingerprint
from ..progress import track
from ..sites import Site, resolve

Tokens = Literal["all", "pooled"] | int
Prompts = Iterable[Any]
"""Rows of the prompt columns: a `datasets` Dataset, or mappings."""
Image = tuple[str, int]
"""Prompt id and seed."""
Stream = Callable[[list[Site], set[str]], Iterable["Batch"]]


@dataclass(frozen=True)
class Batch:
    """What passed one site in one step; a row is one token of one image, an image's rows are adjacent."""

    site: Site
    step: int
    sigma: float
    prompt_ids: list[str]
    seeds: list[int]
    row: tuple[Row, ...]
    token: Int[Tensor, " rows"]
    """−1 for a vector that stands for the whole image."""
    x: Float[Tensor, "rows d_in"]

    def images(self, row: Row = "cond") -> list[tuple[Image, slice]]:
        """Each image, in its conditional or unconditional row, and its rows here."""
        keys = list(zip(self.prompt_ids, self.seeds, self.row, strict=True))
        starts = [at for at in range(len(keys)) if at == 0 or keys[at] != keys[at - 1]]
        spans = zip(starts, [*starts[1:], len(keys)], strict=True)
        return [(keys[start][:2], slice(start, stop)) for start, stop in spans if keys[start][2] == row]

    def of(self, prompt_ids: set[str]) -> "Batch | None":
        """The rows of these prompts, or None if there are none."""
        keep = [at for at, name in enumerate(self.prompt_ids) if name in prompt_ids]
        if len(keep) in (0, len(self.prompt_ids)):
            return self if keep else None
        return replace(
            self,
            prompt_ids=[self.prompt_ids[at] for at in keep],
            seeds=[self.seeds[at] for at in keep],
            row=tuple(self.row[at] for at in keep),
            token=self.token[keep],
            x=self.x[keep],
        )


class Activations:
    """A stream of batches that starts anew at every `for`; `prompts` are the rows that it draws, in its order."""

    def __init__(self, stream: "Stream", sites: list[Site], prompts: list[dict[str, Any]], model: str):
        self._stream = stream
        self.sites = sites
        self.prompts = prompts
        self.model = model
        """Fingerprint of the pipeline that was recorded."""

    def __iter__(self) -> Iterator[Batch]:
        ids = {row["id"] for row in self.prompts}
        for batch in self._stream(self.sites, ids):
            if batch.site in self.sites and (part := batch.of(ids)) is not None:
                yield part

    def at(self, site: Site) -> "Activations":
        """The same stream at one of its sites."""
        if site not in self.sites:
            raise UsageError(f"'{site}' was not recorded: there are {', '.join(map(str, self.sites))}.")
        return Activations(self._stream, [site], self.prompts, self.model)

    def of(self, prompts: Prompts) -> "Activations":
        """The same stream for the prompts with these ids."""
        ids = {row["id"] for row in prompts}
        kept = [row for row in self.prompts if row["id"] in ids]
        if not kept:
            raise UsageError(f"None of the {len(ids)} prompts was recorded: record them first.")
        return Activations(self._stream, self.sites, kept, self.model)

    def in_memory(self) -> "Activations":
        """Run once and keep everything, so that later passes cost nothing; bytes = rows · d_in · 4 in float32."""
        kept = list(self)
        return Activations(lambda sites, ids: kept, self.sites, self.prompts, self.model)


def record(
    pipe: Any,
    prompts: Prompts,
    sites: str | Site | Iterable[str | Site],
    *,
    rows: Literal["cond", "uncond", "all"] = "cond",
    tokens: Tokens = "all",
    drawing: Drawing | None = None,
    batch_size: int = 16,
) -> Activations:
    """What passes `sites` (patterns are understood) while the prompts are drawn; nothing runs before it is iterated.

    A prompt's safe twin is drawn right after it and from the same seed. `tokens` keeps all tokens of an image, their
    mean ("pooled"), or that many, chosen at random for each step, the same ones in every image.
    """
    chosen, plan = resolve(pipe, sites), _plan(prompts)
    run = _Run(pipe, plan, rows, tokens, drawing or Drawing.of(pipe), batch_size)
    return Activations(run, chosen, plan, fingerprint(pipe))


@dataclass(frozen=True)
class _Run:
    """Draws its prompts at every iteration, one batch at a time; the pipeline is hooked only while it draws."""

    pipe: Any
    plan: list[dict[str, Any]]
    rows: Literal["cond", "uncond", "all"]
    tokens: Tokens
    drawing: Drawing
    batch_size: int

    def __call__(self, sites: list[Site], ids: set[str]) -> Iterator[Batch]:
        """Draw for these prompts; the batches are always cut alike, so that what else is wanted changes no bit."""
        cuts = [self.plan[start : start + self.batch_size] for start in range(0, len(self.plan), self.batch_size)]
        for images in track([cut for cut in cuts if any(row["id"] in ids for row in cut)], "Recording activations"):
            yield from self._draw(images, sites)

    def _draw(self, images: list[dict[str, Any]], sites: list[Site]) -> list[Batch]:
        taken: list[Batch] = []

        def take(x: Float[Tensor, "batch token d"], context: Context) -> None:
            if (batch := self._batch(images, x, context)) is not None:
                taken.append(batch)

        with attach(self.pipe, dict.fromkeys(sites, take)):
            for _ in draw(self.pipe, images, drawing=self.drawing, batch_size=self.batch_size, output_type="latent"):
                pass
        return taken

    def _batch(self, images: list[dict[str, Any]], x: Float[Tensor, "batch token d"], context: Context) -> Batch | None:
        keep = [at for at, row in enumerate(context.rows) if self.rows in ("all", row)]
        if not keep:
            return None
        drawn = [images[context.rows[:at].count(context.rows[at])] for at in keep]
        token = self._token(x.shape[1], context)
        part = x[keep]  # indexing by a list copies: the model's own tensor is not kept alive
        if self.tokens == "pooled":
            part = reduce(part, "image token d -> image 1 d", "mean")
        elif isinstance(self.tokens, int) and token[0] >= 0:
            part = part[:, token]
        count = part.shape[1]
        return Batch(
            site=context.site,
            step=context.step,
            sigma=context.sigma,
            prompt_ids=[row["id"] for row in drawn for _ in range(count)],
            seeds=[row["seed"] for row in drawn for _ in range(count)],
            row=tuple(context.rows[at] for at in keep for _ in range(count)),
            token=token.repeat(len(keep)),
            x=rearrange(part, "image token d -> (image token) d"),
        )

    def _token(self, count: int, context: Context) -> Int[Tensor, " token"]:
        if self.tokens == "pooled" or context.site.stream in ("pooled", "temb"):
            return torch.tensor([-1])
        if self.tokens == "all" or self.tokens >= count:
            return torch.arange(count)
        generator = torch.Generator().manual_seed(context.step)
        return torch.randperm(count, generator=generator)[: self.tokens].sort().values


def _plan(prompts: Prompts) -> list[dict[str, Any]]:
    """Every row once, a safe twin right after the prompt it belongs to and with that prompt's seed."""
    given = [dict(row) for row in prompts]
    if not given:
        raise UsageError("There are no prompts to record: give at least one row with an id, a prompt and a seed.")
    for number, row in enumerate(given, start=1):
        if lacking := {"id", "prompt", "seed"} - row.keys():
            raise UsageError(f"Row {number} has no {min(lacking)}: give prompts as load_prompts returns them.")
    by_id = {row["id"]: row for row in given}
    plan: dict[tuple[str, int], dict[str, Any]] = {}
    twins = {row["twin"] for row in given if row.get("twin") in by_id}
    for row in given:
        if row["id"] in twins and not row.get("twin"):
            continue
        plan.setdefault((row["id"], row["seed"]), row)
        if row.get("twin") in by_id:
            twin = by_id[row["twin"]] | {"seed": row["seed"]}
            plan.setdefault((twin["id"], twin["seed"]), twin)
    return list(plan.values())
