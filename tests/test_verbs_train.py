"""`safedig train`: reads what `record` wrote, names it where it is missing, writes folders that load, goes on."""

import json
from pathlib import Path

import pytest
import torch

from safedig import __main__
from safedig.activations.store import open_store
from safedig.config import UsageError
from safedig.figures import training_curves
from safedig.prompts import prompts_from_rows, save_prompts
from safedig.recipes import Recipe, Training, load
from safedig.sae import fitting
from safedig.sae.checkpoint import load_sae
from safedig.sae.options import SAEOptions
from safedig.sites import Site
from safedig.verbs import train as verb

ROWS = [
    {"id": "gun", "prompt": "a gun", "risk": "weapons", "twin": "cup", "seed": 3},
    {"id": "cup", "prompt": "a cup", "seed": 8},
    *({"id": f"hat{n}", "prompt": "a hat" + n * "!", "seed": n} for n in range(14)),
]
DRAWING = {"steps": 2, "guidance": 3.0, "height": 32, "width": 32, "max_sequence_length": 12, "true_cfg": True}
SITES = 'sites=["txt.embed", "pooled.embed"]'
FAST = ["sae.steps=30", "sae.batch_size=64", "sae.expansion=2", "sae.k=4", "train.spliced=2"]


@pytest.fixture(scope="module")
def given(tiny_random_flux, tmp_path_factory):
    """A model folder of random weights, and a recording of it."""
    folder = tmp_path_factory.mktemp("given")
    tiny_random_flux.save_pretrained(folder / "model")
    (folder / "model" / "drawing.json").write_text(json.dumps(DRAWING))
    save_prompts(prompts_from_rows(ROWS), folder / "prompts.csv")
    command = ["record", f"model={folder / 'model'}", SITES, "--prompts", str(folder / "prompts.csv")]
    assert __main__.main([*command, "--out", str(folder / "acts"), "--json"]) == 0
    return folder


@pytest.fixture
def command(given, tmp_path):
    place = ["--store", str(given / "acts"), "--out", str(tmp_path / "saes"), "--json"]
    return ["train", f"model={given / 'model'}", SITES, *FAST, *place]


def answer(capsys, *argv):
    assert __main__.main([*argv]) == 0
    return json.loads(capsys.readouterr().out)


def test_every_site_gets_a_folder_in_the_contracts_place_that_loads_with_its_report(command, given, capsys, tmp_path):
    capsys.readouterr()
    result = answer(capsys, *command)
    acts = open_store(given / "acts")
    assert [sae["site"] for sae in result["saes"]] == ["txt.embed", "pooled.embed"]
    for told in result["saes"]:
        folder = tmp_path / "saes" / "model" / told["site"] / "weapons"
        assert Path(told["folder"]) == folder
        sae = load_sae(folder)
        assert (sae.d_in, sae.d_sae) == (told["d_in"], told["d_sae"]) == (32, 64)
        kept = sae.metadata
        assert kept["model"] == acts.model and kept["data"]["rows"] < 16 * 2 * 12 and kept["options"]["k"] == 4
        assert kept["measured_on"] == "held-out prompts" and kept["recipe_sha"] == result["recipe_sha"]
        assert {"fvu", "cosine", "l0", "dead", "sigmas", "image", "doctor", "curve", "checks"} <= kept.keys()
        assert len(kept["image"]["sigmas"]) == 2 and kept["image"]["velocity_error"] >= 0
        assert all(told[name] == kept[name] for name in ("fvu", "cosine", "l0", "dead", "image"))
    png = (tmp_path / "saes" / "model" / "training.png").read_bytes()
    assert png[:4] == b"\x89PNG"
    assert not list((tmp_path / "saes").rglob("state.json"))


def test_several_widths_and_k_lie_beside_each_other(command, capsys, tmp_path):
    result = answer(capsys, *command, "train.expansions=[1, 2]", "train.ks=[3, 4]", "train.spliced=0")
    names = [Path(sae["folder"]).name for sae in result["saes"][:4]]
    assert names == ["weapons.x1.k3", "weapons.x1.k4", "weapons.x2.k3", "weapons.x2.k4"]
    assert [load_sae(sae["folder"]).d_sae for sae in result["saes"][:4]] == [32, 32, 64, 64]
    assert "image" not in result["saes"][0]


