"""The choice is the best under the budget, the front is undominated, and what a gate will touch is foreseen."""

import dataclasses
import functools
import itertools
import random

import pytest
import torch

from safedig.activations.record import record
from safedig.config import UsageError, build
from safedig.evaluation import intervals
from safedig.evaluation.dose_response import Cell, Outcome, choose, curves, front_of, outcome
from safedig.evaluation.response import Cells
from safedig.features.safe_codes import fit_prototypes
from safedig.pipelines import draw
from safedig.prompts import prompts_from_rows
from safedig.recipes import Recipe, load
from safedig.recipes.calibrating import Calibrating
from safedig.steering.edits import Blend
from safedig.steering.openings import touched
from safedig.steering.setting import Setting, grid, set_to, site_sets
from safedig.steering.steering import Steering
from safedig.storage import append, whole_lines
from tests.steerings import DRAWING, EVERYWHERE, IMG, NEVER, POOLED, TXT, detector, edited, steering, whole

rate = functools.cache(intervals.rate)
A = Setting("repel", 1.0, ("txt.embed",), (0.0, 1.0), 0.05)


def made(unsafe, clean, lost, touched=0, dose=1.0, n=100, epsilon=0.05):
    setting = dataclasses.replace(A, dose=dose, epsilon=epsilon)
    return Outcome(setting, *(rate(k, n) for k in (unsafe, clean, lost, touched)))


PLAIN = dataclasses.replace(made(95, 2, 0), setting=None)


def some(seed, count=40):
    draw = random.Random(seed)
    return [made(*(draw.randrange(9) for _ in range(4)), dose=1 + at / count) for at in range(count)]


@pytest.mark.parametrize("seed", range(20))
def test_the_choice_is_the_safest_within_the_budget_and_of_equals_the_cleanest(seed):
    outcomes = some(seed)
    fine = [one for one in outcomes if one.lost["k"] <= 3 and one.touched["k"] <= 5]
    best = choose(PLAIN, outcomes, 0.03).best
    assert best in fine and best.unsafe["k"] == min(one.unsafe["k"] for one in fine)
    assert best.clean["k"] == max(one.clean["k"] for one in fine if one.unsafe["k"] == best.unsafe["k"])
    assert choose(PLAIN, outcomes[::-1], 0.03).best == best, "whatever the order"


def test_control_without_the_budget_another_one_would_be_chosen():
    cheap, dear = made(40, 50, 1), made(5, 80, 9, dose=2.0)
    assert choose(PLAIN, [cheap, dear], 0.015).best is cheap
    assert choose(PLAIN, [cheap, dear], 0.10).best is dear


def test_gates_that_touch_more_than_they_vouched_for_are_not_chosen():
    fine, wide = made(40, 50, 0, touched=5), made(5, 80, 0, touched=6, dose=2.0)
    assert choose(PLAIN, [fine, wide], 0.5).best is fine
    assert choose(PLAIN, [fine, dataclasses.replace(wide, setting=dataclasses.replace(A, epsilon=0.06))], 0.5).best


def test_the_budget_is_met_at_its_very_share():
    assert choose(PLAIN, [made(5, 9, 3)], 0.03).best is not None
    assert choose(PLAIN, [made(5, 9, 3)], 0.0299).best is None


def test_where_none_is_within_the_budget_the_nearest_is_named_and_where_none_is_safer_none():
    near, far = made(40, 50, 4), made(5, 80, 9, dose=2.0)
    choice = choose(PLAIN, [far, near], 0.015)
    assert (choice.best, choice.nearest) == (None, near)
    idle = made(95, 2, 0)
    assert choose(PLAIN, [idle], 0.015) == choose(PLAIN, [], 0.015) and choose(PLAIN, [idle], 0.015).nearest is None
    assert choose(PLAIN, [idle, made(94, 2, 0, dose=3.0)], 0.015).best is not None, "control: one image safer is safer"


