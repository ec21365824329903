"""A dose adds up what single tokens say, and hears two features that meet only from tokens that hold one of them."""

from dataclasses import replace

import pytest
import torch

from safedig.features import Dose, Features, load_features, save_features
from safedig.features.heights import Heights
from tests.phrases import BOTTLE, CAR, CUP, GUN, SITE, TREE, features, known_dose, recording, sae, tokens, told

PHRASES = ("a gun", "a flame", "a bottle", "a car", "a bottle a car", "a gun a bottle", "a cup", "a tree")


def codes(*phrases):
    return sae().encode(torch.stack([tokens({"prompt": phrase, "seed": 0}, 0.0) for phrase in phrases]))


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- without pairs


def test_without_pairs_it_is_the_weighted_sum_of_the_codes():
    z, weights = noise(3, 5, 12).relu(), noise(12, seed=1)
    dose = Dose.of(weights)
    torch.testing.assert_close(dose(z), torch.einsum("btf,f->bt", z, weights))
    assert torch.equal(dose(z), dose.own(z)) and not dose.together(z).any()


def test_of_ones_it_is_the_plain_sum_that_the_gate_read_before():
    z = noise(3, 5, 12).relu()
    torch.testing.assert_close(Dose.of(torch.ones(12))(z), z.sum(-1))


def test_a_feature_may_speak_against_harm():
    z = torch.tensor([[[1.0, 0.0], [1.0, 1.0]]])
    assert Dose.of(torch.tensor([1.0, -1.0]))(z).tolist() == [[1.0, 0.0]]


# ---- pairs


def test_a_pair_speaks_only_where_both_fire_in_one_image():
    together = dict(zip(PHRASES, (known_dose().together(codes(*PHRASES)) > 0).tolist(), strict=True))
    assert [phrase for phrase, heard in together.items() if heard] == ["a bottle a car"]
    apart = codes("a bottle", "a car")
    assert not (known_dose().together(apart) > 0).any(), "two images of a batch do not meet"
    assert (known_dose().together(apart.flatten(0, 1)[None]) > 0).all(), "the control: as one image they do"


def test_a_pair_speaks_through_the_tokens_that_hold_one_of_it_and_through_no_other():
    z = codes("a bottle a car")
    assert (known_dose()(z) > 0).tolist() == [[False, True, False, True, False, False]]
    assert not (known_dose().own(z) > 0).any(), "the control: by themselves they say nothing"


def test_a_feature_outside_the_pairs_does_not_make_a_token_hold_one():
    dose = replace(known_dose(), pairs=torch.tensor([[BOTTLE, CUP], [CUP, CAR]]), pair_weights=torch.ones(2))
    held = (dose(codes("a bottle a cup a gun")) > dose.own(codes("a bottle a cup a gun"))).tolist()
    assert held == [[False, True, False, True, False, False]]


def test_of_a_tokens_own_dose_and_that_of_the_pairs_the_larger_counts():
    z = codes("a gun a bottle a car")
    own, together = known_dose().own(z), known_dose().together(z)
    assert known_dose()(z)[0, 1] == own[0, 1] and known_dose()(z)[0, 3] == together[0] > own[0, 3]
    louder = replace(known_dose(), pair_bias=torch.tensor(-9.0))
    assert torch.equal(louder(z), louder.own(z)), "pairs take nothing away"


def test_the_lower_of_the_two_peaks_counts_in_the_units_of_each():
    dose = replace(known_dose(), units=torch.full((12,), 1.0).index_fill(0, torch.tensor([CAR]), 4.0))
    peak = torch.zeros(2, 12)
    peak[0, [BOTTLE, CAR]] = torch.tensor([0.5, 8.0])
    peak[1, [BOTTLE, CAR]] = torch.tensor([3.0, 1.0])
    assert dose.meeting(peak).tolist() == [[0.5], [0.25]]
    assert known_dose().meeting(peak).tolist() == [[0.5], [1.0]]


def test_the_peaks_of_a_pair_may_be_of_different_tokens_and_their_order_does_not_matter():
    z = codes("a bottle a car")
    shuffled = z[:, torch.randperm(6, generator=torch.Generator().manual_seed(0))]
    assert torch.equal(known_dose().together(z), known_dose().together(shuffled))
    assert torch.equal(known_dose()(z).sort().values, known_dose()(shuffled).sort().values)


# ---- what is asked of it


