"""Figures of a comparison of methods: one function a figure, each a function of a table; colours for any eyes.

At most sixteen methods are told apart, by colour (Okabe and Ito's eight) and shape together.
"""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate

from .evaluation.any_of import Chance
from .evaluation.intervals import Rate
from .evaluation.pareto import front

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI, WIDTH = 100, 10.0  # inches: 1,000 pixels
TEXT, SMALL = 11, 9  # pt
INK, FAINT, LINE = "#1c1c1c", "#5c5c5c", "#e4e4e4"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C7A00")
SHAPES = ("o", "s")
BLUR = 8  # cells across a blurred picture
DOT = 12  # px, about a marker


def forest(rates: Mapping[str, Rate], what: str, mark: str = "ours") -> "Figure":
    """A line for each method with its 95 % interval and counts; `what` was counted, in percent of images."""
    figure, axes = _page(1.2 + 0.34 * len(rates), f"{what}, {_total(rates)}")
    for at, (name, rate) in enumerate(rates.items()):
        colour = COLOURS[1] if name == mark else COLOURS[0]
        axes.plot([100 * rate["lo"], 100 * rate["hi"]], [at, at], color=colour, linewidth=1.6, solid_capstyle="butt")
        axes.plot(100 * rate["rate"], at, marker="o", color=colour, markersize=6)
    axes.set_yticks(range(len(rates)), list(rates), size=SMALL)
    axes.set_ylim(len(rates) - 0.5, -0.5)
    axes.set_xlim(-2, 102)
    axes.set_xlabel(f"{what}, percent of images, with 95 % interval", size=SMALL)
    counts = axes.secondary_yaxis("right")
    counts.set_yticks(range(len(rates)), [f"{rate['k']}/{rate['n']}" for rate in rates.values()], size=SMALL)
    counts.tick_params(length=0)
    axes.grid(axis="x", color=LINE)
    return figure


def pareto(unsafe: Mapping[str, Rate], benign: Mapping[str, Rate]) -> "Figure":
    """Unsafe images of the held-out domain against benign ones as asked: down and to the right is better.

    Every point bears the numbers of its methods in the legend, for many may lie on one another.
    """
    figure, axes = _page(
        5.6, f"Unsafe of the held-out domain, {_total(unsafe)}\nBenign prompts as asked, {_total(benign)}"
    )
    for at, name in enumerate(unsafe):
        (x, xs), (y, ys) = _cross(benign[name]), _cross(unsafe[name])
        colour, shape = _look(at)
        style = {"color": colour, "marker": shape, "markersize": 7, "linewidth": 1.0, "capsize": 2, "linestyle": ""}
        label = f"{at + 1}  {name} {unsafe[name]['k']}, {benign[name]['k']}"
        axes.errorbar(x, y, xerr=xs, yerr=ys, label=label, **style)
    best = front({name: (unsafe[name]["rate"], benign[name]["rate"]) for name in unsafe})
    edge = sorted((100 * benign[name]["rate"], 100 * unsafe[name]["rate"]) for name in best)
    axes.plot([x for x, _ in edge], [y for _, y in edge], color=FAINT, linestyle=":", linewidth=1.2, label="front")
    axes.set_xlabel("Benign prompts drawn as asked, percent of images", size=SMALL)
    axes.set_ylabel("Unsafe, percent of images of the held-out domain", size=SMALL)
    _legend(figure, axes)
    _numbered(figure, axes, [(100 * benign[name]["rate"], 100 * unsafe[name]["rate"]) for name in unsafe])
    return figure


def threshold_sweep(curves: Mapping[str, Sequence[tuple[float, Rate]]]) -> "Figure":
    """The unsafe rate at every threshold of the judge's own probability, so that no ranking hangs on one of them."""
    first = {name: curve[0][1] for name, curve in curves.items()}
    figure, axes = _page(5.6, f"Unsafe at every threshold, held-out domain, {_total(first)}")
    for at, (name, curve) in enumerate(curves.items()):
        colour, _ = _look(at)
        thresholds, rates = [threshold for threshold, _ in curve], [rate for _, rate in curve]
        style: dict[str, Any] = {"color": colour, "linestyle": "-" if at < len(COLOURS) else "--"}
        axes.plot(thresholds, [100 * rate["rate"] for rate in rates], label=name, linewidth=1.6, **style)
        if at in (0, len(curves) - 1):
            low, high = ([100 * rate[key] for rate in rates] for key in ("lo", "hi"))
            axes.fill_between(thresholds, low, high, color=colour, alpha=0.15)
    axes.set_xlabel("Threshold of the judge's probability of harm (from 0 to 1)", size=SMALL)
    axes.set_ylabel(f"Above it, percent of images ({_banded(curves)})", size=SMALL)
    axes.set_ylim(-2, 102)
    _legend(figure, axes)
    return figure


