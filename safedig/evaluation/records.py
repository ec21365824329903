"""What was drawn and what was seen in it: records.jsonl, scores.jsonl, manifest.json; joined by key, never by order."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from jaxtyping import Float
from torch import Tensor

from safedig.config import UsageError, build
from safedig.storage import write_atomically

PACKAGES = ("safedig", "torch", "diffusers", "transformers", "sae-lens", "datasets", "numpy", "scipy")
T = TypeVar("T")


@dataclass(frozen=True)
class Record:
    """One image: what asked for it, how it was steered, where it is. `image` may be empty, its hash never is."""

    run_id: str
    method: str
    prompt_id: str
    prompt_sha: str
    seed: int
    image_sha: str
    role: str = "source"  # source, target, benign or adversarial:<attack>
    domains: tuple[str, ...] = ()
    operator: str = ""
    strength: float = 0.0
    site: str = ""
    bundle: str = ""  # fingerprint of the saved steering
    image: str = ""  # path, from the run's folder on
    seconds: float | None = None
    peak_mem: int | None = None  # bytes


@dataclass(frozen=True)
class Score:
    """What one detector saw in one image, raw, so that rules can change later; `error` where it failed."""

    image_sha: str
    detector: str
    version: str = ""
    weights_sha: str = ""
    scores: dict[str, Any] = field(default_factory=dict)
    boxes: tuple[dict[str, Any], ...] = ()
    error: str = ""


@dataclass(frozen=True)
class Run:
    """Everything about one run: its images, their scores and the circumstances."""

    records: tuple[Record, ...]
    scores: tuple[Score, ...]
    manifest: dict[str, Any]


def image_sha(image: Float[Tensor, "3 height width"]) -> str:
    """Hash of an image's size and its 8-bit pixels; equal images have equal hashes whatever file they lie in."""
    pixels = (image.detach().float().clamp(0, 1) * 255).round().byte().cpu().contiguous()
    return hashlib.sha256(str(tuple(pixels.shape)).encode() + pixels.numpy().tobytes()).hexdigest()


def prompt_sha(prompt: str) -> str:
    """Hash that stands for a prompt's text where the text itself must not appear."""
    return hashlib.sha256(prompt.encode()).hexdigest()


def circumstances(**facts: Any) -> dict[str, Any]:
    """A manifest: the given facts (model, scheduler, steps, …, tuned_on, command) and the package versions."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return facts | {"packages": versions}


def write_run(folder: str | os.PathLike[str], run: Run) -> None:
    """Write the three files, each complete or not at all; the manifest comes last and vouches for the other two."""
    folder = Path(folder)
    write_atomically(folder / "records.jsonl", _jsonl(run.records))
    write_atomically(folder / "scores.jsonl", _jsonl(run.scores))
    write_atomically(folder / "manifest.json", f"{json.dumps(run.manifest, indent=2, ensure_ascii=False)}\n".encode())


def read_run(folder: str | os.PathLike[str]) -> Run:
    """Read what `write_run` wrote; an unknown key, a wrong type or a torn line is an error that names file and line."""
    folder = Path(folder)
    if not (folder / "manifest.json").is_file():
        raise UsageError(f"'{folder}' holds no finished run (manifest.json is missing): give the --out folder of one.")
    return Run(
        records=tuple(read_rows(folder / "records.jsonl", Record)),
        scores=tuple(read_rows(folder / "scores.jsonl", Score)),
        manifest=json.loads((folder / "manifest.json").read_text(encoding="utf-8")),
    )


def join(records: Iterable[Record], scores: Iterable[Score], detector: str) -> list[tuple[Record, Score]]:
    """Each record with the score that `detector` gave its image, by hash. A missing or failed score is an error."""
    of_image: dict[str, Score] = {}
    for score in scores:
        if score.detector != detector:
            continue
        if of_image.setdefault(score.image_sha, score) != score:
            raise UsageError(
                f"{detector} scored image {score.image_sha[:12]} twice, with different results: keep one version."
            )
    joined = [(record, of_image.get(record.image_sha)) for record in records]
    failed = [record for record, score in joined if score is None or score.error]
    if failed:
        raise UsageError(
            f"{len(failed)} of {len(joined)} images have no valid {detector} score, the first for prompt "
            f"{failed[0].prompt_id} with seed {failed[0].seed}: score them again; a failure never counts as safe."
        )
    return [(record, score) for record, score in joined if score is not None]


def _jsonl(rows: Sequence[Any]) -> bytes:
    return "".join(json.dumps(dataclasses.asdict(row), ensure_ascii=False) + "\n" for row in rows).encode()


def read_rows(path: Path, cls: type[T]) -> Iterable[T]:
    """The rows of one file; an unknown key, a wrong type or a torn line is an error that names file and line."""
    if not path.is_file():
        raise UsageError(f"'{path}' is missing beside its manifest: draw the run again.")
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], start=1):
        try:
            yield row_of(cls, json.loads(line))
        except ValueError as error:
            raise UsageError(f"'{path}', line {number}: {error}") from error


def row_of(cls: type[T], table: Mapping[str, Any]) -> T:
    """One row from its JSON; what is null is left at its default."""
    return build(cls, _without_nulls(table))


def _without_nulls(table: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in table.items() if value is not None}
