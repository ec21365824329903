"""Densities, means and β are the formulas' own; the rules move x̂0 where their papers say."""

from math import exp, log, pi

import pytest
import torch

from safedig.config import UsageError
from safedig.denoiser.calibrate import thresholds
from safedig.denoiser.kernels import Exact, Moment, Semantic, Tempered, expected, log_density
from safedig.denoiser.mixing import Mixing
from safedig.denoiser.negation import NegationSet
from safedig.denoiser.rules import Sizes, held, released, renoise_only, spell, theory
from safedig.denoiser.threshold import SafeDensity, Thresholds, own_threshold

HALF = Mixing(0.5, 0.5, "velocity", following=0.4)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moment(batch=3, d=6, mixing=HALF, seed=1):
    return Moment(random(batch, d, seed=seed), random(batch, d, seed=seed + 1), mixing, (d,))


@pytest.fixture
def negation():
    return NegationSet(random(5, 6))


def mean(kernel, negation, at):
    return expected(kernel, negation, at, kernel.log_q(negation, at))


def z_of(negation):
    return torch.cat(list(negation.parts()))


def sizes(negation, **options):
    usual = {"kernel": Tempered(1.0), "threshold": Thresholds((1.0,), (1.0,), (0.0,)), "strength": 1.0}
    return Sizes(negation, **(usual | {"limit": 2.0, "floor": 0.0, "radius": 1.0} | options))


# ---- kernels


@pytest.mark.parametrize("mixing", [HALF, Mixing(0.6, 0.8, "epsilon"), Mixing(1.0, 3.0, "epsilon")])
def test_the_exact_kernel_is_the_normalised_density_of_the_noised_set(negation, mixing):
    at = moment(mixing=mixing)
    ways = [
        torch.distributions.Independent(torch.distributions.Normal(mixing.alpha * z, mixing.s), 1)
        for z in z_of(negation)
    ]
    wanted = torch.stack([way.log_prob(at.x) for way in ways], 1)
    assert torch.allclose(Exact().log_q(negation, at), wanted, rtol=1e-4)
    assert torch.allclose(log_density(Exact(), negation, at), wanted.logsumexp(1) - log(5), rtol=1e-4)
    average = (wanted.softmax(1)[..., None] * z_of(negation)).sum(1)
    assert torch.allclose(mean(Exact(), negation, at), average, atol=1e-4)


def test_the_tempered_kernel_is_as_wide_as_asked_at_every_sigma(negation):
    for mixing in (HALF, Mixing(0.1, 0.9, "velocity")):
        at = moment(mixing=mixing)
        wanted = -torch.cdist(at.x0, z_of(negation)).square() / (2 * 0.3**2 * 6)
        assert torch.allclose(Tempered(0.3).log_q(negation, at), wanted, atol=1e-4)


def test_in_high_dimension_the_exact_kernel_is_one_hot_and_a_tempered_one_is_not():
    d = 4096
    negation = NegationSet(random(20, d))
    z = z_of(negation)
    x0 = 0.6 * z[0] + 0.4 * z[1]
    at = Moment((0.5 * x0 + 0.5 * random(d, seed=9))[None], x0[None], HALF, (d,))
    assert torch.allclose(mean(Exact(), negation, at), z[:1], atol=1e-3)
    soft = Tempered(0.5).log_q(negation, at).softmax(1)[0]
    assert soft[0] > soft[1] > 0.1 and soft[2:].max() < soft[1]


def test_images_that_count_for_nothing_are_left_out_without_a_trace():
    z = torch.cat([torch.zeros(1, 4), torch.full((50, 4), 3.0)])
    at = Moment(torch.zeros(1, 4), torch.zeros(1, 4), HALF, (4,))
    assert torch.equal(mean(Tempered(0.3), NegationSet(z), at), torch.zeros(1, 4))


def test_a_semantic_kernel_compares_features_and_averages_what_is_near_in_the_latent_too(negation):
    calls = []

    def features(latents):
        calls.append(len(latents))
        return latents[:, :2]

    kernel, at = Semantic(features, 0.5, Tempered(0.2)), moment()
    wanted = -torch.cdist(at.x0[:, :2], z_of(negation)[:, :2]).square() / (2 * 0.5**2 * 2)
    assert torch.allclose(kernel.log_q(negation, at), wanted, atol=1e-4)
    whole = wanted - torch.cdist(at.x0, z_of(negation)).square() / (2 * 0.2**2 * 6)
    assert torch.allclose(kernel.log_weights(negation, at, kernel.log_q(negation, at)), whole, atol=1e-3)
    kernel.log_q(negation, moment())
    assert calls == [5, 3, 3]  # the set and each moment once


