"""Whoever listens to a method or amends what it is given leaves no trace, in whatever order they come and go."""

from contextlib import ExitStack
from itertools import permutations

import pytest
import torch

from safedig.shadow import amend, listen


class Thing:
    def __init__(self):
        self.given = []

    def step(self, output, at=0, *, sample=1.0):
        self.given.append((output, at, sample))
        return output


def twice(given):
    return {"output": 2 * given["output"]}


def plus_one(given):
    return {"output": given["output"] + 1}


def test_what_is_amended_reaches_the_method_by_whatever_way_the_argument_was_given():
    thing = Thing()
    with amend(thing, "step", twice):
        assert thing.step(3) == thing.step(output=3) == thing.step(3, 5, sample=7.0) == 6
    assert thing.given == [(6, 0, 1.0), (6, 0, 1.0), (6, 5, 7.0)]
    assert thing.step(3) == 3


@pytest.mark.parametrize("nothing", [None, {}])
def test_without_a_change_the_very_same_objects_are_passed(nothing):
    thing, output, seen = Thing(), torch.ones(2), []
    with amend(thing, "step", lambda given: seen.append(given["output"]) or nothing):
        assert thing.step(output) is output
    assert thing.given[0][0] is output and seen[0] is output


def test_each_amender_sees_what_those_before_it_have_made():
    thing = Thing()
    with amend(thing, "step", twice), amend(thing, "step", plus_one):
        assert thing.step(3) == 7
    with amend(thing, "step", plus_one), amend(thing, "step", twice):
        assert thing.step(3) == 8


def test_listeners_hear_what_the_method_made_of_the_amended_value():
    thing, heard = Thing(), []
    with listen(thing, "step", after=heard.append), amend(thing, "step", twice):
        thing.step(3)
    assert heard == [6]


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_listeners_and_amenders_leave_in_any_order_and_the_rest_go_on(order):
    thing, heard = Thing(), []
    stacks = [ExitStack() for _ in range(3)]
    stacks[0].enter_context(amend(thing, "step", twice))
    stacks[1].enter_context(listen(thing, "step", after=heard.append))
    stacks[2].enter_context(amend(thing, "step", plus_one))
    present = {0, 1, 2}
    for leaving in order:
        stacks[leaving].close()
        present.remove(leaving)
        count = len(heard)
        assert thing.step(3) == (3 * (1 + (0 in present))) + (2 in present)
        assert len(heard) == count + (1 in present)
    assert "step" not in vars(thing)


def test_after_an_exception_nothing_is_left_and_what_was_the_objects_own_is_its_own_again():
    thing = Thing()
    own = thing.step = lambda output: output * 10

    def fail(_):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), amend(thing, "step", fail):
        thing.step(1)
    assert vars(thing)["step"] is own
    with amend(thing, "step", twice):
        assert thing.step(1) == 20


def test_someone_elses_wrapper_inside_or_outside_keeps_working():
    thing = Thing()
    with amend(thing, "step", twice):
        inner = thing.step
        thing.step = lambda *args, **kwargs: -inner(*args, **kwargs)
        assert thing.step(3) == -6
    assert thing.step(3) == -3  # its wrapper is not ours to take off
