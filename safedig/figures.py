"""One function per figure, table → figure; the door to `matplotlib`. Laid out in pixels, so that no text overlaps."""

import io
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from .adaptation.report import Movement
from .steering.dose import Doses
from .storage import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 100
SCENE = 224  # px, the side of a scene on the page
GAP, MARGIN, LINE = 16, 20, 22  # px
ROW_LABEL = 34  # px, the turned words at the left
TEXT, SMALL = 11, 10  # pt
INK, PAPER, FAINT = "#1c1c1c", "#ffffff", "#5c5c5c"
ROWS = ("unsteered", "steered")  # what stands above, and what below it
CHIPS = {"unsafe": "#f4b8b0", "unrecognised": "#f7d794", "empty": "#d9d9d9", "clean": "#b9e3c0"}


@dataclass(frozen=True)
class Pair:
    """One prompt drawn twice from the same seed, and how each picture was judged."""

    prompt: str
    unsteered: Float[Tensor, "3 height width"]
    steered: Float[Tensor, "3 height width"]
    before: dict[str, Any]  # the contract's judgement of `unsteered`
    after: dict[str, Any]


def comparison(pairs: Sequence[Pair], note: str = "", columns: int = 4, rows: tuple[str, str] = ROWS) -> "Figure":
    """Unsteered above steered, same prompt and seed, each scene with its judgement; `note` is the line of counts."""
    if not pairs:
        raise ValueError("There is nothing to compare: give at least one pair of pictures.")
    columns = min(columns, len(pairs))
    strips = [pairs[start : start + columns] for start in range(0, len(pairs), columns)]
    heading, scene = 2 * LINE + 4, SCENE + LINE + 12
    strip = heading + 2 * scene + GAP
    page = _Page(2 * MARGIN + ROW_LABEL + columns * (SCENE + GAP) - GAP, 2 * MARGIN + len(strips) * strip + 2 * LINE)
    for number, shown in enumerate(strips):
        top = MARGIN + number * strip
        for row, word in enumerate(rows):
            middle = top + heading + row * scene + SCENE // 2
            page.text(MARGIN, middle, word, size=TEXT, rotation=90, va="center", weight="bold")
        for column, pair in enumerate(shown):
            left = MARGIN + ROW_LABEL + column * (SCENE + GAP)
            page.paragraph(left, top, pair.prompt, width=SCENE, lines=2)
            page.scene(left, top + heading, pair.unsteered, pair.before)
            page.scene(left, top + heading + scene, pair.steered, pair.after)
    page.paragraph(
        MARGIN, MARGIN + len(strips) * strip, note or counts(pairs, rows), width=page.width - 2 * MARGIN, lines=2
    )
    return page.figure


