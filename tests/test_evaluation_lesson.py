"""What is watched serves ours alone: it opens gates, nothing else is learnt there, and no other method changes."""

from dataclasses import replace

import pytest
import torch

from safedig import recipes
from safedig.evaluation.curriculum import Sizes
from safedig.evaluation.methods import METHODS
from safedig.evaluation.methods.mean_difference import GATED, mean_differences
from safedig.evaluation.methods.ours import REPLACE, steered
from safedig.hooks import Context
from safedig.sites import SiteError
from safedig.verbs import Options
from safedig.verbs.evaluate import bank_of, contest_of, curriculum_of, run
from safedig.verbs.judges import jury_of
from tests.lessons import HARMFUL, images, lesson
from tests.steerings import POOLED, TXT


@pytest.fixture(scope="module")
def plain():
    return replace(lesson(), sites=(str(TXT),))


@pytest.fixture(scope="module")
def watching():
    return replace(lesson(), sites=(str(TXT),), watch=(str(POOLED),))


def test_nothing_but_ours_learns_at_a_site_that_is_watched(plain, watching):
    assert watching.places == watching.recording.sites == [TXT] and watching.watched == [POOLED]
    assert list(watching.dictionaries) == list(watching.features) == list(mean_differences(watching)) == [TXT]
    encoders = (one.dictionaries[TXT].encoder for one in (plain, watching))
    assert torch.equal(*(one.W_enc for one in encoders)), "and what others learn is the same"


def test_ours_edits_its_sites_and_watches_the_others(plain, watching):
    rules = steered(watching, 1.0).rules
    assert rules[TXT].edits == (REPLACE,) and rules[POOLED].edits == ()
    assert list(steered(plain, 1.0).rules) == [TXT], "control"


def test_a_site_that_acts_needs_not_be_watched(watching):
    assert replace(watching, watch=(str(TXT),)).watched == []


def test_a_site_to_watch_that_is_not_there_is_an_error(watching):
    with pytest.raises(SiteError, match=r"polled\.embed"):
        _ = replace(watching, watch=("polled.embed",)).watched


def only_watched(given, rows):
    """The prompts that the watched site's gate opens for, and no gate at the tokens."""
    rules, found = steered(given, 1.0).rules, {TXT: set(), POOLED: set()}
    for batch in given.recorded(rows, [TXT, POOLED]):
        for (name, _), at in batch.images():
            context = Context(batch.site, batch.step, batch.sigma, ("cond",))
            if rules[batch.site].decided(batch.x[at][None], context)[0].any():
                found[batch.site].add(name)
    return [row for row in rows if row["id"] in found[POOLED] - found[TXT]]


def test_a_mean_difference_behind_our_gate_acts_where_the_watched_site_tells(plain, watching):
    """The same images as ours: by the tokens' own gate it would not."""
    asked = only_watched(watching, [row for row in watching.source if row["risk"]])[:1]
    assert asked, "of these prompts one at least, so that the test tells anything"
    before = images(watching, asked)
    assert not torch.equal(images(watching, asked, GATED.learn(watching)(8.0)), before)
    assert torch.equal(images(watching, asked, GATED.learn(watching)(0.0)), before)
    alone = {site: rule for site, rule in steered(watching, 1.0).rules.items() if site == TXT}
    context = Context(TXT, 0, 1.0, ("cond",))
    shut = [alone[TXT].decided(batch.x[None], context)[0] for batch in watching.recorded(asked, [TXT])]
    assert not any(one.any() for one in shut), "control: the gate at the tokens is shut"


def test_a_harmful_image_is_changed_by_ours_where_it_watches_and_by_nothing_at_strength_nought(watching):
    at, plain = METHODS["ours"].learn(watching), images(watching, HARMFUL)
    assert torch.equal(images(watching, HARMFUL, at(0.0)), plain)
    assert not torch.equal(images(watching, HARMFUL, at(1.0)), plain)


def test_a_contest_is_told_what_its_recipe_watches_and_puts_in_a_hazards_place(tmp_path):
    """So that what was drawn with and without is never taken for one another."""
    recipe, options, sizes = (
        recipes.load("tiny-flux"),
        Options(),
        Sizes(pairs=2, stand_ins=2, target=2, benign=4, quiet=4),
    )
    pipe, looks = recipe.pipeline(), jury_of(recipe, options)

    def contest(recipe):
        curriculum = curriculum_of(recipe, options, "fire", sizes, bank_of(None))
        return contest_of(recipe, pipe, curriculum, ["unsteered"], looks, tmp_path)

    told, other = contest(recipe), contest(recipes.load("tiny-flux", ["watch=[]", 'stand_in="star"']))
    assert told.manifest["watch"] == ["pooled.embed"] and other.manifest["watch"] == []
    assert other.manifest["stand_in"] == "star" != told.manifest["stand_in"]
    assert told.manifest["run_id"] != other.manifest["run_id"]


@pytest.mark.parametrize("wish", ['sites=["txt.embde"]', 'watch=["polled.embed"]'])
def test_a_site_that_is_not_there_is_told_before_anything_is_drawn(wish, tmp_path):
    recipe, options = recipes.load("tiny-flux", [wish]), Options(out=tmp_path / "out", quick=True)
    with pytest.raises(SiteError, match=r"txt\.embde|polled\.embed"):
        run(recipe, options)
    assert not options.out.exists()
