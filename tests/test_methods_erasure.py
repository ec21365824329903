"""LEACE: after it nothing linear tells harm from safety, and no smaller change would do."""

import torch

from safedig.evaluation.methods.erasure import Moments
from safedig.hooks import Context
from safedig.sites import Site


def data(n=400, d=6):
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(d, d, generator=generator)
    z = (torch.rand(n, generator=generator) < 0.4).double()
    shift = torch.randn(d, generator=generator).double()
    x = torch.randn(n, d, generator=generator).double() @ mix.double() + z[:, None] * shift + 3
    return x, z


def fitted(x, z):
    moments = Moments(x.shape[1])
    moments.add(x[z == 1], 1.0)
    moments.add(x[z == 0], 0.0)
    return moments.eraser()


def covariance(x, z):
    return ((x - x.mean(0)) * (z - z.mean())[:, None]).mean(0)


def test_what_is_left_has_no_covariance_with_harm():
    x, z = data()
    erased = x + fitted(x, z)(x.float()).double()
    assert covariance(x, z).norm() > 0.1, "so that there was something to erase"
    assert covariance(erased, z).norm() < 1e-5
    assert (erased.mean(0) - x.mean(0)).norm() < 1e-4, "the mean stays"


def test_control_half_of_it_erases_half():
    x, z = data()
    half = x + 0.5 * fitted(x, z)(x.float()).double()
    assert torch.allclose(covariance(half, z), 0.5 * covariance(x, z), atol=1e-5)


def test_it_changes_less_than_projecting_out_the_difference_of_the_means():
    """Least in the mean square, of all affine maps that erase; that projection is one of them."""
    x, z = data()
    delta = fitted(x, z)(x.float()).double()
    unit = covariance(x, z) / covariance(x, z).norm()
    projection = -((x - x.mean(0)) @ unit)[:, None] * unit
    assert covariance(x + projection, z).norm() < 1e-9
    assert delta.square().sum() < 0.99 * projection.square().sum()


def test_directions_that_do_not_occur_are_left_alone():
    x, z = data()
    wide = torch.cat([x, torch.zeros(len(x), 2)], 1)
    delta = fitted(wide, z)(wide.float())
    assert delta.isfinite().all() and torch.allclose(delta[:, 6:], torch.zeros(len(x), 2), atol=1e-6)
    assert torch.allclose(delta[:, :6], fitted(x, z)(x.float()), atol=1e-3)


def test_only_conditional_rows_are_erased():
    x, z = data()
    site = Site.parse("txt.embed")
    function = fitted(x, z).function(1.0)
    tokens = x.float().reshape(2, 200, 6)
    out = function(tokens, Context(site, 0, 1.0, ("uncond", "cond")))
    assert out is not None and torch.equal(out[0], tokens[0]) and not torch.allclose(out[1], tokens[1])