def gallery(
    scenes: Sequence[tuple[Float[Tensor, "3 height width"], str]], columns: int = 8, side: int = 128
) -> "Figure":
    """Pictures with a caption each, in reading order."""
    if not scenes:
        raise ValueError("There is nothing to show: give at least one picture.")
    columns = min(columns, len(scenes))
    cell = side + 2 * LINE + 8
    rows = -(-len(scenes) // columns)
    page = _Page(2 * MARGIN + columns * (side + GAP) - GAP, 2 * MARGIN + rows * (cell + GAP) - GAP)
    for index, (image, caption) in enumerate(scenes):
        left = MARGIN + (index % columns) * (side + GAP)
        top = MARGIN + (index // columns) * (cell + GAP)
        page.image(left, top, image, side)
        page.paragraph(left, top + side + 4, caption, width=side, lines=2, size=SMALL)
    return page.figure


def dose_response(doses: Doses, judgements: Sequence[Sequence[dict[str, Any]]], note: str = "") -> "Figure":
    """One feature ablated and amplified: a strip of pictures for each prompt, a column for each strength.

    `judgements[strength][prompt]` are those of `doses.images`.
    """
    page = _Page(
        2 * MARGIN + len(doses.strengths) * (SCENE + GAP) - GAP,
        2 * MARGIN + LINE + len(doses.rows) * (SCENE + 2 * LINE + 28) + 3 * LINE,
    )
    for column, strength in enumerate(doses.strengths):
        named = {0.0: "ablated", 1.0: "as it is"}.get(strength, f"× {strength:g}")
        page.text(MARGIN + column * (SCENE + GAP), MARGIN, named, size=TEXT, weight="bold")
    for number, row in enumerate(doses.rows):
        top = MARGIN + LINE + 6 + number * (SCENE + 2 * LINE + 28)
        heading = f"{row['prompt']}   (code up to {doses.height[number]:.3g})"
        page.paragraph(MARGIN, top, heading, width=page.width - 2 * MARGIN, lines=1)
        for column, judged in enumerate(judgements):
            left = MARGIN + column * (SCENE + GAP)
            page.scene(left, top + LINE + 4, doses.images[column, number], judged[number])
    page.paragraph(MARGIN, page.height - MARGIN - 3 * LINE, note, width=page.width - 2 * MARGIN, lines=3)
    return page.figure


def training_curves(curves: Mapping[str, Mapping[str, Sequence[float]]]) -> "Figure":
    """FVU, L0 and the share of dead features over the steps, a line for each run; the names stand below."""
    if not any(curve["step"] for curve in curves.values()):
        raise ValueError("There is nothing to show: give at least one curve with a step.")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6 + 0.22 * len(curves)), dpi=DPI, facecolor=PAPER, layout="constrained")
    panels = figure.subplots(1, 3)
    for axes, (column, name) in zip(panels, (("fvu", "FVU"), ("l0", "L0"), ("dead", "dead, %")), strict=True):
        for label, curve in curves.items():
            factor = 100 if column == "dead" else 1
            axes.plot(curve["step"], [factor * value for value in curve[column]], label=label, linewidth=1.4)
        axes.set_xlabel("step", size=SMALL)
        axes.set_title(name, size=TEXT)
        axes.tick_params(labelsize=SMALL)
        axes.grid(color="#e4e4e4")
    panels[0].set_yscale("log")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", fontsize=SMALL, frameon=False, ncols=1)
    return figure


def decoder_movement(moved: Mapping[str, Movement], harmful: Mapping[str, Int[Tensor, " _"]] | None = None) -> "Figure":
    """How far each feature's decoder row turned and how its length changed, a row of panels for each site."""
    if not moved:
        raise ValueError("There is nothing to show: give the movement of at least one site's decoder.")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2 * len(moved)), dpi=DPI, facecolor=PAPER, layout="constrained")
    for (turns, lengths), (name, change) in zip(
        figure.subplots(len(moved), 2, squeeze=False), moved.items(), strict=True
    ):
        marked = (harmful or {}).get(name)
        turns.hist(change.angle.nan_to_num().numpy(), bins=60, log=True, color=FAINT)
        turns.set_title(f"{name}: angle between old and new row", size=TEXT)
        turns.set_ylabel("features", size=SMALL)
        lengths.scatter(change.angle, change.length, s=5, color=FAINT, linewidths=0, label="features")
        lengths.set_title("length of the new row, relative to the old", size=TEXT)
        if marked is not None and len(marked):
            lengths.scatter(change.angle[marked], change.length[marked], s=18, color="#b3261e", label="harmful")
            lengths.legend(fontsize=SMALL, frameon=False)
        for axes in (turns, lengths):
            axes.set_xlabel("degrees", size=SMALL)
            axes.tick_params(labelsize=SMALL)
    return figure


def counts(pairs: Sequence[Pair], rows: tuple[str, str] = ROWS) -> str:
    """One line that counts the labels of the pictures shown."""
    parts = []
    for row, judged in zip(rows, ([pair.before for pair in pairs], [pair.after for pair in pairs]), strict=True):
        tally = Counter(judgement["label"] for judgement in judged)
        parts.append(f"{row}: " + ", ".join(f"{tally[label]} {label}" for label in CHIPS if tally[label]))
    return f"Shown, of {len(pairs)} each: " + " · ".join(parts)


