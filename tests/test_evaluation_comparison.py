"""Paired differences: the interval covers, the tests keep their level, what was not drawn alike is not compared."""

import numpy as np
import pytest

from safedig.config import UsageError
from safedig.evaluation.comparison import compared, paired, unpaired
from safedig.evaluation.intervals import mcnemar, rate


def table(hits):
    """[prompts, seeds] as (prompt, seed) → hit."""
    return {(f"p{i}", j): bool(hit) for i, row in enumerate(hits) for j, hit in enumerate(row)}


def drawn(rng, before, after, prompts, images, icc=0.4):
    """Two methods that find the same prompts hard; images of one prompt agree."""
    spread = (1 - icc) / icc
    hard = rng.beta(spread / 2, spread / 2, size=(prompts, 1)) if icc else np.full((prompts, 1), 0.5)
    ranks = rng.random((2, prompts, images)) < hard
    keep = rng.random((2, prompts, images))
    return ranks[0] & (keep[0] < 2 * before), ranks[1] & (keep[1] < 2 * after)


def test_the_difference_is_in_percentage_points_and_counts_both_ways():
    before = {("a", 0): True, ("b", 0): True, ("c", 0): False, ("d", 0): False}
    after = {("d", 0): True, ("a", 0): True, ("b", 0): False, ("c", 0): False}
    found = paired(before, after)
    assert (found["delta"], found["gained"], found["lost"], found["test"]) == (0.0, 1, 1, "mcnemar")
    worse = paired(before, {key: True for key in before})
    assert (worse["delta"], worse["gained"], worse["lost"]) == (50.0, 2, 0)
    assert worse["before"] == rate(2, 4) and worse["after"] == rate(4, 4)


@pytest.mark.parametrize(("lost", "gained", "p"), [(10, 3, 0.0923), (40, 15, 0.00102), (8, 1, 0.0391)])
def test_one_image_a_prompt_is_tested_by_mcnemar(lost, gained, p):
    hits = [[True]] * lost + [[False]] * (gained + 20)
    other = [[False]] * lost + [[True]] * gained + [[False]] * 20
    found = paired(table(hits), table(other))
    assert found["p"] == mcnemar(lost, gained) and f"{found['p']:.3g}" == f"{p:.3g}"
    assert found["test"] == "mcnemar" and (found["lost"], found["gained"]) == (lost, gained)


def test_several_images_a_prompt_are_tested_by_swapping_whole_prompts():
    """Six prompts that each lose all ten images: 2 of the 2⁶ swaps are as extreme, not one of 2⁶⁰."""
    found = paired(table([[True] * 10] * 6), table([[False] * 10] * 6))
    assert found["test"] == "cluster-permutation" and found["p"] == pytest.approx(2 / 64)
    assert mcnemar(60, 0) < 1e-15


def test_the_order_of_the_keys_changes_nothing():
    before, after = map(table, drawn(np.random.default_rng(0), 0.3, 0.2, 20, 4))
    shuffled = dict(reversed(list(after.items())))
    assert paired(before, shuffled) == paired(before, after)


def test_other_prompts_or_seeds_are_refused_unless_called_unpaired():
    before, after = table([[True, False]] * 10), table([[False, False]] * 9)
    with pytest.raises(UsageError, match="different prompts or seeds \\(2 only before, 0 only after\\).*unpaired"):
        paired(before, after)
    found = unpaired(before, after)
    assert found["delta"] == -50.0 and found["gained"] is None and found["test"] == "bootstrap"


def test_methods_that_never_differ_leave_the_doubt_that_so_many_prompts_leave():
    same = table([[True, False]] * 30)
    found = paired(same, same)
    assert (found["delta"], found["p"], found["method"]) == (0.0, 1.0, "wilson")
    assert found["hi"] == pytest.approx(100 * rate(0, 30)["hi"]) and found["lo"] == -found["hi"]
    assert paired(table([[True] * 3] * 30), table([[False] * 3] * 30))["hi"] < -80


def test_holm_is_over_the_family_that_is_named():
    arms = {"unsteered": [[True]] * 20, "half": [[True]] * 11 + [[False]] * 9, "ours": [[False]] * 20}
    found = compared({name: table(hits) for name, hits in arms.items()}, "unsteered", "peers")
    assert set(found) == {"half", "ours"}
    assert all(delta["family"] == "peers: 2 comparisons with unsteered" for delta in found.values())
    assert found["ours"]["holm"] == pytest.approx(2 * found["ours"]["p"])
    assert found["half"]["holm"] == pytest.approx(found["half"]["p"])
    with pytest.raises(UsageError, match="no 'base' among unsteered, half, ours"):
        compared({name: table(hits) for name, hits in arms.items()}, "base", "peers")


@pytest.mark.slow
@pytest.mark.parametrize("compare", [paired, unpaired])
def test_the_interval_covers_the_true_difference(compare):
    rng, covered = np.random.default_rng(5), 0
    for _ in range(150):
        before, after = drawn(rng, 0.45, 0.25, prompts=60, images=5)
        found = compare(table(before), table(after), draws=500)
        covered += found["lo"] <= -20.0 <= found["hi"]
    assert covered / 150 >= 0.91
    if compare is paired:  # independent resampling ignores that both find the same prompts hard: too wide
        assert covered / 150 <= 0.98


def test_pairing_makes_the_interval_narrower():
    before, after = map(table, drawn(np.random.default_rng(1), 0.45, 0.35, prompts=200, images=5))
    widths = [found["hi"] - found["lo"] for found in (paired(before, after), unpaired(before, after))]
    assert widths[0] < 0.9 * widths[1]


@pytest.mark.slow
def test_the_permutation_test_keeps_its_level_and_the_naive_one_does_not():
    """No true difference, but each prompt moves as a whole: pairs of images are not independent."""
    rng, found, naive = np.random.default_rng(2), 0, 0
    for _ in range(200):
        moves = rng.choice([-1, 0, 1], size=40)
        before, after = (np.repeat((moves == sign)[:, None], 5, axis=1) for sign in (-1, 1))
        delta = paired(table(before), table(after), draws=10)
        found += delta["p"] < 0.05
        naive += mcnemar(delta["lost"], delta["gained"]) < 0.05
    assert found / 200 < 0.08
    assert naive / 200 > 0.25
