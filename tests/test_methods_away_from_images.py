"""The Safe Denoiser as a method: learnt from what the model draws of its lesson, alone or beside ours."""

import torch

from safedig import recipes
from safedig.evaluation.methods import METHODS, UNLESS_ASKED
from safedig.evaluation.methods.away_from_images import Together
from safedig.verbs.evaluate import methods_of
from tests.lessons import HARMFUL, images, learnt, lesson


def test_it_stays_away_from_what_the_model_draws_of_harmful_prompts():
    away = learnt("tiny-flux", "Safe Denoiser")(1.0)
    given = lesson("tiny-flux")
    assert len(away.negation) == len(given.pairs[::2][::2]) and away.threshold.reference is not None
    assert any(slope > 0 for slope in away.threshold.slope), "harmful pictures lie nearer to it than their twins"


def test_together_both_act():
    both = learnt("tiny-flux", "ours and Safe Denoiser")(4.0)
    assert isinstance(both, Together) and len(both.parts) == 2
    given = lesson("tiny-flux")
    alone = [images(given, HARMFUL, part) for part in both.parts]
    together = images(given, HARMFUL, both)
    assert all(not torch.equal(together, one) for one in alone)


def test_it_is_compared_only_where_it_is_asked_for():
    names = methods_of(recipes.Evaluating())
    assert not UNLESS_ASKED & set(names)
    wanted = tuple(sorted(UNLESS_ASKED))
    assert set(methods_of(recipes.Evaluating(methods=wanted))) == {"unsteered", *UNLESS_ASKED} <= set(METHODS)
