"""A finished run's images before further judges: raw scores beside the old ones, resuming where it was killed."""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from safedig.config import UsageError
from safedig.evaluation.journal import Journal
from safedig.evaluation.judges.judge import BATCH, Judge, score
from safedig.evaluation.pictures import Picture, read_picture
from safedig.evaluation.records import Record, Run, read_run
from safedig.progress import track


def score_run(folder: str | os.PathLike[str], judges: Sequence[Judge], images: str | os.PathLike[str] = "") -> Run:
    """Let each judge see every image once; images lie under `images`, by default the run's own folder.

    Scores that are there are kept, failed ones are tried again. A file whose pixels are not those of the record is a
    `UsageError`; one that cannot be read any more becomes an error row.
    """
    journal = Journal(folder, read_run(folder).manifest)
    root = Path(images or folder)
    for judge in judges:
        new = [one for one in _each_once(journal.records.values()) if not journal.scored(judge.detector, one.image_sha)]
        parts = [new[at : at + BATCH] for at in range(0, len(new), BATCH)]
        for part in track(parts, f"{judge.detector} looks at {len(new)} images"):
            journal.add(scores=score(judge, _pictures(root, part)))
    return journal.finish()


def _each_once(records: Iterable[Record]) -> Iterator[Record]:
    """One record for each image: the same pixels need to be seen once."""
    yield from {record.image_sha: record for record in records}.values()


def _pictures(root: Path, records: Sequence[Record]) -> Iterator[Picture]:
    for record in records:
        if not record.image:
            raise UsageError(f"The image of prompt {record.prompt_id}, seed {record.seed} was not kept: draw it again.")
        found = read_picture(root / record.image)
        if found.pixels is not None and found.sha != record.image_sha:
            raise UsageError(f"'{root / record.image}' is not the image of its record any more: draw the run again.")
        yield Picture(record.image_sha, found.pixels, found.error)
