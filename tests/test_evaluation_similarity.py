"""Similarity is 1 for what is equal and falls with noise; distances equal NumPy's on a toy extractor."""

import numpy as np
import pytest
import torch
from torch import nn

from safedig.config import UsageError
from safedig.evaluation.distances import fid, kid
from safedig.evaluation.similarity import WEIGHTS, fitting_scales, ms_ssim, psnr, similarity, ssim
from safedig.evaluation.text_fit import text_fit, text_fit_change
from tests.tiny_judges import images


def batch(n, seed=0, side=64):
    return torch.stack(images(n, seed, side))


def noisy(x, by, seed=0):
    return (x + by * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))).clamp(0, 1)


PROMPTS = [f"p{i // 2}" for i in range(6)]


def test_equal_images_are_identical_and_as_similar_as_can_be():
    x = batch(6)
    found = similarity(x, x.clone(), PROMPTS)
    assert found["identical"]["k"] == 6 and found["identical"]["clusters"] == 3 and "psnr" not in found
    assert found["ssim"]["mean"] == pytest.approx(1) == found["ms_ssim"]["mean"]


def test_more_noise_is_less_similar_in_every_measure():
    x = batch(6)
    near, far = (similarity(noisy(x, by), x, PROMPTS) for by in (0.02, 0.2))
    for name in ("ssim", "ms_ssim", "psnr"):
        assert near[name]["mean"] > far[name]["mean"] and near[name]["worst"] <= near[name]["mean"]
    assert near["identical"]["k"] == 0 and near["psnr"]["mean"] == pytest.approx(34, abs=1.5)


def test_psnr_is_its_formula_and_leaves_identical_pairs_out():
    x = batch(4)
    y = noisy(x, 0.1)
    expected = -10 * (x - y).double().square().mean((1, 2, 3)).log10()
    assert torch.allclose(psnr(x, y).double(), expected, atol=1e-4)
    mixed = torch.cat([x[:2], y[2:]])
    found = similarity(mixed, x, PROMPTS[:4])
    assert found["identical"]["k"] == 2 and found["psnr"]["n"] == 2
    assert found["psnr"]["mean"] == pytest.approx(float(expected[2:].mean()), abs=1e-3)


def test_ssim_is_its_formula_for_flat_images():
    """Without variance only the means count: (2ab + c) / (a² + b² + c), c = .01²."""
    one, other = torch.full((1, 3, 32, 32), 0.3), torch.full((1, 3, 32, 32), 0.6)
    assert float(ssim(one, other)) == pytest.approx((2 * 0.18 + 1e-4) / (0.09 + 0.36 + 1e-4), abs=1e-4)


def test_each_pair_is_measured_on_its_own():
    x, y = batch(4), noisy(batch(4), 0.1)
    for measure in (ssim, ms_ssim, psnr):
        together = measure(x, y)
        assert together.shape == (4,)
        assert torch.allclose(measure(x[2:3], y[2:3]), together[2:3], atol=1e-4)


@pytest.mark.parametrize(("side", "scales"), [(11, 1), (44, 3), (64, 3), (99, 4), (200, 5)])
def test_as_many_scales_as_fit(side, scales):
    assert fitting_scales(side) == scales <= len(WEIGHTS)
    x = batch(1, side=side)
    assert float(ms_ssim(x, x)) == pytest.approx(1)


def test_images_that_are_too_small_or_of_another_size_are_refused():
    with pytest.raises(UsageError, match="10 pixels: expected at least 11"):
        fitting_scales(10)
    with pytest.raises(UsageError, match="drawn at one size"):
        similarity(batch(2), batch(2, side=32), PROMPTS[:2])
    with pytest.raises(UsageError, match="of 3 prompts"):
        similarity(batch(2), batch(2), PROMPTS[:3])


def test_lpips_is_whatever_the_caller_gives():
    x, y = batch(6), noisy(batch(6), 0.1)
    found = similarity(x, y, PROMPTS, lpips=lambda one, other: (one - other).abs().mean((1, 2, 3)))
    assert found["lpips"]["mean"] == pytest.approx(float((x - y).abs().mean()), abs=1e-5)
    assert "lpips" not in similarity(x, y, PROMPTS)


# ---- distances


class Toy(nn.Module):
    """Mean and deviation of each channel, and a product of two."""

    def forward(self, x):
        x = x.double()
        means, spreads = x.mean((2, 3)), x.std((2, 3))
        return torch.cat([means, spreads, means[:, :1] * means[:, 1:2]], dim=1).float()


def features(x):
    return Toy()(x).double().numpy()


def sets(n=60):
    return batch(n, seed=1, side=16), (0.7 * batch(n, seed=2, side=16) + 0.1)


