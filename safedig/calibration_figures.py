"""A dose–response run, table → figure: what each edit removes and costs as it grows stronger, and the front of them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .evaluation.dose_response import Choice, Outcome, curves, front_of
from .evaluation.intervals import Rate
from .evaluation_figures import COLOURS, DPI, FAINT, INK, LINE, SMALL, TEXT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKS = ("o", "s", "^", "D", "v", "P")
PANELS = {
    "unsafe": "Harmful prompts drawn unsafe (dotted: unsteered)",
    "clean": "Harmful prompts drawn clean (dotted: unsteered)",
    "lost": "Benign prompts lost (dashed: the budget)",
}


def doses_and_front(
    model: str, unsteered: Outcome, outcomes: Sequence[Outcome], choice: Choice, budget: float
) -> "Figure":
    """Left the ladders of doses, the best of each edit with 95 % intervals; right unsafe against lost, and the budget.

    A colour and a mark for each edit; the other conditions of an edit (σ, ε, sites) are pale.
    """
    if not outcomes:
        raise ValueError("There is nothing to show: give at least one setting's outcome.")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.0, 7.6), dpi=DPI, facecolor="white", layout="constrained")
    grid = figure.add_gridspec(3, 2, width_ratios=(1, 1.15))
    panels, plane = [figure.add_subplot(grid[at, 0]) for at in range(3)], figure.add_subplot(grid[:, 1])
    looks = _looks(outcomes)
    for axes, (name, title) in zip(panels, PANELS.items(), strict=True):
        _ladders(axes, outcomes, name, looks, budget)
        axes.set_title(f"{title}, of {getattr(outcomes[0], name)['n']}", size=TEXT, color=INK)
        axes.set_ylabel(f"{name}, % of prompts", size=SMALL)
        axes.set_xticks(sorted({_dose(one) for one in outcomes}))
    for axes, name in zip(panels, ("unsafe", "clean"), strict=False):
        axes.axhline(100 * getattr(unsteered, name)["rate"], color=FAINT, linestyle=":", linewidth=1.2)
        axes.set_ylim(-4, 104)
    panels[2].axhline(100 * budget, color=INK, linestyle="--", linewidth=1.2)
    panels[2].set_ylim(bottom=-0.3)
    panels[2].set_xlabel("dose, in multiples of each edit's unit (pale: at other σ, ε or sites)", size=SMALL)
    _plane(plane, unsteered, outcomes, choice, budget, looks)
    for axes in (*panels, plane):
        axes.tick_params(labelsize=SMALL)
        axes.grid(color=LINE)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    handles, labels = plane.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=SMALL, frameon=False)
    figure.suptitle(_title(model, unsteered, outcomes, choice), size=TEXT, color=INK, parse_math=False)
    return figure


def _title(model: str, unsteered: Outcome, outcomes: Sequence[Outcome], choice: Choice) -> str:
    def counts(name: str, rate: Rate) -> str:
        return f"{name} {rate['k']}/{rate['n']}"

    line = f"{model}, {len(outcomes)} settings on the split calibrate; unsteered {counts('unsafe', unsteered.unsafe)}"
    one = choice.best or choice.nearest
    if one is None:
        return f"{line}\nNo setting is safer than the unsteered model"
    head = "Chosen" if choice.best is not None else "None within the budget; nearest"
    told = ", ".join(counts(name, getattr(one, name)) for name in ("unsafe", "clean", "lost", "touched"))
    return f"{line}\n{head}: {one.setting}: {told}"


def _looks(outcomes: Sequence[Outcome]) -> dict[str, tuple[str, str]]:
    edits = dict.fromkeys(one.setting.edit for one in outcomes if one.setting is not None)
    return {edit: (COLOURS[at], MARKS[at]) for at, edit in enumerate(edits)}


def _ladders(
    axes: "Axes", outcomes: Sequence[Outcome], name: str, looks: dict[str, tuple[str, str]], budget: float
) -> None:
    """Of each edit the ladder that holds its best outcome in full, shifted a little so that intervals do not cover."""
    ladders = curves(outcomes)
    for at, (edit, (colour, mark)) in enumerate(looks.items()):
        own = [ladder for ladder in ladders if _edit(ladder[0]) == edit]
        best = min(own, key=lambda ladder: min((one.beyond(budget), one.unsafe["k"]) for one in ladder))
        for ladder in own:
            x = [_dose(one) for one in ladder]
            rates = [getattr(one, name) for one in ladder]
            if ladder is not best:
                axes.plot(x, [100 * rate["rate"] for rate in rates], color=colour, alpha=0.3, linewidth=1.0)
                continue
            shifted = [dose + 0.02 * (at - (len(looks) - 1) / 2) for dose in x]
            y, reach = zip(*map(_cross, rates), strict=True)
            style: dict[str, Any] = {"color": colour, "marker": mark, "markersize": 5, "linewidth": 1.6, "capsize": 3}
            axes.errorbar(shifted, y, yerr=list(zip(*reach, strict=True)), **style)


def _plane(
    axes: "Axes",
    unsteered: Outcome,
    outcomes: Sequence[Outcome],
    choice: Choice,
    budget: float,
    looks: dict[str, tuple[str, str]],
) -> None:
    for edit, (colour, mark) in looks.items():
        own = [one for one in outcomes if _edit(one) == edit]
        n = f"{edit}, {len(own)} settings"
        axes.plot(*_points(own), color=colour, marker=mark, markersize=6, linestyle="", alpha=0.75, label=n)
    edge = front_of([unsteered, *outcomes])
    axes.plot(*_points(edge), color=FAINT, linestyle=":", linewidth=1.4, label="front", zorder=1)
    axes.plot(*_points([unsteered]), color=INK, marker="x", markersize=7, linestyle="", label="unsteered")
    axes.axvline(100 * budget, color=INK, linestyle="--", linewidth=1.2, label=f"budget, {budget:.1%}")
    one = choice.best or choice.nearest
    if one is not None:
        (x, xs), (y, ys) = _cross(one.lost), _cross(one.unsafe)
        style: dict[str, Any] = {"color": INK, "marker": "*", "markersize": 15, "markerfacecolor": "white"}
        axes.errorbar(
            x,
            y,
            xerr=[[xs[0]], [xs[1]]],
            yerr=[[ys[0]], [ys[1]]],
            linewidth=1.2,
            capsize=3,
            linestyle="",
            label="chosen, 95 % intervals" if choice.best is not None else "nearest, 95 % intervals",
            **style,
        )
    axes.set_title("Unsafe against lost: down and to the left is better", size=TEXT, color=INK)
    axes.set_xlabel("benign prompts lost, %", size=SMALL)
    axes.set_ylabel("harmful prompts drawn unsafe, %", size=SMALL)
    axes.set_ylim(-4, 104)
    axes.set_xlim(right=max(axes.get_xlim()[1], 300 * budget))


def _points(outcomes: Sequence[Outcome]) -> tuple[list[float], list[float]]:
    """Lost and unsafe, in percent."""
    return [100 * one.lost["rate"] for one in outcomes], [100 * one.unsafe["rate"] for one in outcomes]


def _cross(rate: Rate) -> tuple[float, tuple[float, float]]:
    """A rate in percent, and how far its interval reaches below and above."""
    middle = 100 * rate["rate"]
    return middle, (max(0.0, middle - 100 * rate["lo"]), max(0.0, 100 * rate["hi"] - middle))


def _edit(one: Outcome) -> str:
    return "" if one.setting is None else one.setting.edit


def _dose(one: Outcome) -> float:
    return 0.0 if one.setting is None else one.setting.dose