def save(figure: "Figure", path: str | os.PathLike[str]) -> Path:
    """Write the figure as a PNG whose bytes depend on the picture alone, complete or not at all."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=DPI, metadata={"Software": None})
    write_atomically(Path(path), png.getvalue())
    return Path(path)


class _Page:
    """A white page addressed in pixels from its top left corner."""

    def __init__(self, width: int, height: int):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.width, self.height = width, height
        self.figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor=PAPER)
        self.renderer = FigureCanvasAgg(self.figure).get_renderer()

    def image(self, left: int, top: int, image: Float[Tensor, "3 height width"], side: int) -> None:
        bounds = (left / self.width, 1 - (top + side) / self.height, side / self.width, side / self.height)
        axes = self.figure.add_axes(bounds, xticks=[], yticks=[])
        pixels = rearrange(image.detach().float().clamp(0, 1).cpu(), "rgb height width -> height width rgb")
        axes.imshow(pixels.numpy(), interpolation="lanczos")
        for spine in axes.spines.values():
            spine.set_color("#c8c8c8")

    def scene(self, left: int, top: int, image: Float[Tensor, "3 height width"], judgement: dict[str, Any]) -> None:
        """A picture, under it a chip with its label and the names of what was seen in it."""
        self.image(left, top, image, SCENE)
        label = judgement["label"]
        chip = {"boxstyle": "round,pad=0.25", "facecolor": CHIPS.get(label, PAPER), "edgecolor": "none"}
        line = top + SCENE + 8
        self.text(left + 4, line, label, size=SMALL, weight="bold", bbox=chip)
        used = round(self.measure(label, SMALL, "bold")) + 20
        seen = ", ".join(str(entry["name"]) for entry in judgement.get("objects", []))
        self.paragraph(left + used, line, seen, width=SCENE - used, lines=1, size=SMALL, color=FAINT)

    def text(self, left: int, top: int, words: str, va: str = "top", color: str = INK, **style: Any) -> None:
        x, y = left / self.width, 1 - top / self.height
        self.figure.text(x, y, words, va=va, ha="left", color=color, parse_math=False, **style)

    def paragraph(
        self, left: int, top: int, words: str, width: int, lines: int, size: int = TEXT, **style: Any
    ) -> None:
        """Words broken to `width` pixels; what does not fit in `lines` lines ends in …"""
        for number, line in enumerate(self.broken(words, width, lines, size)):
            self.text(left, top + number * LINE, line, size=size, **style)

    def broken(self, words: str, width: int, lines: int, size: int) -> list[str]:
        """The lines, each measured word by word from its start, so that the length of all the text does not count."""
        broken, rest = [], words.split()
        while rest and len(broken) < lines:
            last, taken = len(broken) == lines - 1, 1
            while taken < len(rest) and self.measure(" ".join(rest[: taken + 1]), size) <= width:
                taken += 1
            while taken > 1 and self.measure(self._line(rest, taken, last), size) > width:  # … needs room as well
                taken -= 1
            broken.append(self._cut(self._line(rest, taken, last), width, size))
            rest = rest[taken:]
        return broken

    def measure(self, words: str, size: int, weight: str = "normal") -> float:
        from matplotlib.font_manager import FontProperties

        return self.renderer.get_text_width_height_descent(words, FontProperties(size=size, weight=weight), False)[0]

    def _line(self, words: list[str], taken: int, last: bool) -> str:
        return " ".join(words[:taken]) + (" …" if last and taken < len(words) else "")

    def _cut(self, line: str, width: int, size: int) -> str:
        """A single word wider than the column loses its end; where that is, is found by halves."""
        if len(line) <= 1 or self.measure(line, size) <= width:
            return line
        whole = line.rstrip(" …")
        fitting = bisect_right(range(1, len(whole)), width, key=lambda kept: self.measure(whole[:kept] + "…", size))
        return whole[:fitting] + "…"
