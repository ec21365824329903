"""A recipe is a complete run: what it leaves out stays out of its hash, what it lays over the model is checked."""

import json
from pathlib import Path

import pytest
import torch

from safedig.config import UsageError, from_toml, to_toml
from safedig.pipelines import Drawing
from safedig.recipes import Recipe, Recording, load, names
from safedig.steering.conformal import least
from safedig.verbs import Options, demo

RESULTS = Path(__file__).parents[1] / "docs" / "results"
SCHEDULE = [1.0, 0.936, 0.83, 0.703, 0.463, 0.105]


@pytest.mark.parametrize("model", ["tiny-flux", "tiny-sd3"])
def test_options_that_are_left_out_leave_the_hash_of_older_results_alone(model):
    assert load(model).drawn_sha == json.loads((RESULTS / f"{model}.json").read_text())["recipe_sha"]


@pytest.mark.parametrize(
    "override", ["dtype=bfloat16", "device=cpu", "offload=model", "drawing.steps=3", "record.tokens=4", "seed=1"]
)
def test_control_every_option_that_is_given_changes_the_hash(override):
    assert load("tiny-flux", [override]).sha != load("tiny-flux").sha


@pytest.mark.parametrize("name", names())
def test_a_recipe_survives_toml(name):
    recipe = load(name)
    assert from_toml(Recipe, to_toml(recipe)) == recipe


def test_the_four_released_models_have_a_recipe_each():
    real = {name: load(name) for name in names() if not name.startswith("tiny")}
    assert set(real) == {"flux1-dev", "flux1-schnell", "sd3.5-large", "sd3.5-medium"}
    for recipe in real.values():
        assert recipe.dtype == "bfloat16" and recipe.device == "auto" and len(recipe.sites) == 3
        assert recipe.record is not None and (recipe.record.prompts, recipe.record.tokens) == (2000, 256)
    assert {name for name, recipe in real.items() if recipe.record.sigmas == 6} == set(real) - {"flux1-schnell"}


def test_one_override_keeps_the_rest_of_its_table():
    recipe = load("flux1-dev", ["record.tokens=pooled", "record.sigmas=[1, 0.936]"])
    assert recipe.record == Recording(2000, (1.0, 0.936), "pooled")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["dtype=bf16"], "dtype=\"bf16\": Did you mean 'bfloat16'?"),
        (["offload=modle"], "offload=\"modle\": Did you mean 'model'?"),
        (["record.token=4"], "Unknown key 'record.token'. Did you mean 'record.tokens'?"),
        (["record.tokens=some"], 'record.tokens="some": expected'),
        (["drawing=fast"], 'drawing="fast": expected'),
    ],
)
def test_what_does_not_fit_is_named(overrides, message):
    with pytest.raises(UsageError) as caught:
        load("flux1-dev", overrides)
    assert str(caught.value).startswith(message)


# ---- which σ are kept


@pytest.mark.parametrize(
    ("sigmas", "steps"),
    [("all", [0, 1, 2, 3, 4, 5]), (3, [0, 2, 5]), (1, [0]), (6, [0, 1, 2, 3, 4, 5]), (99, [0, 1, 2, 3, 4, 5])],
)
def test_a_number_of_sigmas_is_spread_over_the_schedule_and_never_exceeds_it(sigmas, steps):
    assert Recording(sigmas=sigmas).steps(SCHEDULE) == steps


def test_sigmas_are_found_as_they_are_shown():
    assert Recording(sigmas=(1, 0.463, 0.1046)).steps(SCHEDULE) == [0, 4, 5]


def test_sigmas_are_kept_once_and_in_the_order_of_the_schedule_as_a_recording_keeps_them():
    assert Recording(sigmas=(0.463, 1.0, 0.4634)).steps(SCHEDULE) == [0, 4]


@pytest.mark.parametrize("sigma", [0.5, 0.0, 2.0, 0.937, float("nan")])
def test_a_sigma_that_is_not_on_the_schedule_is_refused_with_those_that_are(sigma):
    with pytest.raises(UsageError, match=r"is not on the schedule of 6 steps: choose from 1\.000, 0\.936"):
        Recording(sigmas=(1.0, sigma)).steps(SCHEDULE)


@pytest.mark.parametrize("options", [{"sigmas": 0}, {"sigmas": ()}, {"tokens": 0}, {"prompts": 0}, {"tflops": 0.0}])
def test_a_recording_of_nothing_is_refused(options):
    (key,) = options
    with pytest.raises(UsageError, match=f"record.{key}=.*expected at least one"):
        Recording(**options)


# ---- the model and how it draws


def test_the_model_is_loaded_as_the_recipe_says():
    assert load("tiny-flux", ["dtype=bfloat16"]).pipeline().transformer.dtype == torch.bfloat16
    assert load("tiny-flux").pipeline().transformer.dtype == torch.float32


def test_drawing_is_laid_over_what_the_model_says(tiny_random_sd3):
    recipe = load("tiny-sd3", ["drawing.steps=3", "drawing.guidance=2"])
    assert recipe.drawing_of(tiny_random_sd3) == Drawing(3, 2.0, 32, 32, 256)
    assert load("tiny-sd3").drawing_of(tiny_random_sd3) == Drawing.of(tiny_random_sd3)
    with pytest.raises(UsageError, match="Unknown key 'drawing.stepz'. Did you mean 'drawing.steps'"):
        load("tiny-sd3", ["drawing.stepz=3"]).drawing_of(tiny_random_sd3)


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize(
    "cut", [lambda recipe: recipe, lambda recipe: demo._quick(recipe, Options(quick=True))], ids=["whole", "quick"]
)
def test_there_are_prompts_enough_to_vouch_for_the_gates(name, cut):
    """At each site what single tokens say may open one, and what pairs say."""
    recipe = cut(load(name))
    assert least((1 - recipe.quantile) / (2 * len(recipe.sites)), 0.1) <= recipe.prompts.quiet


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("prompts.report=0", r"prompts\.report=0: expected a number from 1 on"),
        ("prompts.shown=0", r"prompts\.shown=0"),
        ("sae.batch_size=-1", r"sae\.batch_size=-1"),
        ("sae.steps=0", r"sae\.steps=0"),
        ("seed=-1", "seed=-1: expected an integer from 0 to"),
        ("strength=-7", "strength=-7"),
        ("strength=inf", "strength=inf"),
        ("quantile=9", "quantile=9"),
        ("sites=[]", "at least one site"),
        ("adapt.objectives=[]", "expected 'reconstruction', 'contrast', or both"),
        ("route.budget=nan", r"route\.budget=nan: expected a number above 0"),
        ("route.pairs=1", r"route\.pairs=1: expected a number from 2 on"),
    ],
)
def test_a_value_with_which_nothing_can_be_done_is_named_before_anything_is(override, message):
    with pytest.raises(UsageError, match=message):
        load("tiny-flux", [override])


@pytest.mark.parametrize("name", ["steps", "height", "width", "max_sequence_length", "guidance"])
def test_a_drawing_of_nothing_is_named(name):
    given = {"steps": 8, "guidance": 3.0, "height": 64, "width": 64, "max_sequence_length": 24}
    assert Drawing(**given)
    with pytest.raises(UsageError, match=rf"drawing\.{name}=-1"):
        Drawing(**given | {name: -1})


def test_a_recipe_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "odd.toml").write_bytes(b"model = '\xff'")
    with pytest.raises(UsageError, match="is not UTF-8"):
        load(str(tmp_path / "odd.toml"))
