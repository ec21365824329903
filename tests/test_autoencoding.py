"""The autoencoder's objective: what it is shown, what it is charged for, and latents of unit variance at no cost."""

import copy

import numpy as np
import pytest
import torch

from safedig.tiny.autoencoding import Autoencoding, _gradient_l1, to_signed, unit_variance
from safedig.tiny.scenes import SIZE


@pytest.fixture(scope="module")
def objective():
    with torch.random.fork_rng():
        return Autoencoding(0, bank=24)


@pytest.fixture
def images(objective):
    return to_signed(objective.bank)


def posterior(vae, images):
    with torch.no_grad():
        return vae.encode(images).latent_dist


def test_pictures_go_from_bytes_to_minus_one_and_one():
    pixels = np.array([[[[0, 255, 51]]]], np.uint8)
    assert to_signed(pixels).flatten().tolist() == pytest.approx([-1, 1, -0.6])
    assert to_signed(np.zeros((2, 4, 5, 3), np.uint8)).shape == (2, 3, 4, 5)


def test_folding_makes_the_latents_unit_and_changes_no_picture(objective, images):
    vae = copy.deepcopy(objective.vae).eval()
    before = posterior(vae, images)
    with torch.no_grad():
        pictures = vae.decode(before.mean).sample
    assert (before.mean.std(dim=(0, 2, 3)) - 1).abs().max() > 0.1, "control: there is something to fold"
    unit_variance(vae, images)
    after = posterior(vae, images)
    torch.testing.assert_close(after.mean.std(dim=(0, 2, 3)), torch.ones(8), atol=1e-4, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(vae.decode(after.mean).sample, pictures, atol=1e-4, rtol=1e-4)
    scale = before.mean.std(dim=(0, 2, 3), keepdim=True)
    torch.testing.assert_close(after.std * scale, before.std, atol=1e-5, rtol=1e-4)


def test_the_loss_is_finite_reaches_every_weight_and_comes_from_the_generator(objective):
    first, again, other = (objective.loss(np.random.default_rng(seed), 0.0)["loss"] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    objective.module.zero_grad(set_to_none=True)
    first.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in objective.module.parameters())
    assert all(p.grad.any() for p in objective.module.parameters() if p.ndim > 1)


@pytest.mark.parametrize(("progress", "side"), [(0.0, Autoencoding.CROP), (0.74, Autoencoding.CROP), (0.75, SIZE)])
def test_crops_come_first_and_whole_pictures_at_the_end(objective, monkeypatch, progress, side):
    shapes, encode = [], objective.vae.encode
    monkeypatch.setattr(objective.vae, "encode", lambda x: (shapes.append(tuple(x.shape)), encode(x))[1])
    objective.loss(np.random.default_rng(0), progress)
    assert shapes == [(Autoencoding.batch, 3, side, side)]


def test_edges_are_charged_for():
    flat, step = torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8)
    step[..., 4:] = 1
    assert _gradient_l1(step, step) == 0 and _gradient_l1(flat + 0.5, flat) == 0
    assert _gradient_l1(flat, step) == pytest.approx(1 / 7)


def test_what_is_published_loads_again_and_has_unit_latents(objective, tmp_path, images):
    from diffusers import AutoencoderKL

    objective.publish(copy.deepcopy(objective.vae), tmp_path)
    vae = AutoencoderKL.from_pretrained(tmp_path)
    assert vae.config.scaling_factor == 1.0 and vae.config.shift_factor == 0.0
    torch.testing.assert_close(posterior(vae, images).mean.std(dim=(0, 2, 3)), torch.ones(8), atol=1e-3, rtol=0)


def test_everything_the_loss_needs_follows_the_autoencoder_to_its_device():
    """Tensors on the meta device refuse company from anywhere else, as those of an accelerator do."""
    with torch.random.fork_rng():
        elsewhere = Autoencoding(0, bank=4)
    elsewhere.module.to("meta")
    assert elsewhere.loss(np.random.default_rng(0), 0.0)["loss"].device.type == "meta"
