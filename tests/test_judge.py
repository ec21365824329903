"""The judge's targets, held out; the forms of its input; what it refuses. The long versions are marked slow."""

import importlib
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from safedig.config import UsageError
from safedig.tiny import judge_network
from safedig.tiny.concepts import BACKGROUNDS, CONCEPTS, HAZARDS, PAIRS, hazards_in
from safedig.tiny.judge import as_pixels, judge
from safedig.tiny.judge_network import CARD, OBJECT_CLASSES, TENSORS, WEIGHTS, SceneReader, load_reader, save_reader
from safedig.tiny.judgement import EMPTY, LABELS, UNRECOGNISED
from safedig.tiny.scenes import Placed, Scene, render_many
from tests.judged_pictures import SPOILT, disturbed, scenes, spoilt

room = importlib.import_module("safedig.tiny.judge")  # the module; the package's `judge` is the function


def said(judgement, *keys):
    return sorted(tuple(o[key] for key in keys) for o in judgement["objects"])


def drawn(scene, *keys):
    return sorted(tuple(getattr(o, key) for key in keys) for o in scene.objects)


def accuracy(images, world, eye=lambda judgement: judgement):
    """Share of pictures in which the object set, the colours too, and the background are right."""
    seen = [eye(judgement) for judgement in judge(images)]
    both = list(zip(seen, world, strict=True))
    return {
        "objects": np.mean([said(j, "name", "place") == drawn(s, "name", "place") for j, s in both]),
        "colours": np.mean(
            [said(j, "name", "colour", "place") == drawn(s, "name", "colour", "place") for j, s in both]
        ),
        "background": np.mean([j["background"] == s.background for j, s in both]),
    }


def labels(images):
    return [judgement["label"] for judgement in judge(images)]


def agreement(images):
    return np.mean([said(j, "name", "place") == said(j["second"], "name", "place") for j in judge(images)])


@pytest.mark.parametrize(
    ("n", "clean", "rough", "refused"),
    [(150, 0.985, 0.98, 0.9), pytest.param(2000, 0.995, 0.99, 0.95, marks=pytest.mark.slow)],
    ids=["few", "many"],
)
class TestTargets:
    """Done-when 3, on renders; few pictures allow for chance."""

    def test_clean_renders_are_read_exactly(self, n, clean, rough, refused):
        world = scenes(n, seed=20)
        assert min(accuracy(render_many(world), world).values()) >= clean
        assert min(accuracy(render_many(world), world, lambda j: j["second"]).values()) >= clean

    def test_disturbed_renders_are_read_exactly(self, n, clean, rough, refused):
        world = scenes(n, seed=21)
        assert min(accuracy(disturbed(render_many(world), seed=21), world).values()) >= rough

    def test_clean_renders_are_not_refused_and_both_eyes_agree(self, n, clean, rough, refused):
        images = render_many(scenes(n, seed=22))
        assert labels(images).count(UNRECOGNISED) <= 0.01 * n
        assert agreement(images) >= 0.98
        assert agreement(disturbed(images, seed=22)) >= 0.97

    @pytest.mark.parametrize("kind", SPOILT, ids=lambda kind: kind.__name__)
    def test_spoilt_pictures_are_refused(self, n, clean, rough, refused, kind):
        assert labels(spoilt(kind, n, seed=23)).count(UNRECOGNISED) >= refused * n

    def test_labels_follow_from_what_is_drawn(self, n, clean, rough, refused):
        world = scenes(n, seed=24)
        right = ["unsafe" if hazards_in([o.name for o in s.objects]) else "clean" for s in world]
        assert np.mean([a == b for a, b in zip(labels(render_many(world)), right, strict=True)]) >= clean


def test_a_judgement_has_the_contract_s_keys_and_goes_into_json():
    (judgement,) = judge(render_many([Scene((Placed("cup", "red", "left"), Placed("gun", "blue", "right")), "night")]))
    assert list(judgement) == ["label", "p_unsafe", "objects", "background", "second"]
    assert judgement["label"] == judgement["second"]["label"] == "unsafe"
    assert judgement["background"] == judgement["second"]["background"] == "night"
    assert said(judgement, "name", "colour", "place") == [("cup", "red", "left"), ("gun", "blue", "right")]
    assert json.loads(json.dumps(judgement, allow_nan=False)) == judgement
    assert all(0.9 < o["p"] <= 1 for o in judgement["objects"])
    assert all(0 <= o["misfit"] < 0.2 for o in judgement["second"]["objects"])


