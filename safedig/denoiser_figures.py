"""Pictures of the Safe Denoiser's theory, table → figure: what is drawn with none, half, all and twice of β*."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from .denoiser.theory import GaussianMixture
from .figures import DPI, FAINT, INK, PAPER, SMALL, TEXT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WANTED, DRAWN, FORBIDDEN = "#0072b2", "#bfc5ca", "#d55e00"
BINS, SPAN = 70, 4.0  # of the histograms; half of what is shown, in the units of the data


def theory_figure(worlds: Mapping[str, Mapping[str, Any]]) -> "Figure":
    """A row for each world, a panel for each share of β*.

    A world has `safe` (a `GaussianMixture`), `centre` and `radius` of the unsafe ball, and `drawn`, by the name of the
    share: the samples `x` [n, d], and `leaked` and `w1`, as they are told above the panel.
    """
    if not worlds:
        raise ValueError("There is nothing to show: give at least one world.")
    from matplotlib.figure import Figure

    columns = max(len(world["drawn"]) for world in worlds.values())
    size = (3.1 * columns, 3.3 * len(worlds))
    figure = Figure(figsize=size, dpi=DPI, facecolor=PAPER, layout="constrained")
    grid = figure.subplots(len(worlds), columns, squeeze=False)
    for row, (name, world) in zip(grid, worlds.items(), strict=True):
        for axes, (share, told) in zip(row, world["drawn"].items(), strict=False):
            (_line if told["x"].shape[1] == 1 else _plane)(axes, told["x"], world)
            axes.set_title(f"{share}\n{told['leaked']:.2%} unsafe, W1 {told['w1']:.2f}", size=TEXT, color=INK)
            axes.tick_params(labelsize=SMALL, colors=FAINT)
        row[0].set_ylabel(name, size=TEXT)
    figure.supxlabel("blue: what is safe; grey: what is drawn; orange: the unsafe region", size=SMALL, color=FAINT)
    return figure


def _line(axes: Any, x: torch.Tensor, world: Mapping[str, Any]) -> None:
    """A histogram under the density of what is safe."""
    safe: GaussianMixture = world["safe"]
    centre, radius = float(world["centre"]), world["radius"]
    axes.axvspan(centre - radius, centre + radius, color=FORBIDDEN, alpha=0.18, linewidth=0)
    axes.hist(x[:, 0].numpy(), bins=BINS, range=(-SPAN, SPAN), density=True, color=DRAWN)
    along = torch.linspace(-SPAN, SPAN, 400)
    axes.plot(along, safe.log_p(along[:, None], 0.0).exp(), color=WANTED, linewidth=1.6)
    axes.set_xlim(-SPAN, SPAN)
    axes.set_ylim(0, 1.6 * float(safe.log_p(safe.means, 0.0).exp().max()))
    axes.set_yticks([])
    axes.set_xlabel("x₀, in units of the data", size=SMALL)


def _plane(axes: Any, x: torch.Tensor, world: Mapping[str, Any]) -> None:
    """Points over circles of two standard deviations of each safe mode."""
    from matplotlib.patches import Circle

    safe: GaussianMixture = world["safe"]
    axes.add_patch(Circle(world["centre"].tolist(), world["radius"], color=FORBIDDEN, alpha=0.18, linewidth=0))
    for mean, std in zip(safe.means.tolist(), safe.std.tolist(), strict=True):
        axes.add_patch(Circle(mean, 2 * std, fill=False, edgecolor=WANTED, linewidth=1.6))
    axes.scatter(*x.T.numpy(), s=4, color=FAINT, linewidths=0, alpha=0.6)
    axes.set_xlim(-SPAN, SPAN)
    axes.set_ylim(-SPAN / 1.6, SPAN / 1.6)
    axes.set_aspect("equal")
    axes.set_xlabel("x₀, in units of the data, both axes", size=SMALL)
