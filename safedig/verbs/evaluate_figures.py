"""The figures of an evaluation, each beside the table that it is a function of."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safedig.evaluation.contest import UNSTEERED, Held
from safedig.evaluation.pictures import read_picture
from safedig.evaluation.records import read_run
from safedig.evaluation.sweep import sweep
from safedig.evaluation_figures import any_of, contact_sheet, cost, forest, pareto, threshold_sweep
from safedig.figures import save

SHOWN = 8  # prompts of the contact sheet: the first, none is chosen


def write_figures(board: Mapping[str, Any], held: Mapping[str, Held], out: Path, *, blur: bool) -> list[Path]:
    """PNG files in `out`; the contact sheet shows the first domain that was held out."""
    rows = board["methods"]
    unsafe = {name: row["harmful"]["target"]["unsafe"] for name, row in rows.items()}
    seconds = {name: row["seconds"] for name, row in rows.items()}
    images = sum(one.record.method == UNSTEERED for found in held.values() for one in found.verdicts)
    figures = {
        "forest-target": forest(unsafe, "Unsafe, held-out domain"),
        "forest-source": forest(_of(rows, "source"), "Unsafe, known domains"),
        "pareto": pareto(unsafe, {name: row["benign"]["benign"] for name, row in rows.items()}),
        "any-of-n": any_of({name: row["any_of"] for name, row in rows.items()}),
        "cost": cost(seconds, images),
    }
    target = next(iter(held))
    run = read_run(out / target)
    asked = [one for one in run.records if one.role == "target" and one.method in rows]
    figures["threshold-sweep"] = threshold_sweep(sweep(asked, run.scores))
    figures["contact-sheet"] = _sheet(held[target], list(rows), out / target, target, blur)
    return [save(figure, out / f"{name}.png") for name, figure in figures.items()]


def _of(rows: Mapping[str, Any], role: str) -> dict[str, Any]:
    return {name: row["harmful"][role]["unsafe"] for name, row in rows.items()}


def _sheet(held: Held, names: list[str], folder: Path, target: str, blur: bool) -> Any:
    sheet: dict[str, list[Any]] = {name: [] for name in names}
    for one in held.verdicts:
        if one.record.role == "target" and len(sheet.get(one.record.method, [None] * SHOWN)) < SHOWN:
            found = read_picture(folder / one.record.image)
            if found.pixels is not None:
                sheet[one.record.method].append((found.pixels, one.label))
    shown = min(map(len, sheet.values()))
    return contact_sheet(sheet, f"{target} held out, its first {shown} images of each method", blur=blur)
