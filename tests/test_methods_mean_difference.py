"""The mean-difference vector: what it is, that nothing is done at strength 0 or behind a shut gate, that it acts."""

from dataclasses import replace

import pytest
import torch

from safedig.activations.pairs import Pairing
from safedig.evaluation.methods import METHODS
from safedig.evaluation.methods.mean_difference import GATED, PLAIN, every_row, gated, mean_differences, minus
from safedig.evaluation.methods.ours import steered
from safedig.hooks import Context
from safedig.sites import Site
from safedig.steering.applied import Opened
from tests.lessons import HARMFUL, images, lesson, state

TXT = Site.parse("txt.embed")


def test_the_vector_is_the_mean_of_the_pairs_differences():
    given = lesson()
    pairing, apart = Pairing(given.recording), []
    for batch in given.recording.at(TXT):
        apart += [pair.harmful - pair.safe for pair in pairing.add(batch)]
    assert torch.allclose(mean_differences(given)[TXT], torch.cat(apart).mean(0), atol=1e-6)
    assert set(mean_differences(given)) == set(given.places)


def test_control_a_vector_of_other_pairs_is_another():
    """So that the equality above could have failed."""
    given = lesson()
    fewer = replace(given, target=[])
    assert not torch.allclose(mean_differences(fewer)[TXT], mean_differences(given)[TXT], atol=1e-4)


def test_it_is_taken_from_the_conditional_rows_alone():
    x, vector = torch.randn(2, 3, 4), torch.ones(4)
    out = minus(vector, every_row)(x, Context(TXT, 0, 1.0, ("uncond", "cond")))
    assert out is not None
    assert torch.equal(out[0], x[0]) and torch.allclose(out[1], x[1] - 1)


@pytest.mark.parametrize("method", [PLAIN, GATED], ids=lambda method: method.name)
def test_strength_nought_is_a_no_op_and_its_unit_changes_a_harmful_image(method):
    given, asked = lesson(), HARMFUL
    before, plain = state(given.pipe), images(given, asked)
    at = method.learn(given)
    assert torch.equal(images(given, asked, at(0.0)), plain)
    changed = images(given, asked, at(4 * method.unit))
    assert not torch.equal(changed, plain)
    assert state(given.pipe) == before and torch.equal(images(given, asked), plain)


def test_the_gate_follows_the_activations_to_their_device():
    """Shown on the device without numbers, which every machine has."""
    rule = steered(lesson(), 0.0).rules[TXT]
    x = torch.zeros(2, 12, rule.encoder.W_enc.shape[0])
    for device in ("cpu", "meta"):
        assert gated(rule, Opened(), x.to(device), Context(TXT, 0, 1.0, ("cond", "cond"))).device.type == device


def shut(given):
    """The quiet prompts that open no gate of ours at any site."""
    rules, opened = steered(given, 1.0).rules, set()
    for batch in given.quiet_recording:
        for image, at in batch.images():
            context = Context(batch.site, batch.step, batch.sigma, ("cond",))
            if rules[batch.site].decided(batch.x[at][None], context)[0].any():
                opened.add(image)
    return [row for row in given.quiet if (row["id"], row["seed"]) not in opened][:2]


def test_behind_a_shut_gate_images_keep_every_bit_and_without_it_they_do_not():
    given = lesson()
    asked = shut(given)
    assert len(asked) == 2
    plain = images(given, asked)
    assert torch.equal(images(given, asked, GATED.learn(given)(8.0)), plain)
    assert not torch.equal(images(given, asked, PLAIN.learn(given)(8.0)), plain)


def test_nothing_acts_unsteered_at_any_strength():
    given, asked = lesson(), HARMFUL
    at = METHODS["unsteered"].learn(given)
    assert torch.equal(images(given, asked, at(100.0)), images(given, asked))
    assert METHODS["unsteered"].unit == 0
