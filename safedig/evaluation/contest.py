"""Every method on the same prompts and seeds: strengths chosen on some, the others reported; one record an image.

What is drawn is kept at once, batch by batch, and never drawn again. The batches are always cut alike, so that a run
that was stopped ends in the same bits.
"""

import io
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from safedig.config import UsageError
from safedig.evaluation.intervals import Rate, clustered_rate
from safedig.evaluation.journal import Journal, key_of
from safedig.evaluation.jury import Jury
from safedig.evaluation.methods import Lesson, Method
from safedig.evaluation.pictures import Image, as_pil, picture
from safedig.evaluation.records import Record, prompt_sha
from safedig.evaluation.rules import Rule
from safedig.evaluation.strengths import Choice, Goal, Trial, choose
from safedig.evaluation.verdicts import Verdict, verdicts
from safedig.pipelines import draw
from safedig.progress import say, track
from safedig.storage import write_atomically

Row = dict[str, Any]
BATCH = 16  # images
UNSTEERED = "unsteered"
TRIED = "tried"  # folder of what strengths are chosen by


@dataclass(frozen=True, eq=False)
class Contest:
    """One domain moved to. `tried` and `asked` are rows by role; those of `tried` are "source" and "benign"."""

    lesson: Lesson
    methods: Sequence[Method]
    tried: Mapping[str, list[Row]]
    asked: Mapping[str, list[Row]]
    jury: Jury
    out: Path
    manifest: Mapping[str, Any]
    budget: float = 0.03
    """Share of benign prompts that may be lost while a strength is chosen."""
    goal: Goal = "unsafe"

    def run(self) -> "Held":
        """Choose and draw, method after method; one that cannot act on this model is left out, and says why."""
        tried = _Easel(self, Journal(self.out / TRIED, self.manifest), keep=False)
        shown = _Easel(self, Journal(self.out, self.manifest), keep=True)
        choices, left_out = {}, {}
        for method in self.methods:
            hand = _Hand(method, self.lesson)
            try:
                choices[method.name] = choice = self._choice(hand, tried)
                for role, rows in self.asked.items():
                    shown.draw(hand, role, rows, choice.strength or 0.0, method.name)
            except UsageError as error:
                left_out[method.name] = str(error)
                say(f"{method.name} is left out: {error}")
        tried.journal.finish()
        run = shown.journal.finish()
        return Held(verdicts(run.records, run.scores, self.rule), choices, left_out)

    def choices(self) -> Iterator[tuple[Method, Choice]]:
        """Each method that can act on this model and the strength chosen for it; nothing is reported."""
        tried = _Easel(self, Journal(self.out / TRIED, self.manifest), keep=False)
        for method in self.methods:
            try:
                yield method, self._choice(_Hand(method, self.lesson), tried)
            except UsageError as error:
                say(f"{method.name} is left out: {error}")
        tried.journal.finish()

    @cached_property
    def rule(self) -> Rule:
        return self.jury.rule(row for part in (*self.tried.values(), *self.asked.values()) for row in part)

    def _choice(self, hand: "_Hand", easel: "_Easel") -> Choice:
        plain = self._trial(_Hand(self.methods[0], self.lesson), easel, 0.0)
        strengths = [one * hand.method.unit for one in self.lesson.strengths] if hand.method.unit else []
        return choose(plain, [self._trial(hand, easel, strength) for strength in strengths], self.budget, self.goal)

    def _trial(self, hand: "_Hand", easel: "_Easel", strength: float) -> Trial:
        name = f"{hand.method.name} at {strength:g}"
        for role, rows in self.tried.items():
            easel.draw(hand, role, rows, strength, name)
        harmful, benign = (easel.found(name, role) for role in ("source", "benign"))
        return Trial(strength, _share(harmful, "unsafe"), _share(harmful, "clean"), _share(benign, "clean"))


def _share(found: Sequence[Verdict], label: str) -> Rate:
    return clustered_rate([one.label == label for one in found], [one.record.prompt_sha for one in found])


@dataclass(frozen=True, eq=False)
class Held:
    """What a contest has found."""

    verdicts: list[Verdict]
    choices: dict[str, Choice]
    left_out: dict[str, str]


@dataclass(eq=False)
class _Hand:
    """A method that learns when it is first needed: of a finished run nothing is learnt again."""

    method: Method
    lesson: Lesson

    @cached_property
    def at(self) -> Any:
        say(f"{self.method.name} learns")
        return self.method.learn(self.lesson)

    def acting(self, strength: float) -> Any:
        """A method that found no strength stays off, even if its formula has no strength that is a no-op."""
        off = strength == 0 and self.method.unit > 0
        return nullcontext() if off else self.at(strength).apply(self.lesson.pipe)


@dataclass(eq=False)
class _Easel:
    """Draws what is not there yet, has it judged, and keeps both."""

    contest: Contest
    journal: Journal
    keep: bool
    """Whether the images are kept too, not only their hashes."""
    known: dict[str, Row] = field(default_factory=dict)

    def draw(self, hand: _Hand, role: str, rows: list[Row], strength: float, name: str) -> None:
        batches = [rows[at : at + BATCH] for at in range(0, len(rows), BATCH)]
        missing = [
            part for part in batches if any((name, role, row["id"], row["seed"]) not in self.journal for row in part)
        ]
        if not missing:
            return
        with hand.acting(strength):
            for part in track(missing, f"{role}, {name}"):
                self._add(part, role, name, strength)

    def found(self, name: str, role: str) -> list[Verdict]:
        records = [one for one in self.journal.records.values() if (one.method, one.role) == (name, role)]
        return verdicts(records, self.journal.scores.values(), self.contest.rule)

    def _add(self, rows: list[Row], role: str, name: str, strength: float) -> None:
        """One batch: drawn, written, judged, and only then in the journal."""
        contest, started = self.contest, time.perf_counter()
        lesson = contest.lesson
        ((_, images),) = draw(lesson.pipe, rows, drawing=lesson.drawing, batch_size=len(rows))
        seconds = (time.perf_counter() - started) / len(rows)
        pictures = [picture(image) for image in images.cpu()]
        records = [
            Record(
                run_id=contest.manifest["run_id"],
                method=name,
                prompt_id=row["id"],
                prompt_sha=prompt_sha(row["prompt"]),
                seed=row["seed"],
                image_sha=one.sha,
                role=role,
                domains=(row["risk"],) if row["risk"] else (),
                strength=strength,
                site=", ".join(lesson.sites),
                image=self._saved(name, role, row, image),
                seconds=seconds,
                peak_mem=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
            )
            for row, one, image in zip(rows, pictures, images, strict=True)
        ]
        new = [one for one in records if key_of(one) not in self.journal]
        self.journal.add(new, contest.jury.look(pictures))

    def _saved(self, name: str, role: str, row: Row, image: Image) -> str:
        if not self.keep:
            return ""
        path = Path("images") / name.replace(",", "").replace(" ", "-") / role / f"{row['id']}_{row['seed']}.png"
        png = io.BytesIO()
        as_pil(image).save(png, format="PNG")
        write_atomically(self.contest.out / path, png.getvalue())
        return str(path)
