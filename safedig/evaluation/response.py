"""The cells of a dose–response run: drawn, judged, and kept line by line, so that none is ever measured twice."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safedig.config import UsageError
from safedig.evaluation.dose_response import Cell
from safedig.evaluation.records import row_of
from safedig.hooks import SafetyBypassError
from safedig.pipelines import Drawing, draw
from safedig.steering.setting import Setting
from safedig.steering.steering import Steering
from safedig.storage import append, whole_lines

Row = dict[str, Any]
Judge = Callable[[Tensor, list[Row]], list[str]]
"""Images [n, 3, h, w] and the rows that asked for them → a label each."""
BATCH = 16  # images
HANDFUL = 4  # benign prompts behind closed gates that are drawn in each cell, to see that they are left alone


class Cells:
    """A file of cells: those of any run, by their keys."""

    def __init__(self, path: Path):
        self._path = path
        try:
            lines = [row_of(Cell, json.loads(line)) for line in whole_lines(path)]
        except ValueError as error:
            raise UsageError(f"'{path}' is damaged ({error}): give another --out, or remove it.") from error
        self._of = {cell.key: cell for cell in lines}

    def get(self, key: str) -> Cell | None:
        return self._of.get(key)

    def add(self, cell: Cell) -> Cell:
        """On disk when it returns."""
        append(self._path, f"{json.dumps(asdict(cell), ensure_ascii=False)}\n".encode())
        self._of[cell.key] = cell
        return cell


@dataclass(eq=False)
class Response:
    """Measures settings on harmful and on benign prompts, which have one seed each."""

    pipe: Any
    drawing: Drawing
    judge: Judge
    harmful: list[Row]
    benign: list[Row]
    cells: Cells
    facts: Mapping[str, Any]
    """As JSON: all that decides the labels beside the setting and the steering: the model, the judge, the prompts."""
    _unsteered: dict[tuple[str, ...], Tensor] = field(default_factory=dict)

    def key(self, setting: Setting | None, learnt: str) -> str:
        """Of a cell; `learnt` is the hash of the steering that the setting is set on."""
        facts = {"facts": self.facts, "setting": setting and asdict(setting), "learnt": learnt}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]

    def unsteered(self) -> Cell:
        """What the model draws by itself, of all prompts."""
        key = self.key(None, "")
        if (known := self.cells.get(key)) is not None:
            return known
        return self.cells.add(Cell(key, self._labels(self.harmful), self._labels(self.benign)))

    def cell(self, setting: Setting, learnt: str, steering: Steering, opened: Callable[[], set[str]]) -> Cell:
        """Of a setting, with the steering set to it; measured only if it has not been.

        `opened` gives the ids of the benign prompts whose gates it opens, and is asked only then. A closed one that is
        not the unsteered picture to the bit is a `SafetyBypassError`.
        """
        key = self.key(setting, learnt)
        if (known := self.cells.get(key)) is not None:
            return known
        there = opened()
        closed = [row for row in self.benign if row["id"] not in there][:HANDFUL]
        before = self._before(closed)
        with steering.apply(self.pipe):
            if closed and not torch.equal(self._images(closed), before):
                raise SafetyBypassError(
                    f"With {setting} a benign picture has changed behind a gate that the recording says is closed: the "
                    "recording was made of another model, or something else acts on this one."
                )
            harmful = self._labels(self.harmful)
            benign = self._labels([row for row in self.benign if row["id"] in there])
        return self.cells.add(Cell(key, harmful, benign, setting, len(closed)))

    def _before(self, rows: list[Row]) -> Tensor:
        """The unsteered pictures of a handful, drawn in the same batch: others may round differently."""
        ids = tuple(row["id"] for row in rows)
        if rows and ids not in self._unsteered:
            self._unsteered[ids] = self._images(rows)
        return self._unsteered.get(ids, torch.zeros(0))

    def _images(self, rows: Sequence[Row]) -> Tensor:
        return torch.cat([images for _, images in draw(self.pipe, rows, drawing=self.drawing, batch_size=BATCH)])

    def _labels(self, rows: list[Row]) -> dict[str, str]:
        found: dict[str, str] = {}
        for asked, images in draw(self.pipe, rows, drawing=self.drawing, batch_size=BATCH):
            found |= {
                row["id"]: label
                for row, label in zip(asked, self.judge(images, [dict(row) for row in asked]), strict=True)
            }
        return found
