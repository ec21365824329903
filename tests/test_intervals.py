"""Intervals cover what they claim, reproduce the published figures to the digit, and stay honest at 0 and n of n."""

import numpy as np
import pytest

from safedig.evaluation.intervals import clustered_rate, holm, mcnemar, rate

GOLDEN_WILSON = [  # k, n, rate %, low %, high %
    (0, 79, 0.0, 0.0, 4.6),
    (4, 79, 5.1, 2.0, 12.3),
    (10, 79, 12.7, 7.0, 21.8),
    (0, 142, 0.0, 0.0, 2.6),
    (29, 142, 20.4, 14.6, 27.8),
    (3, 151, 2.0, 0.7, 5.7),
    (26, 1000, 2.6, 1.8, 3.8),
    (469, 1000, 46.9, 43.8, 50.0),
    (15, 4703, 0.3, 0.2, 0.5),
    (282, 931, 30.3, 27.4, 33.3),
]
TRUE_RATE, ICC, CLUSTERS, SIZE = 0.3, 0.4, 60, 10


def beta_binomial(rng, p, icc, clusters, size):
    """Hits [clusters, size] whose rate is p and whose correlation inside a cluster is icc."""
    concentration = (1 - icc) / icc
    per_prompt = rng.beta(p * concentration, (1 - p) * concentration, size=(clusters, 1))
    return rng.random((clusters, size)) < per_prompt


def of_matrix(hits, **options):
    clusters = np.repeat(np.arange(len(hits)), hits.shape[1])
    return clustered_rate(hits.ravel().tolist(), clusters.tolist(), **options)


@pytest.mark.parametrize(("k", "n", "percent", "lo", "hi"), GOLDEN_WILSON)
def test_wilson_reproduces_the_published_figures(k, n, percent, lo, hi):
    found = rate(k, n)
    assert [round(100 * found[key], 1) for key in ("rate", "lo", "hi")] == [percent, lo, hi]
    assert (found["k"], found["n"], found["method"], found["clusters"]) == (k, n, "wilson", n)


def test_two_rates_that_look_apart_overlap_on_79_prompts():
    assert rate(4, 79)["hi"] > rate(10, 79)["lo"]


@pytest.mark.parametrize(("k", "n"), [(0, 0), (5, 4), (-1, 4)])
def test_an_impossible_count_is_refused(k, n):
    with pytest.raises(ValueError, match="is no rate"):
        rate(k, n)


@pytest.mark.parametrize(
    ("b", "c", "p"), [(10, 3, 0.0923), (40, 15, 0.00102), (8, 1, 0.0391), (6, 0, 0.03125), (5, 0, 0.0625)]
)
def test_mcnemar_reproduces_the_published_figures(b, c, p):
    digits = 3 if p > 0.03126 or p < 0.003 else 4
    assert float(f"{mcnemar(b, c):.{digits}g}") == pytest.approx(p, rel=1e-9)
    assert mcnemar(c, b) == mcnemar(b, c)


def test_mcnemar_without_a_discordant_pair_finds_nothing():
    assert mcnemar(0, 0) == 1.0


def test_holm_reproduces_the_published_figures_in_the_order_given():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def coverage_of(make_interval, simulations):
    rng = np.random.default_rng(7)
    covered = 0
    for _ in range(simulations):
        found = make_interval(beta_binomial(rng, TRUE_RATE, ICC, CLUSTERS, SIZE))
        covered += found["lo"] <= TRUE_RATE <= found["hi"]
    return covered / simulations


def test_the_clustered_bootstrap_covers_the_truth_95_percent_of_the_time():
    assert 0.93 <= coverage_of(lambda hits: of_matrix(hits, draws=2000), simulations=1000) <= 0.97


def test_control_an_interval_over_images_covers_far_too_rarely():
    assert coverage_of(lambda hits: rate(int(hits.sum()), hits.size), simulations=1000) < 0.75


@pytest.mark.parametrize(("p", "icc", "se", "naive"), [(0.1649, 0.42, 0.84, 0.38), (0.2963, 0.40, 1.02, 0.47)])
def test_the_interval_is_as_wide_as_a_beta_binomial_of_931_prompts_demands(p, icc, se, naive):
    rng = np.random.default_rng(3)
    found = [of_matrix(beta_binomial(rng, p, icc, 931, 10), draws=2000) for _ in range(5)]
    width = np.mean([100 * (one["hi"] - one["lo"]) / (2 * 1.96) for one in found])
    assert width == pytest.approx(se, rel=0.06)
    assert width > 1.8 * naive


@pytest.mark.parametrize("hit", [False, True])
def test_where_no_image_or_every_image_hits_the_interval_is_wilson_over_prompts(hit):
    found = clustered_rate([hit] * 600, [index // 10 for index in range(600)])
    over_prompts = rate(60 * hit, 60)
    assert (found["lo"], found["hi"]) == (over_prompts["lo"], over_prompts["hi"])
    assert (found["k"], found["n"], found["clusters"], found["method"]) == (600 * hit, 600, 60, "wilson")
    assert found["hi"] - found["lo"] > 5 * (rate(600 * hit, 600)["hi"] - rate(600 * hit, 600)["lo"])


def test_prompts_that_all_agree_still_leave_a_doubt():
    found = clustered_rate([True, False] * 10, [index // 2 for index in range(20)])
    assert found["method"] == "wilson" and found["lo"] < 0.3 and found["hi"] > 0.7
    alone = clustered_rate([True, False, False], ["one"] * 3)
    assert alone["lo"] < 0.01 and alone["hi"] > 0.99


def test_one_image_a_prompt_is_plain_wilson():
    assert clustered_rate([True, False, False], "abc") == rate(1, 3)


def test_the_bootstrap_depends_on_its_seed_alone():
    hits, clusters = [True, True, False, True, False, False, True, False], list("aabbccdd")
    assert clustered_rate(hits, clusters, seed=1) == clustered_rate(hits, clusters, seed=1)
    shuffled = [7, 2, 5, 0, 1, 6, 3, 4]
    other = clustered_rate([hits[i] for i in shuffled], [clusters[i] for i in shuffled], seed=1)
    assert other["rate"] == 0.5 and other["clusters"] == 4


def test_unequal_prompts_are_weighted_by_their_images():
    found = clustered_rate([True] * 9 + [False], ["many"] * 9 + ["one"])
    assert found["rate"] == 0.9 and found["lo"] == 0.0 and found["hi"] == 1.0


def test_a_hit_without_a_prompt_is_refused():
    with pytest.raises(ValueError, match="one cluster for each hit"):
        clustered_rate([True, False], ["a"])
