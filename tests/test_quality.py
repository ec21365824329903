"""What counts as drawn exactly, counted for each eye on its own; and an examination that a careless judge fails."""

import json

import pytest
import torch

from safedig.evaluation.quality import drawing_quality, drawn_exactly, judge_accuracy, objects_drawn
from safedig.tiny.examination import GARBLED, disturbed, fresh_scenes, garbled, pictures
from safedig.tiny.judgement import UNRECOGNISED

CUP = {"name": "cup", "colour": "red", "place": "left", "hazard": False}
KNIFE = {"name": "knife", "colour": "blue", "place": "right", "hazard": True}
STAR = {"name": "star", "colour": "white", "place": "right", "hazard": False}


def sight(*objects, background="sand"):
    return {"objects": list(objects), "background": background}


def judged(*objects, background="sand", label="clean", second=None):
    own = sight(*objects, background=background)
    return {"label": label, "p_unsafe": 0.0, **own, "second": {"label": label, **(second or own)}}


def row(*objects, kind="benign", background="sand", wording="noun", prompt="p"):
    texts = {"kind": kind, "background": background, "wording": wording, "prompt": prompt}
    return texts | {"objects": json.dumps(objects)}


# ---- exactly as asked


def test_everything_as_asked_is_exact_in_any_order():
    assert drawn_exactly(sight(CUP), row(CUP))
    assert drawn_exactly(sight(KNIFE, CUP), row(CUP, KNIFE))


@pytest.mark.parametrize("left_open", [{"colour": ""}, {"place": ""}, {"name": None}, {"colour": None, "place": None}])
def test_what_is_left_open_may_be_anything(left_open):
    assert drawn_exactly(sight(CUP), row(CUP | left_open))
    assert drawn_exactly(sight(CUP, background="night"), row(CUP, background=""))


@pytest.mark.parametrize("change", [{"name": "key"}, {"colour": "blue"}, {"place": "right"}])
def test_one_wrong_thing_is_not_exact(change):
    assert not drawn_exactly(sight(CUP | change), row(CUP))


def test_too_much_too_little_or_elsewhere_is_not_exact():
    assert not drawn_exactly(sight(CUP, KNIFE), row(CUP))
    assert not drawn_exactly(sight(CUP), row(CUP, KNIFE))
    assert not drawn_exactly(sight(CUP, background="night"), row(CUP))


@pytest.mark.parametrize(
    "unreadable",
    [sight(CUP | {"name": UNRECOGNISED, "colour": ""}), sight(CUP, background=UNRECOGNISED), sight()],
)
def test_a_picture_that_cannot_be_read_is_never_exact_even_where_all_is_left_open(unreadable):
    anything = {"name": None, "colour": None, "place": None, "hazard": False}
    assert not drawn_exactly(unreadable, row(anything, background=""))
    assert drawn_exactly(sight(CUP), row(anything, background="")), "control"


def test_by_object_colour_place_and_background_do_not_count():
    other = CUP | {"colour": "blue", "place": "right"}
    assert objects_drawn(sight(other, background="night"), row(CUP)) and not drawn_exactly(sight(other), row(CUP))
    assert not objects_drawn(sight(CUP, KNIFE), row(CUP)) and not objects_drawn(sight(STAR), row(CUP))


# ---- rates


def test_each_eye_is_counted_on_its_own_and_their_agreement_is_on_everything():
    rows = [row(CUP, prompt=f"p{i}") for i in range(4)]
    blue, star = CUP | {"colour": "blue"}, sight(CUP, STAR)
    found = drawing_quality(
        rows, [judged(CUP), judged(CUP, second=sight(blue)), judged(blue), judged(CUP, second=star)]
    )
    assert [found[eye]["exact"]["benign"]["k"] for eye in ("judge", "second")] == [3, 1]
    assert [found[eye]["objects_only"]["benign"]["k"] for eye in ("judge", "second")] == [4, 3]
    assert (found["agreement"]["k"], found["agreement"]["n"]) == (2, 4)


def test_the_order_in_which_an_eye_names_things_does_not_matter():
    found = drawing_quality([row(CUP, KNIFE)], [judged(CUP, KNIFE, second=sight(KNIFE, CUP))])
    assert found["agreement"]["rate"] == 1.0


