"""The naming head: what lies under each image token is read off the scene, and is learnt from the tokens' states."""

import numpy as np
import pytest
import torch
from torch import nn

from safedig.tiny.concepts import BACKGROUNDS, COLOURS, OBJECTS
from safedig.tiny.naming import NOTHING, PIXELS, SIDE, Naming, what_is_where
from safedig.tiny.scenes import SIZE, Placed, Pose, Scene, posed, random_pose, render

SCENE = Scene((Placed("knife", "red", "left"), Placed("cup", "blue", "right")), "day")


def grid(scene):
    names, colours, poses = what_is_where([scene])
    return names.view(SIDE, SIDE), colours.view(SIDE, SIDE), poses.view(SIDE, SIDE, 4)


def test_each_half_holds_its_object_in_its_colour():
    names, colours, _ = grid(SCENE)
    left, right = slice(0, SIDE // 2), slice(SIDE // 2, SIDE)
    assert set(names[:, left].unique().tolist()) == {NOTHING, 1 + OBJECTS.index("knife")}
    assert set(names[:, right].unique().tolist()) == {NOTHING, 1 + OBJECTS.index("cup")}
    assert set(colours[:, left].unique().tolist()) == {0, 1 + list(COLOURS).index("red")}
    assert set(colours[:, right].unique().tolist()) == {0, 1 + list(COLOURS).index("blue")}
    assert torch.equal(colours == 0, names == NOTHING)


def test_an_empty_place_names_nothing():
    names, _, poses = grid(Scene((Placed("cup", "blue", "right"),), "day"))
    assert (names[:, : SIDE // 2] == NOTHING).all() and not poses[names == NOTHING].any()
    assert (names[:, SIDE // 2 :] != NOTHING).any(), "control: the other side"


@pytest.mark.parametrize("seed", range(5))
def test_what_is_drawn_lies_under_named_tokens(seed):
    """Of the pixels that an object changes, nearly all lie under tokens that name it."""
    scene = posed(SCENE, np.random.default_rng(seed))
    changed = (render(scene) != render(Scene((), "day"))).any(-1)
    named = np.kron(grid(scene)[0].numpy() != NOTHING, np.ones((PIXELS, PIXELS), bool))
    assert named.shape == (SIZE, SIZE) and (changed & named).sum() > 0.9 * changed.sum()
    assert (changed & ~np.roll(named, SIZE // 2, axis=0)).sum() > 0.5 * changed.sum(), "control: the grid upside down"


def test_poses_come_in_standard_units():
    rng = np.random.default_rng(0)
    scenes = [Scene((Placed("cup", "blue", "left", random_pose(rng)),), "day") for _ in range(2000)]
    _, _, poses = what_is_where(scenes)
    middle = poses.view(-1, SIDE, SIDE, 4)[:, SIDE // 2, 2]
    torch.testing.assert_close(middle.mean(0), torch.zeros(4), atol=0.1, rtol=0)
    torch.testing.assert_close(middle.std(0), torch.ones(4), atol=0.1, rtol=0)
    assert grid(Scene((Placed("cup", "blue", "left", Pose(turn=7.0)),), "day"))[2][4, 2, 3] == pytest.approx(1.0)


def test_the_head_learns_from_states_that_tell_and_not_from_states_that_do_not():
    """States that hold the answer are read down to little loss; shuffled over the scenes, they are not."""
    rng = np.random.default_rng(0)
    scenes = [
        posed(
            Scene(
                (Placed(str(rng.choice(OBJECTS)), str(rng.choice(list(COLOURS))), "left"),),
                str(rng.choice(list(BACKGROUNDS))),
            ),
            rng,
        )
        for _ in range(64)
    ]
    names, colours, poses = what_is_where(scenes)
    states = torch.cat(
        [
            nn.functional.one_hot(names, 1 + len(OBJECTS)).float(),
            nn.functional.one_hot(colours, 1 + len(COLOURS)).float(),
            poses,
        ],
        dim=-1,
    )
    assert _learnt(states, scenes) < 0.1 < 0.3 < _learnt(states[torch.randperm(64)], scenes)


def _learnt(states, scenes):
    torch.manual_seed(0)
    head = Naming(states.shape[-1])
    optimizer = torch.optim.Adam(head.parameters(), lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        loss = head.loss(states, scenes)
        loss.backward()
        optimizer.step()
    return float(loss.detach())
