"""The command line answers on stdout alone; a mistake is one line that says what to do, exit code 2, no traceback."""

import json
import os
import subprocess
import sys
from importlib import import_module

import pytest

from safedig import __version__
from safedig.__main__ import main
from safedig.config import UsageError
from safedig.recipes import Recipe, load, names
from safedig.verbs import VERBS, Options, demo


@pytest.fixture
def called(monkeypatch):
    """Put a stand-in at the demo's work and keep what it is called with."""
    calls = []

    def run(recipe: Recipe, options: Options) -> dict:
        print("a library that prints")
        calls.append((recipe, options))
        return {"model": recipe.model, "rate": {"k": 1, "n": 2}}

    monkeypatch.setattr(demo, "run", run)
    monkeypatch.setattr(demo, "table", lambda result: f"table of {result['model']}")
    return calls


def test_a_recipe_overrides_and_flags_reach_the_verb_in_any_order(called, tmp_path):
    assert (
        main(["demo", "tiny-sd3", "--seed", "7", "strength=1.5", "--out", str(tmp_path), "prompts.report=8", "--quick"])
        == 0
    )
    recipe, options = called[0]
    assert (recipe.model, recipe.strength, recipe.prompts.report) == ("tiny-sd3", 1.5, 8)
    assert options == Options(out=tmp_path, seed=7, quick=True, given=("strength", "prompts.report"))


def test_without_a_recipe_the_demo_is_of_the_tiny_flux(called):
    assert main(["demo", "strength=3"]) == 0
    assert called[0][0].model == "tiny-flux" and called[0][0].strength == 3.0