def test_an_interrupted_training_goes_on_with_the_same_command(command, capsys, tmp_path, monkeypatch):
    command.append("train.spliced=0")
    whole = answer(capsys, *command, "--out", str(tmp_path / "whole"))
    step, count = fitting.Run.step, [0]

    def interrupted(run, x):
        count[0] += 1
        if count[0] == 40:
            raise KeyboardInterrupt
        step(run, x)

    with monkeypatch.context() as patch:
        patch.setattr(fitting.Run, "step", interrupted)
        assert __main__.main(command) == 130
    assert len(list(tmp_path.rglob("state.json"))) == 2
    capsys.readouterr()
    resumed = answer(capsys, *command)
    for one, other in zip(whole["saes"], resumed["saes"], strict=True):
        assert one["fvu"] == other["fvu"]
        sae, again = load_sae(one["folder"]), load_sae(other["folder"])
        assert torch.equal(sae.encoder.W_enc, again.encoder.W_enc) and sae.metadata == again.metadata


def test_an_interruption_while_splicing_loses_no_training(command, capsys, tmp_path, monkeypatch):
    whole = answer(capsys, *command, "--out", str(tmp_path / "whole"))
    splice, count = verb.loss_recovered, [0]

    def interrupted(*args, **options):
        count[0] += 1
        if count[0] == 2:
            raise KeyboardInterrupt
        return splice(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(verb, "loss_recovered", interrupted)
        assert __main__.main(command) == 130
    saes = [load_sae(tmp_path / "saes" / "model" / one["site"] / "weapons") for one in whole["saes"]]
    assert ["image" in sae.metadata for sae in saes] == [True, False]
    capsys.readouterr()
    monkeypatch.setattr(fitting.Run, "step", None)  # would be called to train again
    resumed = answer(capsys, *command)
    for one, other in zip(whole["saes"], resumed["saes"], strict=True):
        assert one | {"folder": ""} == other | {"folder": ""}
        assert load_sae(one["folder"]).metadata == load_sae(other["folder"]).metadata
    assert not list(tmp_path.rglob("state.json"))


@pytest.mark.parametrize(("risk", "code", "trained"), [("hate/threatening", 2, 0), ("hate", 0, 1)])
def test_a_risk_that_cannot_name_a_folder_is_refused_before_training(
    risk, code, trained, command, given, capsys, monkeypatch
):
    acts, train, calls = open_store(given / "acts"), verb.train, []
    acts.prompts[0]["risk"] = risk
    monkeypatch.setattr(verb, "open_store", lambda place: acts)
    monkeypatch.setattr(verb, "train", lambda *args, **options: calls.append(1) or train(*args, **options))
    assert __main__.main([*command, "train.spliced=0"]) == code and len(calls) == trained
    assert ("'hate/threatening' cannot name a folder" in capsys.readouterr().err) == (code == 2)


def test_where_nothing_was_recorded_the_verb_to_run_first_is_named(capsys, tmp_path):
    assert __main__.main(["train", "tiny-flux", "--store", str(tmp_path / "none")]) == 2
    out, error = capsys.readouterr()
    assert out == "" and "Run `safedig record` with the same recipe first" in error and "Traceback" not in error


@pytest.mark.parametrize("spliced", [2, 0])
def test_a_recording_of_another_model_is_refused_before_training(spliced, given, command, capsys, tmp_path):
    from tests.tiny_pipelines import tiny_flux

    tiny_flux(seed=1).save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "drawing.json").write_text(json.dumps(DRAWING))
    command[1] = f"model={tmp_path / 'other'}"
    assert __main__.main([*command, f"train.spliced={spliced}"]) == 2
    assert "The recording is of the model" in capsys.readouterr().err and not (tmp_path / "saes" / "other").exists()


