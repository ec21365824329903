"""Unknown words side by side become one thing, and nothing else of a text changes for it."""

from dataclasses import replace

import pytest
import torch

from safedig.config import UsageError
from safedig.features import Counterparts
from safedig.features.counterparts import Known
from safedig.hooks import Context
from safedig.sites import Site
from safedig.steering.edits import Replace, from_json, to_json
from safedig.steering.gate import Gate
from safedig.steering.material import Material
from safedig.steering.phrases import as_one
from safedig.steering.rule import Rule
from safedig.steering.steering import Steering
from tests.phrases import D_IN, FLAME, SITE, features, sae

D, TOKENS = 4, 6
STAND_INS = torch.tensor([[9.0, 0.0, 0.0, 0.0], [0.0, 9.0, 0.0, 0.0], [0.0, 7.0, 0.0, 0.0]])
ADDED = torch.diag(torch.tensor([1.0, 7.0, 7.0, 90.0]))[:3]  # half of the median: 3.5
HARM = Known(STAND_INS + ADDED, ADDED)


def text(seed=0, images=1):
    return torch.randn(images, TOKENS, D, generator=torch.Generator().manual_seed(seed))


def moved(*norms):
    """A delta with so much along the second axis at each token."""
    return torch.tensor(norms)[None, :, None] * torch.eye(D)[1]


def unknown(*places):
    return torch.tensor([[place in places for place in range(TOKENS)]])


# ---- one phrase


def test_the_strongest_word_of_a_phrase_becomes_the_nearest_stand_in_and_the_others_padding():
    a, delta = text(), moved(0.0, 4.0, 6.0, 3.6, 0.0, 0.0)
    a[0, 2] = torch.tensor([0.0, 2.0, 0.0, 0.0])  # with 6 more it stands between two stand-ins, nearer to neither of 9
    out = a + as_one(a, delta, unknown(1, 2, 3), Known(HARM.tokens[:2], ADDED[:2]), 1)
    torch.testing.assert_close(out[0, 2], STAND_INS[1])
    for place in (1, 3):
        torch.testing.assert_close(out[0, place], a[0, -1])
    assert torch.equal(out[0, [0, 4, 5]], a[0, [0, 4, 5]])


def test_of_several_stand_ins_the_mean_is_taken_and_of_too_few_all():
    a, delta = torch.zeros(1, TOKENS, D), moved(0.0, 8.0, 6.0, 0.0, 0.0, 0.0)
    for nearest, mean in ((1, 0.5 * (STAND_INS[1] + STAND_INS[2])), (2, STAND_INS[1:].mean(0)), (9, STAND_INS.mean(0))):
        out = as_one(a, delta, unknown(1, 2), HARM, nearest)[0, 1]
        if nearest == 1:  # 8 is as far from 7 as from 9
            assert any(torch.allclose(out, one) for one in STAND_INS[1:])
        else:
            torch.testing.assert_close(out, mean)


def test_padding_is_what_the_last_token_becomes():
    a, delta = text(), moved(0.0, 4.0, 6.0, 0.0, 0.0, 1.0)
    out = a + as_one(a, delta, unknown(1, 2), HARM, 1)
    torch.testing.assert_close(out[0, 1], a[0, -1] + torch.eye(D)[1])


@pytest.mark.parametrize(
    ("norms", "strange"),
    [
        ((0.0, 4.0, 0.0, 0.0, 0.0, 0.0), unknown(1)),
        ((0.0, 4.0, 6.0, 0.0, 0.0, 0.0), unknown(1)),
        ((0.0, 4.0, 0.0, 4.0, 0.0, 0.0), unknown(1, 3)),
        ((0.0, 4.0, 3.4, 0.0, 0.0, 0.0), unknown(1, 2)),
        ((8.1, 3.4, 3.4, 0.0, 0.0, 0.0), unknown(1, 2)),
        ((0.0, 0.0, 0.0, 0.0, 4.0, 4.0), unknown(4, 5)),
        ((0.0, 0.0, 0.0, 0.0, 0.0, 0.0), unknown(1, 2)),
    ],
    ids=["one word", "a known neighbour", "apart", "a weak one beside it", "both weak", "no padding", "no change"],
)
def test_what_is_no_phrase_keeps_every_bit(norms, strange):
    delta = moved(*norms) * -1.0  # with −0.0 among them
    assert same_bits(as_one(text(), delta, strange, HARM, 1), delta)


def test_control_half_as_strong_as_known_harm_is_a_part_of_it():
    delta = moved(9.0, 4.0, 3.6, 0.0, 0.0, 0.0)
    assert not same_bits(as_one(text(), delta, unknown(1, 2), HARM, 1), delta)


def test_two_phrases_of_one_text_are_two_things():
    a, delta = torch.zeros(1, 8, D), torch.zeros(1, 8, D)
    delta[0, [0, 1], 1], delta[0, [3, 4, 5], 0] = torch.tensor([5.0, 8.9]), torch.tensor([5.0, 6.0, 8.0])
    strange = torch.tensor([[True, True, False, True, True, True, False, False]])
    out = as_one(a, delta, strange, HARM, 1)[0]
    assert torch.equal(out[1], STAND_INS[1]) and torch.equal(out[5], STAND_INS[0])
    assert not out[[0, 2, 3, 4, 6, 7]].any()


def test_each_image_of_a_batch_is_what_it_is_alone():
    a, delta = text(3, images=5), 4 * text(4, images=5)
    strange = torch.rand(5, TOKENS, generator=torch.Generator().manual_seed(5)) < 0.7
    together = as_one(a, delta, strange, HARM, 1)
    alone = [as_one(*(part[[at]] for part in (a, delta, strange)), HARM, 1) for at in range(5)]
    assert torch.equal(together, torch.cat(alone)) and not torch.equal(together, delta)


