"""A gate opens above its threshold, at the σ and in the rows that are asked for."""

import pytest
import torch

from safedig.config import UsageError
from safedig.hooks import Context
from safedig.sites import Site
from safedig.steering.gate import Gate

TXT = Site.parse("txt.embed")


def at(sigma=0.5, rows=("cond", "cond")):
    return Context(TXT, 0, sigma, rows)


@pytest.mark.parametrize("rows", ["cond", "all"])
def test_a_gate_opens_above_its_threshold_in_the_rows_that_are_steered(rows):
    """2.0 is not above 2."""
    height = torch.tensor([[2.0, 2.1, 2.1, 1.9]]).repeat(2, 1)
    expected = torch.tensor([[False, True, True, False]]).repeat(2, 1)
    if rows == "cond":
        expected[0] = False
    assert torch.equal(Gate(2.0, rows=rows)(height, at(rows=("uncond", "cond"))), expected)


def test_the_scope_decides_whether_one_token_opens_the_gate_for_its_whole_image():
    height = torch.tensor([[3.0, 0.1, 0.0], [1.0, 1.0, 1.9]])
    assert Gate(2.0, "token")(height, at()).tolist() == [[True, False, False], [False] * 3]
    assert Gate(2.0, "image")(height, at()).tolist() == [[True] * 3, [False] * 3]


def test_what_other_sites_have_opened_for_opens_it_where_it_is_of_images_and_in_rows_that_are_steered():
    height, opened = torch.zeros(2, 3), torch.tensor([True, False])
    assert Gate(2.0, "image")(height, at(), opened).tolist() == [[True] * 3, [False] * 3]
    assert not Gate(2.0, "image")(height, at()).any(), "the control"
    assert not Gate(2.0, "token")(height, at(), opened).any()
    assert not Gate(2.0, "image")(height, at(rows=("uncond", "cond")), opened).any()
    assert Gate(2.0, "image", rows="all")(height, at(rows=("uncond", "cond")), opened)[0].all()
    assert not Gate(2.0, "image", sigmas=(0.6, 1.0))(height, at(), opened).any()


def test_the_window_holds_both_its_ends_and_nothing_beyond():
    height, gate = torch.ones(2, 3), Gate(0.0, sigmas=(0.25, 0.75))
    for sigma, opens in ((0.25, True), (0.5, True), (0.75, True), (0.24, False), (0.76, False)):
        assert gate(height, at(sigma)).all() == opens and gate(height, at(sigma)).any() == opens
        assert gate.steered(at(sigma)) == [opens, opens]


def test_a_window_whose_ends_were_written_with_six_digits_holds_the_levels_they_were():
    for sigma in torch.linspace(0.3, 1.0, 50, dtype=torch.float64).tolist():
        assert Gate(0.0, sigmas=(round(sigma, 6), 1.0)).steered(at(sigma)) == [True, True]
        assert Gate(0.0, sigmas=(0.0, round(sigma, 6))).steered(at(sigma)) == [True, True]


def test_codes_that_are_no_numbers_do_not_open_it():
    """The image is lost anyway, and what would be written is no number either."""
    assert not Gate(0.0)(torch.full((2, 3), float("nan")), at()).any()


def test_a_window_the_wrong_way_round_is_refused():
    with pytest.raises(UsageError, match="expected the lowest σ first"):
        Gate(0.0, sigmas=(0.8, 0.2))
