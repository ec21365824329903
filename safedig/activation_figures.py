"""Pictures of a recording, table → figure: where harm is, token by token, as harmful prompts differ from safe twins."""

from collections.abc import Sequence
from math import isqrt
from typing import TYPE_CHECKING, Any

from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from .activations.pairs import Pair
from .figures import DPI, PAPER, SMALL, TEXT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LABEL, CELL, BAR = 2.3, 1.7, 1.1  # inches: the names of sites at the left, a map, the scale at the right


def change_maps(pairs: Sequence[Pair], sigmas: Sequence[float]) -> "Figure":
    """‖a − a′‖ of each token of one image to its safe twin's: a row for each site, a column for each step.

    Each map is in shares of its token that differs most, which is 1. Tokens of an image lie where they do in the
    picture, those of a text in reading order. `sigmas` are those of the schedule, by the number of the step.
    """
    if not pairs:
        raise ValueError("There is nothing to show: give the pairs of one image at one site at least.")
    from matplotlib.figure import Figure

    sites = list(dict.fromkeys(pair.site for pair in pairs))
    steps = sorted({pair.step for pair in pairs})
    size = (LABEL + CELL * len(steps) + BAR, 0.5 + CELL * len(sites))
    figure = Figure(figsize=size, dpi=DPI, facecolor=PAPER, layout="constrained")
    grid = figure.subplots(len(sites), len(steps), squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for pair in pairs:
        axes = grid[sites.index(pair.site), steps.index(pair.step)]
        shown = _map(axes, _laid_out(pair))
        if pair.step == steps[0]:
            axes.set_ylabel(_name(pair), size=SMALL, rotation=0, ha="right", va="center")
    for axes, step in zip(grid[0], steps, strict=True):
        axes.set_title(f"σ = {sigmas[step]:.2f}", size=TEXT)
    bar = figure.colorbar(shown, ax=grid, pad=0.02)
    bar.set_label("difference to the safe twin,\nshare of the map's largest", size=SMALL)
    bar.ax.tick_params(labelsize=SMALL)
    return figure


def _map(axes: Any, change: Float[Tensor, "height width"]) -> Any:
    axes.set_axis_on()
    axes.set_xticks([])
    axes.set_yticks([])
    return axes.imshow(change.numpy(), aspect="auto", cmap="cividis", vmin=0, vmax=1, interpolation="none")


def _laid_out(pair: Pair) -> Float[Tensor, "height width"]:
    """Square where the tokens are those of a square picture, else one line."""
    change, side = pair.change(), isqrt(len(pair.harmful))
    if pair.site.stream == "img" and side**2 == len(change):
        return rearrange(change, "(height width) -> height width", height=side)
    return rearrange(change, "token -> 1 token")


def _name(pair: Pair) -> str:
    """On lines of their own: the block, and what of it."""
    site, tokens = pair.site, len(pair.harmful)
    block = str(site).removesuffix(f"{site.stream}.{site.point}").rstrip(".")
    lines = [block, f"{site.stream}.{site.point}", f"{tokens} tokens"]
    return "\n".join(line for line in lines if line)
