"""What the judge learns from: labels that fit, spoilers that spoil, disturbances that do not; the same for a seed."""

import numpy as np
import pytest
import torch

from safedig.tiny import judge_training, spoiling
from safedig.tiny.concepts import BACKGROUNDS, OBJECTS
from safedig.tiny.judge_network import BACKGROUND_CLASSES, COLOUR_CLASSES, OBJECT_CLASSES, load_reader
from safedig.tiny.judge_training import IGNORED, NOTHING, SPOILT, STRANGE, Judging, labelled, random_scene
from safedig.tiny.matching import closest_renders
from safedig.tiny.training import fit
from tests.judged_pictures import scenes


@pytest.fixture(scope="module")
def objective():
    return Judging(seed=0, bank=256)


def places(n, seed):
    """The left places of random scenes and of others before the same background, 0 … 1."""
    world = [s for s in scenes(6 * n, seed) if s.background == "day" and any(o.place == "left" for o in s.objects)]
    x = torch.from_numpy(judge_training.render_many(world)).movedim(3, 1).float()[..., :32] / 255
    return x, x.roll(1, 0)


def test_its_loss_can_be_followed_downhill(objective):
    terms = objective.loss(np.random.default_rng(0), 0.5)
    assert terms["loss"].requires_grad and not terms["right"].requires_grad


def test_scenes_are_labelled_as_drawn():
    rng = np.random.default_rng(0)
    world = [random_scene(rng) for _ in range(40)]
    pictures = labelled(world)
    for i, scene in enumerate(world):
        there = {o.place: o for o in scene.objects}
        for p, place in enumerate(("left", "right")):
            name, colour = OBJECT_CLASSES[pictures.objects[i, p]], int(pictures.colours[i, p])
            assert (name, colour == IGNORED) == ((there[place].name, False) if place in there else ("empty", True))
            assert place not in there or COLOUR_CLASSES[colour] == there[place].colour
        assert BACKGROUND_CLASSES[pictures.background[i]] == scene.background


def test_a_batch_has_its_size_known_labels_and_values_in_0_to_1(objective):
    pictures = objective.draw(np.random.default_rng(1))
    assert len(pictures) == objective.batch
    assert pictures.x.min() >= 0 and pictures.x.max() <= 1
    for given, classes in ((pictures.objects, OBJECT_CLASSES), (pictures.colours, COLOUR_CLASSES)):
        assert set(given.unique().tolist()) <= {IGNORED, *range(len(classes))}
    assert STRANGE in pictures.background and (pictures.objects == SPOILT).any() and (pictures.objects == NOTHING).any()
    assert (pictures.colours[pictures.objects >= len(OBJECTS)] == IGNORED).all()


def test_batches_follow_from_the_seed_and_the_step_alone(objective):
    first, again, other = (objective.draw(np.random.default_rng(seed)) for seed in ((0, 5), (0, 5), (0, 6)))
    assert torch.equal(first.x, again.x) and torch.equal(first.objects, again.objects)
    assert not torch.equal(first.x, other.x)


def test_every_object_is_learnt_whole_and_spoilt(objective):
    batches = [objective.draw(np.random.default_rng(seed)) for seed in range(30)]
    whole = torch.cat([b.objects[(b.objects >= 0) & (b.objects < len(OBJECTS))] for b in batches])
    assert set(whole.tolist()) == set(range(len(OBJECTS)))
    assert 0.2 < np.mean([(b.objects == SPOILT).float().mean() for b in batches]) < 0.6


@pytest.mark.parametrize("spoiler", dict.fromkeys(spoiling.SPOILERS), ids=lambda spoiler: spoiler.__name__)
def test_a_spoiler_changes_a_place_beyond_what_disturbing_does(spoiler):
    x, y = places(40, seed=1)
    spoilt, kept = spoiler(x, y, np.random.default_rng(0)), x.clone()
    assert spoilt.shape == x.shape and torch.equal(x, kept)
    changed = (spoilt - x).abs().mean(1).sum((1, 2))
    assert changed.median() > 3 * judge_training.CHANGED


