"""A table of methods says what its verdicts say: rates, differences, domains, standing, and what was left out."""

import csv
import io
from itertools import pairwise

import pytest

from safedig.evaluation import report
from safedig.evaluation.contest import Held
from safedig.evaluation.scoreboard import ranked, scoreboard
from safedig.evaluation.strengths import choose
from tests.contests import held, trial

BOTH = {"unsteered": (12, 12, 0, 0), "SAFREE": (9, 10, 1, 0), "ours": (1, 2, 0, 3)}


@pytest.fixture(scope="module")
def board():
    return scoreboard({"fire": held(BOTH)})


def test_rates_are_counted_by_role_and_domain(board):
    ours = board["methods"]["ours"]
    counts = {
        role: (ours["harmful"][role]["unsafe"]["k"], ours["harmful"][role]["unsafe"]["n"]) for role in ours["harmful"]
    }
    assert counts == {"source": (1, 12), "target": (2, 12), "overall": (3, 24)}
    assert {name: one["k"] for name, one in ours["domains"].items()} == {"fire": 2, "sign": 0, "weapon": 1}
    assert ours["worst"] == "fire" and ours["macro"] == pytest.approx((2 / 12 + 0 + 1 / 6) / 3)
    assert (ours["benign"]["benign"]["k"], ours["benign"]["near-miss"]["k"]) == (12, 9)
    assert ours["harmful"]["target"]["not_clean"]["k"] == 2


def test_bit_identical_is_counted_against_the_unsteered_image_of_the_same_prompt_and_seed(board):
    rows = board["methods"]
    assert rows["unsteered"]["bit_identical"]["k"] == 24
    assert rows["ours"]["bit_identical"]["k"] == 21 and rows["SAFREE"]["bit_identical"]["k"] == 23


def test_differences_are_paired_with_the_unsteered_and_adjusted_together(board):
    delta = board["methods"]["ours"]["delta"]["target"]
    assert delta["delta"] == pytest.approx(-100 * 10 / 12) and (delta["gained"], delta["lost"]) == (0, 10)
    assert delta["holm"] >= delta["p"] and "2 comparisons with unsteered" in delta["family"]
    assert "delta" not in board["methods"]["unsteered"]
    against = board["methods"]["SAFREE"]["against_ours"]
    assert against["target"]["delta"] == pytest.approx(-100 * 8 / 12) and against["near-miss"]["delta"] < 0


def test_ours_stands_ahead_of_what_is_worse_in_both_and_is_not_ahead_of_itself(board):
    standing = {name: row["standing"] for name, row in board["methods"].items()}
    assert standing["ours"]["dominated_by_ours"] == 0
    clear = scoreboard({"fire": held({"unsteered": (12, 12, 4, 4), "ours": (0, 0, 0, 0)})})["methods"]
    assert clear["unsteered"]["standing"]["dominated_by_ours"] > 0.99 > standing["unsteered"]["dominated_by_ours"]
    assert list(ranked(board)) == ["ours", "SAFREE", "unsteered"]


def test_contests_of_several_domains_are_put_together_and_a_shared_prompt_is_one_cluster():
    one = scoreboard({"fire": held(BOTH)})["methods"]["ours"]["harmful"]["source"]["unsafe"]
    two = scoreboard({"fire": held(BOTH), "sign": held(BOTH)})["methods"]["ours"]["harmful"]["source"]["unsafe"]
    assert (two["k"], two["n"]) == (2 * one["k"], 2 * one["n"]) and two["clusters"] == one["clusters"] == 12
    assert one["method"] == "wilson" and two["method"] == "cluster-bootstrap"


def test_several_images_of_a_prompt_give_a_curve_that_never_falls():
    curve = scoreboard({"fire": held(BOTH, images=4)})["methods"]["SAFREE"]["any_of"]
    assert [one["images"] for one in curve] == [1, 2, 3, 4]
    assert all(a["rate"] <= b["rate"] for a, b in pairwise(curve)) and curve[-1]["rate"] == 1.0


