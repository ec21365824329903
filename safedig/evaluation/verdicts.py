"""One label an image under one rule, joined by hash: recomputed from records alone, whatever the order of the files."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from safedig.config import UsageError
from safedig.evaluation.records import Record, Score
from safedig.evaluation.rules import Rule


@dataclass(frozen=True)
class Verdict:
    """An image and its label: unsafe, unrecognised, empty or clean; `error` is why it could not be judged."""

    record: Record
    label: str
    error: str = ""


def verdicts(records: Iterable[Record], scores: Iterable[Score], rule: Rule, tolerance: float = 0.0) -> list[Verdict]:
    """The rule on every image. Errors up to the share `tolerance` count as unrecognised; more are a `UsageError`.

    An image that a detector of the rule has not scored at all is a `UsageError`, as are two versions of one detector.
    """
    table = _by_image(scores, rule.detectors)
    found = []
    for record in records:
        own = table.get(record.image_sha, {})
        if missing := [name for name in rule.detectors if name not in own]:
            raise UsageError(
                f"{missing[0]} has not scored the image of prompt {record.prompt_id}, seed {record.seed} "
                f"({record.method}): score the run with it first."
            )
        label = rule(record, own)
        why = "; ".join(f"{name}: {one.error}" for name, one in own.items() if one.error) if label == "error" else ""
        found.append(Verdict(record, "unrecognised" if label == "error" else label, why))
    _check(found, tolerance)
    return found


def hits(found: Iterable[Verdict], of: str | Callable[[Verdict], bool] = "unsafe") -> dict[tuple[Hashable, Any], bool]:
    """(prompt, image) → whether its label is that one: what intervals, paired differences and any-of-N take.

    A prompt is its text, whose images are alike even where two rows share it; an image is its seed and row.
    """
    table: dict[tuple[Hashable, Any], bool] = {}
    for one in found:
        key = one.record.prompt_sha, (one.record.seed, one.record.prompt_id)
        if key in table:
            raise UsageError(
                f"Prompt {one.record.prompt_id} has seed {one.record.seed} twice: give the images of one method."
            )
        table[key] = of(one) if callable(of) else one.label == of
    return table


def _by_image(scores: Iterable[Score], detectors: Sequence[str]) -> dict[str, dict[str, Score]]:
    table: dict[str, dict[str, Score]] = {}
    versions: dict[str, tuple[str, str]] = {}
    for score in scores:
        if score.detector not in detectors:
            continue
        version = score.version, score.weights_sha
        if versions.setdefault(score.detector, version) != version:
            raise UsageError(
                f"Two versions of {score.detector} are mixed ({versions[score.detector][0]} and {score.version}, or "
                "other weights): score all images with one."
            )
        own = table.setdefault(score.image_sha, {})
        if own.setdefault(score.detector, score) != score:
            raise UsageError(f"{score.detector} scored image {score.image_sha[:12]} twice, differently: keep one.")
    return table


def _check(found: Sequence[Verdict], tolerance: float) -> None:
    failed = [one for one in found if one.error]
    if len(failed) > tolerance * len(found):
        first = failed[0]
        raise UsageError(
            f"{len(failed)} of {len(found)} images could not be judged, more than the {tolerance:.1%} allowed; the "
            f"first is prompt {first.record.prompt_id}, seed {first.record.seed} ({first.error}): a failure is never "
            "safe."
        )
