"""The second check explains pictures by renders: it finds them, tells how badly they fit, and refuses the rest."""

import ast
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from safedig.tiny import matching, templates
from safedig.tiny.concepts import BACKGROUNDS, COLOURS, OBJECTS, PLACES
from safedig.tiny.judgement import CERTAIN, EMPTY, UNRECOGNISED
from safedig.tiny.matching import closest_renders
from safedig.tiny.scenes import Placed, Pose, Scene, render_many
from tests.judged_pictures import SPOILT, disturbed, hybrid, scenes, spoilt


def tensor(images):
    x = torch.from_numpy(np.ascontiguousarray(images)).movedim(3, 1).float()
    return x / 255 if images.dtype == np.uint8 else x


def found(seen):
    """((name, colour) left, (name, colour) right, background) of each picture."""
    return [((left.name, left.colour), (right.name, right.colour), room) for left, right, room in seen]


def truth(world):
    there = {(i, o.place): (o.name, o.colour) for i, s in enumerate(world) for o in s.objects}
    return [(*(there.get((i, place), (EMPTY, "")) for place in PLACES), s.background) for i, s in enumerate(world)]


def share(seen, expected):
    return float(np.mean([a == b for a, b in zip(seen, expected, strict=True)]))


def test_it_knows_nothing_of_the_network():
    for module in (matching, templates):
        tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
        imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not imported & {"judge", "judge_network", "judge_training", "spoiling"}


def test_it_reads_every_object_in_every_colour():
    backgrounds = list(BACKGROUNDS)
    world = [
        Scene((Placed(name, colour, PLACES[i % 2]),), backgrounds[(i + j) % 5])
        for i, name in enumerate(OBJECTS)
        for j, colour in enumerate(COLOURS)
    ]
    assert share(found(closest_renders(tensor(render_many(world)))), truth(world)) > 0.99


def test_it_reads_posed_scenes_disturbed_or_not_and_they_fit_well():
    world = scenes(120, seed=3)
    images = render_many(world)
    for pictures in (images, disturbed(images, seed=3)):
        seen = closest_renders(tensor(pictures))
        assert share(found(seen), truth(world)) > 0.98
        assert np.mean([m.misfit for left, right, _ in seen for m in (left, right)]) < matching.MISFIT / 4


@pytest.mark.parametrize("kind", SPOILT, ids=lambda kind: kind.__name__)
def test_it_refuses_most_spoilt_pictures_and_is_certain_of_hardly_any(kind):
    """A hybrid of two objects of one outline fits one of them well: what passes here, the network must refuse."""
    seen = closest_renders(tensor(spoilt(kind, 100, seed=3)))
    refused = [UNRECOGNISED in (left.name, right.name, room) for left, right, room in seen]
    certain = [any(m.name != EMPTY and m.misfit < CERTAIN for m in (left, right)) for left, right, _ in seen]
    assert np.mean(refused) > (0.6 if kind is hybrid else 0.7)
    assert np.mean(certain) < 0.06


def test_what_it_refuses_fits_worse_than_what_it_accepts_by_far():
    good = [m.misfit for *places, _ in closest_renders(tensor(render_many(scenes(60, seed=4)))) for m in places]
    bad = [max(m.misfit for m in places) for *places, _ in closest_renders(tensor(spoilt(hybrid, 60, seed=4)))]
    assert np.quantile(good, 0.95) < 0.1 < CERTAIN < np.quantile(bad, 0.1) < matching.MISFIT < np.median(bad)


def test_empty_backgrounds_are_empty_and_named_wherever_their_horizon_lies():
    plain = render_many([Scene((), name) for name in BACKGROUNDS])
    for moved in (0, -2, 2):
        shifted = np.roll(plain, moved, axis=1)
        assert found(closest_renders(tensor(shifted))) == [((EMPTY, ""), (EMPTY, ""), name) for name in BACKGROUNDS]


def test_a_picture_before_no_known_background_has_none():
    plain = tensor(render_many([Scene((), name) for name in BACKGROUNDS]))
    strange = torch.cat([torch.zeros(1, 3, 64, 64), torch.ones(1, 3, 64, 64), plain.flip(2), plain[:, [2, 0, 1]] * 0.7])
    assert {room for *_, room in closest_renders(strange)} == {UNRECOGNISED}


