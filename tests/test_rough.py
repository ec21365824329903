"""Scores in low precision are those of float32 up to rounding, and as whole numbers they have the same order."""

import pytest
import torch

from safedig.sae.memory import Memory
from safedig.sae.rough import rough_scores

BATCH, D_IN, D_SAE = 19, 40, 300
UNIT = 2.0**-8  # of what bfloat16 rounds
LEVEL = 1 / 127  # of the largest, what int8 rounds
DTYPES = ("bfloat16", "int8")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def given(d_sae=D_SAE):
    bias, length = normal(d_sae, seed=2), normal(d_sae, seed=3).abs() + 0.5
    return normal(BATCH, D_IN), normal(d_sae, D_IN, seed=1), bias, length


def exact(x, weight, bias, length):
    return (x @ weight.T + bias) * length


def rough(parts, dtype, memory=None):
    return rough_scores(*parts, dtype, memory or Memory()).view(torch.bfloat16).float()


def bound(dtype, x, weight, bias, length):
    """By Cauchy and Schwarz: two rounded factors, a rounded bias, and the rounded result."""
    longest = x.norm(dim=1)[:, None] * (weight * length[:, None]).norm(dim=1)
    result = UNIT * exact(x, weight, bias, length).abs()
    if dtype == "bfloat16":
        return 2.1 * UNIT * longest + UNIT * (bias * length).abs() + result
    # Half a level of each number, of the largest of all inputs and of a feature's; channels are nearly alike here.
    off = D_IN**0.5 * LEVEL * x.abs().max() * (weight * length[:, None]).norm(dim=1)
    off = off + D_IN**0.5 * LEVEL * x.norm(dim=1)[:, None] * (weight * length[:, None]).abs().amax(1)
    return off + result


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d_sae", [40, D_SAE, 1100, 2048])
def test_no_score_is_further_off_than_rounding_explains(dtype, d_sae):
    parts = given(d_sae)
    found = rough(parts, dtype)
    assert found.shape == (BATCH, d_sae) and ((found - exact(*parts)).abs() <= bound(dtype, *parts)).all()
    assert error(found, exact(*parts)) < (0.005 if dtype == "bfloat16" else 0.02)


def error(found, expected):
    """Relative to how far the scores lie apart."""
    return ((found - expected).std() / expected.std()).item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("left_out", ["bias", "length"])
def test_control_without_the_bias_or_the_length_they_would_be(left_out, dtype):
    x, weight, bias, length = given()
    bias, length = (0 * bias, length) if left_out == "bias" else (bias, length.new_ones(D_SAE))
    found = rough((x, weight, bias, length), dtype)
    assert not ((found - exact(*given())).abs() <= bound(dtype, *given())).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_positive_scores_as_whole_numbers_have_their_order(dtype):
    found = rough_scores(*given(), dtype, Memory())
    scores = found.view(torch.bfloat16)
    assert found.dtype == torch.int16 and (scores[found > 0] > 0).all() and (scores[found <= 0] <= 0).all()
    positive = scores > 0
    assert torch.equal(found[positive].argsort(stable=True), scores[positive].argsort(stable=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_is_written_over_and_nothing_of_before_is_left(dtype):
    memory = Memory()
    first = rough(given(), dtype, memory).clone()
    other = rough((10 * normal(BATCH, D_IN, seed=7), *given()[1:]), dtype, memory).clone()
    assert torch.equal(rough(given(), dtype, memory), first) and not torch.equal(first, other)


def test_in_int8_a_channel_far_out_leaves_the_others_their_levels():
    far = torch.ones(D_IN)
    far[3] = 300
    x, weight = normal(500, D_IN) * far, normal(64, D_IN, seed=1) / far
    parts = x, weight, torch.zeros(64), torch.ones(64)
    steps = x.abs().max() * LEVEL, weight.abs().amax(1, keepdim=True) * LEVEL
    alike = (x / steps[0]).round() @ (weight / steps[1]).round().T * steps[0] * steps[1].T
    assert error(rough(parts, "int8"), exact(*parts)) < 0.05 < 0.2 < error(alike, exact(*parts))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_and_features_of_zeros_score_their_bias(dtype):
    bias, length = torch.arange(8.0), torch.ones(8)
    for x, weight in ((torch.zeros(3, D_IN), normal(8, D_IN)), (normal(3, D_IN), torch.zeros(8, D_IN))):
        assert torch.equal(rough((x, weight, bias, length), dtype), bias.expand(3, 8))
