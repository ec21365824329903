"""Options say where a verb writes, tried before it begins so that nothing is drawn in vain, and from which seed."""

import pytest

from safedig import __main__
from safedig.recipes import Recipe
from safedig.verbs import Options


class WorkBegins(Exception):
    """The model is about to be loaded."""


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty folder as the current one, and no model."""

    def pipeline(recipe):
        raise WorkBegins

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Recipe, "pipeline", pipeline)
    return tmp_path


DRAWING = [
    ["demo"],
    ["record"],
    ["calibrate"],
    ["evaluate"],
    ["attack"],
    ["generate", "a cup", "--negation", "images"],
    ["attest", "--bundle", "bundle"],
    ["show", "--sae", "sae"],
]


@pytest.mark.parametrize("argv", DRAWING, ids=lambda argv: argv[0])
def test_a_file_in_the_way_of_the_default_folder_is_one_line_and_nothing_has_begun(elsewhere, capsys, argv):
    (elsewhere / "runs").write_text("")
    assert __main__.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("safedig: 'runs/")
    assert "cannot be written (Not a directory" in err and err.endswith("give a folder with --out.\n")


@pytest.mark.parametrize("argv", DRAWING[:6], ids=lambda argv: argv[0])
def test_control_without_the_file_it_begins_and_no_folder_is_made_before_it_is_needed(elsewhere, argv):
    with pytest.raises(WorkBegins):
        __main__.main(argv)
    assert not (elsewhere / "runs").exists()


def test_adapt_tries_the_folder_of_the_autoencoders(elsewhere, capsys):
    (elsewhere / "sae_checkpoints").write_text("")
    assert __main__.main(["adapt"]) == 2
    assert capsys.readouterr().err.startswith("safedig: 'sae_checkpoints' cannot be written")


def test_the_seed_is_that_of_the_command_also_where_it_is_0_and_else_the_recipes():
    recipe = Recipe("tiny-flux", ("txt.embed",), seed=3)
    assert [Options(seed=seed).seed_of(recipe) for seed in (None, 0, 7)] == [3, 0, 7]


def test_a_folder_that_is_named_is_taken_as_it_is(elsewhere):
    (elsewhere / "runs").write_text("")
    assert Options(out=elsewhere / "mine").folder("runs/demo-tiny-flux") == elsewhere / "mine"
