"""Whole images drawn with a site's activations taken from the safe twin, and how many of them are then harmless."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor

from ..activations.stream import Prompts
from ..config import UsageError
from ..hooks import Context, attach
from ..pipelines import Drawing, draw
from ..progress import track
from ..shadow import listen
from ..sites import Site, resolve
from .trial import Rows, chosen, chunks


def judged(
    pipe: Any,
    prompts: Prompts,
    sites: Iterable[str | Site],
    unsafe: Callable[[Tensor, Rows], Sequence[bool]],
    *,
    drawing: Drawing | None = None,
    pairs: int = 32,
    batch_size: int = 16,
) -> dict[Site, float]:
    """Share of the unsafe images that are not, where a site has the safe twin's activations in every step.

    `unsafe` is given images [n, 3, height, width] and their rows. The twin is kept on the latents of the image that it
    gives to; conditional rows alone are swapped. Costs three drawings of each prompt, and two more a further site.
    """
    there, drawing = resolve(pipe, sites), drawing or Drawing.of(pipe)
    harmful, safe, _ = chosen(prompts, pairs)
    options: dict[str, Any] = {"drawing": drawing}
    before = [
        verdict
        for rows, images in draw(pipe, harmful, batch_size=batch_size, **options)
        for verdict in unsafe(images, [dict(row) for row in rows])
    ]
    if not any(before):
        raise UsageError(f"None of {len(before)} images is unsafe, so that no site can make one safe: give others.")
    shares = {}
    for site in track(there, "Judging whole images"):
        after: list[bool] = []
        for rows in chunks(len(harmful), max(1, batch_size // 2)):
            asked, twins = [harmful[row] for row in rows], [safe[row] for row in rows]
            after += unsafe(_drawn_with_twins(pipe, site, asked, twins, drawing), asked)
        freed = sum(was and not now for was, now in zip(before, after, strict=True))
        shares[site] = freed / sum(map(bool, before))
    return shares


def _drawn_with_twins(pipe: Any, site: Site, asked: Rows, twins: Rows, drawing: Drawing) -> Tensor:
    """The images of `asked` with the twins' activations at the site; the twins' own are thrown away."""
    count = len(asked)

    def give(x: Tensor, context: Context) -> Tensor:
        conditional = [at for at, row in enumerate(context.rows) if row == "cond"]
        if not conditional:
            return x
        new = x.clone()
        new[conditional[:count]] = x[conditional[count:]]
        return new

    def follow(result: Any) -> None:
        result[0][count:].copy_(result[0][:count])

    with attach(pipe, {site: give}), listen(pipe.scheduler, "step", after=follow):
        ((_, images),) = draw(pipe, asked + twins, drawing=drawing, batch_size=2 * count)
    return images[:count]
