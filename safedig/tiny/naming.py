"""A help while training: a linear head that tells, under each image token halfway through, what is to be drawn there.

Aligning inner states with what a picture shows speeds the training of a Diffusion Transformer up (REPA, arXiv
2410.06940), and is best stopped before its end (HASTE, arXiv 2505.16792). Here the scene itself says what it shows,
so no second network is needed. The head is thrown away afterwards.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from .concepts import COLOURS, OBJECTS
from .models import SCENE_TOKENS
from .scenes import SIZE, Pose, Scene, bounds

SIDE = int(SCENE_TOKENS**0.5)
PIXELS = SIZE // SIDE  # of a token
NOTHING = 0  # class of a token without an object
_CENTRE, _SPREAD = torch.tensor([0.0, 0.0, 12.25, 0.0]), torch.tensor([0.9, 2.9, 0.7, 7.0])  # of `scenes.random_pose`


class Naming(nn.Module):
    """Object, colour and pose under each token, from the token's state."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.sizes = (1 + len(OBJECTS), 1 + len(COLOURS), 4)
        self.read = nn.Linear(width, sum(self.sizes))

    def loss(self, states: Float[Tensor, "n tokens width"], scenes: Sequence[Scene]) -> Tensor:
        """Cross-entropy of object and colour under every token, and squared error of the pose under the objects'."""
        names, colours, poses = (where.to(states.device) for where in what_is_where(scenes))
        name, colour, pose = self.read(states).split(self.sizes, dim=-1)
        there = names != NOTHING
        return (
            F.cross_entropy(name.flatten(0, 1), names.flatten())
            + F.cross_entropy(colour.flatten(0, 1), colours.flatten())
            + ((pose - poses).square().mean(-1) * there).mean()
        )


def what_is_where(
    scenes: Sequence[Scene],
) -> tuple[Int[Tensor, "n tokens"], Int[Tensor, "n tokens"], Float[Tensor, "n tokens 4"]]:
    """Under each image token, row by row: object and colour (0: none), and the object's pose in standard units."""
    names = torch.full((len(scenes), SIDE, SIDE), NOTHING)
    colours, poses = names.clone(), torch.zeros(*names.shape, 4)
    for i, scene in enumerate(scenes):
        for placed in scene.objects:
            left, top, right, bottom = (round(edge / PIXELS) for edge in bounds(placed))
            here = (i, slice(top, bottom), slice(left, right))
            names[here] = 1 + OBJECTS.index(placed.name)
            colours[here] = 1 + list(COLOURS).index(placed.colour)
            poses[here] = _standard(placed.pose)
    return names.flatten(1), colours.flatten(1), poses.flatten(1, 2)


def _standard(pose: Pose) -> Float[Tensor, " 4"]:
    return (torch.tensor([pose.dx, pose.dy, pose.radius, pose.turn]) - _CENTRE) / _SPREAD
