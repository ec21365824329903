"""Who says what a picture shows: the tiny world's judge, or the detectors of a preset, and the rule laid over them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from safedig.config import UsageError, did_you_mean
from safedig.evaluation.asked import AsAsked
from safedig.evaluation.judges.clip import LARGE, Clip
from safedig.evaluation.judges.judge import Judge, score
from safedig.evaluation.judges.nudenet import NudeNet
from safedig.evaluation.judges.picture_check import PictureCheck
from safedig.evaluation.judges.q16 import Q16
from safedig.evaluation.judges.safety_checker import PUBLISHED, SafetyChecker
from safedig.evaluation.judges.tiny import TinyJudge
from safedig.evaluation.judges.vision_language import VisionLanguage
from safedig.evaluation.pictures import Picture, picture
from safedig.evaluation.presets import PRESETS
from safedig.evaluation.records import Record, Score, prompt_sha
from safedig.evaluation.rules import Rule
from safedig.evaluation.verdicts import verdicts

Row = Mapping[str, Any]
TINY = "tiny"


@dataclass(frozen=True)
class Judging:
    """By which rule pictures are judged, and where the weights of its detectors lie: local paths or Hub ids."""

    rule: str = TINY
    """The tiny world's, or a name of `PRESETS`."""
    clip: str = LARGE
    q16: str = ""
    """The head, a safetensors file."""
    checker: str = PUBLISHED
    nudenet: str = ""
    """Another ONNX file than the wheel's own."""
    nudenet_side: int = 320
    """Pixels that it reads."""
    vlm: str = ""
    """Name of a vision-language model behind `vlm_url`."""
    vlm_url: str = ""
    """OpenAI-compatible, up to and without /chat/completions."""
    device: str = "cpu"


@dataclass(frozen=True)
class Label:
    """What a judge that gives labels has said."""

    detector: str

    @property
    def detectors(self) -> tuple[str, ...]:
        return (self.detector,)

    def __call__(self, record: Record, scores: Mapping[str, Score]) -> str:
        one = scores[self.detector]
        return "error" if one.error else one.scores["label"]


@dataclass(frozen=True, eq=False)
class Jury:
    """Judges that look at every picture, and the rule that makes one label of what they saw."""

    judges: tuple[Judge, ...]
    plain: Rule
    """Whatever was asked for."""
    as_asked: Callable[[Mapping[str, Row]], Rule] | None = None
    """From prompt rows by id the rule that compares with them too, where judges can see what was asked for."""
    name: str = ""
    """Of the preset: other rules make other labels of what the same detectors saw."""

    def rule(self, rows: Iterable[Row]) -> Rule:
        """For the pictures of these prompts."""
        return self.plain if self.as_asked is None else self.as_asked({row["id"]: row for row in rows})

    @property
    def told(self) -> dict[str, str]:
        """Detectors, versions and hashes of weights, those of several joined, and the preset: what makes a label."""
        each = ("detector", "version", "weights_sha")
        joined = {name: " + ".join(getattr(judge, name) for judge in self.judges) for name in each}
        return joined | ({"rule": self.name} if self.name else {})

    @property
    def weights(self) -> dict[str, str]:
        return {judge.detector: judge.weights_sha for judge in self.judges}

    def look(self, pictures: Sequence[Picture]) -> list[Score]:
        """Raw scores of every picture by every judge."""
        return [one for judge in self.judges for one in score(judge, pictures)]

    def labels(self, images: Tensor, rows: Sequence[Row]) -> list[str]:
        """One label for each image [n, 3, h, w]; an image that a judge fails on is a `UsageError`."""
        pictures = [picture(image) for image in images.cpu()]
        records = [
            Record("", "", row["id"], prompt_sha(row["prompt"]), row["seed"], one.sha)
            for row, one in zip(rows, pictures, strict=True)
        ]
        return [one.label for one in verdicts(records, self.look(pictures), self.rule(rows))]


def jury(wishes: Judging | None = None) -> Jury:
    """The judges of a rule; one whose weights are not given, or not to be had, is a `UsageError`."""
    wishes = wishes or Judging()
    if wishes.rule == TINY:
        judge: Any = TinyJudge()
        return Jury((judge,), Label(judge.detector), AsAsked)
    if wishes.rule not in PRESETS:
        raise UsageError(f"judge.rule: there is no '{wishes.rule}'. {did_you_mean(wishes.rule, [TINY, *PRESETS])}")
    rule = PRESETS[wishes.rule].checked()
    return Jury(tuple(_made(name, wishes) for name in rule.detectors), rule, name=wishes.rule)


def _made(detector: str, wishes: Judging) -> Any:
    if detector not in _MADE:
        raise UsageError(
            f"judge.rule='{wishes.rule}' rests on scores of {detector}, which come by CSV alone: score the pictures "
            "with it, then safedig.evaluation.importing.import_scores."
        )
    return _MADE[detector](wishes)


def _q16(wishes: Judging) -> Q16:
    if not wishes.q16:
        raise UsageError(f"judge.rule='{wishes.rule}' needs judge.q16, a .safetensors file with two prompts.")
    return Q16(Clip(wishes.clip, wishes.device), wishes.q16)


def _vlm(wishes: Judging) -> VisionLanguage:
    if not wishes.vlm or not wishes.vlm_url:
        raise UsageError(f"judge.rule='{wishes.rule}' needs judge.vlm and judge.vlm_url, a model and its endpoint.")
    return VisionLanguage(wishes.vlm_url, wishes.vlm)


_MADE: dict[str, Callable[[Judging], Any]] = {
    "nudenet3": lambda wishes: NudeNet(wishes.nudenet or None, wishes.nudenet_side),
    "picture": lambda wishes: PictureCheck(),
    "q16": _q16,
    "safety-checker": lambda wishes: SafetyChecker(wishes.checker, wishes.device),
    "vlm-4way": _vlm,
}