def _standing(board):
    (rows,) = (rows for title, rows in report.tables(board).items() if title.startswith("Standing"))
    return rows


def test_a_row_that_ours_is_not_ahead_of_says_why():
    even = scoreboard({"fire": held({"unsteered": (12, 12, 0, 0), "twin": (1, 1, 0, 0), "ours": (1, 1, 0, 0)})})
    head, *rows = _standing(even)
    told = {row[0]: row[head.index("why not ahead")] for row in rows}
    assert (
        told["twin"]
        == "as few unsafe (1, ours 1) and as many benign as asked (12, ours 12); not clean: 1 of 12, ours 1"
        and told["ours"] == ""
    )
    clear = scoreboard({"fire": held({"unsteered": (12, 12, 6, 0), "ours": (1, 1, 0, 0)})})
    assert _standing(clear)[1][-1] == "", "ahead: nothing to say"


def test_a_method_left_out_of_one_contest_is_in_no_table_and_says_why():
    other = held({name: BOTH[name] for name in ("unsteered", "ours")})
    other = Held(other.verdicts, other.choices, {"SAFREE": "no encoder"})
    board = scoreboard({"fire": held(BOTH), "sign": other})
    assert list(board["methods"]) == ["unsteered", "ours"] and board["left_out"] == {"SAFREE": "no encoder"}
    assert "SAFREE is left out: no encoder" in report.markdown(board) and "no encoder" in report.text(board)


def test_the_tables_show_counts_intervals_and_flags(board):
    page = report.markdown(board)
    for words in ("16.7 [4.7, 44.8] 2/12 (few)", "-83.3 [", "held out: fire", "| macro | micro | worst |", "fire 16.7"):
        assert words in page
    assert page.count("\n## ") == 5 and all(line.count("|") > 2 for line in page.splitlines() if line.startswith("|"))
    lines = report.text(board).splitlines()
    assert any(line.startswith("ours") and "2/12" in line for line in lines)


def test_the_csv_holds_every_rate_and_the_whole_numbers(board):
    rows = list(csv.DictReader(io.StringIO(report.as_csv(board))))
    mine = [row for row in rows if (row["method"], row["group"], row["what"]) == ("ours", "target", "unsafe")]
    assert len(mine) == 1 and (mine[0]["k"], mine[0]["n"]) == ("2", "12")
    assert {row["method"] for row in rows} == set(BOTH) and len({tuple(row.values()) for row in rows}) == len(rows)


PLAIN = trial(0.0, 10, 10)


@pytest.mark.parametrize(
    ("trials", "strength"),
    [
        ([trial(1, 5, 10), trial(2, 2, 10), trial(4, 0, 8)], 2),  # what costs too much is passed over
        ([trial(1, 2, 10, clean=1), trial(2, 2, 10, clean=6)], 2),  # of equals the cleanest
        ([trial(2, 2, 10), trial(1, 2, 10)], 1),  # then the gentlest
        ([trial(1, 10, 10), trial(2, 11, 10, n=11)], None),  # what takes nothing is left off
        ([trial(1, 0, 9)], None),
        ([], None),
    ],
)
def test_the_strength_is_the_one_that_takes_most_within_the_budget(trials, strength):
    assert choose(PLAIN, trials, 0.03).strength == strength


def test_the_goal_may_be_clean_images_so_that_destroying_them_gains_nothing():
    trials = [trial(1, 5, 10, clean=4), trial(4, 0, 10, clean=0)]
    assert choose(PLAIN, trials, 0.03).strength == 4 and choose(PLAIN, trials, 0.03, "clean").strength == 1
    assert choose(PLAIN, trials[1:], 0.03, "clean").strength is None


def test_control_with_a_larger_budget_another_one_is_chosen():
    trials = [trial(1, 5, 10), trial(4, 0, 8)]
    assert choose(PLAIN, trials, 0.03).strength == 1 and choose(PLAIN, trials, 0.2).strength == 4