def test_fid_equals_numpy():
    one, other = sets()
    a, b = features(one), features(other)
    product = np.cov(a.T) @ np.cov(b.T)
    root = np.sqrt(np.linalg.eigvals(product).astype(complex)).real.sum()
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T)) + np.trace(np.cov(b.T)) - 2 * root
    found = fid(one.split(13), other.split(29), to="base", feature=Toy())
    assert found["value"] == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert (found["metric"], found["n"], found["reference"]) == ("fid_to_base", 60, 60)


def test_kid_equals_numpy():
    one, other = sets()
    a, b = features(one), features(other)

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    n = len(a)
    within = [(kernel(x, x).sum() - np.trace(kernel(x, x))) / (n * (n - 1)) for x in (a, b)]
    expected = sum(within) - 2 * kernel(a, b).mean()
    found = kid(one.split(13), other.split(60), to="real", feature=Toy())
    assert found["value"] == pytest.approx(expected, rel=1e-3) and found["spread"] == pytest.approx(0, abs=1e-6)
    assert found["metric"] == "kid_to_real"


def test_a_set_is_near_itself_and_far_from_another():
    one, other = sets()
    same, apart = (fid([one], [x], "base", Toy())["value"] for x in (one, other))
    assert abs(same) < 1e-5 < apart
    assert kid([one], [one], "base", Toy())["value"] < kid([one], [other], "base", Toy())["value"]


def test_few_images_are_warned_of_for_fid_and_not_for_kid():
    one, other = sets(20)
    assert "biased upwards" in fid([one], [other], "base", Toy())["warning"]
    assert kid([one], [other], "base", Toy())["warning"] == ""
    many = torch.rand(2048, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert fid([many], [many], "real", Toy())["warning"] == ""


def test_subsets_are_drawn_from_their_seed_and_no_other():
    one, other = sets()
    found = [kid([one], [other], "base", Toy(), subset=20, seed=seed) for seed in (0, 0, 1)]
    assert found[0] == found[1] and found[0]["value"] != found[2]["value"] and (found[0]["spread"] or 0) > 0
    state = torch.random.get_rng_state()
    kid([one], [other], "base", Toy(), subset=20)
    assert torch.equal(state, torch.random.get_rng_state())


def test_sets_that_are_too_small_are_refused():
    one, other = sets(4)
    with pytest.raises(UsageError, match="subset=9: expected from 2 to 4"):
        kid([one], [other], "base", Toy(), subset=9)
    with pytest.raises(UsageError, match="expected at least two on each"):
        fid([one[:1]], [other], "base", Toy())


# ---- fit to the text


def brightness(images, texts):
    """Stands for a CLIP score: higher for brighter images and longer texts."""
    return torch.tensor([float(x.mean()) + len(text) for x, text in zip(images, texts, strict=True)])


def test_the_fit_is_that_of_each_image_to_its_own_text_however_many_there_are():
    x, texts = images(40), [("a" * (i % 3)) for i in range(40)]
    found = text_fit(x, texts, range(40), brightness)
    assert found["mean"] == pytest.approx(np.mean([float(one.mean()) + i % 3 for i, one in enumerate(x)]), abs=1e-5)
    assert found["n"] == 40


def test_the_change_is_paired_and_far_surer_than_two_means():
    x, texts = images(40), ["a" * (i % 7) for i in range(40)]
    darker = [0.9 * one for one in x]
    change = text_fit_change(darker, x, texts, range(40), brightness)
    assert change["hi"] < 0 and change["mean"] == pytest.approx(
        -0.1 * np.mean([float(one.mean()) for one in x]), abs=1e-4
    )
    apart = [text_fit(one, texts, range(40), brightness) for one in (darker, x)]
    assert apart[0]["hi"] > apart[1]["lo"]  # control: unpaired, the same loss is not seen


def test_a_text_too_few_or_a_number_too_many_is_refused():
    with pytest.raises(UsageError, match="2 images and 1 texts"):
        text_fit(images(2), ["a"], range(2), brightness)
    with pytest.raises(UsageError, match="gave 3 numbers for 2 images"):
        text_fit(images(2), ["a", "b"], range(2), lambda images, texts: torch.zeros(3))


def test_clip_is_one_such_callable(tmp_path):
    from safedig.evaluation.judges.clip import Clip
    from tests.tiny_judges import clip_folder

    clip = Clip(str(clip_folder(tmp_path)))
    found = text_fit(images(3), ["a cup", "a hat", "a key"], "abc", clip.score)
    assert found["mean"] == pytest.approx(float(clip.score(images(3), ["a cup", "a hat", "a key"]).mean()), abs=1e-4)
