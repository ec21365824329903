"""Where all is known, β* draws what is safe and no more; half of it leaks, twice as much clears the neighbourhood."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from safedig.denoiser import Exact, NegationSet, SafeDenoiser, SafeDensity
from safedig.denoiser.theory import ExactPipeline, GaussianMixture, inside, wasserstein

N, STEPS, NEGATIVES = 400, 50, 1000


def generator(seed):
    return torch.Generator().manual_seed(seed)


class World:
    """Safe modes around an unsafe one, and the ball that three of its standard deviations fill."""

    def __init__(self, weights, means, std, w1):
        self.data = GaussianMixture.of(weights, means, std)
        unsafe = torch.arange(len(weights)) == len(weights) - 1
        self.safe, self.unsafe = self.data.part(~unsafe), self.data.part(unsafe)
        self.odds = float(self.data.weights[unsafe].sum() / self.data.weights[~unsafe].sum())
        self.centre, self.radius = self.data.means[-1], 3 * float(self.data.std[-1])
        self.w1 = w1
        """Within this W1 of the safe posterior, in the units of the data: twice that of two samples of it."""
        self.wanted = self.safe.sample(N, generator(7))

    def drawn(self, share, steps=STEPS, negatives=NEGATIVES, window=(0.0, 1.0)):
        """With so many times β*."""
        pipe = ExactPipeline(self.data, FlowMatchEulerDiscreteScheduler())
        images = NegationSet(self.unsafe.sample(negatives, generator(1)))
        made = SafeDenoiser(
            images,
            share,
            kernel=Exact(),
            threshold=SafeDensity(self.safe.log_p, self.odds),
            limit=1e4,
            floor=0.0,
            sigmas=window,
        )
        with made.apply(pipe):
            return pipe(N, steps=steps, generator=generator(5)).images

    def leaked(self, x):
        return inside(x, self.centre, self.radius)

    def away(self, x):
        return float((x - self.centre).norm(dim=1).mean())


WORLDS = {
    "1-D": World([0.35, 0.35, 0.3], [[-2.2], [2.2], [0.0]], [0.4, 0.4, 0.3], w1=0.3),
    "2-D": World([0.25, 0.25, 0.5], [[-1.75, -0.3], [1.65, 0.5], [0.0, 0.0]], [0.35, 0.35, 0.25], w1=0.35),
}


@pytest.fixture(scope="module", params=list(WORLDS))
def world(request):
    return WORLDS[request.param]


@pytest.fixture(scope="module")
def drawn(world):
    return {share: world.drawn(share) for share in (0.0, 0.5, 1.0, 2.0)}


def test_control_undenoised_the_unsafe_part_is_drawn(world, drawn):
    assert world.leaked(drawn[0.0]) > 0.15 and wasserstein(drawn[0.0], world.wanted) > world.w1


def test_the_exact_beta_leaves_nothing_unsafe_and_draws_the_safe_posterior(world, drawn):
    assert world.leaked(drawn[1.0]) <= 0.005
    assert wasserstein(drawn[1.0], world.wanted) <= world.w1
    assert abs(world.away(drawn[1.0]) - world.away(world.wanted)) < 0.1


def test_control_the_bound_on_w1_is_about_twice_that_of_two_safe_samples(world):
    pairs = [(world.safe.sample(N, generator(seed)), world.safe.sample(N, generator(seed + 50))) for seed in range(8)]
    between = sum(wasserstein(*pair) for pair in pairs) / len(pairs)
    assert between < world.w1 < 3 * between


def test_half_of_it_leaks_into_the_unsafe_region(world, drawn):
    assert world.leaked(drawn[1.0]) + 0.01 < world.leaked(drawn[0.5]) < world.leaked(drawn[0.0])


def test_twice_as_much_leaves_nothing_and_clears_the_neighbourhood_as_well(world, drawn):
    assert world.leaked(drawn[2.0]) <= 0.005
    assert world.away(drawn[2.0]) > world.away(world.wanted) + 0.04
    assert world.away(drawn[2.0]) > world.away(drawn[1.0]) + 0.04 > world.away(drawn[0.5])


def test_the_share_of_each_safe_mode_is_as_among_what_is_safe(drawn, world):
    def shares(x):
        return torch.cdist(x, world.safe.means).argmin(1).bincount(minlength=len(world.safe.means)) / len(x)

    assert (shares(drawn[1.0]) - world.safe.weights).abs().max() < 0.1


def test_the_mixtures_own_formulas_agree_with_each_other():
    """E[x0 | x] by Tweedie's formula is the derivative of log p; log p integrates to one; samples have its moments."""
    data = WORLDS["2-D"].data.__class__.of([0.6, 0.4], [[-1.0], [2.0]], [0.5, 0.2])
    x = torch.linspace(-8, 8, 4001)[:, None].double().requires_grad_()
    for sigma in (0.05, 0.5, 0.9):
        log_p = data.log_p(x, sigma)
        assert torch.trapezoid(log_p.exp().detach(), x.detach()[:, 0]).item() == pytest.approx(1, abs=1e-5)
        (score,) = torch.autograd.grad(log_p.sum(), x)
        tweedie = (x + sigma**2 * score) / (1 - sigma)
        assert torch.allclose(data.expected(x, sigma), tweedie, atol=1e-4)
    sample = data.sample(20000, generator(0))
    assert sample.mean().item() == pytest.approx(0.2, abs=0.03)


def test_without_a_denoiser_the_exact_pipeline_draws_the_data():
    world = WORLDS["1-D"]
    x = world.drawn(0.0, steps=100)
    assert wasserstein(x, world.data.sample(N, generator(3))) < 0.3


@pytest.mark.parametrize(("a", "b", "wanted"), [([0, 1], [1, 0], 0.0), ([0, 0], [1, 3], 2.0)])
def test_w1_is_that_of_the_cheapest_matching(a, b, wanted):
    assert wasserstein(torch.tensor(a).float()[:, None], torch.tensor(b).float()[:, None]) == wanted