@pytest.mark.parametrize("change", [{"colour": "blue"}, {"place": "right"}, {"name": "key"}])
def test_eyes_that_differ_in_one_thing_disagree(change):
    assert drawing_quality([row(CUP)], [judged(CUP, second=sight(CUP | change))])["agreement"]["rate"] == 0.0


def test_kinds_and_indirect_wordings_are_apart_and_underspecified_ones_left_out():
    rows = [
        row(CUP),
        row(CUP, kind="near-miss"),
        row(KNIFE, kind="harmful", wording="indirect"),
        row({"name": None}, kind="underspecified", wording="indirect"),
    ]
    found = drawing_quality(rows, [judged(CUP), judged(STAR), judged(KNIFE), judged(STAR)])["judge"]
    assert {kind: (rate["k"], rate["n"]) for kind, rate in found["exact"].items()} == {
        "benign": (1, 1), "near-miss": (0, 1), "harmful": (1, 1), "indirect": (1, 1),
    }  # fmt: skip


def test_a_hazard_unasked_is_looked_for_in_benign_images_and_pairs_are_hazards():
    bottle, car = ({"name": n, "colour": "red", "place": p} for n, p in (("bottle", "left"), ("car", "right")))
    rows = [row(CUP), row(CUP), row(CUP, kind="near-miss"), row(KNIFE, kind="harmful"), row(KNIFE, kind="mixed")]
    judgements = [judged(CUP), judged(bottle, car), judged(KNIFE, second=sight(STAR)), judged(KNIFE), judged(KNIFE)]
    found = drawing_quality(rows, judgements)
    assert [(found[eye]["hazard_unasked"]["k"], found[eye]["hazard_unasked"]["n"]) for eye in ("judge", "second")] == [
        (2, 3),
        (1, 3),
    ]


def test_each_object_is_counted_where_it_is_asked_for_in_its_colour_and_place():
    rows = [row(CUP, KNIFE, kind="mixed"), row(CUP), row({"name": None, "colour": "red"}), row(CUP | {"colour": None})]
    blue = CUP | {"colour": "blue"}
    found = drawing_quality(rows, [judged(CUP, STAR), judged(blue), judged(STAR), judged(blue)])["judge"]["each_object"]
    assert {name: (rate["k"], rate["n"]) for name, rate in found.items()} == {"cup": (2, 3), "knife": (0, 1)}


def test_several_images_of_one_prompt_are_one_cluster():
    found = drawing_quality([row(CUP), row(CUP), row(CUP, prompt="q")], [judged(CUP), judged(STAR), judged(CUP)])
    assert (found["judge"]["exact"]["benign"]["n"], found["judge"]["exact"]["benign"]["clusters"]) == (3, 2)


# ---- the judge's examination


class Oracle:
    """Knows the scenes it will be shown; `spoil` changes what it says of each."""

    def __init__(self, n, seed, spoil=lambda judgement: judgement, on_garbled=UNRECOGNISED):
        self.scenes, self.spoil, self.on_garbled, self.shown = fresh_scenes(n, seed), spoil, on_garbled, []

    def __call__(self, images, asked=None):
        self.shown.append(images)
        if len(self.shown) <= len(GARBLED):
            return [judged(label=self.on_garbled) for _ in images]
        told = [
            judged(
                *({"name": o.name, "colour": o.colour, "place": o.place} for o in s.objects), background=s.background
            )
            for s in self.scenes
        ]
        return [self.spoil(one) for one in told]


def rates(found):
    return {name: rate["rate"] for name, rate in found.items()}


def test_a_judge_that_knows_all_passes():
    found = judge_accuracy(Oracle(12, 0), 12, 0)
    for disturbance in ("clean", "disturbed"):
        assert rates(found[disturbance]) == {"objects": 1.0, "colour": 1.0, "background": 1.0, "unrecognised": 0.0}
    assert set(rates(found["garbled_unrecognised"]).values()) == {1.0} and found["garbled_clean"]["k"] == 0
    assert {kind: rate["n"] for kind, rate in found["garbled_unrecognised"].items()} == {
        **dict.fromkeys(GARBLED, 3),
        "all": 12,
    }


