"""What the thresholds guarantee holds over calibrations, whatever the distribution; a usual quantile does not."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from safedig.activations.record import Activations, Batch
from safedig.config import UsageError
from safedig.features import Dose, Features
from safedig.sae.model import Decoder, SparseAutoencoder, ThresholdEncoder
from safedig.sites import Site
from safedig.steering.conformal import calibrated, least, threshold

SITES = [Site.parse(name) for name in ("txt.embed", "pooled.embed", "velocity")]
EPSILON, DELTA, TIMES = 0.05, 0.1, 400
SLACK = 3 * math.sqrt(DELTA * (1 - DELTA) / TIMES)  # three standard errors of a share that is DELTA
DISTRIBUTIONS = {
    "normal": stats.norm(),
    "heavy-tailed": stats.cauchy(),
    "skewed": stats.lognorm(3.0),
    "tied": stats.poisson(1.5),
    "mostly zero": stats.bernoulli(0.04),
    "all the same": stats.randint(3, 4),
}


def failures(distribution, n, of):
    """Of many calibrations of n heights, the share in which more than ε of fresh heights lie above: exactly counted."""
    rng = np.random.default_rng(n)
    drawn = distribution.rvs(size=(TIMES, n), random_state=rng).astype(float)
    above = np.array([distribution.sf(of(heights.tolist())) for heights in drawn])
    return (above > EPSILON + 1e-12).mean(), above.mean()


def marginal(heights):
    """The usual split-conformal quantile: fresh heights lie above it in a share ε on average over calibrations."""
    rank = math.ceil((len(heights) + 1) * (1 - EPSILON))
    return sorted(heights)[rank - 1]


# ---- the guarantee


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("n", [45, 100, 300])
def test_the_share_above_exceeds_epsilon_in_no_more_than_delta_of_all_calibrations(name, n):
    failed, above = failures(DISTRIBUTIONS[name], n, lambda heights: threshold(heights, EPSILON, DELTA))
    assert failed <= DELTA + SLACK and above < EPSILON


@pytest.mark.parametrize("name", ["normal", "heavy-tailed", "skewed"])
def test_control_the_marginal_quantile_keeps_epsilon_on_average_and_breaks_it_in_many_calibrations(name):
    failed, above = failures(DISTRIBUTIONS[name], 100, marginal)
    assert failed > 2 * (DELTA + SLACK) and above == pytest.approx(EPSILON, abs=0.005)


def test_it_is_as_low_as_the_guarantee_allows():
    """One height further down, and more than δ of the calibrations would fail."""
    for n in (45, 100, 300, 1000):
        heights = [float(one) for one in range(n)]
        rank = int(threshold(heights, EPSILON, DELTA)) + 1
        assert stats.binom.cdf(n - rank, n, EPSILON) <= DELTA < stats.binom.cdf(n - rank + 1, n, EPSILON)
    assert threshold([float(one) for one in range(100)]) == 98.0, "of 100 the highest but one"
    failed, _ = failures(DISTRIBUTIONS["normal"], 100, lambda heights: sorted(heights)[-4])
    assert failed > DELTA + SLACK, "the control: two further down it is seen in the simulation too"


def test_the_order_of_the_heights_does_not_matter_and_the_threshold_is_one_of_them():
    heights = np.random.default_rng(0).normal(size=200).tolist()
    assert (
        threshold(heights) == threshold(sorted(heights)) == threshold(heights[::-1]) and threshold(heights) in heights
    )


def test_more_prompts_allow_a_lower_quantile_and_looser_wishes_too():
    def rank(n, *wish):
        return threshold([float(one) for one in range(n)], *wish) / n

    assert rank(50) > rank(200) > rank(2000) > 1 - EPSILON
    assert rank(200, 0.1, 0.1) < rank(200, 0.05, 0.1) < rank(200, 0.05, 0.01)


# ---- how many it takes


def test_it_takes_45_prompts_to_vouch_for_five_percent_with_nine_tenths_confidence():
    assert least(0.05, 0.1) == 45
    assert threshold([*range(45)]) == 44, "then the highest of all is the threshold"
    with pytest.raises(
        UsageError, match=r"44 benign prompts cannot vouch that at most 5\.0% are touched, with 90% conf"
    ):
        threshold([0.0] * 44)
    with pytest.raises(UsageError, match="record at least 45 of each kind, or loosen epsilon or delta"):
        threshold([])


@pytest.mark.parametrize("epsilon", [0.5, 0.25, 0.1, 0.05, 0.01])
@pytest.mark.parametrize("delta", [0.5, 0.25, 0.1, 0.05, 0.001])
def test_with_the_least_number_the_highest_is_enough_and_with_one_less_it_is_not(epsilon, delta):
    n = least(epsilon, delta)
    assert (1 - epsilon) ** n <= delta * (1 + 1e-9) and (1 - epsilon) ** (n - 1) > delta
    assert threshold([float(one) for one in range(n)], epsilon, delta) <= n - 1


@pytest.mark.parametrize(("epsilon", "delta"), [(0.0, 0.1), (1.0, 0.1), (0.05, 0.0), (0.05, 1.0), (-1.0, 0.1)])
def test_shares_out_of_range_are_refused(epsilon, delta):
    for call in (lambda: least(epsilon, delta), lambda: threshold([0.0] * 99, epsilon, delta)):
        with pytest.raises(UsageError, match="expected two shares between 0 and 1"):
            call()


# ---- the doses of sites, by the kinds of prompts


def sae(width=3):
    """Feature j reads coordinate j, from 0 on."""
    eye = torch.eye(width)
    return SparseAutoencoder(
        ThresholdEncoder(eye, torch.zeros(width), torch.zeros(width)), Decoder(eye, torch.ones(width))
    )


def recorded(heights, kinds="benign", sites=SITES[:1], images=1, steps=2, token=0):
    """Of each prompt a token of these coordinates; its other images, if any, are lower by one."""
    names = [kinds] * len(heights) if isinstance(kinds, str) else kinds
    rows = [
        {"id": f"p{at}", "seed": image, "risk": "", "kind": kind, "twin": ""}
        for at, kind in enumerate(names)
        for image in range(images)
    ]
    x = torch.tensor(np.asarray(heights), dtype=torch.float32).repeat_interleave(images, 0)
    x = x - torch.arange(images).repeat(len(heights))[:, None]
    ids, seeds = [row["id"] for row in rows], [row["seed"] for row in rows]
    batches = [
        Batch(site, step, 1.0 - step, ids, seeds, ("cond",) * len(ids), torch.full((len(ids),), token), x - step)
        for site in sites
        for step in range(steps)
    ]
    return Activations(lambda sites, ids: batches, list(sites), rows, "fingerprint")


def found(dose=None, width=3):
    return Features(torch.arange(width), math.inf, torch.ones(width), torch.ones(width), dose=dose, facts={"of": "old"})


def summed():
    return Dose.of(torch.tensor([1.0, 0.0, 0.0]))


def met():
    """What single tokens say is coordinate 0; the pair of 1 and 2 means harm."""
    return replace(summed(), pairs=torch.tensor([[1, 2]]), pair_weights=torch.ones(1))


def opened(one, x):
    """Whether its gate opens for a token of these coordinates."""
    z = sae().encode(torch.tensor(np.asarray(x), dtype=torch.float32))[:, None]
    return (one.dose(z)[:, 0] > one.threshold).numpy()


def uniform(n, seed=0, width=3):
    return np.random.default_rng(seed).uniform(2, 3, size=(n, width))


def test_calibrated_the_gate_opens_above_the_threshold_of_the_prompts_and_the_rest_is_kept():
    x = uniform(200)
    before = found(summed())
    (after,) = calibrated({SITES[0]: before}, {SITES[0]: sae()}, recorded(x)).values()
    limit = threshold(x[:, 0].astype(np.float32).tolist())
    assert after.threshold == 0.0
    assert (opened(after, x) == (x[:, 0].astype(np.float32) > limit)).all() and 0 < opened(after, x).sum() < 10
    assert torch.equal(after.index, before.index) and torch.equal(after.dose.weights, before.dose.weights)
    assert after.facts == {
        "of": "old",
        "guarantee": {"epsilon": 0.05, "delta": 0.1, "benign_prompts": {"benign": 200}},
    }
    assert not opened(before, x).any(), "the control: before it was calibrated no gate was open"


def test_features_that_were_found_and_not_weighed_are_calibrated_by_their_sum():
    x = uniform(100)
    (after,) = calibrated({SITES[0]: found()}, {SITES[0]: sae()}, recorded(x)).values()
    heights = x.astype(np.float32).sum(1)
    assert (opened(after, x) == (heights > np.sort(heights)[-2])).all()


def test_a_prompt_counts_once_by_its_highest_image_and_step():
    """45 prompts of 3 images are 45; lower images and steps change nothing."""
    x = uniform(45)
    features, saes = {SITES[0]: found(summed())}, {SITES[0]: sae()}
    one, three = (calibrated(features, saes, recorded(x, images=images))[SITES[0]] for images in (1, 3))
    assert torch.equal(one.dose.bias, three.dose.bias) and one.facts == three.facts
    with pytest.raises(UsageError, match="44 benign prompts cannot"):
        calibrated(features, saes, recorded(x[:44], images=3))


@pytest.mark.parametrize(
    ("site", "token", "told"),
    [
        ("transformer_blocks.0.img.resid_post", 7, "1 of each image's tokens"),
        ("transformer_blocks.0.img.resid_post", -1, "the mean of each image's tokens"),
        ("transformer_blocks.0.img.resid_post", 0, None),
        ("pooled.embed", -1, None),
    ],
)
def test_a_gate_is_not_set_by_some_of_the_tokens_that_it_will_see(site, token, told):
    x, where = uniform(100), Site.parse(site)
    args = {where: found(summed())}, {where: sae()}, recorded(x, sites=[where], token=token)
    if told is None:
        assert list(calibrated(*args)) == [where], "the control"
    else:
        with pytest.raises(UsageError, match=rf"'{site}' keeps {told}.*record the benign prompts with tokens='all'"):
            calibrated(*args)


@pytest.mark.parametrize(("sites", "dose", "gates"), [(1, summed(), 1), (2, summed(), 2), (1, met(), 2), (3, met(), 6)])
def test_all_that_may_open_a_gate_share_epsilon(sites, dose, gates):
    where = SITES[:sites]
    features, saes = dict.fromkeys(where, found(dose)), dict.fromkeys(where, sae())
    wanted = least(EPSILON / gates, DELTA)
    x = uniform(wanted)
    after = calibrated(features, saes, recorded(x, sites=where))
    assert list(after) == where and not any(opened(one, x).any() for one in after.values())
    with pytest.raises(UsageError, match=f"at most {EPSILON / gates:.1%} are touched.*at least {wanted} of each kind"):
        calibrated(features, saes, recorded(x[1:], sites=where))


def test_what_pairs_say_has_a_threshold_of_its_own():
    """Ten times as loud as single tokens, it neither raises their threshold nor is drowned by it."""
    x = uniform(200) * np.array([1.0, 10.0, 10.0])
    (after,) = calibrated({SITES[0]: found(met())}, {SITES[0]: sae()}, recorded(x)).values()
    own, pair = (column.astype(np.float32) for column in (x[:, 0], x[:, 1:].min(1)))
    limits = threshold(own.tolist(), EPSILON / 2), threshold(pair.tolist(), EPSILON / 2)
    assert (opened(after, x) == (own > limits[0]) | (pair > limits[1])).all()
    assert (own > limits[0]).any() and (pair > limits[1]).any()


def test_two_gates_that_never_open_for_the_same_prompt_keep_the_guarantee_together():
    """The worst case of the sharing: what one leaves alone the other may touch. Unshared, it breaks."""
    rng, failed = np.random.default_rng(1), {2: 0, 1: 0}
    for heights in rng.uniform(size=(TIMES, 200)):
        for share in failed:
            high = threshold(heights.tolist(), EPSILON / share, DELTA)
            low = threshold((-heights).tolist(), EPSILON / share, DELTA)
            failed[share] += (1 - high) + (-low) > EPSILON
    assert failed[2] / TIMES <= DELTA + SLACK < 0.5 < failed[1] / TIMES


def test_each_kind_of_prompt_is_vouched_for_by_itself():
    """Near-misses are few and high: vouched for with all others, more than ε of them would be touched."""
    kinds = ["benign"] * 300 + ["near-miss"] * 60
    x, fresh = uniform(360), uniform(1000, seed=1)
    x[300:, 0] += 1
    fresh[:, 0] += 1
    features, saes = {SITES[0]: found(summed())}, {SITES[0]: sae()}
    apart = calibrated(features, saes, recorded(x, kinds))[SITES[0]]
    limit = threshold(x[300:, 0].astype(np.float32).tolist())
    assert (opened(apart, fresh) == (fresh[:, 0].astype(np.float32) > limit)).all()
    assert not opened(apart, x[:300]).any() and opened(apart, fresh).mean() < 2 * EPSILON
    assert apart.facts["guarantee"]["benign_prompts"] == {"benign": 300, "near-miss": 60}
    pooled = calibrated(features, saes, recorded(x))[SITES[0]]
    assert opened(pooled, fresh).mean() > 3 * EPSILON, "the control"
    with pytest.raises(UsageError, match="44 benign prompts cannot vouch"):
        calibrated(features, saes, recorded(x[:344], kinds[:344]))


def test_prompts_that_are_not_benign_have_no_say():
    x = np.concatenate([uniform(100), 100 + uniform(100)])
    kinds = ["benign"] * 100 + ["underspecified", "harmful"] * 50
    features, saes = {SITES[0]: found(summed())}, {SITES[0]: sae()}
    mixed, alone = (calibrated(features, saes, recorded(x[:n], kinds[:n]))[SITES[0]] for n in (200, 100))
    assert torch.equal(mixed.dose.bias, alone.dose.bias) and mixed.facts == alone.facts
    with pytest.raises(UsageError, match="There is no benign prompt in the recording: record some"):
        calibrated(features, saes, recorded(x[100:], kinds[100:]))


@pytest.mark.slow
def test_end_to_end_the_gates_of_fresh_calibrations_keep_the_guarantee():
    """By the dose itself, with a pair: 200 calibrations of 91 prompts, each tried on 2,000 fresh ones."""
    features, saes, fresh = {SITES[0]: found(met())}, {SITES[0]: sae()}, uniform(2000, seed=99)
    failed = 0
    for seed in range(200):
        x = uniform(91, seed=seed)
        (limits,) = calibrated(features, saes, recorded(x, steps=1)).values()
        failed += opened(limits, fresh).mean() > EPSILON
    assert failed / 200 <= DELTA + 3 * math.sqrt(DELTA * (1 - DELTA) / 200)
