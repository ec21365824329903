"""`safedig generate`: images with a bundle on, unsteered beside them, what was done to each; mistakes in one line."""

import json
from pathlib import Path

import pytest
import torch

from safedig import __main__
from safedig.pipelines import load_pipeline
from safedig.steering.edits import Blend, Repel
from safedig.verbs import generate
from tests.steerings import ALWAYS, NEVER, POOLED, TXT, detector, edited

FAST = ("drawing.steps=2",)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """Made for the shipped tiny FLUX: one that always acts, one that never does, one that acts on guns."""
    root, pipe = tmp_path_factory.mktemp("bundles"), load_pipeline("tiny-flux")
    for name, gate in (("always", ALWAYS), ("never", NEVER)):
        edited(pipe, [Repel(2.0), Blend(0.5)], [TXT, POOLED], gate).save(root / name)
    detector(pipe, "a gun", "a cup").save(root / "guns")
    return root


def answer(capsys, *argv):
    capsys.readouterr()
    assert __main__.main([*argv, *FAST, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_prompt_is_drawn_steered_with_what_was_done_to_it(bundles, tmp_path, capsys):
    result = answer(capsys, "generate", "a gun", "--bundle", str(bundles / "always"), "--out", str(tmp_path))
    (image,) = result["images"]
    assert Path(image["steered"]).read_bytes()[:4] == b"\x89PNG" and "unsteered" not in image and "page" not in result
    assert image["sites"].keys() == {str(TXT), str(POOLED)}
    told = image["sites"][str(POOLED)]
    assert (told["passed"], told["touched"], len(told["sigmas"])) == (2, 2, 2) and told["moved"] > 0
    assert json.loads((tmp_path / "generate.json").read_text()) == result
    assert "a gun" not in json.dumps(result)  # prompts stay out of what is kept


def test_beside_it_stands_the_unsteered_image_of_the_same_seed(bundles, tmp_path, capsys):
    def drawn(name, seed="3"):
        out = tmp_path / name
        place = ["--bundle", str(bundles / name), "--out", str(out), "--compare", "--seed", seed]
        (image,) = answer(capsys, "generate", "a gun", *place)["images"]
        assert (out / "compare.png").read_bytes()[:4] == b"\x89PNG" and image["seed"] == int(seed)
        return image["identical"], Path(image["unsteered"]).read_bytes(), Path(image["steered"]).read_bytes()

    same, before, after = drawn("never")
    assert same and before == after
    same, unsteered, steered = drawn("always")
    assert not same and unsteered == before != steered
    assert drawn("never", "4")[1] != before  # another seed is another image


def test_of_the_prompts_of_a_file_those_are_changed_that_the_gate_opens_for(bundles, tmp_path, capsys):
    (tmp_path / "mine.csv").write_text("id,prompt\none,a cup\ntwo,a gun\n")
    place = ["--bundle", str(bundles / "guns"), "--out", str(tmp_path / "out"), "--compare"]
    result = answer(capsys, "generate", "--prompts", str(tmp_path / "mine.csv"), *place)
    assert [(one["id"], one["identical"]) for one in result["images"]] == [("one", True), ("two", False)]
    assert [one["sites"][str(POOLED)]["touched"] for one in result["images"]] == [0, 2]


def test_what_was_drawn_before_an_interruption_is_kept(bundles, tmp_path, monkeypatch):
    whole = generate.draw

    def interrupted(*args, **kwargs):
        yield next(iter(whole(*args, **kwargs)))
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "BATCH", 1)
    monkeypatch.setattr(generate, "draw", interrupted)
    (tmp_path / "mine.csv").write_text("id,prompt\none,a cup\ntwo,a gun\n")
    place = ["--bundle", str(bundles / "never"), "--out", str(tmp_path / "out")]
    argv = ["generate", "--prompts", str(tmp_path / "mine.csv"), *place, *FAST]
    assert __main__.main(argv) == 130
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["000-steered.png"]


def test_the_table_has_a_line_for_each_image(bundles, tmp_path, capsys):
    for name, words in (
        ("always", "pooled.embed: 2 of 2 tokens, by up to"),
        ("never", "no gate has opened; bit-ident"),
    ):
        place = ["--bundle", str(bundles / name), "--out", str(tmp_path), "--compare"]
        assert __main__.main(["generate", "a cup", "tiny-flux", *place, *FAST]) == 0
        out = capsys.readouterr().out
        assert words in out and "000-steered.png" in out and "compare.png" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["generate", "a cup"], "There is no steering: give --bundle"),
        (["generate", "--bundle", "BUNDLE"], 'There is nothing to draw: give a prompt, safedig generate "a cup'),
        (["generate", " ", "--bundle", "BUNDLE"], "There is nothing to draw"),
        (["generate", "a cup", "--bundle", "nowhere"], "'nowhere' is no steering folder"),
        (["generate", "a cup", "tiny-sd3", "--bundle", "BUNDLE"], "This steering was made for the model"),
        (["generate", "a cup", "tiny-flx", "--bundle", "BUNDLE"], "There is no recipe 'tiny-flx'"),
        (["generate", "tiny-sd3", "--bundle", "BUNDLE"], "'tiny-sd3' is a recipe, and there is no prompt: give one"),
        (["generate", "mine.toml", "drawing.steps=2", "--bundle", "BUNDLE"], "'mine.toml' is a recipe, and there is"),
        (["generate", "tiny-sd3", "tiny-sd3", "--bundle", "BUNDLE"], "This steering was made for the model"),
        (["demo", "--bundle", "BUNDLE"], "'demo' takes no --bundle"),
        (["attest", "--compare"], "'attest' takes no --compare"),
    ],
)
def test_a_mistake_is_one_line(bundles, tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    argv = [str(bundles / "never") if word == "BUNDLE" else word for word in argv]
    assert __main__.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err.splitlines()[-1]


# ---- away from images


@pytest.fixture(scope="module")
def cups(tmp_path_factory):
    """What the shipped model itself draws of a cup, as images to stay away from."""
    folder, pipe = tmp_path_factory.mktemp("cups"), load_pipeline("tiny-flux")
    options = {"height": 64, "width": 64, "max_sequence_length": 16, "num_inference_steps": 2}
    for seed in range(3):
        image = pipe("a cup", generator=torch.Generator().manual_seed(seed), **options).images[0]
        image.save(folder / f"{seed}.png")
    return folder


def test_away_from_a_folder_of_images_what_was_done_is_told(cups, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    argv = ["generate", "a cup", "--negation", str(cups), "--compare", "--out", str(tmp_path)]
    result = answer(capsys, *argv)
    (image,) = result["images"]
    assert (result["negation"], result["negatives"], result["bundle"]) == (str(cups), 3, None)
    told = image["denoiser"]
    assert image["sites"] == {} and bool(told["sigmas"]) == (told["beta"] > 0) == (not image["identical"])
    assert (tmp_path / "cache" / "safedig" / "negation").is_dir()
    assert __main__.main([*argv, *FAST]) == 0
    assert f"kept from 3 images in {cups}" in capsys.readouterr().out


def test_both_act_at_once(bundles, cups, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    place = ["--bundle", str(bundles / "always"), "--negation", str(cups), "--out", str(tmp_path)]
    result = answer(capsys, "generate", "a gun", *place)
    (image,) = result["images"]
    assert image["sites"][str(POOLED)]["touched"] == 2 and "denoiser" in image
    assert __main__.main(["generate", "a gun", *place, *FAST]) == 0
    assert f"steered by {bundles / 'always'} and kept from 3 images" in capsys.readouterr().out


def test_a_folder_without_images_is_one_line(tmp_path, capsys):
    assert __main__.main(["generate", "a cup", "--negation", str(tmp_path)]) == 2
    assert "There is no image in" in capsys.readouterr().err.splitlines()[-1]