def any_of(curves: Mapping[str, Sequence[Chance]], images: str = "images of a prompt") -> "Figure":
    """How many prompts give at least one unsafe image among N."""
    last = {name: curve[-1] for name, curve in curves.items()}
    prompts = max(one["prompts"] for one in last.values())
    figure, axes = _page(5.6, f"At least one unsafe among N, {prompts} prompts")
    for at, (name, curve) in enumerate(curves.items()):
        colour, shape = _look(at)
        y, low, high = ([100 * one[key] for one in curve] for key in ("rate", "lo", "hi"))
        label = f"{name} {round(last[name]['rate'] * last[name]['prompts'])}/{last[name]['prompts']}"
        x = [one["images"] for one in curve]
        axes.plot(x, y, color=colour, marker=shape, markersize=5, linewidth=1.4, label=label)
        if at in (0, len(curves) - 1):
            axes.fill_between(x, low, high, color=colour, alpha=0.15)
    axes.set_xlabel(f"N, {images}", size=SMALL)
    axes.set_ylabel(f"Prompts with an unsafe one, percent ({_banded(curves)})", size=SMALL)
    axes.set_ylim(-2, 102)
    axes.set_xticks(sorted({one["images"] for curve in curves.values() for one in curve}))
    _legend(figure, axes)
    return figure


def success_curves(curves: Mapping[str, Sequence[tuple[int, Rate]]], under: str, prompts: int) -> "Figure":
    """Prompts broken against what the attack may spend."""
    last = {name: curve[-1][1] for name, curve in curves.items()}
    figure, axes = _page(5.6, f"Broken by what may be spent: {under}, {prompts} prompts")
    for at, (name, curve) in enumerate(curves.items()):
        colour, shape = _look(at)
        x, rates = [budget for budget, _ in curve], [rate for _, rate in curve]
        style: dict[str, Any] = {"color": colour, "marker": shape, "markersize": 4, "drawstyle": "steps-post"}
        label = f"{name} {last[name]['k']}/{last[name]['n']}"
        axes.plot(x, [100 * rate["rate"] for rate in rates], linewidth=1.4, label=label, **style)
        if at in (0, len(curves) - 1):
            low, high = ([100 * rate[key] for rate in rates] for key in ("lo", "hi"))
            axes.fill_between(x, low, high, color=colour, alpha=0.15, step="post")
    axes.set_xlabel("Budget of one attack on one prompt, rows through the transformer", size=SMALL)
    axes.set_ylabel(f"Prompts drawn unsafe, percent ({_banded(curves)})", size=SMALL)
    axes.set_ylim(-2, 102)
    _legend(figure, axes)
    return figure


def cost(seconds: Mapping[str, float], images: int) -> "Figure":
    """Seconds an image."""
    figure, axes = _page(1.2 + 0.34 * len(seconds), f"Time to draw an image, mean of {images} each")
    axes.barh(range(len(seconds)), list(seconds.values()), color=COLOURS[0], height=0.6)
    axes.set_yticks(range(len(seconds)), list(seconds), size=SMALL)
    axes.set_ylim(len(seconds) - 0.5, -0.5)
    axes.set_xlabel("seconds an image", size=SMALL)
    plain = next(iter(seconds.values()))
    factors = axes.secondary_yaxis("right")
    factors.set_yticks(range(len(seconds)), [f"× {value / plain:.2f}" for value in seconds.values()], size=SMALL)
    factors.tick_params(length=0)
    axes.grid(axis="x", color=LINE)
    return figure


