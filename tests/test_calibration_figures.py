"""The page of a dose–response run: legible, no text over another, counts in its title, the choice and budget in it."""

import dataclasses
import itertools

import pytest

from safedig.calibration_figures import doses_and_front
from safedig.evaluation.dose_response import Choice, choose
from tests.test_dose_response import PLAIN, A, made
from tests.test_evaluation_figures import luminance, overlapping, texts

SITES = ("transformer_blocks.0.img.resid_post", "txt.embed", "pooled.embed")


def outcomes(n=96):
    """Of three edits, five doses, two ε and two windows; sites with long names."""
    found = []
    for at, (edit, dose, epsilon, low) in enumerate(
        itertools.product(("repel", "blend", "replace"), (0.5, 0.75, 1.0, 1.5, 2.0), (0.05, 0.025), (0.0, 0.5))
    ):
        one = made(max(2, round(90 - 40 * dose)), 30, round(dose * 2), at % 5, dose=dose, n=n, epsilon=epsilon)
        setting = dataclasses.replace(A, dose=dose, epsilon=epsilon, edit=edit, sites=SITES, sigmas=(low, 1.0))
        found.append(dataclasses.replace(one, setting=setting))
    return found


CASES = {"chosen": 0.03, "none within": 0.001, "none safer": 0.03}


@pytest.fixture(scope="module", params=CASES)
def page(request):
    shown, budget = outcomes(), CASES[request.param]
    if request.param == "none safer":
        shown = [dataclasses.replace(one, unsafe=PLAIN.unsafe) for one in shown]
    choice = choose(PLAIN, shown, budget)
    return request.param, choice, budget, doses_and_front("tiny-flux", PLAIN, shown, choice, budget)


def test_no_text_overlaps_or_leaves_the_page_and_all_is_legible(page):
    assert overlapping(page[3]) == []
    assert min(one.get_fontsize() for one, _ in texts(page[3])) >= 8


def test_the_title_counts_what_was_chosen_or_says_that_nothing_was(page):
    name, choice, _, figure = page
    words = " ".join(figure.get_suptitle().split())
    one = choice.best or choice.nearest
    says = {"chosen": "Chosen:", "none within": "None within the budget; nearest", "none safer": "No setting is safer"}
    assert says[name] in words and "60 settings" in words and "unsafe 95/100" in words
    assert one is None or (f"unsafe {one.unsafe['k']}/96" in words and f"lost {one.lost['k']}/96" in words)


def test_axes_have_units_and_the_budget_is_a_line_in_both_panels_of_what_is_lost(page):
    _, _, budget, figure = page
    _, _, below, plane = figure.axes
    assert all("%" in axes.get_ylabel() for axes in figure.axes) and "%" in plane.get_xlabel()
    assert "multiples" in below.get_xlabel()
    dashed = [line for axes in (below, plane) for line in axes.lines if line.get_linestyle() == "--"]
    assert len(dashed) == 2
    assert [float(v) for v in dashed[0].get_ydata()] == pytest.approx([100 * budget] * 2)
    assert [float(v) for v in dashed[1].get_xdata()] == pytest.approx([100 * budget] * 2)


def test_the_star_stands_where_the_choice_is(page):
    _, choice, _, figure = page
    one = choice.best or choice.nearest
    stars = [line for line in figure.axes[3].lines if line.get_marker() == "*"]
    if one is None:
        assert stars == []
        return
    assert [float(stars[0].get_xdata()[0]), float(stars[0].get_ydata()[0])] == pytest.approx(
        [100 * one.lost["rate"], 100 * one.unsafe["rate"]]
    )


def test_edits_differ_in_colour_and_mark_and_only_the_best_ladder_of_each_is_in_full(page):
    figure = page[3]
    above = figure.axes[0]
    full = [box.lines[0] for box in above.containers]
    assert len({line.get_color() for line in full}) == len({line.get_marker() for line in full}) == 3
    assert all(1.05 / (luminance(line.get_color()) + 0.05) > 1.8 for line in full), "against white"
    assert sum(line.get_alpha() == 0.3 for line in above.lines) == 9, "three of four conditions of each edit are pale"


def test_one_setting_is_enough_and_none_is_refused():
    one = made(5, 9, 1)
    figure = doses_and_front("tiny-flux", PLAIN, [one], Choice(one, None), 0.03)
    assert overlapping(figure) == []
    with pytest.raises(ValueError, match="nothing to show"):
        doses_and_front("tiny-flux", PLAIN, [], Choice(None, None), 0.03)