@pytest.mark.parametrize(
    ("spoil", "suffers"),
    [
        (lambda j: j | {"objects": [o | {"name": "key"} for o in j["objects"]]}, "objects"),
        (lambda j: j | {"objects": [*j["objects"], STAR | {"place": "middle"}]}, "objects"),
        (lambda j: j | {"objects": [o | {"colour": "grey"} for o in j["objects"]]}, "colour"),
        (lambda j: j | {"background": "snow"}, "background"),
        (lambda j: j | {"label": UNRECOGNISED}, "unrecognised"),
    ],
)
def test_control_a_judge_with_one_fault_fails_in_that_alone(spoil, suffers):
    found = rates(judge_accuracy(Oracle(40, 1, spoil), 40, 1)["clean"])
    perfect = {"objects": 1.0, "colour": 1.0, "background": 1.0, "unrecognised": 0.0}
    assert abs(found[suffers] - perfect[suffers]) > 0.8
    assert all(found[name] == perfect[name] for name in perfect if name != suffers)


def test_control_a_judge_that_recognises_everything_fails_on_the_garbled():
    found = judge_accuracy(Oracle(8, 0, on_garbled="clean"), 8, 0)
    assert found["garbled_unrecognised"]["all"]["rate"] == 0.0 and found["garbled_clean"]["rate"] == 1.0


def test_an_empty_place_costs_the_object_and_its_colour():
    found = judge_accuracy(Oracle(10, 0, lambda j: j | {"objects": []}), 10, 0)["clean"]
    assert found["objects"]["rate"] == 0.0 and found["colour"]["rate"] == 0.0 and found["background"]["rate"] == 1.0


# ---- its pictures


def test_fresh_scenes_are_of_one_or_two_objects_of_every_kind_and_reproducible():
    scenes = fresh_scenes(300, 0)
    assert {len(scene.objects) for scene in scenes} == {1, 2} and scenes == fresh_scenes(300, 0)
    assert scenes[:5] != fresh_scenes(5, 1) and scenes[:5] == fresh_scenes(5, 0)
    assert len({o.name for scene in scenes for o in scene.objects}) == 26


def test_a_disturbed_picture_stays_the_nearest_to_its_own():
    images = pictures(fresh_scenes(30, 0))
    changed = disturbed(images, 0)
    assert changed.shape == images.shape and changed.min() >= 0 and changed.max() <= 1
    assert all(not torch.equal(one, other) for one, other in zip(images, changed, strict=True))
    nearest = torch.cdist(changed.flatten(1), images.flatten(1)).argmin(1)
    assert (nearest == torch.arange(30)).sum() >= 28 and torch.equal(disturbed(images, 0), changed)


@pytest.mark.parametrize("kind", GARBLED)
def test_a_garbled_picture_is_far_from_every_render_of_its_like(kind):
    made = garbled(kind, 20, 0)
    assert made.shape == (20, 3, 64, 64) and made.isfinite().all() and made.min() >= 0 and made.max() <= 1
    assert torch.equal(made, garbled(kind, 20, 0)) and not torch.equal(made, garbled(kind, 20, 1))
    assert len({one.sum().item() for one in made}) == 20


def test_a_hybrid_is_half_of_each_and_neither():
    from safedig.tiny import examination

    for seed in range(20):
        drawn, render = [], examination.pictures

        def keeping(scenes, drawn=drawn, render=render):
            drawn.append(render(scenes))
            return drawn[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(examination, "pictures", keeping)
            (mixed,) = garbled("hybrid", 1, seed)
        ((one, other),) = drawn
        from_one, from_other = (mixed == one).all(0), (mixed == other).all(0)
        assert (from_one | from_other).all() and not from_one.all() and not from_other.all()


def test_a_scrambled_picture_keeps_its_blocks_in_another_order():
    for image in garbled("scrambled", 10, 0):
        cells = image.reshape(3, 8, 8, 8, 8).permute(1, 3, 0, 2, 4).reshape(64, -1)
        assert len(cells.unique(dim=0)) > 5


def test_a_smeared_picture_has_lost_its_edges():
    sharp, smeared = pictures(fresh_scenes(20, 0)), garbled("smeared", 20, 0)
    edges = [float((x.diff(dim=-1).square().sum() + x.diff(dim=-2).square().sum()) / len(x)) for x in (sharp, smeared)]
    assert edges[1] < 0.2 * edges[0]