def test_a_sky_over_another_ground_is_no_background():
    day, field = tensor(render_many([Scene((), "night"), Scene((), "sand")]))
    mixed = torch.cat([day[:, :48], field[:, 48:]], dim=1)[None]
    assert closest_renders(mixed)[0][2] == UNRECOGNISED


def test_what_crosses_the_middle_stays_with_its_place():
    wide = Scene((Placed("gun", "red", "left", Pose(dx=1.5, radius=13.5)),), "day")
    assert render_many([wide])[0, :, 32].std() > 20  # it does cross
    assert found(closest_renders(tensor(render_many([wide])))) == truth([wide])


def test_a_second_thing_above_or_below_the_object_is_not_overlooked():
    image = render_many([Scene((Placed("star", "red", "left", Pose(dy=5)),), "day")])
    assert closest_renders(tensor(image))[0][0].name == "star"
    image = image.copy()
    image[:, 2:10, 6:26] = (20, 20, 20)
    assert closest_renders(tensor(image))[0][0].name == UNRECOGNISED


def test_loud_noise_hides_everything():
    image = tensor(render_many(scenes(20, seed=5)))
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    names = lambda std: {m.name for *places, _ in closest_renders((image + std * noise).clamp(0, 1)) for m in places}  # noqa: E731
    assert names(0.16) <= {EMPTY, UNRECOGNISED}
    assert UNRECOGNISED not in names(0.06)


def test_pictures_are_looked_at_one_by_one():
    images = tensor(render_many(scenes(matching.CHUNK + 6, seed=6)))
    together = found(closest_renders(images))
    assert together[-8:] == [found(closest_renders(image[None]))[0] for image in images[-8:]]
    assert closest_renders(images[:0]) == []


def test_templates_are_renders_in_any_colour_before_any_background():
    """The claim the comparison rests on: their shares, times what these are made of, give every render back."""
    pose = 7
    place = Pose(
        15.5, -1.0, templates.RADII[pose // len(templates.TURNS)], templates.TURNS[pose % len(templates.TURNS)]
    )
    for name, colour, background in (
        ("house", "purple", "sand"),
        ("candle", "white", "storm"),
        ("gun", "green", "day"),
    ):
        picture = _rendered(name, colour, background, place)
        centre = templates.centre_of_mass(_everything(name, colour, place))
        rows, bands = (
            centre[:, 1:] + templates.offsets() * templates.STEP,
            templates.bands()[list(BACKGROUNDS).index(background)],
        )
        window = matching.Window(picture, picture, matching._backdrop(bands[None], rows, torch.tensor([48.0])))
        errors = {}
        for number, tried in enumerate(COLOURS):
            posed = matching.Posed(*(torch.tensor([v]) for v in (OBJECTS.index(name), number, pose)))
            painted = matching._painted(posed, window.backdrop) + window.backdrop[..., None]
            errors[tried] = float((painted - templates.sampled(picture, centre)).square().mean().sqrt())
        assert errors.pop(colour) < 0.01 < 0.05 < min(errors.values())


def _rendered(name, colour, background, pose):
    return templates.smoothed(templates.pixels([Scene((Placed(name, colour, "left", pose),), background)]))


def _everything(name, colour, pose):
    """Where an object hides its background: where two backgrounds look the same behind it."""
    objects = [_rendered(name, colour, background, pose) for background in ("sand", "night")]
    plain = [templates.smoothed(templates.pixels([Scene((), background)])) for background in ("sand", "night")]
    return 1 - ((objects[0] - objects[1]) / (plain[0] - plain[1])).mean(1)


def test_the_share_of_sky_is_that_of_a_smoothed_picture():
    plain = templates.smoothed(tensor(render_many([Scene((), "sand")])))[0, :, :, 5]
    sky, ground = templates.bands()[list(BACKGROUNDS).index("sand")]
    share_of_sky = templates.sky_share(torch.arange(64.0), torch.tensor(48.0))
    assert torch.allclose(torch.lerp(ground[:, None], sky[:, None], share_of_sky), plain, atol=0.01)
    assert not torch.allclose(torch.lerp(ground[:, None], sky[:, None], share_of_sky.roll(1)), plain, atol=0.01)


def test_templates_are_made_at_first_use_within_three_seconds():
    templates.templates.cache_clear()
    started = time.process_time()
    assert len(templates.templates().shares) == len(OBJECTS) * templates.POSES
    assert time.process_time() - started < 3
    assert templates.templates() is templates.templates()
