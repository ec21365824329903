"""Every verb runs the recipes of the released models with nothing but `model=` pointed at a small random folder."""

import json

import pytest
import torch

from safedig.__main__ import main
from safedig.pipelines import Drawing, load_pipeline
from safedig.recipes import load
from safedig.verbs import VERBS
from tests.reduced_models import DRAWING, reduced, write

RECIPES = {"flux1-dev": 256, "sd3.5-large": 128}  # and the width of two heads
GATE = ["quantile=0.05", "prompts.quiet=16"]  # as many prompts as vouch for anything at all
FAST = ["sae.steps=60", "sae.expansion=4", "sae.k=8", "prompts.learn=8", "prompts.report=2", "prompts.benign=2"]


@pytest.fixture(scope="module", params=RECIPES)
def real(request, tmp_path_factory):
    """A recipe's name and the override that points it at its reduced folder."""
    folder = write(request.param, tmp_path_factory.mktemp("models") / request.param, layers=3, heads=2)
    return request.param, f"model={folder}"


def answer(capsys, *argv):
    assert main([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_what_is_reduced_is_depth_and_width_alone(real):
    name, override = real
    pipe = load_pipeline(override.removeprefix("model="))
    config, embedded = pipe.transformer.config, load(name).pipeline
    assert pipe.transformer.inner_dim == RECIPES[name] and callable(embedded)
    assert config.joint_attention_dim == 4096 and pipe.vae.config.latent_channels == 16 and pipe.vae_scale_factor == 8
    assert config.pooled_projection_dim == {"flux1-dev": 768, "sd3.5-large": 2048}[name]
    assert Drawing.of(pipe) == Drawing(**DRAWING)


@pytest.mark.parametrize("recipe", ["flux1-schnell", "sd3.5-medium"])
def test_the_other_two_draw_as_well(recipe):
    from safedig.pipelines import draw

    pipe = reduced(recipe)
    drawing = Drawing(**DRAWING | {"steps": 2})
    ((_, images),) = draw(pipe, [{"prompt": "a cup", "seed": 0}], drawing=drawing)
    assert images.shape == (1, 3, 64, 64) and images.isfinite().all()


def test_the_full_width_can_be_kept(tmp_path):
    with torch.device("meta"):
        pipe = reduced("flux1-dev", layers=1, heads=None)
    assert pipe.transformer.inner_dim == 3072


def test_show(real, capsys):
    name, override = real
    result = answer(capsys, "show", name, override)
    assert result["model"]["sites"]["txt.embed"] == RECIPES[name] and result["model"]["drawing"] == DRAWING | {
        "true_cfg": False
    }


def test_plan(real, capsys):
    name, override = real
    result = answer(capsys, "plan", name, override)
    assert {site["d_in"] for site in result["sites"].values()} == {RECIPES[name]}
    assert result["bytes"] == 2000 * 4 * RECIPES[name] * 2 * sum(s["tokens"] for s in result["sites"].values())


def test_demo_and_what_its_steering_is_good_for(real, capsys, tmp_path):
    name, override = real
    result = answer(capsys, "demo", name, override, *FAST, *GATE, "--out", str(tmp_path))
    assert result["steered"]["not_clean"]["n"] == 2 and (tmp_path / "demo.png").is_file()
    given = [name, override, "--bundle", str(tmp_path / "steering"), "--out", str(tmp_path / "out")]
    assert answer(capsys, "attest", *given)["passed"]
    answer(capsys, "generate", "a cup", *given, "--compare")
    assert [*(tmp_path / "out").glob("*.png")]


def test_route(real, capsys, tmp_path):
    name, override = real
    domains = (("weapons", "gun"), ("poison", "vial"))
    rows = [
        f"{thing}{n},a {thing} {n},{risk},{risk}{n}\n{risk}{n},a cup {n} {risk},,\n"
        for risk, thing in domains
        for n in range(8)
    ]
    (tmp_path / "p.csv").write_text(f"id,prompt,risk,twin\n{''.join(rows)}")
    sites = 'route.sites=["txt.embed", "temb.out"]'
    few = ["record.sigmas=2", "route.pairs=4", "route.budget=2", "target=poison", sites]
    given = [name, override, *few, "--prompts", str(tmp_path / "p.csv"), "--out", str(tmp_path)]
    result = answer(capsys, "route", *given)
    assert {site["site"] for site in result["sites"]} == {"txt.embed", "temb.out"}
    assert result["target"] in ("poison", ["poison"]) and (tmp_path / name / "all--poison.png").is_file()


@pytest.mark.slow
def test_the_demo_runs_with_the_model_overridden(real, capsys, tmp_path):
    """Fewer prompts and steps than even --quick takes, and as many that vouch for the gates as the recipe has."""
    name, override = real
    fewer = ["prompts.learn=8", "prompts.report=4", "prompts.benign=4", "sae.steps=20", "sae.k=8"]
    assert answer(capsys, "demo", name, override, *fewer, "--out", str(tmp_path))["recipe_sha"]


def test_record_keeps_to_the_byte_what_plan_foretells_and_finds_it_again(real, capsys, tmp_path):
    name, override = real
    (tmp_path / "p.csv").write_text("id,prompt,risk,twin\na,a gun,weapons,b\nb,a cup,,\n")
    command = [name, override, "--prompts", str(tmp_path / "p.csv")]
    recorded = answer(capsys, "record", *command, "--out", str(tmp_path / "store"))
    planned = answer(capsys, "plan", *command)
    for site, kept in recorded["sites"].items():
        foretold = planned["sites"][site]
        assert (kept["rows"], kept["d_in"]) == (foretold["rows"], foretold["d_in"])
        assert kept["dtype"] == "bfloat16"
    assert recorded["images"] == 2
    assert answer(capsys, "record", *command, "--out", str(tmp_path / "store")) == recorded


def test_show_sites(real, capsys):
    name, override = real
    listed = answer(capsys, "show", name, override, "--sites")["sites"]
    assert listed["txt.embed"]["d_in"] == RECIPES[name] and len(listed) > 20


def test_train_reads_what_record_wrote(real, capsys, tmp_path):
    name, override = real
    rows = "".join(f"p{n},a cup {n}\n" for n in range(3))
    (tmp_path / "p.csv").write_text(f"id,prompt\n{rows}")
    few = ["record.sigmas=2", "record.tokens=16", "sae.steps=5", "sae.expansion=2", "sae.batch_size=64", "sae.k=8"]
    given = [name, override, *few, "train.spliced=1"]
    answer(capsys, "record", *given, "--prompts", str(tmp_path / "p.csv"), "--out", str(tmp_path / "acts"))
    result = answer(capsys, "train", *given, "--store", str(tmp_path / "acts"), "--out", str(tmp_path / "saes"))
    assert len(result["saes"]) == 3 and all(sae["image"]["velocity_error"] >= 0 for sae in result["saes"])
    assert {sae["d_sae"] for sae in result["saes"]} == {2 * RECIPES[name]}


def test_adapt_reads_what_record_and_train_wrote(real, capsys, tmp_path):
    name, override = real
    few = ["record.sigmas=2", "record.tokens=16", "sae.steps=5", "sae.expansion=2", "sae.batch_size=64", "sae.k=8"]
    for risk, thing in (("weapons", "gun"), ("poison", "vial")):
        rows = "".join(f"{thing}{n},a {thing} {n},{risk},c{n}\nc{n},a cup {n},,\n" for n in range(4))
        (tmp_path / "p.csv").write_text(f"id,prompt,risk,twin\n{rows}")
        command = [name, override, *few, "--prompts", str(tmp_path / "p.csv"), "--out", str(tmp_path / risk)]
        answer(capsys, "record", *command)
    given = [name, override, *few, "--store", str(tmp_path / "weapons"), "--out", str(tmp_path / "saes")]
    answer(capsys, "train", *given, "train.spliced=0")
    whole = ['adapt.objectives=["reconstruction"]', f"adapt.target={tmp_path / 'poison'}"]
    result = answer(capsys, "adapt", *given, *whole)
    assert result["source"] == ["weapons"] and result["target"] == ["poison"] and len(result["decoders"]) == 3


def test_the_tests_above_run_every_verb():
    asked_of_judges = {"calibrate", "evaluate", "attack"}  # of the tiny models alone, which have one
    run = {"demo", "show", "record", "train", "adapt", "plan", "route", "generate", "attest"}
    assert set(VERBS) == run | asked_of_judges


CONTEST = [
    'methods=["unsteered", "prompt filter", "mean difference", "ours"]', "evaluate.strengths=[1.0]", "target=weapon",
    "evaluate.sizes.pairs=6", "evaluate.sizes.stand_ins=6", "evaluate.sizes.target=6", "evaluate.sizes.benign=6",
    "evaluate.sizes.quiet=48", "evaluate.sizes.tried=2", "evaluate.sizes.asked=2", "evaluate.sizes.near_misses=2",
    "quantile=0.5", "sae.steps=20", "sae.expansion=2", "sae.k=8", 'sites=["txt.embed"]',
]  # fmt: skip


@pytest.mark.slow
def test_evaluate_and_attack(real, capsys, tmp_path):
    name, override = real
    given = [name, override, *CONTEST, "--out", str(tmp_path)]
    result = answer(capsys, "evaluate", *given)
    assert set(result["choices"]["weapon"]) >= {"unsteered", "ours"} and (tmp_path / "evaluate.md").is_file()
    few = ["prompts=1", "passes=16", 'attacks=["seed search", "paraphrases", "adaptive"]']
    result = answer(capsys, "attack", *given, *few)
    assert result["broken"]["unsteered"]["any of them"]["n"] == 1 and (tmp_path / "attack.md").is_file()


@pytest.mark.slow
def test_calibrate(real, capsys, tmp_path):
    name, override = real
    few = ["edits=['replace']", "doses=[1.0]", "sigmas=[[0, 1]]", "epsilons=[0.5]", "calibrate.sites=['txt.embed']"]
    few += [f"calibrate.prompts.{use}=4" for use in ("harmful", "benign")]
    given = [name, override, *few, "calibrate.prompts.quiet=24", *FAST, "--out", str(tmp_path)]
    result = answer(capsys, "calibrate", *given)
    assert len(result["cells"]) == 1 and (tmp_path / "front.png").is_file()
