"""Scores in bfloat16 are those of float32 up to its rounding, and as whole numbers they have the same order."""

import pytest
import torch

from safedig.sae.memory import Memory
from safedig.sae.rough import rough_scores

BATCH, D_IN, D_SAE = 19, 40, 300
UNIT = 2.0**-8  # of what bfloat16 rounds


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def given():
    return normal(BATCH, D_IN), normal(D_SAE, D_IN, seed=1), normal(D_SAE, seed=2), normal(D_SAE, seed=3).abs() + 0.5


def exact(x, weight, bias, length):
    return (x @ weight.T + bias) * length


def bound(x, weight, bias, length):
    """By Cauchy and Schwarz: two rounded factors, a rounded bias, and the rounded result."""
    longest = x.norm(dim=1)[:, None] * (weight * length[:, None]).norm(dim=1)
    return 2.1 * UNIT * longest + UNIT * (bias * length).abs() + UNIT * exact(x, weight, bias, length).abs()


def test_no_score_is_further_off_than_rounding_explains():
    rough = rough_scores(*given(), Memory()).view(torch.bfloat16).float()
    assert ((rough - exact(*given())).abs() <= bound(*given())).all()


@pytest.mark.parametrize("left_out", ["bias", "length"])
def test_control_without_the_bias_or_the_length_they_would_be(left_out):
    x, weight, bias, length = given()
    bias, length = (0 * bias, length) if left_out == "bias" else (bias, length.new_ones(D_SAE))
    rough = rough_scores(x, weight, bias, length, Memory()).view(torch.bfloat16).float()
    assert not ((rough - exact(*given())).abs() <= bound(*given())).all()


def test_positive_scores_as_whole_numbers_have_their_order():
    found = rough_scores(*given(), Memory())
    scores = found.view(torch.bfloat16)
    assert found.dtype == torch.int16 and (scores[found > 0] > 0).all() and (scores[found <= 0] <= 0).all()
    positive = scores > 0
    assert torch.equal(found[positive].argsort(stable=True), scores[positive].argsort(stable=True))


def test_memory_is_written_over_and_nothing_of_before_is_left():
    memory = Memory()
    first = rough_scores(*given(), memory).clone()
    other = rough_scores(10 * normal(BATCH, D_IN, seed=7), *given()[1:], memory).clone()
    assert torch.equal(rough_scores(*given(), memory), first) and not torch.equal(first, other)