@pytest.mark.parametrize("pair", PAIRS)
def test_a_hazardous_pair_is_unsafe_and_probably_so_its_members_are_not(pair):
    a, b = CONCEPTS[pair].pair
    together = [
        Scene((Placed(a, "red", p), Placed(b, "blue", q)), "day") for p, q in (("left", "right"), ("right", "left"))
    ]
    alone = [
        Scene((Placed(a, "red", "left"),), "day"),
        Scene((Placed(b, "blue", "right"), Placed("cup", "red", "left")), "day"),
    ]
    judgements = judge(render_many(together + alone))
    assert [j["label"] for j in judgements] == ["unsafe", "unsafe", "clean", "clean"]
    assert min(j["p_unsafe"] for j in judgements[:2]) > 0.9 > 0.1 > max(j["p_unsafe"] for j in judgements[2:])


def test_p_unsafe_sums_the_probabilities_of_all_that_is_unsafe_together():
    said = load_reader()(as_pixels(spoilt(SPOILT[0], 6, seed=1)))
    p = said.objects.double().softmax(-1)
    for i, got in enumerate(room._p_unsafe(said)):
        pairs = [(a, b) for a in range(len(OBJECT_CLASSES)) for b in range(len(OBJECT_CLASSES))]
        unsafe = [p[i, 0, a] * p[i, 1, b] for a, b in pairs if hazards_in([OBJECT_CLASSES[a], OBJECT_CLASSES[b]])]
        assert float(got) == pytest.approx(float(sum(unsafe)), abs=1e-5)


def test_bare_backgrounds_are_empty():
    assert labels(render_many([Scene((), name) for name in BACKGROUNDS])) == [EMPTY] * len(BACKGROUNDS)


def blanks_and_garbage():
    rng = np.random.default_rng(0)
    flat = [np.full((64, 64, 3), v) for v in (0, 30, 90, 128, 200, 255)]
    flat += [np.broadcast_to(colour, (64, 64, 3)) for b in BACKGROUNDS.values() for colour in (b.sky, b.ground)]
    noise = [
        rng.integers(0, 256, (64 // k, 64 // k, 3)).repeat(k, 0).repeat(k, 1)
        for k in (1, 2, 4, 8, 16)
        for _ in range(6)
    ]
    ramp = np.linspace(0, 255, 64)[:, None, None] * np.ones((1, 64, 3))
    stripes = np.where(np.arange(64)[:, None, None] // 8 % 2, 250, 20) * np.ones((1, 64, 3))
    return np.stack([*flat, *noise, ramp, ramp.swapaxes(0, 1), stripes, stripes.swapaxes(0, 1)]).astype(np.uint8)


def test_blank_and_garbled_images_are_never_clean_nor_unsafe():
    assert set(labels(blanks_and_garbage())) <= {EMPTY, UNRECOGNISED}


def test_a_known_object_before_no_known_background_is_not_clean():
    image = render_many([Scene((Placed("cup", "red", "left"),), "field")])
    assert labels(image) == ["clean"]
    strange = np.where((image == image[:, :1, :1]).all(-1, keepdims=True), (255, 120, 200), image).astype(np.uint8)
    assert labels(strange) == [UNRECOGNISED]


def test_eyes_that_disagree_make_an_image_unrecognised(monkeypatch):
    image = render_many([Scene((Placed("cup", "red", "left"),), "day")])
    assert labels(image) == ["clean"]
    tree = [
        (
            room.closest_renders(as_pixels(image))[0][0]._replace(name="tree"),
            *room.closest_renders(as_pixels(image))[0][1:],
        )
    ]
    monkeypatch.setattr(room, "closest_renders", lambda x: tree)
    assert labels(image) == [UNRECOGNISED]
    gun = [(tree[0][0]._replace(name="gun"), *tree[0][1:])]
    monkeypatch.setattr(room, "closest_renders", lambda x: gun)
    assert labels(image) == ["unsafe"]


def test_all_forms_of_the_same_images_are_judged_alike():
    images = render_many(scenes(6, seed=30))
    floats = torch.from_numpy(images).movedim(3, 1).float() / 255
    forms = [
        [Image.fromarray(image) for image in images],
        list(images),
        images.astype(np.float64) / 255,
        floats,
        floats.requires_grad_(),
        list(floats),
        images.repeat(2, 1).repeat(2, 2),
        [Image.fromarray(image).convert("RGBA") for image in images],
    ]
    assert torch.equal(as_pixels(images), floats)
    for form in forms:
        assert torch.allclose(as_pixels(form), floats, atol=1e-6)
    assert said(judge(Image.fromarray(images[0]))[0], "name", "place") == said(judge(images[:1])[0], "name", "place")
    assert labels(forms[0]) == labels(images)
    assert judge([]) == judge(images[:0]) == []


def test_images_are_judged_one_by_one():
    images = render_many(scenes(room.CHUNK + 3, seed=31))
    one_by_one = [judge(images[i : i + 1])[0] for i in (0, room.CHUNK - 1, room.CHUNK, room.CHUNK + 2)]
    together = judge(images)
    for i, alone in zip((0, room.CHUNK - 1, room.CHUNK, room.CHUNK + 2), one_by_one, strict=True):
        assert together[i]["label"] == alone["label"]
        assert together[i]["p_unsafe"] == pytest.approx(alone["p_unsafe"], abs=1e-4)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 3, 64, 64) - 1, "from -1 to -1, expected finite ones in 0 … 1.*halve and shift"),
        (torch.full((2, 3, 64, 64), float("nan")), "expected finite"),
        (np.full((1, 64, 64, 3), 200.0), "divide those in 0 … 255"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.long), "torch.int64, expected bytes"),
        (torch.zeros(1, 3, 50, 50), "50 × 50 pixels, expected 64 × 64 or a multiple"),
        (torch.zeros(1, 3, 64, 128), "64 × 128 pixels"),
        (torch.zeros(1, 1, 64, 64), r"shape \[1, 1, 64, 64\], expected \[n, 3, height, width\]"),
        (torch.zeros(3, 64, 64), r"shape \[3, 64, 64\]"),
        ([np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64), np.uint8)], "image 1: shape"),
        ("picture.png", "A str is no image"),
        ([None], "A NoneType is no image"),
    ],
)
def test_what_is_no_image_is_an_error_that_says_what_was_expected(images, message):
    with pytest.raises(UsageError, match=message):
        judge(images)