def test_where_no_harm_is_known_nothing_is_a_phrase():
    delta = moved(0.0, 4.0, 6.0, 0.0, 0.0, 0.0)
    assert same_bits(as_one(text(), delta, unknown(1, 2), Known(STAND_INS[:0], STAND_INS[:0]), 1), delta)


# ---- as an edit


def known():
    """Of one harmful token, far from all others, whose twin shows 1 at the second place, and of four harmless ones."""
    eye = torch.eye(D_IN)
    tokens = torch.cat([20 * eye[:1], eye[2:6]])
    delta = torch.cat([20 * eye[:1] - eye[1:2], torch.zeros(4, D_IN)])
    return Counterparts(Known(tokens, delta), Known(torch.zeros(0, 1), torch.zeros(0, 1)), torch.tensor(0.5))


def rule(strength=1.0, phrases=True):
    edit = Replace(strength, "counterparts", 1, 2.0, phrases)
    rows = torch.zeros(D_IN, D_IN)
    rows[FLAME, FLAME] = 0.5
    found = features()
    material = replace(Material.of(SITE, sae(), found, edit.needs, counterparts=known()), directions=rows)
    return Rule(found.index, sae().encoder.columns(found.index), material, Gate(-9.0, "image"), (edit,))


def prompt(*strange):
    """Harmless tokens, and such that harm is heard of, like none that is known."""
    x = torch.eye(D_IN)[[2, 3, 4, 5, 2, 3]].clone()
    for place, height in strange:
        x[place] = height * torch.eye(D_IN)[FLAME]
    return x[None]


def acted(one, x):
    return one(x, Context(SITE, 0, 0.5, ("cond",) * len(x)))[0]


def test_an_unknown_phrase_becomes_the_stand_in_and_each_word_of_it_would_have_been_repelled():
    x = prompt((1, 30.0), (2, 40.0))
    out, before = acted(rule(), x)[0], acted(rule(phrases=False), x)[0]
    torch.testing.assert_close(out[2], torch.eye(D_IN)[1])
    torch.testing.assert_close(out[1], x[0, -1])
    assert same_bits(out[[0, 3, 4, 5]], x[0, [0, 3, 4, 5]])
    for place in (1, 2):
        torch.testing.assert_close(before[place], torch.zeros(D_IN))


def test_a_single_unknown_word_is_repelled_as_before_to_the_bit():
    for x in (prompt((1, 30.0)), prompt((1, 30.0), (3, 40.0)), prompt()):
        assert same_bits(acted(rule(), x), acted(rule(phrases=False), x))


def test_words_that_are_moved_less_than_harm_moves_are_repelled_each():
    """As in a benign prompt that the gate lets through by mistake."""
    x = prompt((1, 3.0), (2, 4.0))
    assert same_bits(acted(rule(), x), acted(rule(phrases=False), x)) and not same_bits(acted(rule(), x), x)


def test_a_known_word_beside_an_unknown_one_is_looked_up_and_no_part_of_a_phrase():
    x = prompt((2, 30.0))
    x[0, 1] = 20 * torch.eye(D_IN)[0]  # moved by 20, the other by 30: both are strong
    out = acted(rule(), x)
    torch.testing.assert_close(out[0, 1], torch.eye(D_IN)[1])
    assert same_bits(out, acted(rule(phrases=False), x))


def test_strength_is_how_far_a_phrase_goes_towards_it():
    x = prompt((1, 30.0), (2, 40.0))
    whole, half = acted(rule(), x), acted(rule(0.5), x)
    torch.testing.assert_close(half, (x + whole) / 2)
    assert same_bits(acted(rule(0.0), x), x)


def test_a_phrase_is_written_as_json_and_what_was_written_before_has_none():
    edit = Replace(by="counterparts", unknown=2.0, phrases=True)
    assert from_json(to_json(edit)) == edit
    older = {key: value for key, value in to_json(edit).items() if key != "phrases"}
    assert from_json(older) == replace(edit, phrases=False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Replace(by="counterparts", phrases=True),
            "a phrase is made of unknown tokens, so give unknown above 0",
        ),
        (lambda: Replace(phrases=True), "a phrase is made of unknown tokens"),
        (lambda: steering("transformer_blocks.1.img.resid_post"), "the tokens of an image are no words"),
        (lambda: steering("single_transformer_blocks.0.joint.resid_post"), "it at sites of the stream txt"),
    ],
)
def test_phrases_that_make_no_sense_are_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make()


def test_control_sites_of_text_and_of_a_single_token_take_them():
    edit = Replace(by="counterparts", unknown=2.0, phrases=True)
    assert steering("txt.embed").rules[SITE].edits == steering("pooled.embed").rules[Site.parse("pooled.embed")].edits
    assert steering("txt.embed").rules[SITE].edits == (edit,)
    one = prompt((1, 30.0))[:, 1:2]
    assert same_bits(acted(rule(), one), acted(rule(phrases=False), one)) and not same_bits(acted(rule(), one), one)


def steering(site):
    made = {Site.parse(site): sae()}
    edit = Replace(by="counterparts", unknown=2.0, phrases=True)
    where = Site.parse(site)
    return Steering(made, {where: features()}, [edit], counterparts={where: known()}, scope="image")


def same_bits(one, other):
    return torch.equal(one.contiguous().view(torch.int32), other.contiguous().view(torch.int32))
