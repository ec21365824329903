"""What a run learns serves every steering of it: edited where it is asked to act, gates opened by what is watched."""

import pytest

from safedig.config import UsageError, to_toml
from safedig.recipes import load
from safedig.sites import SiteError
from safedig.verbs.learning import EDITS, drawn, learn, passed
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
    recipe = load("tiny-sd3", [*FEW, "watch=[]"])
    both = load("tiny-sd3", ['watch=["txt.embed"]'])
    assert passed(recipe, recipe.sites) == ["txt.embed"] == passed(both, both.sites)
    learnt = learn(small_world, recipe, recipe.sites, quiet)
    assert list(learnt.steering("replace", [TXT], 0.5).rules) == [TXT] == list(learnt.saes)


def test_a_site_that_is_not_there_cannot_be_watched(small_world, quiet):
    recipe = load("tiny-sd3", [*FEW, 'watch=["polled.embed"]'])
    with pytest.raises((SiteError, UsageError), match=r"polled\.embed"):
        learn(small_world, recipe, recipe.sites, quiet)


@pytest.mark.parametrize("model", ["tiny-flux", "tiny-sd3"])
def test_the_tiny_recipes_watch_the_pooled_vector_and_leave_tokens_to_be_edited(model):
    recipe = load(model)
    assert recipe.watch == ("pooled.embed",) and recipe.sites == ("txt.embed",)
    assert passed(recipe, recipe.sites) == ["txt.embed", "pooled.embed"]


def test_a_stand_in_that_the_tiny_world_does_not_know_is_an_error(small_world, quiet):
    recipe = load("tiny-sd3", [*FEW, 'stand_in="haert"'])
    with pytest.raises(UsageError, match=r"'haert'.*heart"):
        learn(small_world, recipe, recipe.sites, quiet)


def test_tokens_like_none_of_the_lessons_are_repelled(watching):
    """So that a word which nothing was learnt of is not looked up among others."""
    (edit,) = watching.steering("replace", [TXT], 0.5).rules[TXT].edits
    assert edit == EDITS["replace"] and edit.unknown > 0
    known = watching.steering("replace", [TXT], 0.5).rules[TXT].material.counterparts
    assert 0 < known.radius < float("inf")


def test_what_a_recipe_leaves_open_does_not_change_what_stands_for_it():
    """A result of a recipe stays one of it when recipes learn to say more."""
    asked = load("tiny-flux")
    assert asked.sha == load("tiny-flux", ["seed=0"]).sha != load("tiny-flux", ["watch=[]"]).sha
    assert "dtype" not in to_toml(asked) and "watch" in to_toml(asked)
