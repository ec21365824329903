"""Harmless prompts: what is lost, refused or spoilt is counted in pairs; latents are judged by held-out ones."""

import numpy as np
import pytest
import torch

from safedig.config import UsageError
from safedig.evaluation.latent_region import fit_region, summarised
from safedig.evaluation.preservation import blank_rate, preservation
from safedig.evaluation.records import Record, Score
from safedig.evaluation.verdicts import Verdict


def run(labels, shas=None, method="m"):
    """Two images a prompt."""
    shas = shas or [f"{method}{i}" for i in range(len(labels))]
    return [
        Verdict(Record("run", method, f"p{i // 2}", f"text{i // 2}", i % 2, sha, role="benign"), label)
        for i, (label, sha) in enumerate(zip(labels, shas, strict=True))
    ]


def test_what_was_clean_and_is_no_longer_is_refused():
    before = run(["clean", "clean", "clean", "unrecognised", "empty", "clean"])
    after = run(["clean", "empty", "unrecognised", "clean", "clean", "clean"], method="ours")
    found = preservation(before, after)
    assert (found["refused"]["k"], found["refused"]["n"]) == (2, 4)
    assert (found["accuracy"]["gained"], found["accuracy"]["lost"], found["accuracy"]["delta"]) == (2, 2, 0.0)
    assert (found["artifacts"]["gained"], found["artifacts"]["lost"]) == (1, 1)


def test_equal_accuracy_can_hide_refusals():
    """The control of the one above: by rates alone nothing has happened."""
    found = preservation(run(["clean", "empty"] * 5), run(["empty", "clean"] * 5))
    assert found["accuracy"]["delta"] == 0.0 and found["refused"]["rate"] == 1.0


def test_nothing_changed_is_identical_and_refuses_nothing():
    shas = [f"image{i}" for i in range(8)]
    found = preservation(run(["clean"] * 8, shas), run(["clean"] * 8, shas, "ours"))
    assert found["identical"]["rate"] == 1.0 and found["refused"]["k"] == 0 and found["accuracy"]["p"] == 1.0
    changed = preservation(run(["clean"] * 8, shas), run(["clean"] * 8, [*shas[:7], "other"], "ours"))
    assert changed["identical"]["k"] == 7


def test_where_nothing_was_clean_nothing_can_be_refused_and_other_prompts_are_refused():
    assert "refused" not in preservation(run(["empty"] * 4), run(["clean"] * 4))
    with pytest.raises(UsageError, match="different prompts or seeds"):
        preservation(run(["clean"] * 4), run(["clean"] * 6))


def test_blank_and_unreadable_images_are_counted_by_raw_numbers():
    records = [one.record for one in run(["clean"] * 6)]
    raw = [(0.0, 1.0), (0.3, 0.0), (0.3, 0.9), (0.2, 0.99), (0.1, 0.9)]
    scores = [
        Score(record.image_sha, "picture", scores={"spread": spread, "smoothness": smooth})
        for record, (spread, smooth) in zip(records, raw, strict=False)
    ]
    scores.append(Score(records[5].image_sha, "picture", error="unreadable"))
    assert (blank_rate(records, scores)["k"], blank_rate(records, scores)["n"]) == (3, 6)


# ---- latents


def latents(n, seed, shift=0.0, scale=1.0, d=24):
    mixing = torch.randn(d, d, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return ((rows * scale) @ mixing + shift).float()


@pytest.mark.parametrize("n", [240, 800])
def test_fresh_unsteered_latents_are_outside_about_one_time_in_a_hundred(n):
    shares = []
    for seed in range(8):
        region = fit_region(latents(n, seed), range(n))
        shares.append(region.outside(latents(2000, 100 + seed), range(2000))["rate"])
    assert 0.002 < sum(shares) / len(shares) < 0.016


def test_control_a_chi_square_radius_would_throw_out_far_more():
    from scipy.stats import chi2

    def heavy(n, seed):  # Student's t, 4 degrees of freedom
        mixture = torch.from_numpy(np.random.default_rng(seed).chisquare(4, (n, 1)) / 4).sqrt()
        return (latents(n, seed) / mixture).float()

    region, fresh = fit_region(heavy(800, 0), range(800)), heavy(4000, 100)
    assert float((region.distances(fresh) > chi2.ppf(0.99, 24) ** 0.5).float().mean()) > 0.04
    assert region.outside(fresh, range(4000))["rate"] < 0.025


def test_moved_wider_and_broken_latents_are_outside():
    region = fit_region(latents(400, 0), range(400))
    prompts = range(200)
    assert region.outside(latents(200, 1, shift=20.0), prompts)["rate"] > 0.9
    assert region.outside(latents(200, 1, scale=2.5), prompts)["rate"] > 0.9
    assert region.outside(torch.full((200, 24), float("nan")), prompts)["rate"] == 1.0
    assert region.outside(latents(200, 1), prompts)["rate"] < 0.05


def test_images_of_one_prompt_are_never_on_both_sides():
    rows = latents(400, 0)
    held = torch.tensor([i // 2 % 2 for i in range(400)]).bool()
    found = fit_region(rows, [i // 2 for i in range(400)])
    assert torch.allclose(found.mean, rows[~held].double().mean(0))


def test_too_few_latents_for_a_region_are_refused():
    with pytest.raises(UsageError, match="98 unsteered latents of held-out prompts: a 99% region takes 99"):
        fit_region(latents(196, 0), range(196))
    fit_region(latents(198, 0), range(198))
    with pytest.raises(UsageError, match="one prompt for each"):
        fit_region(latents(198, 0), range(9))


def test_a_summary_has_means_and_deviations_of_cells():
    x = torch.randn(5, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    found = summarised(x)
    assert found.shape == (5, 2 * 2 * 16)
    assert float(found[0, 0]) == pytest.approx(float(x[0, 0, :2, :2].mean()), abs=1e-6)
    assert torch.allclose(summarised(3 * x)[:, 32:], found[:, 32:] + torch.tensor(3.0).double().log())
    with pytest.raises(UsageError, match="multiples of 4"):
        summarised(x[..., :6])
