"""Published line and any-of-10 rates give the ICC, design effect and standard errors known for them; power likewise."""

import math

import numpy as np
import pytest

from safedig.config import UsageError
from safedig.evaluation.beta_binomial import BetaBinomial, from_rates
from safedig.evaluation.intervals import clustered_rate, rate
from safedig.evaluation.power import detectable, per_arm, prompts_per_arm
from safedig.evaluation.resampling import bounds, redrawn

SAFEDIG = [  # line %, any of 10 %, ICC, design effect, SE at 931 × 10 in pp, the same as if images were independent
    (16.49, 44.56, 0.42, 4.8, 0.84, 0.38),
    (7.98, 30.29, 0.29, 3.6, 0.53, 0.28),
    (29.63, 68.00, 0.40, 4.6, 1.02, 0.47),
    (16.23, 44.71, 0.41, 4.7, 0.83, 0.38),
]


@pytest.mark.parametrize(("line", "any_of", "icc", "effect", "se", "naive"), SAFEDIG)
def test_the_published_rates_give_the_known_icc_design_effect_and_errors(line, any_of, icc, effect, se, naive):
    found = from_rates(line / 100, any_of / 100, images=10)
    assert round(found.icc, 2) == icc
    assert round(found.design_effect(10), 1) == effect
    assert round(100 * found.standard_error(931, 10), 2) == se
    assert round(100 * BetaBinomial(line / 100, 0.0).standard_error(931, 10), 2) == naive
    assert found.any_of(10) == pytest.approx(any_of / 100) and found.any_of(1) == pytest.approx(line / 100)


def test_any_of_1_4_and_10_of_flux_and_what_independent_images_would_give():
    flux = from_rates(0.165, 0.446)  # to one digit, as printed
    assert [round(100 * flux.any_of(n), 1) for n in (1, 4, 10)] == [16.5, 33.3, 44.6]
    assert 100 * from_rates(0.1649, 0.4456).any_of(4) == pytest.approx(33.25, abs=0.005)
    assert round(100 * BetaBinomial(0.1649, 0.0).any_of(10), 1) == 83.5


def test_variance_per_prompt_at_icc_0_4():
    assert [round(BetaBinomial(0.2, 0.4).variance_per_prompt(n), 2) for n in (1, 4, 5, 10)] == [1, 0.55, 0.52, 0.46]


def test_the_ends_are_independence_and_full_agreement():
    assert from_rates(0.2, 1 - 0.8**10).icc == 0.0
    assert from_rates(0.2, 0.2).icc == 1.0 and BetaBinomial(0.2, 1.0).any_of(10) == 0.2
    for icc in (0.01, 0.3, 0.9):
        assert from_rates(0.2, BetaBinomial(0.2, icc).any_of(7), images=7).icc == pytest.approx(icc)


@pytest.mark.parametrize(("line", "any_of", "images"), [(0.2, 0.1, 10), (0.2, 0.95, 10), (1.2, 0.9, 10), (0.2, 0.3, 1)])
def test_rates_that_no_prompts_can_have_are_refused(line, any_of, images):
    with pytest.raises(UsageError, match=r"line=|any_of=|images="):
        from_rates(line, any_of, images)


@pytest.mark.parametrize(
    ("before", "after", "n"), [(45, 30, 163), (30, 25, 1251), (10, 7, 1356), (5, 3, 1506), (2, 1, 2319)]
)
def test_power_reproduces_the_known_numbers_per_arm(before, after, n):
    assert per_arm(before / 100, after / 100) == per_arm(after / 100, before / 100) == n


def test_so_many_images_do_find_the_difference_four_times_in_five():
    rng, n = np.random.default_rng(0), per_arm(0.45, 0.30)
    one, other = rng.binomial(n, 0.45, 20_000) / n, rng.binomial(n, 0.30, 20_000) / n
    mean = (one + other) / 2
    found = np.abs(one - other) > 1.959964 * np.sqrt(2 * mean * (1 - mean) / n)
    assert found.mean() == pytest.approx(0.80, abs=0.015)
    assert per_arm(0.45, 0.30, power=0.9) > n


def test_prompts_of_several_images_are_worth_less_than_their_images_and_more_than_one():
    one, ten = per_arm(0.45, 0.30), prompts_per_arm(0.45, 0.30, images=10, icc=0.4)
    assert ten < one < 10 * ten and ten == math.ceil(162.334 * 0.46)
    assert prompts_per_arm(0.45, 0.30, images=1, icc=0.4) == one


def test_what_can_be_detected_is_what_the_number_was_for():
    assert detectable(0.45, per_arm(0.45, 0.30)) == pytest.approx(0.30, abs=5e-4)
    assert detectable(0.02, 20) is None
    with pytest.raises(UsageError, match="two different fractions"):
        per_arm(0.3, 0.3)


# ---- coverage


def many(p, icc, simulations, rng, clusters=60, size=10):
    """Hits a cluster [simulations, clusters]."""
    spread = (1 - icc) / icc
    return rng.binomial(size, rng.beta(p * spread, (1 - p) * spread, size=(simulations, clusters)))


def covered(k, p, size=10, draws=2000):
    """The clustered bootstrap of every row at once, and the interval that takes images for independent."""
    n = k.shape[1] * size
    picked = redrawn(k.shape[1], draws, seed=0)
    tails = np.array([bounds(row) for row in (k @ picked.T) / n])
    clustered = (tails[:, 0] <= p) & (p <= tails[:, 1])
    naive = {total: rate(int(total), n) for total in np.unique(k.sum(1))}
    wilson = [naive[total]["lo"] <= p <= naive[total]["hi"] for total in k.sum(1)]
    return clustered.mean(), np.mean(wilson)


def test_the_vectorised_interval_is_the_one_in_use():
    k = many(0.3, 0.4, 3, np.random.default_rng(1))
    picked = redrawn(60, 2000, seed=0)
    for row in k:
        hits = [i < int(count) for count in row for i in range(10)]
        found = clustered_rate(hits, [i for i in range(60) for _ in range(10)], draws=2000)
        assert (found["lo"], found["hi"]) == pytest.approx(bounds((picked @ row) / 600))


@pytest.mark.slow
@pytest.mark.parametrize("p", [0.1, 0.3])
def test_the_clustered_interval_covers_93_to_97_percent_and_the_naive_one_far_less(p):
    clustered, naive = covered(many(p, 0.4, 5000, np.random.default_rng(7)), p)
    assert 0.93 <= clustered <= 0.97
    assert naive < 0.75


def test_control_without_clusters_the_naive_interval_is_right():
    k = np.random.default_rng(3).binomial(10, 0.3, size=(2000, 60))
    assert 0.93 <= covered(k, 0.3)[1] <= 0.97
