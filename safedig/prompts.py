"""Prompts with a risk label and a safe twin: check, load, filter, pair, save. The door to `datasets`."""

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import UsageError, did_you_mean

if TYPE_CHECKING:
    from datasets import Dataset

COLUMNS: tuple[str, ...] = ("id", "prompt", "risk", "kind", "wording", "twin", "split", "seed", "objects", "background")
KINDS = ("harmful", "mixed", "benign", "near-miss", "underspecified")
WORDINGS = ("noun", "indirect")
SPLITS = ("train", "calibrate", "report")
CHOICES = {"kind": KINDS, "wording": WORDINGS, "split": SPLITS}
FORMATS = (".csv", ".jsonl", ".parquet")
LONGEST = 2**17  # characters of one cell, far above what any text encoder reads; also the limit of Python's csv
LARGEST_SEED = 2**62  # leaves room below the 2**63 of the column's int64, and of torch's, for seeds that count on


def prompts_from_rows(rows: Iterable[Mapping[str, Any]]) -> "Dataset":
    """A `datasets` dataset with the columns `COLUMNS`, every row checked; only `prompt` must be given.

    Left out, `id` is a hash of the prompt and seed, `kind` is harmful where there is a risk and benign elsewhere,
    `wording` is noun, `split` is report, `seed` is 0, and the others are empty.
    """
    from datasets import Dataset, Features, Value

    given = list(rows)
    checked = [_checked(row, number) for number, row in enumerate(given, start=1)]
    first_use: dict[str, int] = {}
    for number, row in enumerate(checked, start=1):
        if (first := first_use.setdefault(row["id"], number)) == number:
            continue
        if given[number - 1].get("id"):
            raise UsageError(f"Row {number}, column id: '{row['id']}' is taken by row {first}; ids must be unique.")
        raise UsageError(f"Row {number} repeats the prompt and seed of row {first}: give it another seed, or an id.")
    types = {column: Value("int64" if column == "seed" else "string") for column in COLUMNS}
    return Dataset.from_dict({column: [row[column] for row in checked] for column in COLUMNS}, features=Features(types))


def load_prompts(
    source: "str | PathLike[str] | Iterable[Mapping[str, Any]]",
    risk: str | Sequence[str] | None = None,
    kind: str | Sequence[str] | None = None,
    split: str | Sequence[str] | None = None,
) -> "Dataset":
    """Prompts from a CSV, JSONL or Parquet file, or from rows; filters keep the given values.

    A file must hold at least one prompt; what is wrong in it is a `UsageError` that names row and column. `risk` keeps
    the harmful prompts of those domains together with their safe twins.
    """
    rows = _read(Path(source)) if isinstance(source, str | PathLike) else source
    prompts = prompts_from_rows(rows)
    if risk is not None:
        prompts = _select(prompts, "risk", risk, with_twins=True)
    if kind is not None:
        prompts = _select(prompts, "kind", kind)
    if split is not None:
        prompts = _select(prompts, "split", split)
    return prompts


def save_prompts(prompts: "Dataset", path: str | PathLike[str]) -> None:
    """Write prompts to a CSV, JSONL or Parquet file that `load_prompts` reads back to the same rows."""
    path = Path(path)
    _check_format(path)
    rows = as_rows(prompts)
    if path.suffix == ".parquet":
        from pyarrow import Table
        from pyarrow.parquet import write_table

        write_table(Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path.write_text("".join(lines), encoding="utf-8")
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(COLUMNS))
            writer.writeheader()
            writer.writerows(rows)


def as_rows(prompts: "Dataset") -> list[dict[str, Any]]:
    """The dataset's rows as plain dictionaries."""
    return [
        dict(zip(COLUMNS, values, strict=True)) for values in zip(*(prompts[name] for name in COLUMNS), strict=True)
    ]


def counted_on(rows: Sequence[Mapping[str, Any]], seed: int | None) -> list[dict[str, Any]]:
    """The rows drawn from this seed on, each from the one after; from their own where none is given."""
    return [dict(row) if seed is None else {**row, "seed": seed + at} for at, row in enumerate(rows)]


def check_seed(seed: int, given_as: str) -> None:
    """A `UsageError` where nothing could be drawn from it, or from those that are counted on from it."""
    if not 0 <= seed <= LARGEST_SEED:
        raise UsageError(f"{given_as}{seed}: expected an integer from 0 to 2**62.")


def twins(prompts: "Dataset") -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Every prompt that has a safe twin beside that twin, in the dataset's order."""
    rows = as_rows(prompts)
    by_id = {row["id"]: row for row in rows}
    lost = [row for row in rows if row["twin"] and row["twin"] not in by_id]
    if lost:
        raise UsageError(
            f"{len(lost)} prompts name a safe twin that is not among the {len(rows)} given, first '{lost[0]['id']}' "
            f"names '{lost[0]['twin']}': keep the twins when filtering (load_prompts(risk=…) does)."
        )
    return [(row, by_id[row["twin"]]) for row in rows if row["twin"]]


def _checked(row: Mapping[str, Any], number: int) -> dict[str, Any]:
    """One full row, its missing columns filled; errors name row and column, never the prompt itself."""
    for column in row:
        if column not in COLUMNS:
            raise UsageError(f"Row {number}: unknown column '{column}'. {did_you_mean(str(column), COLUMNS)}")
    given = {column: value for column, value in row.items() if not _missing(value)}
    for column, value in given.items():
        _check_text(value, f"Row {number}, column {column}")
    prompt = given.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise UsageError(f"Row {number}, column prompt: it is empty; give the text to draw.")
    risk = given.get("risk", "")
    seed = _seed(given.get("seed", 0), number)
    full = {
        "id": hashlib.sha256(f"{seed}:{prompt}".encode()).hexdigest()[:16],
        "risk": risk,
        "kind": "harmful" if risk else "benign",
        "wording": "noun",
        "twin": "",
        "split": "report",
        "background": "",
    } | given
    full |= {"seed": seed, "objects": _objects(given.get("objects", "[]"), number)}
    for column, choices in CHOICES.items():
        if full[column] not in choices:
            raise UsageError(
                f"Row {number}, column {column}: '{full[column]}'. {did_you_mean(str(full[column]), choices)}"
            )
    full |= {column: str(full[column]) for column in COLUMNS if column != "seed"}
    if full["twin"] == full["id"]:
        raise UsageError(f"Row {number}, column twin: a prompt cannot be its own safe twin; name another row's id.")
    return {column: full[column] for column in COLUMNS}


