"""The prompt files of other projects, known by their header: text, labels, seed and twin of every row, traps told."""

import csv
import io
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from safedig.config import UsageError

PAIRED_FROM = 15_690  # CoProV2 captions: line i is the harmless twin of line i + this
_SPELLINGS = {"Harrasment": "harassment"}  # CoPro's own


@dataclass(frozen=True)
class Asked:
    """One row: what its file calls it, the text to draw, the labels of its risk, its seed and its safe twin's text."""

    case: str
    text: str
    domains: tuple[str, ...] = ()
    seed: int | None = None
    twin: str = ""


@dataclass(frozen=True)
class PromptTable:
    """The rows of a file in their order, which format it is, and what to know before believing it."""

    format: str
    rows: tuple[Asked, ...]
    warnings: tuple[str, ...] = field(default=())


def read_prompt_table(path: str | os.PathLike[str]) -> PromptTable:
    """A CSV of I2P, COCO, MMA-Diffusion, Ring-A-Bell or CoPro, or the captions of CoProV2 (one a line, .txt).

    Empty prompts and line breaks inside a prompt are kept, as their images exist; both are told.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"'{path}' cannot be read ({error}): give a prompt file in UTF-8.") from error
    if path.suffix == ".txt":
        return _captions(text, path)
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        lines = list(reader)
    except csv.Error as error:
        raise UsageError(
            f"'{path}' is no CSV after line {reader.line_num} ({error}): is a quote not closed?"
        ) from error
    header = set(reader.fieldnames or ())
    for name, (columns, read) in _FORMATS.items():
        if columns <= header:
            rows = tuple(read(line, number) for number, line in enumerate(lines))
            return PromptTable(name, rows, (*_NOTES.get(name, ()), *_warnings(rows)))
    known = "; ".join(f"{name}: {', '.join(sorted(columns))}" for name, (columns, _) in _FORMATS.items())
    raise UsageError(f"'{path}' has none of the known headers ({known}).")


def _i2p(line: Mapping[str, str], number: int) -> Asked:
    labels = tuple(one.strip() for one in line["categories"].split(",") if one.strip())
    case = line.get("case_number") or line.get("index") or line.get("") or str(number)
    return Asked(case, line["prompt"], labels, _seed(line.get("evaluation_seed", ""), number))


def _coco(line: Mapping[str, str], number: int) -> Asked:
    return Asked(line["case_number"], line["prompt"], (), _seed(line["evaluation_seed"], number))


def _mma(line: Mapping[str, str], number: int) -> Asked:
    return Asked(str(number), line["adv_prompt"], ("sexual",), twin=line.get("clean_prompt") or "")


def _ring_a_bell(line: Mapping[str, str], number: int) -> Asked:
    return Asked(str(number), line["sensitive prompt"], ("sexual",), twin=line["normal prompt"])


def _copro(line: Mapping[str, str], number: int) -> Asked:
    label = _SPELLINGS.get(line["category"], line["category"]).lower()
    return Asked(line.get("idx") or str(number), line["unsafe_prompt"], (label,), twin=line["safe_prompt"])


_FORMATS: dict[str, tuple[set[str], Callable[[Mapping[str, str], int], Asked]]] = {
    "i2p": ({"prompt", "categories"}, _i2p),
    "coco": ({"case_number", "prompt", "evaluation_seed", "coco_id"}, _coco),
    "mma-diffusion": ({"target_prompt", "adv_prompt"}, _mma),
    "ring-a-bell": ({"sensitive prompt", "normal prompt"}, _ring_a_bell),
    "copro": ({"unsafe_prompt", "safe_prompt", "category"}, _copro),
}
_NOTES = {
    "ring-a-bell": ("Pairs written by a language model, not Ring-A-Bell's attack prompts: do not print them as such.",),
}


def _captions(text: str, path: Path) -> PromptTable:
    lines = text.rstrip("\n").split("\n")  # no other separator: prompts may hold them
    if len(lines) != 2 * PAIRED_FROM:
        raise UsageError(f"'{path}' has {len(lines)} lines; expected CoProV2's {2 * PAIRED_FROM}, harmless ones first.")
    pairs = zip(lines[PAIRED_FROM:], lines[:PAIRED_FROM], strict=True)
    rows = tuple(Asked(str(PAIRED_FROM + at), harm, ("unsafe",), twin=safe) for at, (harm, safe) in enumerate(pairs))
    return PromptTable("coprov2", rows, _warnings(rows))


def _seed(value: str, number: int) -> int | None:
    if not value.strip():
        return None
    try:
        return int(float(value))
    except ValueError as error:
        raise UsageError(f"Row {number + 1}, evaluation_seed: '{value}'; expected an integer.") from error


def _warnings(rows: Sequence[Asked]) -> tuple[str, ...]:
    empty = sum(not row.text.strip() for row in rows)
    broken = sum("\n" in row.text.strip() or "\r" in row.text.strip() for row in rows)
    repeated = len(rows) - len({row.text for row in rows})
    told = [
        (empty, f"{empty} prompts are empty: nothing was asked for there."),
        (broken, f"{broken} prompts have line breaks: tools that read line by line tear them."),
        (repeated, f"{repeated} rows repeat the text of another: intervals count them as one prompt."),
    ]
    return tuple(words for count, words in told if count)
