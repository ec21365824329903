"""Every mode × recording and editing: what becomes of it. `python -m tests.compatibility` writes it down."""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from safedig import hooks
from safedig.config import UsageError
from safedig.hooks import Context, SafetyBypassError
from safedig.sites import Place, Site, places
from tests.compatibility_modes import MODES, Mode, nothing
from tests.tiny_pipelines import tiny_flux, tiny_sd3

DOCUMENT = Path(__file__).parents[1] / "docs" / "compatibility.md"
PIPELINES = {"tiny-flux": tiny_flux, "tiny-sd3": tiny_sd3}
ACTIONS = ("record", "edit")
ORDERS = ("before", "after")


class Cell(NamedTuple):
    mode: Mode
    order: str
    """Whether the mode is turned on before the functions are attached, or while they are."""
    pipeline: str
    action: str

    def __str__(self) -> str:
        return f"{self.mode.name}-{self.order}-{self.pipeline}-{self.action}"


class Outcome(NamedTuple):
    verdict: Literal["works", "raises", "SILENT", "not run"]
    detail: str = ""


def cells() -> list[Cell]:
    """The whole matrix; the plain pipeline is not turned on, so that one order of it is enough."""
    every = [Cell(*row) for row in product(MODES, ORDERS, PIPELINES, ACTIONS)]
    return [cell for cell in every if cell.order == "before" or cell.mode.enable is not nothing]


# ---- one cell

Attach = Callable[..., AbstractContextManager[None]]
Seen = list[tuple[Site, int, tuple[str, ...], torch.Tensor]]


def outcome(cell: Cell, attach: Attach = hooks.attach) -> Outcome:
    """Run one cell on a new pipeline, two calls in a row, for the second may go wrong alone."""
    mode = cell.mode
    if mode.missing:
        return Outcome("not run", f"{mode.needs} is not installed")
    pipe, plain = PIPELINES[cell.pipeline](), PIPELINES[cell.pipeline]()
    mode.weights(plain)
    seen, wanted = [], []
    with hooks.attach(plain, functions(plain, cell.action, wanted)):
        expected = mode.draw(plain)
    alone = PIPELINES[cell.pipeline]() if cell.order == "after" else pipe
    mode.enable(alone)
    without = None if cell.pipeline in mode.broken else mode.draw(alone)
    try:
        with attach(pipe, functions(pipe, cell.action, seen)):
            if cell.order == "after":
                mode.enable(pipe)
            images = [mode.draw(pipe), mode.draw(pipe)]
    except (SafetyBypassError, UsageError) as error:
        return Outcome("raises", f"{type(error).__name__}: {error}")
    if without is None:
        return Outcome("SILENT", "it drew, which it cannot without the functions")
    wrong = _wrong_images(cell, images, expected, without) or wrong_rows(seen, wanted * 2, mode.tolerance)
    if not wrong and not _equal(mode.draw(pipe), without, mode.tolerance):
        wrong = "it is not as it was once the functions are gone"
    return Outcome("SILENT", wrong) if wrong else Outcome("works")


def functions(pipe: Any, action: str, seen: Seen) -> dict[Site, hooks.SiteFunction]:
    """Record at every live site, text encoders too; or edit at all of those that can be edited."""

    def record(x: torch.Tensor, context: Context) -> None:
        seen.append((context.site, context.step, context.rows, x.detach().clone()))

    def edit(x: torch.Tensor, context: Context) -> torch.Tensor:
        record(x, context)  # where an edit hardly reaches the image, the sites behind it show that it was made
        return x + 0.5 * x.roll(1, -1)

    return {place.site: record if action == "record" else edit for place in armed(pipe, action)}


def armed(pipe: Any, action: str) -> list[Place]:
    return [place for place in places(pipe) if not (place.dead if action == "record" else place.why_not)]


def _wrong_images(cell: Cell, images: list[torch.Tensor], expected: torch.Tensor, without: torch.Tensor) -> str:
    tolerance = cell.mode.tolerance
    for image in images:
        if cell.action == "record" and not _equal(image, without, tolerance):
            return "recording changed the images"
        if cell.action == "edit" and _equal(image, without, 10 * tolerance):
            return "the edit changed nothing"
        if not _equal(image, expected, tolerance):
            return f"the images differ from the plain pipeline's by {(image - expected).abs().max():.1e}"
    return ""