def test_hybrids_show_both_and_ghosts_neither():
    x, y = places(40, seed=2)
    cut = spoiling.halves(x, y, np.random.default_rng(0))
    from_x, from_y = ((cut - z).abs().amax(1) < 0.02 for z in (x, y))
    assert ((from_x | from_y).float().mean((1, 2)) > 0.9).all()
    differs = (x - y).abs().amax(1) > 0.1
    shares = (from_x & differs).float().sum((1, 2)) / differs.float().sum((1, 2))
    assert ((shares > 0.05) & (shares < 0.95)).float().mean() > 0.8
    ghost = spoiling.ghosts(x, y, np.random.default_rng(0))
    assert not ((ghost - x).abs().amax(1)[differs] < 0.02).any()


def test_disturbed_renders_are_still_read_by_the_second_check():
    """An eye that was not trained says that what is taught as recognisable is."""
    rng = np.random.default_rng(0)
    pictures = labelled([random_scene(rng) for _ in range(150)])
    x = spoiling.disturbed(pictures.x.float() / 255, rng)
    names = [[OBJECT_CLASSES[o] for o in row] for row in pictures.objects.tolist()]
    seen = [[left.name, right.name] for left, right, _ in closest_renders(x)]
    assert np.mean([a == b for a, b in zip(seen, names, strict=True)]) > 0.5
    places = [place for one, other in zip(seen, names, strict=True) for place in zip(one, other, strict=True)]
    wrong = [a for a, b in places if a != b]
    assert wrong.count("unrecognised") > 0.7 * len(wrong)


def test_blur_keeps_what_is_even_and_lessens_what_is_not():
    x = torch.cat([torch.full((1, 3, 64, 32), 0.3), torch.rand(1, 3, 64, 32)])
    soft = spoiling.blurred(x, torch.tensor([2.0, 2.0]))
    assert torch.allclose(soft[0], x[0], atol=1e-5)
    assert soft[1].std() < 0.3 * x[1].std()
    assert torch.allclose(spoiling.blurred(x, torch.zeros(2)), x, atol=1e-5)


def test_warping_by_whole_pixels_moves_pixels():
    x = torch.rand(1, 3, 64, 32)
    shift = torch.tensor([2.0, -3.0])[None, :, None, None].expand(1, 2, 64, 32)
    assert torch.allclose(
        spoiling.warped(x, shift)[..., 5:-5, 5:-5], x.roll((3, -2), (2, 3))[..., 5:-5, 5:-5], atol=1e-4
    )


def test_a_repainted_picture_keeps_its_object_and_loses_its_background():
    rng = np.random.default_rng(0)
    pictures = labelled([random_scene(rng) for _ in range(60)])
    x, background = pictures.x.float() / 255, pictures.background
    new = judge_training._repainted(x, background, rng)
    plain = (
        torch.from_numpy(judge_training.render_many([judge_training.Scene((), b) for b in BACKGROUNDS])).movedim(3, 1)
        / 255
    )
    front = (x - plain[background]).abs().amax(1) > 0.3
    assert ((new - x).abs().amax(1)[front] < 1e-5).all()
    assert ((new - x).abs().amax(1)[~front].mean()) > 0.1


@pytest.mark.slow
def test_a_short_training_learns_and_publishes_what_loads(tmp_path):
    objective = Judging(seed=0, bank=1024)
    log = fit(objective, name="judge", samples=200 * 64, folder=tmp_path / "judge", work=tmp_path, seed=0)
    assert log["log"][-1]["loss"] < 4.0  # a guess at random: ln 28 + (ln 6 + ln 6) / 2 = 5.1
    rng = np.random.default_rng((0, 10**6))
    assert objective.loss(rng, 1.0)["loss"] < 3.0
    assert load_reader(tmp_path / "judge")(torch.zeros(1, 3, 64, 64)).objects.shape == (1, 2, len(OBJECT_CLASSES))


def test_everything_the_loss_needs_follows_the_reader_to_its_device():
    """Tensors on the meta device refuse company from anywhere else, as those of an accelerator do."""
    elsewhere = Judging(seed=0, bank=64)
    elsewhere.module.to("meta")
    assert elsewhere.loss(np.random.default_rng(0), 0.0)["loss"].device.type == "meta"
