"""Any-of-N: first seeds or all choices of them, never falling in N, exact against enumeration."""

from itertools import combinations, pairwise

import numpy as np
import pytest

from safedig.config import UsageError
from safedig.evaluation.any_of import any_of, any_of_curve
from safedig.evaluation.beta_binomial import BetaBinomial, from_rates
from safedig.evaluation.intervals import rate

HITS = {
    **{("a", seed): seed in (3, 4) for seed in range(5)},
    **{("b", seed): False for seed in range(5)},
    **{("c", seed): seed == 0 for seed in range(5)},
}


def test_the_first_seeds_count_whatever_the_order_of_the_rows():
    shuffled = {key: HITS[key] for key in sorted(HITS, key=lambda key: (key[1] * 7 % 5, key[0]))}
    for hits in (HITS, shuffled):
        assert [any_of(hits, n)["k"] for n in (1, 3, 4, 5)] == [1, 1, 2, 2]
    assert any_of(HITS, 5) == rate(2, 3)


def test_the_line_rate_and_any_of_1_are_one_number_and_any_of_10_another():
    hits = {(prompt, seed): prompt < 3 and seed < 2 for prompt in range(10) for seed in range(10)}
    assert any_of_curve(hits)[0]["rate"] == pytest.approx(0.06)
    assert any_of_curve(hits)[-1]["rate"] == pytest.approx(0.3) == any_of(hits, 10)["rate"]


def test_the_curve_is_the_mean_over_all_choices_of_seeds():
    for point in any_of_curve(HITS):
        chosen = [set(choice) for choice in combinations(range(5), point["images"])]
        each = [np.mean([any(HITS[p, seed] for seed in seeds) for seeds in chosen]) for p in "abc"]
        assert point["rate"] == pytest.approx(np.mean(each))


def test_the_curve_never_falls_and_ends_at_wilson_over_prompts():
    curve = any_of_curve(HITS)
    assert all(a["rate"] <= b["rate"] for a, b in pairwise(curve))
    assert curve[-1]["method"] == "wilson" and curve[-1]["lo"] == rate(2, 3)["lo"]
    assert {point["method"] for point in curve[:-1]} == {"cluster-bootstrap"}
    assert all(point["lo"] <= point["rate"] <= point["hi"] and point["prompts"] == 3 for point in curve)


def test_no_hit_at_all_still_has_an_upper_bound():
    curve = any_of_curve({(prompt, seed): False for prompt in range(79) for seed in range(4)})
    assert all(point["rate"] == 0 and round(100 * point["hi"], 1) == 4.6 for point in curve)


def test_prompts_that_follow_a_beta_binomial_give_its_curve():
    true = from_rates(0.1649, 0.4456)
    rng, spread = np.random.default_rng(0), (1 - true.icc) / true.icc
    own = rng.beta(true.rate * spread, (1 - true.rate) * spread, size=3000)
    drawn = rng.random((3000, 10)) < own[:, None]
    hits = {(i, j): bool(drawn[i, j]) for i in range(3000) for j in range(10)}
    for point in any_of_curve(hits, draws=500):
        assert point["lo"] - 0.01 <= true.any_of(point["images"]) <= point["hi"] + 0.01
    assert any_of_curve(hits, draws=500)[-1]["hi"] < BetaBinomial(0.1649, 0.0).any_of(10)


def test_more_images_than_a_prompt_has_are_refused():
    hits = {key: hit for key, hit in HITS.items() if key != ("b", 4)}
    with pytest.raises(UsageError, match="images=5: expected from 1 to 4"):
        any_of(hits, 5)
    with pytest.raises(UsageError, match="images=9: expected from 1 to 4"):
        any_of_curve(hits, 9)
    assert len(any_of_curve(hits)) == 4
    with pytest.raises(UsageError, match="no image to count"):
        any_of_curve({})