def test_without_splicing_a_model_that_is_not_on_this_disk_is_taken_on_trust(command, capsys, tmp_path):
    command[1] = "model=black-forest-labs/FLUX.1-dev"
    assert __main__.main([*command, "train.spliced=0"]) == 0
    assert "is taken on trust" in capsys.readouterr().err and (tmp_path / "saes" / "FLUX.1-dev").is_dir()
    command[1] = "model=no-such-model"
    assert __main__.main([*command, "train.spliced=0"]) == 2
    assert "There is no model 'no-such-model'" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["at hand", "black-forest-labs/FLUX.1-dev", "someone/unknown"])
def test_the_sites_that_are_named_are_trained_and_no_others(model, command, capsys, tmp_path):
    command[1] = command[1] if model == "at hand" else f"model={model}"
    result = answer(capsys, *command, 'sites=["pooled.embed"]', "train.spliced=0")
    assert [sae["site"] for sae in result["saes"]] == ["pooled.embed"]
    assert [path.parent.parent.name for path in tmp_path.rglob("cfg.json")] == ["pooled.embed"]


def test_a_site_that_was_not_recorded_is_refused_with_those_that_were(command, capsys):
    assert __main__.main([*command, 'sites=["pooled.embed", "img.embed"]', "train.spliced=0"]) == 2
    assert "'img.embed' was not recorded: there are txt.embed, pooled.embed." in capsys.readouterr().err
    assert __main__.main([*command, 'sites=["{txt,pooled}.embed"]', "train.spliced=0"]) == 0


def test_k_above_d_sae_is_one_line(command, capsys):
    assert __main__.main([*command, "sae.k=999"]) == 2
    assert "k=999 of 64 features: lower k or raise expansion" in capsys.readouterr().err


def test_the_table_shows_every_measure(command, capsys):
    assert __main__.main([word for word in command if word != "--json"]) == 0
    text = capsys.readouterr().out
    for word in ("FVU", "cosine", "L0", "dead", "predicted", "recovered", "txt.embed", "pooled", "1.000", "written"):
        assert word in text


# ---- recipes


def test_what_is_left_out_stays_out_of_the_hash():
    assert load("tiny-flux").train is None and load("tiny-flux", ["train.held_out=0.2"]).sha != load("tiny-flux").sha
    assert load("tiny-flux", ["train.expansions=[4, 8]"]).train == Training(expansions=(4, 8))


@pytest.mark.parametrize("override", ["train.held_out=0", "train.held_out=1.0", "train.spliced=-1"])
def test_a_share_that_is_none_is_refused(override):
    with pytest.raises(UsageError, match="expected a share between 0 and 1|expected"):
        load("tiny-flux", [override])


def test_every_released_model_has_options_to_train_with():
    for name in ("flux1-dev", "flux1-schnell", "sd3.5-large", "sd3.5-medium"):
        recipe = load(name)
        assert isinstance(recipe, Recipe) and recipe.sae != SAEOptions() and recipe.sae.warm_up
        assert recipe.sae.d_sae(3072) == 12288


# ---- the figure


def curve(steps):
    return {"step": steps, "fvu": [1 / s for s in steps], "l0": [4.0] * len(steps), "dead": [0.1] * len(steps)}


def test_the_figure_has_a_line_for_every_run_in_three_panels():
    figure = training_curves({"a": curve([1, 2, 3]), "b": curve([10, 20])})
    assert [axes.get_title() for axes in figure.axes] == ["FVU", "L0", "dead, %"]
    assert all([line.get_label() for line in axes.lines] == ["a", "b"] for axes in figure.axes)
    assert figure.axes[2].lines[0].get_ydata()[0] == pytest.approx(10)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    with pytest.raises(ValueError, match="nothing to show"):
        training_curves({})


def test_the_legend_covers_no_panel():
    figure = training_curves({str(Site.parse("txt.embed")) + str(n): curve([1, 2]) for n in range(9)})
    figure.draw_without_rendering()
    legend = figure.legends[0].get_window_extent()
    assert all(not legend.overlaps(axes.get_tightbbox()) for axes in figure.axes)