def contact_sheet(
    sheet: Mapping[str, Sequence[tuple[Float[Tensor, "3 height width"], str]]], note: str, *, blur: bool = True
) -> "Figure":
    """A row of pictures a method, the same prompts and seeds in each, with labels; blurred unless it is to be clear."""
    from matplotlib.figure import Figure

    columns = max(map(len, sheet.values()))
    figure = Figure(figsize=(WIDTH, 1.0 + 1.12 * len(sheet)), dpi=DPI, facecolor="white", layout="constrained")
    panels = figure.subplots(len(sheet), columns, squeeze=False)
    for line, (name, pictures) in zip(panels, sheet.items(), strict=True):
        for axes in line:
            axes.axis("off")
        for axes, (image, label) in zip(line, pictures, strict=False):
            axes.imshow(_pixels(image, blur), interpolation="nearest")
            axes.set_title(label, size=8, pad=2, color=FAINT, parse_math=False)
        line[0].text(-0.15, 0.5, name, size=SMALL, ha="right", va="center", transform=line[0].transAxes)
    figure.suptitle(f"{note}{'; blurred' if blur else ''}", size=TEXT)
    return figure


def blurred(image: Float[Tensor, "3 height width"]) -> Float[Tensor, "3 height width"]:
    """So coarse that nothing can be made out."""
    height, width = image.shape[1:]
    coarse = interpolate(image[None].float(), size=(BLUR, BLUR), mode="area")
    return interpolate(coarse, size=(height, width), mode="bilinear")[0]


def _pixels(image: Float[Tensor, "3 height width"], blur: bool) -> Any:
    shown = blurred(image) if blur else image
    return rearrange(shown.detach().float().clamp(0, 1).cpu(), "rgb height width -> height width rgb").numpy()


def _page(height: float, title: str) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor="white", layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, size=TEXT, color=INK, parse_math=False)
    axes.tick_params(labelsize=SMALL)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _legend(figure: "Figure", axes: "Axes") -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=SMALL, frameon=False)
    axes.grid(color=LINE)


def _numbered(figure: "Figure", axes: "Axes", points: Sequence[tuple[float, float]]) -> None:
    """The places of these points in their order, from 1 on, beside them: on the first side where nothing stands."""
    from matplotlib.transforms import Bbox

    axes.margins(0.05, 0.12)
    figure.draw_without_rendering()  # where the axes come to lie
    taken = [Bbox.from_bounds(x - DOT / 2, y - DOT / 2, DOT, DOT) for x, y in axes.transData.transform(points)]
    for point in dict.fromkeys(points):
        words = ", ".join(str(at) for at, other in enumerate(points, start=1) if other == point)
        text = axes.annotate(words, point, (0, 0), textcoords="offset points", size=SMALL, color=INK)
        text.set_bbox({"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 0.5})
        for away, up, right in product((7, 16, 25), (1, -1), (1, -1)):
            sides = {"ha": "left" if right > 0 else "right", "va": "bottom" if up > 0 else "top"}
            text.set(position=(right * away, up * away), **sides)
            box = text.get_window_extent()
            within = axes.bbox.x0 < box.x0 and box.x1 < axes.bbox.x1
            if within and not any(box.overlaps(other) for other in taken):
                break
        taken.append(text.get_window_extent())


def _banded(curves: Mapping[str, Any]) -> str:
    """Of so many bands none could be told from another: the first method's and the last one's are drawn."""
    names = list(curves)
    return f"bands: 95 %, {' and '.join(dict.fromkeys((names[0], names[-1])))}"


def _look(at: int) -> tuple[str, str]:
    return COLOURS[at % len(COLOURS)], SHAPES[at // len(COLOURS) % len(SHAPES)]


def _cross(rate: Rate) -> tuple[float, list[list[float]]]:
    """A rate in percent, and how far its interval reaches below and above."""
    middle = 100 * rate["rate"]
    return middle, [[max(0.0, middle - 100 * rate["lo"])], [max(0.0, 100 * rate["hi"] - middle)]]


def _total(rates: Mapping[str, Rate]) -> str:
    """The counts of the first and the last method, which are the unsteered one and ours."""
    names = list(rates)
    return ", ".join(f"{name} {rates[name]['k']}/{rates[name]['n']}" for name in dict.fromkeys((names[0], names[-1])))
