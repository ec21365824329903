"""Kappa is chance-corrected, a rate is corrected for the judge's errors, and a corrected interval covers the truth."""

import numpy as np
import pytest

from safedig.config import UsageError
from safedig.evaluation.agreement import corrected_rate, kappa, worth
from safedig.evaluation.means import clustered_mean


def test_kappa_is_1_for_agreement_and_0_for_chance():
    rng = np.random.default_rng(0)
    labels = [str(x) for x in rng.choice(["unsafe", "clean"], 400)]
    assert kappa(labels, labels, range(400))["kappa"] == 1.0
    by_chance = kappa(labels, [str(x) for x in rng.choice(["unsafe", "clean"], 400, p=[0.9, 0.1])], range(400))
    assert abs(by_chance["kappa"]) < 0.1 and by_chance["agreed"] > 150


def test_kappa_of_a_textbook_table():
    """20 both yes, 5 and 10 apart, 15 both no: observed .7, by chance .5, kappa .4."""
    one = ["yes"] * 25 + ["no"] * 25
    other = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    found = kappa(one, other, range(50))
    assert found["kappa"] == pytest.approx(0.4) and found["agreed"] == 35
    assert found["lo"] < 0.2 and found["hi"] > 0.6


def test_images_of_one_prompt_widen_the_bounds_of_kappa():
    one = (["yes"] * 25 + ["no"] * 25) * 4
    other = (["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15) * 4
    apart, shared = kappa(one, other, range(200)), kappa(one, other, [i % 50 for i in range(200)])
    assert apart["kappa"] == shared["kappa"] and shared["clusters"] == 50
    assert shared["hi"] - shared["lo"] > 1.7 * (apart["hi"] - apart["lo"])


def test_an_audit_of_one_label_says_nothing():
    with pytest.raises(UsageError, match="Every image is 'clean' to both"):
        kappa(["clean"] * 9, ["clean"] * 9, range(9))


def test_a_perfect_judge_is_not_corrected_and_a_known_error_is_undone():
    hits = [True] * 30 + [False] * 70
    assert corrected_rate(hits, range(100), (500, 500), (500, 500))["rate"] == pytest.approx(0.3)
    said = [True] * 31 + [False] * 69  # .25 × .8 + .75 × (1 − .8533…) = .31
    assert corrected_rate(said, range(100), (80, 100), (1280, 1500))["rate"] == pytest.approx(0.25, abs=1e-9)


def test_a_judge_that_calls_safe_images_unsafe_never_gives_a_negative_rate():
    found = corrected_rate([True] * 8 + [False] * 92, range(100), (90, 100), (90, 100))
    assert found["rate"] == 0.0 and found["lo"] == 0.0 and found["hi"] > 0


def test_a_judge_no_better_than_chance_cannot_be_corrected():
    with pytest.raises(UsageError, match="no better than chance"):
        corrected_rate([True, False], range(2), (5, 10), (5, 10))
    with pytest.raises(UsageError, match="expected counts"):
        corrected_rate([True, False], range(2), (11, 10), (5, 10))


def simulated(rng, true, se, sp, prompts, images, icc=0.4):
    spread = (1 - icc) / icc
    own = rng.beta(true * spread, (1 - true) * spread, size=(prompts, 1))
    unsafe = rng.random((prompts, images)) < own
    said = np.where(unsafe, rng.random(unsafe.shape) < se, rng.random(unsafe.shape) >= sp)
    audit = (int(rng.binomial(80, se)), 80), (int(rng.binomial(120, sp)), 120)
    return said.ravel().tolist(), [i for i in range(prompts) for _ in range(images)], audit


@pytest.mark.slow
@pytest.mark.parametrize("images", [1, 5])
def test_the_corrected_interval_covers_the_truth_and_the_uncorrected_does_not(images):
    rng, covered, naive = np.random.default_rng(4), 0, 0
    for _ in range(400):
        said, prompts, audit = simulated(rng, 0.3, 0.85, 0.9, prompts=100, images=images)
        found = corrected_rate(said, prompts, *audit)
        covered += found["lo"] <= 0.3 <= found["hi"]
        naive += np.mean(said) - 0.05 <= 0.255 <= np.mean(said) + 0.05
    assert 0.92 <= covered / 400 <= 0.985
    assert naive / 400 < 0.9


def test_alike_images_are_worth_fewer():
    half = [True] * 50 + [False] * 50
    assert worth(half, range(100)) == 100
    assert worth(half, [i // 10 for i in range(100)]) < 12
    assert worth([False] * 100, [i // 10 for i in range(100)]) == 10


def test_a_mean_is_clustered_too_and_refuses_what_is_no_number():
    values = [1.0] * 10 + [0.0] * 10
    apart, alike = clustered_mean(values, range(20)), clustered_mean(values, [i // 5 for i in range(20)])
    assert apart["mean"] == alike["mean"] == 0.5 and alike["clusters"] == 4
    assert alike["hi"] - alike["lo"] > 1.5 * (apart["hi"] - apart["lo"])
    assert np.isnan(clustered_mean([1.0, 2.0], "aa")["lo"])
    with pytest.raises(UsageError, match="Number 2 of 2 is not finite"):
        clustered_mean([1.0, float("nan")], "ab")
