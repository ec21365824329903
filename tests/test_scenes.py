"""Scenes are drawn where and as they say, the same every time, and no two objects look alike."""

import itertools

import numpy as np
import pytest

from safedig.tiny.concepts import BACKGROUNDS, COLOURS, OBJECTS, PLACES
from safedig.tiny.pictograms import INK, pictogram
from safedig.tiny.scenes import (
    CENTRES,
    SIZE,
    Placed,
    Pose,
    Scene,
    bounds,
    clutter,
    place_of,
    posed,
    random_pose,
    render,
    render_many,
)

APART = round(CENTRES["right"] - CENTRES["left"])  # pixels between the two places
MIDDLE = SIZE // 2


def one(name, colour="red", place="left", background="day", pose=None):
    return Scene((Placed(name, colour, place, pose or Pose()),), background)


def touched(scene):
    """Which pixels the objects of a scene change."""
    return (render(scene) != render(Scene((), scene.background))).any(-1)


def poses(n=12):
    rng = np.random.default_rng(0)
    return [random_pose(rng) for _ in range(n)]


@pytest.mark.parametrize("name", BACKGROUNDS)
def test_an_empty_scene_is_two_flat_bands(name):
    background, picture = BACKGROUNDS[name], render(Scene((), name))
    assert picture.shape == (SIZE, SIZE, 3) and picture.dtype == np.uint8
    assert (picture[: background.horizon] == background.sky).all()
    assert (picture[background.horizon :] == background.ground).all()


@pytest.mark.parametrize("name", OBJECTS)
def test_an_object_keeps_to_its_place_and_inside_the_picture(name):
    for pose in poses():
        left, right = touched(one(name, pose=pose)), touched(one(name, place="right", pose=pose))
        assert left.sum() > 150 and right.sum() > 150
        assert not left[:, MIDDLE + 2 :].any() and not right[:, : MIDDLE - 2].any()
        assert not left[0].any() and not left[-1].any(), "nothing is cut off above or below"


def test_control_an_object_in_the_middle_is_found_outside_its_place():
    assert touched(one("star", pose=Pose(dx=10)))[:, MIDDLE + 2 :].any()


@pytest.mark.parametrize("name", OBJECTS)
def test_the_two_places_differ_by_nothing_but_their_distance(name):
    left, right = render(one(name)), render(one(name, place="right"))
    moved = (left[:, : SIZE - APART] != right[:, APART:]).any(-1).sum()
    stayed = (left != right).any(-1).sum()
    assert moved <= 12 and stayed > 300, "a few edge pixels are rounded otherwise"


@pytest.mark.parametrize("name", OBJECTS)
def test_every_colour_can_be_seen(name):
    for colour, rgb in COLOURS.items():
        shown = (render(one(name, colour)) == rgb).all(-1).sum()
        assert shown > 40, f"only {shown} pixels of {name} are {colour}"
        others = [(render(one(name, other)) == rgb).all(-1).sum() for other in COLOURS if other != colour]
        assert not any(others), "control: no other colour shows it"


@pytest.mark.parametrize("name", OBJECTS)
def test_an_object_lies_within_its_bounds_but_for_its_corners(name):
    for place in PLACES:
        for pose in poses():
            scene = one(name, place=place, pose=pose)
            left, top, right, bottom = bounds(scene.objects[0])
            assert 0 <= left < right <= SIZE and 0 <= top < bottom <= SIZE
            inside = touched(scene)[top:bottom, left:right].sum() / touched(scene).sum()
            assert inside > 0.97, inside


def test_edges_are_antialiased():
    picture = render(one("star", pose=Pose(turn=7))).reshape(-1, 3)
    flat = {COLOURS["red"], INK, BACKGROUNDS["day"].sky, BACKGROUNDS["day"].ground}
    assert len({tuple(p) for p in picture.tolist()} - flat) > 20


def test_no_two_objects_look_alike_in_any_pose():
    """The nearest of all upright drawings is the object's own, by the mean difference of their pixels, pose by pose."""
    for pose in poses(4):
        drawn = np.stack([render(one(name, pose=pose)) for name in OBJECTS]).astype(int)
        for i, j in itertools.combinations(range(len(OBJECTS)), 2):
            assert np.abs(drawn[i] - drawn[j]).sum(-1).sum() > 12_000, (OBJECTS[i], OBJECTS[j])


def test_every_drawing_fits_its_square_and_names_its_fills():
    for name in OBJECTS:
        for fill, points in pictogram(name):
            assert fill in ("main", "ink", "light", "dark", "line")
            assert all(max(abs(x), abs(y)) <= 1.12 for x, y in points), name


def test_the_later_object_lies_in_front():
    knife, star = Placed("knife", "red", "left"), Placed("star", "blue", "left")
    both, alone = render(Scene((knife, star), "day")), render(one("star", "blue"))
    inside = (alone == COLOURS["blue"]).all(-1)
    assert np.array_equal(both[inside], alone[inside])
    assert not np.array_equal(render(Scene((star, knife), "day"))[inside], alone[inside]), "control: order matters"


def test_a_fresh_pose_changes_the_pose_alone_and_comes_from_the_generator():
    scene = Scene((Placed("cup", "red", "left"), Placed("axe", "blue", "right")), "sand")
    first, again = (posed(scene, np.random.default_rng(1)) for _ in range(2))
    assert first == again != posed(scene, np.random.default_rng(2))
    assert [(o.name, o.colour, o.place) for o in first.objects] == [(o.name, o.colour, o.place) for o in scene.objects]
    assert first.objects[0].pose != first.objects[1].pose != scene.objects[1].pose
    assert not np.array_equal(render(first), render(scene))


def test_poses_are_free_within_their_limits():
    seen = np.array([(p.dx, p.dy, p.radius, p.turn) for p in poses(500)])
    low, high = np.array([-1.5, -5, 11, -12]), np.array([1.5, 5, 13.5, 12])
    assert (seen >= low).all() and (seen <= high).all()
    assert (seen.max(0) - seen.min(0) > 0.95 * (high - low)).all()


def test_many_scenes_are_each_drawn_as_one():
    scenes = [one("cup"), one("gun", "blue", "right", "night")]
    assert np.array_equal(render_many(scenes), np.stack([render(scene) for scene in scenes]))
    assert render_many([]).shape == (0, SIZE, SIZE, 3)


def test_drawing_leaves_the_shared_backdrop_clean():
    before = render(Scene((), "day")).copy()
    render(one("bomb"))
    assert np.array_equal(render(Scene((), "day")), before)


def test_two_objects_stand_left_then_right_and_one_on_either_side():
    rng = np.random.default_rng(0)
    assert tuple(place_of(i, 2, rng) for i in range(2)) == PLACES
    assert {place_of(0, 1, rng) for _ in range(30)} == set(PLACES)


def test_clutter_strews_as_many_objects_as_asked_all_over_the_picture():
    rng = np.random.default_rng(0)
    scenes = [clutter(rng, 5) for _ in range(40)]
    assert all(len(scene.objects) == 5 for scene in scenes)
    covered = np.mean([touched(scene) for scene in scenes], axis=0)
    assert covered.min() > 0 and scenes[0] == clutter(np.random.default_rng(0), 5)
