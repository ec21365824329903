"""Images and scores of other projects as records: a folder of `<case>_<seed>.png` beside its prompts, scores by CSV."""

import csv
import io
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safedig.config import UsageError
from safedig.evaluation.pictures import read_picture
from safedig.evaluation.prompt_tables import PromptTable
from safedig.evaluation.records import Record, Score, prompt_sha
from safedig.progress import track

NAMED = re.compile(r"(?P<case>.+)_(?P<seed>\d+)\.(png|jpg|jpeg|webp)", re.IGNORECASE)
KEYS = ("image_sha", "image", "case", "seed")


def import_folder(
    folder: str | os.PathLike[str], prompts: PromptTable, method: str, run_id: str, role: str = "source"
) -> tuple[list[Record], list[str]]:
    """A record for every image file, by case and seed in its name, in the order of the prompts; and warnings.

    A file whose case no prompt has is an error. A corrupt file has a record all the same, with the hash of its bytes:
    judges give it an error row. Prompts without an image are told.
    """
    folder, by_case = Path(folder), {row.case: row for row in prompts.rows}
    if not folder.is_dir():
        raise UsageError(f"There is no folder '{folder}': give one with images named <case>_<seed>.png.")
    if len(by_case) < len(prompts.rows):
        raise UsageError(f"{len(prompts.rows) - len(by_case)} prompts share their case number: give each its own.")
    files = {(match["case"], int(match["seed"])): path for path in _images(folder) if (match := _named(path))}
    strangers = sorted({case for case, _ in files} - by_case.keys())
    if strangers:
        raise UsageError(f"'{folder}' has images of case {strangers[0]}, which is no case of the prompts.")
    order = {case: at for at, case in enumerate(by_case)}
    records, corrupt = [], 0
    for case, seed in track(sorted(files, key=lambda key: (order[key[0]], key[1])), f"images in {folder.name}"):
        found, row = read_picture(files[case, seed]), by_case[case]
        corrupt += bool(found.error)
        records.append(
            Record(
                run_id=run_id,
                method=method,
                prompt_id=case,
                prompt_sha=prompt_sha(row.text),
                seed=seed,
                image_sha=found.sha,
                role=role,
                domains=row.domains,
                image=files[case, seed].name,
            )
        )
    missing = len(by_case.keys() - {case for case, _ in files})
    told = [(missing, f"{missing} prompts have no image."), (corrupt, f"{corrupt} images cannot be read.")]
    return records, [*prompts.warnings, *(words for count, words in told if count)]


def import_scores(
    path: str | os.PathLike[str], records: Sequence[Record], detector: str, version: str, weights_sha: str = ""
) -> list[Score]:
    """Scores that another program gave, joined by `image_sha`, by file name (`image`), or by `case` and `seed`.

    Every other column is a raw score under its own name, a number where it reads as one; `boxes` is JSON, `error` text.
    A row that belongs to no image is an error, as is an image with two different rows; one without any has no score.
    """
    rows, key = _rows(Path(path))
    of_image = {_key_of(record, key): record for record in records}
    found: dict[str, Score] = {}
    for number, row in enumerate(rows, start=1):
        name = tuple(_same(row[column], column) for column in key)
        if name not in of_image:
            raise UsageError(f"'{path}', row {number}: no image has {_told(key, name)}; are these scores of this run?")
        score = _score(row, of_image[name].image_sha, (detector, version, weights_sha), f"'{path}', row {number}")
        if found.setdefault(score.image_sha, score) != score:
            raise UsageError(f"'{path}', row {number}: the image with {_told(key, name)} has another score already.")
    return list(found.values())


def _images(folder: Path) -> Iterable[Path]:
    return (path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith("."))


def _named(path: Path) -> re.Match[str] | None:
    match = NAMED.fullmatch(path.name)
    if match is None and path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"):
        raise UsageError(f"'{path.name}' is not named <case>_<seed>.png: whose image is it? Rename or remove it.")
    return match


def _rows(path: Path) -> tuple[list[dict[str, str]], tuple[str, ...]]:
    try:
        reader = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline=""), strict=True)
        rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"'{path}' cannot be read as a CSV of scores: {error}.") from error
    header = reader.fieldnames or ()
    for key in (("image_sha",), ("image",), ("case", "seed")):
        if set(key) <= set(header):
            return rows, key
    raise UsageError(f"'{path}' has the columns {', '.join(header)}: expected image_sha, image, or case and seed.")


def _key_of(record: Record, key: tuple[str, ...]) -> tuple[str, ...]:
    given = {"image_sha": record.image_sha, "image": Path(record.image).name}
    given |= {"case": record.prompt_id, "seed": str(record.seed)}
    return tuple(given[column] for column in key)


def _same(value: str, column: str) -> str:
    return Path(value).name if column == "image" else value.strip()


def _told(key: tuple[str, ...], name: tuple[str, ...]) -> str:
    return ", ".join(f"{column} {value}" for column, value in zip(key, name, strict=True))


def _score(row: Mapping[str, str], sha: str, judge: tuple[str, str, str], where: str) -> Score:
    if None in row or None in row.values():
        raise UsageError(f"{where}: it has more or fewer cells than the header.")
    raw = {name: _value(value) for name, value in row.items() if name not in (*KEYS, "boxes", "error") and value != ""}
    error = row.get("error", "")
    try:
        boxes = tuple(json.loads(row["boxes"])) if row.get("boxes") else ()
        if any(not {"class", "score"} <= set(box) for box in boxes):
            raise ValueError("a box without class and score")
    except (ValueError, TypeError) as wrong:
        raise UsageError(f'{where}, boxes: {wrong}; expected [{{"class": …, "score": …}}, …].') from wrong
    if not raw and "boxes" not in row and not error:
        error = "the row holds no score"
    return Score(sha, *judge, scores=raw, boxes=boxes, error=error or _not_finite(raw))


def _value(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def _not_finite(raw: Mapping[str, Any]) -> str:
    wrong = [name for name, value in raw.items() if isinstance(value, float) and value - value != 0]
    return f"{wrong[0]} is no finite number" if wrong else ""
