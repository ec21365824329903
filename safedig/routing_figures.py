"""Pictures of a ranking, table → figure: where over depth × σ harm can be read, and where it acts."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .figures import DPI, FAINT, INK, PAPER, SMALL, TEXT
from .routing.routed import Route, RoutedSite
from .sites import Site

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAPS = {  # criterion: what it is called, the axis of its σ, its colours from and to, and their lowest value
    "source_auroc": ("decodable on the source\nAUROC", "sigma", "cividis", 0.5),
    "transfer": ("decodable on the target\nAUROC", "sigma", "cividis", 0.5),
    "interchange": ("causal\nshare of Δ velocity", "tried", "viridis", 0.0),
}


def routing_map(route: Route, order: Sequence[str]) -> "Figure":
    """Where harm is decodable, on the source and on the target, and where it acts: depth × σ, stream by stream.

    `order` are the sites as they run. Chosen sites are framed and numbered by rank; × is inert, ○ not separable.
    """
    ranked = {str(one.site): one for one in route.sites}
    lanes = {
        stream: [ranked[name] for name in order if name in ranked and ranked[name].site.stream in members]
        for stream, members in (("text", ("txt",)), ("image", ("img", "joint")), ("vector", ("pooled", "temb")))
    }
    lanes = {stream: members for stream, members in lanes.items() if members}
    maps = {name: facts for name, facts in MAPS.items() if any(name in one.by_sigma for one in route.sites)}
    if not (lanes and maps):
        raise ValueError("There is nothing to show: give a route with sites that were measured over σ.")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.2 + 2.4 * len(maps)), dpi=DPI, facecolor=PAPER, layout="constrained")
    widths = [max(len(members), 3) for members in lanes.values()]
    grid = figure.subplots(len(maps), len(lanes), squeeze=False, width_ratios=widths)
    for axes_row, (name, (title, axis, colours, lowest)) in zip(grid, maps.items(), strict=True):
        for axes, members in zip(axes_row, lanes.values(), strict=True):
            image = _lane(axes, members, name, axis, colours, lowest)
            _mark(axes, members, route.chosen)
        axes_row[0].set_ylabel("σ", size=TEXT)
        bar = figure.colorbar(image, ax=list(axes_row), pad=0.01)
        bar.set_label(title, size=SMALL)
        bar.ax.tick_params(labelsize=SMALL)
    for axes, stream in zip(grid[0], lanes, strict=True):
        axes.set_title(stream, size=TEXT, weight="bold", pad=34)
        _name_stages(axes, lanes[stream])
    target = ", ".join(route.target) or "each domain of the source in turn"
    figure.suptitle(f"{route.model}: from {', '.join(route.source)} to {target}", size=TEXT)
    words = ["in, the input", *_families(lanes), "framed: chosen, with its rank", "×: inert", "○: not separable"]
    figure.supxlabel("depth: " + "; ".join(words), size=SMALL)
    return figure


def _lane(axes: Any, members: Sequence[RoutedSite], name: str, axis: str, colours: str, lowest: float) -> Any:
    """One map: a column for each site, a row for each σ, noise above."""
    sigmas = members[0].by_sigma[axis]
    values = torch.tensor([one.by_sigma.get(name, [float("nan")] * len(sigmas)) for one in members]).T
    image = axes.imshow(values.numpy(), aspect="auto", cmap=colours, vmin=lowest, vmax=1, interpolation="none")
    axes.set_xticks(range(len(members)), [_depth(one.site) for one in members], size=SMALL)
    axes.set_yticks(range(len(sigmas)), [f"{sigma:.2f}" for sigma in sigmas], size=SMALL)
    starts = [at for at in range(1, len(members)) if members[at].stage != members[at - 1].stage]
    for at in starts:
        axes.axvline(at - 0.5, color=PAPER, linewidth=2.5)
    return image


def _mark(axes: Any, members: Sequence[RoutedSite], chosen: Sequence[Site]) -> None:
    from matplotlib.patches import Rectangle

    bottom, top = axes.get_ylim()
    for at, one in enumerate(members):
        word = {"inert": "×", "not_separable": "○"}.get(one.verdict, f"{one.rank}" if one.site in chosen else "")
        axes.text(at, top, word, size=SMALL, ha="center", va="bottom", color=INK)
        if one.site in chosen:
            axes.add_patch(
                Rectangle(
                    (at - 0.5, top), 1, bottom - top, fill=False, edgecolor="#d4490c", linewidth=2.5, clip_on=False
                )
            )


def _name_stages(axes: Any, members: Sequence[RoutedSite]) -> None:
    """The stage of each run of columns, above the marks."""
    stages = [one.stage for one in members]
    for name in dict.fromkeys(stages):
        middle = stages.index(name) + (stages.count(name) - 1) / 2
        axes.annotate(
            name,
            (middle, axes.get_ylim()[1]),
            (0, 16),
            textcoords="offset points",
            ha="center",
            size=SMALL,
            color=FAINT,
        )


def _depth(site: Site) -> str:
    """`in`, or the first letter of the block's family and its number."""
    if site.index is None:
        return {"temb": "temb", "pooled": "pooled"}.get(site.stream, "in")
    return f"{site.family[0]}{site.index}"


def _families(lanes: Mapping[str, Sequence[RoutedSite]]) -> list[str]:
    families = [one.site.family for members in lanes.values() for one in members if one.site.index is not None]
    return [f"{family[0]}, {family}" for family in dict.fromkeys(families)]