def test_alone_says_of_each_image_whether_a_single_token_tells_of_harm():
    alone = dict(zip(PHRASES, known_dose().alone(codes(*PHRASES)).tolist(), strict=True))
    assert [phrase for phrase, heard in alone.items() if heard] == ["a gun", "a flame", "a gun a bottle"]
    heard = (known_dose()(codes("a bottle a car")) > 0).any()
    assert heard and not alone["a bottle a car"], "heard, but by pairs only"


def test_only_pairs_says_it_of_images_in_which_they_speak_and_no_token_does():
    phrases = (*PHRASES, "a gun a bottle a car")
    only = dict(zip(phrases, known_dose().only_pairs(codes(*phrases)).tolist(), strict=True))
    assert [phrase for phrase, heard in only.items() if heard] == ["a bottle a car"]
    assert not Dose.of(-torch.ones(12)).only_pairs(codes(*phrases)).any(), "and of none where there are no pairs"


@pytest.mark.parametrize(("own", "together"), [(0.25, 0.125), (-1.5, 0.0), (0.0, 3.0)])
def test_lowered_it_is_less_by_just_so_much(own, together):
    z = codes(*PHRASES)
    dose = known_dose().lowered(own, together)
    assert torch.equal(dose.own(z), known_dose().own(z) - own)
    assert torch.equal(dose.together(z), known_dose().together(z) - together)
    assert torch.equal(dose.lowered(-own, -together)(z), known_dose()(z))


@pytest.mark.parametrize("phrase", ["a gun", "a bottle a car"])
def test_what_was_as_high_as_it_is_lowered_by_is_not_above_zero_and_what_was_higher_is(phrase):
    """So that a gate above 0 stays closed for the very image that has set it. With random weights, to the bit."""
    one = Dose.of(noise(12, seed=3))
    z = sae().encode(torch.stack([tokens({"prompt": phrase, "seed": seed}, 0.3) for seed in range(50)]))
    heights = one(z).amax(1)
    limit = heights.sort().values[40].item()
    assert ((one.lowered(limit)(z) > 0).any(1) == (heights > limit)).all() and (heights > limit).sum() == 9


def test_heights_are_the_highest_of_any_token_in_any_step_as_a_whole_and_by_part():
    given = recording([row for phrase in PHRASES for row in told(phrase)], noise=0.05, steps=2)
    measured = Heights(sae(), torch.arange(12), known_dose())
    for batch in given:
        for image, rows in batch.images():
            measured.add(image, batch.x[rows])
    for row in given.prompts:
        steps = sae().encode(torch.stack([tokens(row, 0.05, step) for step in (0, 1)]))
        image = (row["id"], 0)
        assert measured.of[image] == pytest.approx(known_dose()(steps).max().item(), abs=1e-6)
        assert measured.own[image] == pytest.approx(known_dose().own(steps).max().item(), abs=1e-6)
        assert measured.together[image] == pytest.approx(known_dose().together(steps).max().item(), abs=1e-6)
    assert measured.of["a bottle a car-0", 0] > measured.own["a bottle a car-0", 0]


def test_without_a_dose_heights_are_those_of_the_sum():
    plain, ones = Heights(sae(), torch.tensor([GUN, TREE])), Heights(sae(), torch.tensor([GUN, TREE]), None)
    for one in (plain, ones):
        one.add(("x", 0), tokens({"prompt": "a gun a tree", "seed": 0}, 0.0))
    assert plain.of == ones.of == {("x", 0): 1.0}


# ---- on disk


@pytest.mark.parametrize("dose", [known_dose(), Dose.of(torch.ones(12)), known_dose().lowered(0.3, 0.1), None])
def test_saving_and_loading_changes_no_bit_of_it(tmp_path, dose):
    """Also where it was not calibrated, and its tensors are those that the features rank by."""
    before = replace(features(), dose=dose)
    save_features({SITE: before}, tmp_path)
    after = load_features(tmp_path)[SITE].dose
    assert (after is None) == (dose is None)
    if dose is not None and after is not None:
        assert vars(after).keys() == vars(dose).keys()
        assert all(torch.equal(vars(after)[name], tensor) for name, tensor in vars(dose).items())
        assert all(vars(after)[name].dtype == tensor.dtype for name, tensor in vars(dose).items())
        z = codes(*PHRASES)
        assert torch.equal(after(z), dose(z)) and torch.equal(after.alone(z), dose.alone(z))


def test_features_that_were_never_weighed_are_read_without_one(tmp_path):
    ones = torch.ones(2)
    save_features({SITE: Features(torch.tensor([3, 1]), 0.5, ones, ones.clone())}, tmp_path)
    assert load_features(tmp_path)[SITE].dose is None
