"""The site doctor's numbers are those of data whose numbers are known, and what it predicts comes true."""

from dataclasses import asdict, replace

import pytest
import torch

from safedig.sae.doctor import compared, diagnose
from safedig.sae.options import SAEOptions
from safedig.sae.train import train_on

D_IN = 32


def gaussian(rows=6000, spread=None, mean=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, D_IN, generator=generator)
    return x * (torch.ones(D_IN) if spread is None else spread) + (torch.zeros(D_IN) if mean is None else mean)


def test_a_gaussian_has_kurtosis_three_full_rank_and_no_outlier():
    found = diagnose(gaussian(), 4, 4)
    assert found.kurtosis == pytest.approx(3, abs=0.06) and found.effective_rank == pytest.approx(D_IN, rel=0.01)
    assert found.mean_ratio < 0.05 and found.outlier_channels == () and found.distinct == 1.0 and found.far_out == 0
    assert found.dead < 0.01 and found.dead_uncentred < 0.01 and not found.centre
    assert (found.rows, found.d_in, found.k, found.expansion) == (6000, D_IN, 4, 16)


def test_control_heavy_tails_and_few_directions_are_seen():
    heavy = gaussian().pow(3)
    assert diagnose(heavy, 4, 4).kurtosis > 10
    few = diagnose(gaussian(spread=torch.tensor([1.0] * 4 + [0.0] * 28)), 4, 4)
    assert few.effective_rank == pytest.approx(4, rel=0.01) and few.k == 2


@pytest.mark.parametrize("ratio", [0.5, 2.0, 8.0])
def test_the_ratio_of_mean_and_deviation_is_what_was_put_in(ratio):
    direction = torch.nn.functional.normalize(torch.randn(D_IN, generator=torch.Generator().manual_seed(1)), dim=0)
    found = diagnose(gaussian(mean=ratio * D_IN**0.5 * direction), 4, 4)
    assert found.mean_ratio == pytest.approx(ratio, rel=0.02)


def test_the_further_the_mean_the_more_die_unless_it_is_taken_out():
    direction = torch.nn.functional.normalize(torch.randn(D_IN, generator=torch.Generator().manual_seed(1)), dim=0)
    found = [diagnose(gaussian(mean=ratio * D_IN**0.5 * direction), 4, 4) for ratio in (0, 1, 2, 8, 30)]
    uncentred = [one.dead_uncentred for one in found]
    assert uncentred == sorted(uncentred) and uncentred[0] < 0.01 and uncentred[-1] > 0.5
    assert max(one.dead for one in found) < 0.01 and [one.centre for one in found] == [False, True, True, True, True]


def test_outlier_channels_are_named():
    spread = torch.ones(D_IN)
    spread[[3, 17]] = 40.0
    assert diagnose(gaussian(spread=spread), 4, 4).outlier_channels == (3, 17)


def test_repeated_and_far_out_rows_are_counted():
    x = gaussian(2000)
    assert diagnose(x[:10].repeat(200, 1), 4, 4).distinct == 10 / 2000
    assert diagnose(x[:10].repeat(200, 1), 4, 4).expansion == 1, "no wider than there are rows to learn from"
    x[:3] += 1e4
    assert diagnose(x, 4, 4).far_out == pytest.approx(3 / 2000)


def test_a_site_that_does_not_move_breaks_nothing():
    found = diagnose(torch.ones(50, D_IN), 2, 2)
    assert found.kurtosis == 0 and found.mean_ratio > 1e6 and all(v == v for v in asdict(found).values())


def test_what_is_predicted_comes_true():
    """Without the auxiliary loss, and with a step size too small to move anything, just the predicted ones are dead."""
    spread = torch.logspace(0, -3, D_IN)
    for x in (gaussian(spread=spread), gaussian()):
        options = SAEOptions(expansion=8, k=2, steps=200, batch_size=100, lr=1e-7, aux=0.0)
        found = diagnose(x, options.expansion, options.k)
        sae = train_on(x, options)
        told = compared(found, sae.metadata)
        assert told["dead_trained"] == pytest.approx(told["dead_predicted"], abs=0.06)
        assert told["revived"] == pytest.approx(found.dead - sae.metadata["dead"])
    assert diagnose(gaussian(spread=spread), 8, 2).dead > 0.05 > 0.01 > diagnose(gaussian(), 8, 2).dead


def test_the_same_sample_gives_the_same_diagnosis():
    x = gaussian()
    assert diagnose(x, 4, 4) == diagnose(x, 4, 4)
    assert replace(diagnose(x, 4, 4), dead=0.0, dead_uncentred=0.0) == replace(
        diagnose(x, 2, 9), dead=0.0, dead_uncentred=0.0
    )