def test_json_is_the_only_thing_on_stdout(called, capsys):
    assert main(["demo", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"model": "tiny-flux", "rate": {"k": 1, "n": 2}}
    assert "a library that prints" in err


def test_without_json_a_table_is_printed(called, capsys):
    assert main(["demo"]) == 0
    assert capsys.readouterr().out == "table of tiny-flux\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["demoo"], "Unknown verb 'demoo'. Did you mean 'demo'?"),
        (["demo", "tiny-flx"], "There is no recipe 'tiny-flx'. Did you mean 'tiny-flux'?"),
        (["demo", "../tiny-flux"], "There is no recipe '../tiny-flux'."),
        (["demo", "gone.toml"], "There is no recipe 'gone.toml'."),
        (["demo", "tiny-flux", "strenght=1"], "Unknown key 'strenght'. Did you mean 'strength'?"),
        (["evaluate", "tiny-flux", "targt=fire"], "Unknown key 'targt'. Did you mean 'target'?"),
        (["demo", "tiny-flux", "prompts.reprot=1"], "Unknown key 'prompts.reprot'. Did you mean 'prompts.report'?"),
        (["demo", "tiny-flux", "seed=one"], 'seed="one": expected an integer.'),
        (["demo", "tiny-flux", "tiny-sd3"], "'tiny-sd3' is no override"),
        (["demo", "--sede", "1"], "Unknown flag '--sede'. Did you mean '--seed'?"),
        (["demo", "--jsn"], "Unknown flag '--jsn'. Did you mean '--json'?"),
        (["demo", "--seed", "x"], "Argument --seed: invalid int value: 'x'"),
        (["demo", "--seed", "-3"], "--seed -3: expected an integer from 0 to 2**62."),
        (["demo", "--seed", str(2**64)], f"--seed {2**64}: expected an integer from 0 to 2**62."),
        (["demo", "--seed", str(2**62 + 1)], f"--seed {2**62 + 1}: expected"),
        (["demo", f"seed={2**62 + 1}"], f"seed={2**62 + 1}: expected an integer from 0 to 2**62."),
        (["demo", "seed=-1"], "seed=-1: expected an integer from 0 to 2**62."),
        (["demo", "--seed"], "Argument --seed: expected one argument"),
        (["demo", "--quality"], "'demo' takes no --quality: it takes --out, --prompts, --seed, --quick, --json."),
        (["demo", "--prompts", "gone.csv"], "--prompts gone.csv: there is no such file"),
        (["demo", "--out", "/dev/null/below"], "--out /dev/null/below cannot be written"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_has_begun(called, capsys, argv, message):
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and called == []
    assert err.startswith(f"safedig: {message}") and err.count("\n") == 1 and err.endswith("\n")


@pytest.mark.parametrize("verb", ["generate", "attest"])
@pytest.mark.parametrize("override", ["strength=0", "sae.k=-1", '"quantile"=9', 'sites=["txt.embed"]', "watch=[]"])
def test_a_key_that_the_verb_does_not_read_is_refused(capsys, verb, override):
    words = ["a cup", "tiny-flux"] if verb == "generate" else []
    assert main([verb, *words, "--bundle", "nowhere", "drawing.steps=2", override]) == 2
    key = override.split("=")[0].split(".")[0].strip('"')
    expected = f"'{verb}' does not read '{key}': of a recipe it reads model, seed, dtype, device, offload, drawing"
    assert capsys.readouterr().err == f"safedig: {expected}; leave it out.\n"


def test_control_a_key_that_the_verb_reads_is_taken_and_an_unknown_one_named(capsys):
    assert main(["generate", "a cup", "--bundle", "nowhere", "drawing.steps=2", "seed=1"]) == 2
    assert "'nowhere' is no steering folder" in capsys.readouterr().err
    assert main(["generate", "a cup", "--bundle", "nowhere", "sede=1"]) == 2
    assert "Unknown key 'sede'" in capsys.readouterr().err


def test_control_the_largest_seed_is_taken(called):
    assert main(["demo", "--seed", str(2**62), f"seed={2**62}"]) == 0
    assert called[0][1].seed == called[0][0].seed == 2**62


def test_a_file_in_the_way_of_out_is_named(called, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert main(["demo", "--out", str(tmp_path / "file")]) == 2
    assert f"--out {tmp_path / 'file'} cannot be written" in capsys.readouterr().err


def test_a_mistake_found_while_working_is_one_line_too(called, capsys, monkeypatch):
    def run(recipe, options):
        raise UsageError("The weights\nare torn: install again.")

    monkeypatch.setattr(demo, "run", run)
    assert main(["demo", "--json"]) == 2
    assert capsys.readouterr() == ("", "safedig: The weights are torn: install again.\n")


def test_our_own_mistakes_are_not_dressed_up_as_the_callers(called, monkeypatch):
    monkeypatch.setattr(demo, "run", lambda recipe, options: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        main(["demo"])


def test_an_interruption_is_one_line_and_130(called, capsys, monkeypatch):
    def run(recipe, options):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", run)
    assert main(["demo"]) == 130
    assert capsys.readouterr().err == "safedig: interrupted; the same command starts again.\n"


@pytest.mark.parametrize("verb", VERBS)
def test_what_the_same_command_does_after_an_interruption_is_what_its_verb_does(verb, capsys, monkeypatch):
    def run(recipe, options):
        raise KeyboardInterrupt

    monkeypatch.setattr(import_module(VERBS[verb].module), "run", run)
    assert main([verb, "a cup"] if VERBS[verb].takes_prompt else [verb]) == 130
    resumes = verb in ("record", "train", "calibrate", "evaluate", "attack")
    does = "goes on where it stopped" if resumes else "starts again"
    assert capsys.readouterr().err == f"safedig: interrupted; the same command {does}.\n"


def test_an_interruption_while_modules_are_imported_is_one_line_too(tmp_path):
    """A torch that is interrupted at its import, in a process of its own."""
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    paths = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    for argv, code in ((["plan"], 130), (["--version"], 0)):  # control: without torch there is nothing to interrupt
        command = [sys.executable, "-m", "safedig", *argv]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": paths}
        )
        assert done.returncode == code and "Traceback" not in done.stderr
        assert done.stderr.startswith("safedig: interrupted") == (code == 130)


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["demo", "--help"]])
def test_help_names_every_verb_and_recipe(argv, capsys):
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert all(f"  {verb} " in out for verb in VERBS) and all(name in out for name in names())


def test_the_version_is_the_packages(capsys):
    assert main(["--version"]) == 0 and capsys.readouterr().out.strip() == __version__


@pytest.mark.parametrize("name", names())
def test_every_shipped_recipe_loads(name):
    assert load(name).sites


def test_a_recipe_may_lie_anywhere(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('model = "some/folder"\nsites = ["txt.embed"]')
    assert load(str(path), ["seed=3"]) == Recipe("some/folder", ("txt.embed",), seed=3)


def test_the_command_itself_exits_with_2_and_without_a_traceback():
    for command in ([sys.executable, "-m", "safedig"], [os.path.join(os.path.dirname(sys.executable), "safedig")]):
        done = subprocess.run([*command, "demo", "tiny-flx"], capture_output=True, text=True, check=False)
        assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
        assert done.stderr.startswith("safedig: There is no recipe 'tiny-flx'")


def test_the_libraries_notes_on_missing_packages_stay_away_unless_they_are_asked_for():
    def said(**environment):
        command = [sys.executable, "-m", "safedig", "plan", "flux1-dev", "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | environment)
        json.loads(done.stdout)
        return done.stderr

    assert "torchvision" not in said()
    assert "torchvision" in said(TRANSFORMERS_VERBOSITY="warning"), "control: the environment decides"