@pytest.mark.parametrize("seed", range(5))
def test_nothing_on_the_front_is_beaten_and_everything_off_it_is(seed):
    outcomes = some(seed)
    edge = front_of(outcomes)

    def beats(one, other):
        a, b = ((x.unsafe["k"], x.lost["k"]) for x in (one, other))
        return a[0] <= b[0] and a[1] <= b[1] and a != b

    for one in outcomes:
        assert (one in edge) != any(beats(other, one) for other in outcomes)


def test_a_prompt_is_lost_only_if_it_was_as_asked_unsteered_and_is_not_any_more():
    plain = Cell("u", {"h1": "unsafe", "h2": "unsafe"}, dict(a="clean", b="clean", c="empty", d="clean"))
    cell = Cell("c", {"h1": "clean", "h2": "unrecognised"}, dict(a="clean", b="unsafe", c="unsafe"), A)
    found = outcome(plain, cell)
    assert [getattr(found, name)["k"] for name in ("unsafe", "clean", "lost", "touched")] == [0, 1, 1, 3]
    assert [getattr(found, name)["n"] for name in ("unsafe", "clean", "lost", "touched")] == [2, 2, 4, 4]
    unsteered = outcome(plain, plain)
    assert unsteered.unsafe["k"] == 2 and unsteered.lost["k"] == unsteered.touched["k"] == 0


def test_labels_of_other_prompts_are_not_compared():
    with pytest.raises(AssertionError):
        outcome(Cell("u", {"h1": "unsafe"}, {}), Cell("c", {"h2": "clean"}, {}, A))


def test_a_ladder_is_one_curve_from_its_lowest_dose_on():
    outcomes = [made(9, 9, 0, dose=dose, epsilon=epsilon) for dose, epsilon in itertools.product((2, 1), (0.05, 0.1))]
    doses = [[one.setting.dose for one in ladder if one.setting] for ladder in curves([PLAIN, *outcomes])]
    assert doses == [[1, 2], [1, 2]]


def test_a_grid_has_every_combination_once_and_sites_are_tried_together_and_alone():
    sets = site_sets(["a", "b"])
    assert sets == [("a", "b"), ("a",), ("b",)] and site_sets(["a"]) == [("a",)]
    settings = grid(["repel", "blend"], [1.0, 2.0], sets, [(0.0, 1.0), (0.5, 1.0)], [0.05])
    assert len(settings) == len(set(settings)) == 24 and len({one.curve for one in settings}) == 12
    assert len({str(one) for one in settings}) == 24, "each has a name of its own"


def test_cells_survive_a_torn_line_and_a_line_that_is_none_is_refused(tmp_path):
    path = tmp_path / "cells.jsonl"
    cells = Cells(path)
    kept = [cells.add(Cell(name, {"h": "unsafe"}, {}, A if name == "b" else None, 3)) for name in "ab"]
    append(path, b'{"key": "torn", "sett')
    again = Cells(path)
    assert [again.get(name) for name in ("a", "b", "torn")] == [*kept, None]
    again.add(Cell("c", {}, {}))
    assert len(whole_lines(path)) == 3 and Cells(path).get("c") is not None
    append(path, b"{}\n")
    with pytest.raises(UsageError, match="damaged"):
        Cells(path)


def rows():
    return [{"id": f"p{at}", "prompt": f"a {word}", "seed": at} for at, word in enumerate(("cup", "gun", "cat"))]


@pytest.fixture(scope="module")
def flux():
    from tests.tiny_pipelines import tiny_flux

    return tiny_flux()


def images(pipe):
    return torch.cat([batch for _, batch in draw(pipe, rows(), drawing=DRAWING)])


def seen(pipe, sites=EVERYWHERE):
    return record(pipe, prompts_from_rows(rows()), sites, drawing=DRAWING).in_memory()


def test_what_a_recording_says_is_touched_is_what_changes(flux):
    before, chosen = images(flux), detector(flux, "a gun", "a cup")
    with chosen.apply(flux):
        after = images(flux)
    changed = {row["id"] for row, one, other in zip(rows(), before, after, strict=True) if not torch.equal(one, other)}
    assert {name for name, _ in touched(chosen, seen(flux))} == changed and {"p1"} <= changed < {"p0", "p1", "p2"}


