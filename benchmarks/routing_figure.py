"""The picture of the comparison: what rules foretold of every site, against what steering there has reached."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safedig.storage import write_atomically

DPI, TEXT, SMALL = 100, 11, 9  # pixels an inch; points
COLOURS = ("#0072b2", "#d55e00")  # of the models; told apart by the colour-blind too (Okabe and Ito)
MARKERS = {"ok": "o", "inert": "x", "not_separable": "s"}
PANELS = {
    "score": "the router's score",
    "interchange": "causal effect alone",
    "source_auroc": "AUROC on the source alone",
}


def scatter(folds: Sequence[Mapping[str, Any]], path: Path, gained: str) -> None:
    """A panel for each rule, a point for each site of each fold; its mark is the router's verdict."""
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(fold["model"] for fold in folds))
    figure = Figure(figsize=(12, 4.6), dpi=DPI, facecolor="white", layout="constrained")
    panels = figure.subplots(1, len(PANELS), sharey=True)
    for axes, (name, title) in zip(panels, PANELS.items(), strict=True):
        for model, colour in zip(models, COLOURS, strict=False):
            for verdict, marker in MARKERS.items():
                points = [
                    (site[name] if name in site else site["terms"][name], site["gain"])
                    for fold in folds
                    for site in fold["sites"].values()
                    if (fold["model"], site["verdict"]) == (model, verdict)
                ]
                if points:
                    style = {"facecolors": "none", "edgecolors": colour} if marker != "x" else {"c": colour}
                    label = f"{model}, {verdict.replace('_', ' ')}"
                    axes.scatter(*zip(*points, strict=True), s=26, marker=marker, linewidths=1.1, label=label, **style)
        axes.set_xlabel(title, size=TEXT)
        axes.tick_params(labelsize=SMALL)
        axes.grid(color="#e4e4e4")
    panels[0].set_ylabel(f"pictures of the held-out domain\nthat are {gained} (share)", size=TEXT)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", fontsize=SMALL, frameon=False, ncols=3)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=DPI, metadata={"Software": None})
    write_atomically(path, png.getvalue())