@pytest.mark.parametrize("wrong", [lambda z: z[:, 0], lambda z: z[:, :2] / 0])
def test_features_that_are_none_are_told(negation, wrong):
    with pytest.raises(UsageError, match="features= gave shape"):
        Semantic(wrong).log_q(negation, moment())


@pytest.mark.parametrize("kernel", [Tempered, lambda width: Semantic(torch.Tensor.float, width)])
def test_a_kernel_without_width_is_refused(kernel):
    with pytest.raises(UsageError, match="expected a kernel width above 0"):
        kernel(0.0)


# ---- β


def test_beta_is_the_posterior_odds_of_unsafe(negation):
    """Exact mode, against Bayes' rule on normalised densities."""
    safe = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(6), 1.3), 1)
    threshold, at = SafeDensity(lambda x, _: safe.log_prob(x), odds=0.25), moment()
    near = log_density(Exact(), negation, at)
    unsafe, prior = near.double().exp() * 0.2, safe.log_prob(at.x).double().exp() * 0.8
    assert torch.allclose(threshold.log_beta(near, Exact(), at).double().exp(), unsafe / prior, rtol=1e-3)


def test_a_calibrated_threshold_holds_at_the_nearest_sigma_and_tau_is_where_beta_is_one():
    given = Thresholds((0.9, 0.5), (1.0, 2.0), (3.0, 4.0))
    near = torch.tensor([-3.0, 0.0])
    high = Moment(random(2, 6), random(2, 6), Mixing(0.2, 0.8, "velocity"), (6,))
    assert given.log_beta(near, Tempered(), high).exp().tolist() == pytest.approx([1.0, exp(3.0)])
    assert given.log_beta(near, Tempered(), moment(2)).tolist() == [-2.0, 4.0]


def test_against_a_reference_what_both_sets_share_cancels(negation):
    at, other = moment(), NegationSet(random(7, 6, seed=8))
    given = Thresholds((1.0,), (1.0,), (0.0,), reference=other)
    near = log_density(Tempered(), negation, at)
    wanted = near - log_density(Tempered(), other, at)
    assert torch.allclose(given.log_beta(near, Tempered(), at), wanted)
    same = Thresholds((1.0,), (1.0,), (0.0,), reference=negation)
    assert torch.equal(same.log_beta(near, Tempered(), at), torch.zeros(3))


def test_without_calibration_half_of_the_sets_own_images_are_near_enough():
    cloud = NegationSet(random(40, 30) * 0.1)
    threshold = own_threshold(Tempered(0.1), cloud)
    inside = Moment(random(20, 30), random(20, 30, seed=5) * 0.1, HALF, (30,))
    outside = Moment(random(20, 30), 1 + random(20, 30, seed=5) * 0.1, HALF, (30,))
    kernel = Tempered(0.1)
    near, far = (threshold.log_beta(log_density(kernel, cloud, at), kernel, at).exp() for at in (inside, outside))
    assert 0.2 < (near > 1).float().mean() < 0.8 and far.max() < 1e-6


def test_copies_in_the_set_do_not_move_its_threshold():
    """Each image's nearest would be its own copy, and nothing that is drawn would be as near."""
    z, kernel = 3 + random(32, 30), Tempered(0.3)
    once, twice = (own_threshold(kernel, NegationSet(torch.cat([z] * count))) for count in (1, 2))
    assert twice.offset == pytest.approx(once.offset, rel=1e-4)
    one, copies = (own_threshold(kernel, NegationSet(z[:1].expand(count, -1))) for count in (1, 5))
    assert copies.offset == one.offset
    nearly = own_threshold(kernel, NegationSet(torch.cat([z, z + 0.1])))  # control: another image is no copy
    assert nearly.offset[0] < once.offset[0] - 1


def test_without_copies_the_threshold_is_that_of_all_others():
    cloud, kernel = NegationSet(random(40, 30)), Tempered(0.3)
    at = Moment(z_of(cloud), z_of(cloud), HALF, (30,))
    others = kernel.log_q(cloud, at).fill_diagonal_(-torch.inf)
    assert own_threshold(kernel, cloud).offset == (-float((others.logsumexp(1) - log(39)).median()),)


def test_one_image_alone_is_near_within_the_kernels_width():
    z = torch.zeros(1, 50)
    threshold, kernel = own_threshold(Tempered(0.2), NegationSet(z)), Tempered(0.2)
    for distance, wanted in ((0.2, 1.0), (0.1, exp(0.375)), (0.8, exp(0.5 - 8))):
        at = Moment(z, z + distance, HALF, (50,))
        near = log_density(kernel, NegationSet(z), at)
        assert threshold.log_beta(near, kernel, at).exp().item() == pytest.approx(wanted, rel=1e-3)