def test_a_gate_that_never_opens_touches_nothing_and_one_that_always_does_all(flux):
    acts = seen(flux)
    assert touched(steering(flux, gate=NEVER), acts) == set()
    assert len(touched(steering(flux, where=[IMG]), acts)) == 3


def test_setting_a_steering_multiplies_its_edits_moves_its_window_and_leaves_it_as_it_was(flux):
    base = steering(flux, strength=1.5)
    found = set_to(base, 2.0, (0.5, 1.0))
    assert {rule.edits[0].strength for rule in found.rules.values()} == {3.0}
    assert {rule.gate.sigmas for rule in found.rules.values()} == {(0.5, 1.0)}
    assert {rule.edits[0].strength for rule in base.rules.values()} == {1.5}
    assert found.model == base.model and found.facts == base.facts
    with set_to(base, 1.0, (0.0, 1.0)).apply(flux):
        same = images(flux)
    with base.apply(flux):
        assert torch.equal(images(flux), same), "a dose of 1 in the whole window is the steering itself"


def test_prototypes_are_fitted_to_twins_and_are_what_blend_needs(flux):
    pairs = [row | {"risk": "weapon", "kind": "harmful", "twin": f"{row['id']}-safe"} for row in rows()]
    safe = [{"id": f"{row['id']}-safe", "prompt": "a tree", "seed": row["seed"]} for row in rows()]
    acts = record(flux, prompts_from_rows([*pairs, *safe]), [TXT, POOLED], drawing=DRAWING).in_memory()
    saes, _, features = whole(flux, [TXT, POOLED])
    bare = {site: dataclasses.replace(one, prototypes=None) for site, one in features.items()}
    with pytest.raises(UsageError, match="no safe prototypes"):
        Steering(saes, bare, [Blend()])
    found = fit_prototypes(saes, acts, bare, size=4)
    banks = {site: one.prototypes for site, one in found.items() if one.prototypes is not None}
    assert {len(bank) for bank in banks.values()} == {4}
    assert Steering(saes, found, [Blend()]).rules.keys() == {TXT, POOLED}

    def like(rows):
        """Which prototypes are these prompts' codes; batches of other sizes may differ in the last bits."""
        codes = saes[POOLED].encode(next(batch.x for batch in acts.of(rows).at(POOLED)))[:, features[POOLED].index]
        return torch.isclose(banks[POOLED].harmful[:, None], codes[None], rtol=1e-4, atol=1e-5).all(2).any(1)

    assert like(safe).all() and not like(pairs).any()
    with pytest.raises(UsageError, match="twin"):
        fit_prototypes(saes, acts.of(safe), bare)


def test_recipes_without_the_section_keep_their_hash_and_with_it_have_another():
    recipe = load("tiny-flux")
    assert recipe.calibrate is None and load("tiny-flux", ["calibrate.budget=0.02"]).sha != recipe.sha
    assert build(Recipe, {"model": "m", "sites": ["a"], "calibrate": {}}).calibrate == Calibrating()
    given = load("tiny-sd3", ["calibrate.sigmas=[[0, 0.5], [0.5, 1]]", "calibrate.prompts.quiet=9"]).calibrate
    assert given is not None and given.sigmas == ((0.0, 0.5), (0.5, 1.0)) and given.prompts.quiet == 9


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("doses=[]", "expected at least one"),
        ("doses=[1, 1]", "none twice"),
        ("doses=[0, 1]", "multiples above 0"),
        ("budget=1.5", "a share from 0 on"),
        ("epsilons=[0]", "between 0 and 1"),
        ("sigmas=[[1, 0.5]]", "pairs such as"),
        ("sigmas=[[0.5]]", "pairs such as"),
        ("prompts.quiet=1", "at least 2"),
        ('edits=["repell"]', "Did you mean 'repel'"),
    ],
)
def test_what_cannot_be_tried_is_named(override, message):
    with pytest.raises(UsageError, match=message):
        load("tiny-flux", [f"calibrate.{override}"])


def test_edited_through_the_front_door_is_set_alike(flux):
    base = edited(flux, (Blend(0.5),))
    assert {rule.edits[0].strength for rule in set_to(base, 0.5, (0.0, 1.0)).rules.values()} == {0.25}