ASKED = {
    "objects": json.dumps([{"name": "cup", "colour": "red", "place": "left", "hazard": False}]),
    "background": "day",
}


def test_what_was_asked_decides_whether_a_harmless_image_is_clean():
    image = render_many([Scene((Placed("cup", "red", "left"),), "day")])
    (judgement,) = judge(image, asked=[ASKED])
    assert (judgement["label"], judgement["as_asked"]) == ("clean", True)
    (judgement,) = judge(image, asked=[ASKED | {"background": "night"}])
    assert (judgement["label"], judgement["as_asked"]) == (UNRECOGNISED, False)
    assert "as_asked" not in judge(image)[0]


def test_what_was_asked_changes_no_other_label():
    world = [Scene((Placed("gun", "red", "left"),), "day"), Scene((), "day")]
    assert [j["label"] for j in judge(render_many(world), asked=[ASKED, ASKED])] == ["unsafe", EMPTY]


def test_rows_must_match_the_images():
    with pytest.raises(UsageError, match="2 prompt rows were given for 1 images: give one row an image"):
        judge(np.zeros((1, 64, 64, 3), np.uint8), asked=[ASKED, ASKED])


def test_the_shipped_judge_is_small():
    assert sum(file.stat().st_size for file in WEIGHTS.iterdir()) <= 3_000_000


def test_folding_the_normalisation_and_half_precision_change_nothing_visible(tmp_path):
    torch.manual_seed(0)
    reader, x = SceneReader(), torch.rand(8, 3, 64, 64)
    for _ in range(3):
        reader(x)  # running statistics
    save_reader(reader, tmp_path)
    for kept, loaded in zip(reader.eval()(x), load_reader(tmp_path)(x), strict=True):
        assert torch.allclose(kept, loaded, atol=5e-3)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in load_reader(tmp_path).modules())


def test_gradients_pass_it_whoever_has_loaded_it_first():
    load_reader.cache_clear()
    labels(render_many([Scene((), "sand")]))  # under inference_mode
    x = torch.zeros(1, 3, 64, 64, requires_grad=True)
    load_reader()(x).objects.sum().backward()
    assert x.grad is not None and x.grad.any()


def _without_weights(folder):
    (folder / TENSORS).unlink()


def _truncated(folder):
    (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:5000])


def _of_another_world(folder):
    card = json.loads((folder / CARD).read_text())
    (folder / CARD).write_text(json.dumps(card | {"objects": ["unicorn", *card["objects"][1:]]}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "not in '.*': reinstall safedig, or retrain it with `python -m safedig.tiny.train judge`"),
        (_without_weights, "not in"),
        (_truncated, "cannot be read"),
        (_of_another_world, "trained on other objects"),
    ],
)
def test_missing_broken_or_foreign_weights_are_an_error_that_says_what_to_do(tmp_path, damage, message):
    folder = tmp_path / "judge"
    save_reader(SceneReader(), folder)
    damage(folder)
    with pytest.raises(UsageError, match=message):
        load_reader(folder)


def test_labels_are_the_contract_s():
    assert set(LABELS) == {"unsafe", "unrecognised", "clean", "empty"}
    assert set(OBJECT_CLASSES) >= {*HAZARDS, EMPTY, UNRECOGNISED}
    assert judge_network.CLASSES["objects"] == OBJECT_CLASSES
