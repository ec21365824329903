"""Methods that read a dictionary: clamp, replacement, paper form, Concept Steerers, ours, each beside its formula."""

from dataclasses import replace

import pytest
import torch

from safedig.config import UsageError
from safedig.evaluation.methods import METHODS
from safedig.evaluation.methods.clamp import clamping, mean_codes
from safedig.evaluation.methods.concept_sae import text_site
from safedig.evaluation.methods.lesson import found
from safedig.features import NoFeatureError
from safedig.hooks import Context
from safedig.sites import Site
from tests.lessons import SITES, lesson
from tests.synthetic import HARM, recording, rows, sae

TXT = Site.parse("txt.embed")
HERE = Context(TXT, 0, 1.0, ("cond", "cond"))
M, MEAN = torch.tensor([HARM]), torch.tensor([1.0])


def tokens():
    x = torch.rand(2, 5, 8, generator=torch.Generator().manual_seed(0))
    x[0, 0, HARM] = 3.0
    x[:, 1:, HARM] = 0.0
    x[1, 0, HARM] = 0.5
    return x


def test_the_clamp_is_the_formula_where_a_code_exceeds_its_mean_and_nothing_elsewhere():
    x, made = tokens(), sae()
    out = clamping(made, M, MEAN, 2.0, published=False)(x, HERE)
    assert out is not None
    delta = out - x
    assert delta[0, 0, HARM] == pytest.approx(-2.0 * 1.0 * 3.0 - 3.0)
    delta[0, 0, HARM] = 0
    assert torch.equal(delta, torch.zeros_like(x)), "0.5 is below the mean: no other bit is touched"


@pytest.mark.parametrize("published", [True, False])
def test_the_clamp_follows_the_activations_to_their_device(published):
    """Shown on the device without numbers, which every machine has."""
    out = clamping(sae(), M, MEAN, 2.0, published=published)(tokens().to("meta"), HERE)
    assert out is not None and out.is_meta and out.shape == tokens().shape


def test_at_nought_the_code_is_taken_away_which_is_no_no_op():
    x = tokens()
    out = clamping(sae(), M, MEAN, 0.0, published=False)(x, HERE)
    assert out is not None and out[0, 0, HARM] == pytest.approx(0.0)


def test_the_published_sign_doubles_the_reconstruction_error_even_where_no_harm_is():
    x, made = tokens(), sae()
    out = clamping(made, M, MEAN, 2.0, published=True)(x, HERE)
    assert out is not None
    error = x - made.decode(made.encode(x))
    assert torch.allclose(out[1], x[1] - 2 * error[1], atol=1e-6)
    assert error[1].norm() > 0.01, "this dictionary reconstructs what exceeds a threshold of 0.1"


def test_the_means_are_those_of_harmful_tokens():
    given = lesson()
    means = mean_codes(given)
    assert set(means) == set(given.features)
    for site, mean in means.items():
        assert (mean > 0).any() and mean.shape == given.features[site].index.shape


def test_replacement_needs_a_map():
    given = lesson()
    pooled = {site: one for site, one in given.features.items() if site.stream == "pooled"}
    alone = replace(given)
    vars(alone)["features"] = pooled
    with pytest.raises(UsageError, match="exchanges tokens"):
        METHODS["PER replacement"].learn(alone)


def test_replacement_acts_at_maps_and_ours_wherever_there_are_features():
    given = lesson()
    assert set(METHODS["ours"].learn(given)(1.0).rules) == set(given.weighed)
    assert set(METHODS["PER replacement"].learn(given)(1.0).rules) == {TXT} & set(given.features)


@pytest.mark.parametrize("name", ["SafeDIG paper form, Repel", "SafeDIG paper form, Blend"])
def test_the_paper_form_moves_tokens_in_which_nothing_harmful_fires(name):
    given = lesson()
    made = METHODS[name].learn(given)(0.2)
    for site, rule in made.rules.items():
        width = given.dictionaries[site].d_in
        x = 1e-3 * torch.ones(1, 2, width)
        silent = replace(rule, encoder=replace(rule.encoder, threshold=torch.full_like(rule.encoder.threshold, 1e9)))
        out, open_, _ = silent(x, Context(site, 0, 1.0, ("cond",)))
        assert open_.all() and not torch.equal(out, x)


def test_the_delta_form_moves_none_of_them():
    given = lesson()
    for site, rule in METHODS["Repel, contrast decoder"].learn(given)(4.0).rules.items():
        x = torch.ones(1, 2, given.dictionaries[site].d_in)
        silent = replace(rule, encoder=replace(rule.encoder, threshold=torch.full_like(rule.encoder.threshold, 1e9)))
        out, open_, _ = silent(x, Context(site, 0, 1.0, ("cond",)))
        assert not open_.any() and torch.equal(out, x)


def test_concept_steerers_push_the_rows_apart_by_as_much():
    given = lesson()
    site = text_site(given)
    assert str(site) == "text_encoder_2:final.txt.resid_post" and str(text_site(lesson("tiny-sd3")))[13:14] == "3"
    made = METHODS["Concept Steerers"].learn(given)(2.0)
    x = torch.zeros(2, 3, 64)
    out = made.functions[site](x, Context(site, -1, 1.0, ("cond", "uncond")))
    assert out is not None and torch.equal(out[0], -out[1]) and out.norm() > 0
    assert torch.equal(out[0][0], out[0][2]), "the same for every token"


def test_a_site_without_features_is_left_out_and_none_at_all_is_an_error(capsys):
    options = {"quantile": 0.9, "calibration": recording()}
    silent = replace(sae(), encoder=replace(sae().encoder, threshold=torch.full((16,), 1e9)))
    other = Site.parse("pooled.embed")
    with pytest.raises(NoFeatureError, match="No feature at 'txt.embed'"):
        found({TXT: silent}, recording(), **options)
    assert "txt.embed is left out" in capsys.readouterr().err
    assert set(found({TXT: sae()}, recording(), **options)) == {TXT} != {TXT, other}


def test_the_lesson_shares_what_it_has_made():
    given = lesson()
    assert given.dictionaries is given.dictionaries and [str(site) for site in given.places] == list(SITES)
    for site, one in given.contrast.items():
        assert one.encoder is given.dictionaries[site].encoder is given.reconstruction[site].encoder
    assert len(rows()) == 80
