"""What a run learns serves every steering of it: edited where it is asked to act, gates opened by what is watched."""

import pytest

from safedig.config import UsageError
from safedig.recipes import load
from safedig.sites import SiteError
from safedig.verbs.learning import drawn, learn, passed
from tests.steerings import POOLED, TXT

FEW = ["prompts.learn=8", "sae.steps=20", "sae.expansion=2", "sae.k=8"]


@pytest.fixture(scope="module")
def quiet():
    return drawn("calibrate", {"benign": 16, "near-miss": 16}, 0)


@pytest.fixture(scope="module")
def watching(quiet, small_world):
    recipe = load("tiny-sd3", [*FEW, 'watch=["pooled.embed"]'])
    return learn(small_world, recipe, recipe.sites, quiet)


@pytest.fixture(scope="module")
def small_world():
    return load("tiny-sd3").pipeline()


@pytest.mark.parametrize("edit", ["replace", "repel", "blend"])
def test_what_a_recipe_watches_has_gates_and_no_edit(watching, edit):
    made = watching.steering(edit, [TXT], 0.5)
    assert list(made.rules) == [TXT, POOLED]
    assert made.rules[TXT].edits and made.rules[POOLED].edits == ()
    assert {rule.gate.scope for rule in made.rules.values()} == {"image"}
    share = made.facts[POOLED]["receipt"]["guarantee"]["epsilon"]
    assert share == made.facts[TXT]["receipt"]["guarantee"]["epsilon"] == 0.5, "all gates share it"


def test_a_site_that_is_asked_for_is_edited_though_the_recipe_watches_it(watching):
    made = watching.steering("replace", [TXT, POOLED], 0.5)
    assert all(rule.edits for rule in made.rules.values())


def test_control_a_recipe_that_watches_nothing_passes_its_sites_alone(small_world, quiet):
    recipe = load("tiny-sd3", FEW)
    assert (
        passed(recipe, recipe.sites)
        == ["txt.embed"]
        == passed(load("tiny-sd3", ['watch=["txt.embed"]']), ["txt.embed"])
    )
    learnt = learn(small_world, recipe, recipe.sites, quiet)
    assert list(learnt.steering("replace", [TXT], 0.5).rules) == [TXT] == list(learnt.saes)


def test_a_site_that_is_not_there_cannot_be_watched(small_world, quiet):
    recipe = load("tiny-sd3", [*FEW, 'watch=["polled.embed"]'])
    with pytest.raises((SiteError, UsageError), match=r"polled\.embed"):
        learn(small_world, recipe, recipe.sites, quiet)


def test_results_of_a_recipe_that_watches_nothing_stay_what_they_were():
    plain, watch = load("tiny-flux"), load("tiny-flux", ['watch=["pooled.embed"]'])
    assert plain.watch is None and plain.sha != watch.sha
    assert plain.sha == load("tiny-flux", ["seed=0"]).sha
