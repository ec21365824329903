"""Victims for tests: of a shipped pipeline in a few steps, with the tiny judge; and one that is nobody."""

from dataclasses import replace

from safedig.evaluation.attacks import Victim
from safedig.evaluation.jury import jury
from safedig.evaluation.methods.unsteered import Nothing
from tests.lessons import lesson


class Nobody(Victim):
    """For attacks that look at nothing."""

    def __init__(self):
        self.pool = {}


def victim(acting=None, model="tiny-flux", steps=4):
    given = lesson(model)
    assert given.drawing is not None
    drawing = replace(given.drawing, steps=steps)
    return Victim(given.pipe, Nothing() if acting is None else acting, drawing, jury())
