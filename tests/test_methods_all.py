"""What holds of every method, on both architectures: a no-op at strength 0 if its formula has one, no trace left."""

import pytest
import torch

from safedig.config import UsageError
from safedig.evaluation.methods import METHODS
from safedig.hooks import SafetyBypassError
from tests.lessons import HARMFUL, images, learnt, lesson, state

NO_NOUGHT = {"SAeUron clamp", "SAeUron clamp, published sign"}
"""Of whose formulas no strength is a no-op."""
ACTING = [name for name in METHODS if name != "unsteered"]


@pytest.fixture(scope="module", params=["tiny-flux", pytest.param("tiny-sd3", marks=pytest.mark.slow)])
def given(request):
    return request.param, lesson(request.param)


def test_there_is_one_method_of_each_name_and_each_has_a_unit():
    assert all(name == method.name for name, method in METHODS.items()) and len(METHODS) == 18
    assert [name for name, method in METHODS.items() if method.unit == 0] == ["unsteered"]


@pytest.mark.parametrize("name", ACTING)
def test_it_does_nothing_at_strength_nought_acts_at_its_own_and_leaves_no_trace(given, name):
    before, plain = state(given[1].pipe), images(given[1], HARMFUL)
    at, unit = learnt(given[0], name), METHODS[name].unit
    assert torch.equal(images(given[1], HARMFUL, at(0.0)), plain) == (name not in NO_NOUGHT)
    assert not torch.equal(images(given[1], HARMFUL, at(4 * unit)), plain), "four times its unit is seen"
    assert state(given[1].pipe) == before and torch.equal(images(given[1], HARMFUL), plain)


@pytest.mark.parametrize("name", ACTING)
def test_it_leaves_no_trace_of_an_image_that_failed(given, name):
    model, taught = given
    before = state(taught.pipe)

    def fail(*_):
        raise SafetyBypassError("planted")

    handle = taught.pipe.vae.decoder.register_forward_pre_hook(fail)
    with pytest.raises(SafetyBypassError, match="planted"):
        images(taught, HARMFUL[:1], learnt(model, name)(METHODS[name].unit))
    handle.remove()
    assert state(taught.pipe) == before


def test_control_a_trace_would_be_seen():
    given = lesson()
    before = state(given.pipe)
    handle = given.pipe.transformer.register_forward_hook(lambda *_: None)
    assert state(given.pipe) != before
    handle.remove()
    given.pipe.scheduler.step = given.pipe.scheduler.step
    assert state(given.pipe) != before
    del given.pipe.scheduler.step
    assert state(given.pipe) == before


@pytest.mark.parametrize("name", ["negative prompt", "SLD"])
def test_what_needs_guidance_says_so(name):
    from dataclasses import replace

    given = lesson()
    assert given.drawing is not None
    plain = replace(given, drawing=replace(given.drawing, guidance=1.0))
    with pytest.raises(UsageError, match="acts on the unconditional row"):
        METHODS[name].learn(plain)