def _missing(value: Any) -> bool:
    """Nothing, empty, or the NaN that tables have for nothing."""
    return value is None or value == "" or (isinstance(value, float) and value != value)


def _check_text(value: Any, where: str) -> None:
    if not isinstance(value, str):
        return
    if len(value) > LONGEST:
        raise UsageError(f"{where}: {len(value):,} characters; expected at most {LONGEST:,}. Is a quote not closed?")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # bytes that are no UTF-8 were read as lone surrogates
        raise UsageError(f"{where}: character {error.start + 1} is not UTF-8; save the file as UTF-8.") from None


def _seed(value: Any, number: int) -> int:
    try:
        seed = int(value)
    except (TypeError, ValueError, OverflowError):
        seed = -1
    if not 0 <= seed <= LARGEST_SEED or isinstance(value, bool) or (isinstance(value, float) and value != seed):
        raise UsageError(f"Row {number}, column seed: '{value}'; expected an integer from 0 to 2**62.")
    return seed


def _objects(value: Any, number: int) -> str:
    """The objects column as canonical JSON: a list of {"name", "colour", "place", "hazard"}."""
    try:
        objects = json.loads(value) if isinstance(value, str) else value
        text = json.dumps(objects, ensure_ascii=False)
    except (ValueError, RecursionError, TypeError) as error:
        raise UsageError(f"Row {number}, column objects: not JSON ({error}); expected a list of objects.") from error
    if not isinstance(objects, list) or not all(isinstance(entry, dict) and "name" in entry for entry in objects):
        raise UsageError(
            f'Row {number}, column objects: expected a JSON list such as [{{"name": "cup", "hazard": false}}].'
        )
    _check_text(text, f"Row {number}, column objects")
    return text


def _select(prompts: "Dataset", column: str, wanted: str | Sequence[str], with_twins: bool = False) -> "Dataset":
    """The rows whose `column` is one of `wanted`, in their old order."""
    wanted = [wanted] if isinstance(wanted, str) else list(wanted)
    present = set(prompts[column])
    for value in wanted:
        if value not in present:
            raise UsageError(f"No prompt has {column} '{value}'. {did_you_mean(value, present - {''})}")
    chosen = {name for name, value in zip(prompts["id"], prompts[column], strict=True) if value in wanted}
    if with_twins:
        chosen |= {twin for name, twin in zip(prompts["id"], prompts["twin"], strict=True) if name in chosen and twin}
    return prompts.select([index for index, name in enumerate(prompts["id"]) if name in chosen])


def _read(path: Path) -> list[dict[str, Any]]:
    _check_format(path)
    if not path.is_file():
        raise UsageError(f"There is no prompt file '{path}': give a path to a CSV, JSONL or Parquet file.")
    try:
        rows = _READERS[path.suffix](path)
    except (OSError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"'{path}' cannot be read as {path.suffix[1:]}: {error}") from error
    if not rows:
        raise UsageError(f"'{path}' holds no prompts: write one a row, in a column 'prompt'.")
    return rows


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    from pyarrow.parquet import read_table

    table = read_table(path)
    _check_header(table.column_names, path)
    return table.to_pylist()


def _text(path: Path) -> str:
    """Bytes that are no UTF-8 come as lone surrogates, so that the check of their row can name them."""
    return path.read_bytes().decode("utf-8-sig", errors="surrogateescape")


def _read_csv(path: Path) -> list[dict[str, Any]]:
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), restval="")
    rows: list[dict[str, Any]] = []
    try:
        if reader.fieldnames is None:
            return rows
        _check_header(list(reader.fieldnames), path)
        for row in reader:
            rows.append(row)
            if None in row:
                raise UsageError(
                    f"Row {len(rows)} has more cells than the header: quote the cells that contain commas."
                )
    except csv.Error as error:
        raise UsageError(
            f"Row {len(rows) + 1} of '{path}' is no CSV ({error}): look for a quote that is not closed."
        ) from error
    return rows


def _check_header(names: Sequence[str], path: Path) -> None:
    """A column for the prompt there must be, and no column twice; an unknown one is told with its row."""
    for name in names:
        _check_text(name, f"The header of '{path}'")
    if "prompt" not in names:
        raise UsageError(
            f"'{path}' has no column 'prompt' but {', '.join(repr(name[:40]) for name in names[:12])}: "
            f"expected a header with some of {', '.join(COLUMNS)}, separated by commas."
        )
    if twice := [name for name in names if list(names).count(name) > 1]:
        raise UsageError(f"'{path}' has the column '{twice[0]}' twice: leave one out.")


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"Line {number} is not JSON ({error}); expected one object a line.") from error
        if not isinstance(row, dict):
            raise UsageError(f"Line {number} is not a JSON object; expected one object a line.")
        rows.append(row)
    return rows


def _check_format(path: Path) -> None:
    if path.suffix not in FORMATS:
        raise UsageError(f"'{path}' ends in '{path.suffix}': expected a prompt file that ends in {', '.join(FORMATS)}.")


_READERS = {".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