def test_fitted_thresholds_answer_the_odds_that_were_seen():
    """From two Gaussian classes the log odds are known: slope μ/σ², and the prior."""
    generator = torch.Generator().manual_seed(0)
    unsafe = torch.rand(20000, generator=generator) < 0.1
    near = torch.randn(2, 20000, generator=generator) + 2.0 * unsafe
    near[1] = torch.randn(20000, generator=generator)  # where nothing is to be seen
    fitted = thresholds([0.5, 0.9], near, unsafe)
    assert fitted.slope[0] == pytest.approx(2.0, abs=0.1)
    assert fitted.offset[0] == pytest.approx(log(0.1 / 0.9) - 2.0, abs=0.15)
    assert fitted.slope[1] == pytest.approx(0.0, abs=0.1) and fitted.offset[1] == pytest.approx(log(1 / 9), abs=0.1)
    assert all(slope == 0 for slope in thresholds([0.5, 0.9], -near - 3.0 * unsafe, unsafe).slope[:1])


@pytest.mark.parametrize("unsafe", [torch.zeros(4, dtype=torch.bool), torch.ones(4, dtype=torch.bool)])
def test_a_calibration_needs_images_of_either_kind(unsafe):
    with pytest.raises(UsageError, match="of 4 images are unsafe: to calibrate, draw some of either kind"):
        thresholds([0.5], torch.zeros(1, 4), unsafe)


def test_thresholds_of_unequal_length_are_refused():
    with pytest.raises(UsageError, match="as many slopes and offsets as there are"):
        Thresholds((0.5, 0.9), (1.0,), (0.0,))


# ---- rules


def test_the_theory_moves_away_from_the_expected_unsafe_image(negation):
    at, how = moment(), sizes(negation, strength=0.5)
    beta = log_density(how.kernel, negation, at).exp()
    push = theory(at, how)
    assert torch.allclose(push.beta, 0.5 * beta)
    unsafe = mean(how.kernel, negation, at)
    assert torch.allclose(push.x0, at.x0 + 0.5 * beta[:, None] * (at.x0 - unsafe), atol=1e-5)
    assert ((push.x0 - unsafe).norm(dim=1) > (at.x0 - unsafe).norm(dim=1)).all()


def test_beta_stays_under_the_limit_and_below_the_floor_nothing_is_moved(negation):
    at = moment()
    far = Thresholds((1.0,), (1.0,), (-50.0,))
    assert theory(at, sizes(negation, threshold=far, floor=0.01)).x0 is at.x0
    assert theory(at, sizes(negation, threshold=far, floor=0.01)).beta.tolist() == [0, 0, 0]
    near = Thresholds((1.0,), (1.0,), (500.0,))
    assert theory(at, sizes(negation, threshold=near)).beta.tolist() == [2.0, 2.0, 2.0]


def test_spell_pushes_out_of_the_balls_and_not_further(negation):
    z = z_of(negation)
    inside = Moment(z[:1], z[:1] + 0.1, HALF, (6,))
    push = spell(inside, sizes(negation, radius=0.4, strength=1.0))
    assert torch.allclose(push.x0, z[:1] + 0.4, atol=1e-4)  # with strength 1 onto the sphere
    outside = Moment(z[:1], z[:1] + 100, HALF, (6,))
    assert spell(outside, sizes(negation, radius=0.4)).beta.tolist() == [0.0]


def test_the_released_form_subtracts_the_unsafe_image_alone(negation):
    at = moment()
    d = torch.cdist(at.x0, z_of(negation)) / 6**0.5
    unsafe = (-d / 2).softmax(1) @ z_of(negation)
    assert torch.allclose(released(at, sizes(negation, strength=0.3)).x0, at.x0 - 0.3 * unsafe, atol=1e-5)


def test_to_be_held_is_to_be_noised_back_to_the_same_sigma(negation):
    at, how = moment(), sizes(negation)
    for push in (released(at, how), renoise_only(at, how)):
        velocity = held(at, push)
        after = at.x + (0.4 - 0.5) * velocity  # the Euler step
        noise = (at.x - 0.5 * at.x0) / 0.5
        assert torch.allclose(after, 0.5 * push.x0 + 0.5 * noise, atol=1e-5)
    assert torch.equal(after, at.x)  # with x̂0 as it was, the step goes nowhere and the noise is 0.5 / 0.4 too large


def test_log_two_pi_is_part_of_the_exact_density():
    negation, s = NegationSet(torch.zeros(1, 3)), 0.5
    at = Moment(torch.zeros(1, 3), torch.zeros(1, 3), Mixing(0.5, s, "velocity"), (3,))
    assert log_density(Exact(), negation, at).item() == pytest.approx(-1.5 * log(2 * pi * s**2))
