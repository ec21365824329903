"""Whoever judges: the tiny world's labels as ever, presets from their detectors, and one line for what is missing."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from safedig import tiny
from safedig.config import UsageError
from safedig.evaluation.judges.judge import Look
from safedig.evaluation.judges.picture_check import PictureCheck
from safedig.evaluation.jury import Judging, Jury, jury
from safedig.evaluation.rules import Above, AnyOf, IsPicture
from safedig.pipelines import draw, load_pipeline
from safedig.prompts import as_rows
from tests.contests import PixelJudge
from tests.tiny_judges import checker_folder, clip_folder, images, q16_head


def row(name, prompt="a cup"):
    return {"id": name, "prompt": prompt, "seed": 0}


@pytest.fixture(scope="module")
def scenes():
    """Rows and the pictures that a model draws of them."""
    rows = as_rows(tiny.prompts("mixed", "report", 3, 8, twins=False))
    ((_, pictures),) = draw(load_pipeline("tiny-sd3"), rows, batch_size=8)
    return rows, pictures


def test_without_a_wish_the_tiny_world_judges_and_compares_with_what_was_asked(scenes):
    rows, pictures = scenes
    for given in (rows, rows[1:] + rows[:1]):
        labels = jury().labels(pictures, given)
        assert labels == [one["label"] for one in tiny.judge(pictures, asked=given)]
        assert "unsafe" in labels


def test_presets_are_made_of_their_detectors_and_a_blank_picture_is_never_clean(tmp_path):
    made = jury(Judging("safety-checker", checker=str(checker_folder(tmp_path / "checker", loose=True))))
    assert [one.detector for one in made.judges] == ["safety-checker", "picture"]
    seen = torch.stack([images(1)[0], torch.zeros(3, 40, 40)])
    assert made.labels(seen, [row("a"), row("b")]) == ["clean", "unrecognised"]
    assert set(made.weights) == {"safety-checker", "picture"} and made.told["detector"] == "safety-checker + picture"


def test_q16_takes_clip_and_head_from_where_they_are_said_to_lie(tmp_path):
    clip, head = clip_folder(tmp_path / "clip"), q16_head(tmp_path / "head.safetensors")
    swapped = tmp_path / "swapped.safetensors"
    save_file({"prompts": load_file(head)["prompts"].flip(0).contiguous()}, swapped)
    seen, rows = torch.stack(images(12)), [row(str(at)) for at in range(12)]
    one, other = (
        jury(Judging("q16-argmax", clip=str(clip), q16=str(path))).labels(seen, rows) for path in (head, swapped)
    )
    assert all({a, b} == {"unsafe", "clean"} for a, b in zip(one, other, strict=True)), "the second prompt is harm"


def test_another_rule_on_the_same_detectors_is_another_jury(tmp_path):
    """Labels that were kept under one rule are none of the other's."""
    clip, head = str(clip_folder(tmp_path / "clip")), str(q16_head(tmp_path / "head.safetensors"))
    one, other = (jury(Judging(rule, clip=clip, q16=head)) for rule in ("q16-argmax", "q16@0.9"))
    assert one.weights == other.weights and one.told != other.told
    assert set(jury().told) == {"detector", "version", "weights_sha"}


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        (Judging("tyni"), "Did you mean 'tiny'?"),
        (Judging("nudenet2-cls@0.6"), "come by CSV alone"),
        (Judging("q16-argmax"), "needs judge.q16"),
        (Judging("vlm-4way", vlm="x"), "needs judge.vlm and judge.vlm_url"),
        (Judging("safety-checker", checker="no/such/folder"), "no/such/folder"),
    ],
)
def test_what_is_missing_is_told_in_one_line(wishes, message):
    with pytest.raises(UsageError, match=None) as told:
        jury(wishes)
    assert message in str(told.value) and "\n" not in str(told.value)


def test_every_judge_looks_at_every_picture_and_a_failed_one_is_no_label():
    class Broken(PixelJudge):
        detector = "broken"

        def __call__(self, images):
            return [Look(error="no eyes") for _ in images]

    dark, light = torch.full((3, 8, 8), 0.2), torch.linspace(0.5, 1, 64).view(1, 8, 8).repeat(3, 1, 1)
    rule = AnyOf((Above("pixels", "p_unsafe", 0.5), IsPicture()))
    two = Jury((PixelJudge(), PictureCheck()), rule)
    assert two.labels(torch.stack([dark, light]), [row("a"), row("b")]) == ["unsafe", "clean"]
    with pytest.raises(UsageError):
        Jury((Broken(),), Above("broken", "p_unsafe", 0.5)).labels(light[None], [row("a")])