def wrong_rows(seen: Seen, wanted: Seen, tolerance: float) -> str:
    """What is wrong with the recorded tensors; empty: nothing."""
    key = [(site, step, rows) for site, step, rows, _ in seen]
    if key != [(site, step, rows) for site, step, rows, _ in wanted]:
        return f"{len(seen)} tensors were recorded instead of {len(wanted)}, or others"
    for (site, step, _, x), (*_, y) in zip(seen, wanted, strict=True):
        if not _equal(x, y, tolerance):
            return f"what was recorded at {site} in step {step} differs from the plain pipeline's"
    return ""


def _equal(x: torch.Tensor, y: torch.Tensor, tolerance: float) -> bool:
    return torch.allclose(x, y, rtol=tolerance, atol=tolerance) if tolerance else torch.equal(x, y)


# ---- the document

Outcomes = dict[Cell, Outcome]
_HEAD = """# Compatibility

Generated by `.venv/bin/python -m tests.compatibility` with diffusers VERSION on a CPU; `make test-slow` runs every cell
again and fails where one does otherwise than stands here. The table of modes is `tests/compatibility_modes.py`.

In each cell a pipeline with random weights draws two prompts under guidance, twice in a row, with functions on every
live site of the transformer and the text encoders that record (*record*), or on every editable one that edit (*edit*).
The mode is turned on *before* the functions are attached (and after a first drawing), or while they are (*after*).

- **works**: recorders change no bit of the images and see the tensors of the plain pipeline with the same weights;
  edits give the images, and behind every site the tensors, of the plain pipeline under the same edits;
  and without functions all is as it was.
  Equal means bit for bit, or within the tolerance below.
- **raises**: a `SafetyBypassError` or a `UsageError` before an image comes out; the messages stand below.
- **not run**: a package was missing.
"""


def document(outcomes: Outcomes) -> str:
    """The matrix as Markdown, with what was run and what was raised."""
    columns = [f"{pipeline}, {action}" for pipeline, action in product(PIPELINES, ACTIONS)]
    lines = [_row("mode", "turned on", *columns), _row(*["---"] * (2 + len(columns)))]
    raised: dict[str, None] = {}
    for mode, order in dict.fromkeys((cell.mode, cell.order) for cell in outcomes):
        found = [outcomes[Cell(mode, order, *column)] for column in product(PIPELINES, ACTIONS)]
        lines.append(_row(mode.name, order, *(one.verdict for one in found)))
        raised |= dict.fromkeys(f"- {mode.name}, {order}: {one.detail}" for one in found if one.detail)
    return "\n".join([_head(), *lines, "", "## What was run", "", *_runs(), "", "## Why not", "", *raised, ""])


def listed(text: str) -> dict[tuple[str, str, str, str], str]:
    """(mode, order, pipeline, action) → verdict, read back from the document."""
    rows = [[part.strip() for part in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    columns = list(product(PIPELINES, ACTIONS))
    return {
        (mode, order, *column): verdict
        for mode, order, *verdicts in rows[2:]
        for column, verdict in zip(columns, verdicts, strict=True)
    }


def _head() -> str:
    import diffusers

    return _HEAD.replace("VERSION", f"{diffusers.__version__} and torch {torch.__version__}")


def _runs() -> Iterator[str]:
    for mode in MODES:
        equal = f"within {mode.tolerance:g}" if mode.tolerance else "bit for bit"
        yield f"- {mode.name} ({equal}): `{mode.run}`" if mode.enable is not nothing else f"- {mode.name} ({equal})"


def _row(*parts: str) -> str:
    return f"| {' | '.join(parts)} |"


def main() -> None:
    """Run the whole matrix, four minutes on an idle machine, and write the document."""
    outcomes = {}
    for cell in cells():
        outcomes[cell] = outcome(cell)
        torch.compiler.reset()
        print(cell, *outcomes[cell], file=sys.stderr)
    DOCUMENT.write_text(document(outcomes), encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
