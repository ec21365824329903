"""A run while it is drawn or judged: one line an image, so that being killed loses nothing and doubles nothing."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safedig.config import UsageError
from safedig.evaluation.records import Record, Run, Score, read_rows, row_of, write_run
from safedig.storage import append, whole_lines

JOURNAL = "journal.jsonl"
Key = tuple[str, str, str, int]  # method, role, prompt id, seed


def key_of(record: Record) -> Key:
    """What may be drawn only once in a run."""
    return record.method, record.role, record.prompt_id, record.seed


class Journal:
    """Open, or reopen, the run in a folder; `add` what is new, and `finish` when nothing is missing.

    `records` and `scores` hold all that earlier processes have written, in their order. An image file must be in place
    before its record is added. One process writes at a time.
    """

    def __init__(self, folder: str | os.PathLike[str], manifest: Mapping[str, Any]) -> None:
        self._folder, self._manifest = Path(folder), dict(manifest)
        self.records: dict[Key, Record] = {}
        self.scores: dict[tuple[str, str], Score] = {}
        self._path = self._folder / JOURNAL
        self._folder.mkdir(parents=True, exist_ok=True)
        finished = self._folder / "manifest.json"
        if finished.is_file():
            self._check(_identity(json.loads(finished.read_text(encoding="utf-8"))))
        if finished.is_file() or self._path.is_file():
            self._take_finished()
        self._take_journal()

    def __contains__(self, key: Key) -> bool:
        return key in self.records

    def scored(self, detector: str, image_sha: str) -> bool:
        """Whether it is there and no error: what failed is looked at again."""
        score = self.scores.get((detector, image_sha))
        return score is not None and not score.error

    def add(self, records: Iterable[Record] = (), scores: Iterable[Score] = ()) -> None:
        """On disk when it returns, all of it or nothing; what is there already is refused unless it is the same."""
        new, seen = [one for one in records if self._is_new(one)], list(scores)
        line = {"records": [dataclasses.asdict(one) for one in new], "scores": [dataclasses.asdict(s) for s in seen]}
        if new or seen:
            self._append(line)
            self._take(new, seen)

    def finish(self) -> Run:
        """Write the three files of a run, and only then let go of the journal."""
        run = Run(tuple(self.records.values()), tuple(self.scores.values()), self._manifest)
        if not self._path.is_file() and (self._folder / "manifest.json").is_file():
            return run  # it was finished, and nothing has been added
        (self._folder / "manifest.json").unlink(missing_ok=True)  # it vouches for the files that are replaced now
        write_run(self._folder, run)
        self._path.unlink(missing_ok=True)
        return run

    def _is_new(self, record: Record) -> bool:
        known = self.records.get(key_of(record))
        if known is not None and known != record:
            raise UsageError(
                f"{record.method} has drawn prompt {record.prompt_id}, seed {record.seed} in '{self._folder}' already, "
                "and differently: give another --out."
            )
        return known is None

    def _take(self, records: Iterable[Record], scores: Iterable[Score]) -> None:
        self.records |= {key_of(one): one for one in records}
        self.scores |= {(one.detector, one.image_sha): one for one in scores}

    def _take_finished(self) -> None:
        records, scores = self._folder / "records.jsonl", self._folder / "scores.jsonl"
        self._take(
            read_rows(records, Record) if records.is_file() else [],
            read_rows(scores, Score) if scores.is_file() else [],
        )

    def _take_journal(self) -> None:
        """What earlier processes wrote; the last line is cut off where it is torn."""
        try:
            whole = whole_lines(self._path)
            if not whole:
                self._path.unlink(missing_ok=True)
                return
            head, *lines = map(json.loads, whole)
            taken = [
                ([row_of(Record, row) for row in line["records"]], [row_of(Score, row) for row in line["scores"]])
                for line in lines
            ]
        except (ValueError, KeyError) as error:
            raise UsageError(f"'{self._path}' is damaged ({error}): give another --out, or remove it.") from error
        self._check(head["run"])
        for records, scores in taken:
            self._take(records, scores)

    def _check(self, identity: str) -> None:
        if identity != _identity(self._manifest):
            raise UsageError(f"'{self._folder}' holds a run with other options: give those, or another --out.")

    def _append(self, line: dict[str, Any]) -> None:
        lines = [line] if self._path.is_file() else [{"run": _identity(self._manifest)}, line]
        append(self._path, "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in lines).encode())


def _identity(manifest: Mapping[str, Any]) -> str:
    """Hash of all that makes one run differ from another; how it was called does not."""
    facts = {name: value for name, value in manifest.items() if name != "command"}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
