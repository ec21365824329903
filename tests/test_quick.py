"""--quick lowers what a recipe asks for: never above it, and never what was given by hand in the same command."""

import pytest

from safedig import __main__
from safedig.config import keys_of
from safedig.evaluation.curriculum import Sizes
from safedig.recipes import Attacking
from safedig.verbs import Options
from safedig.verbs.quick import lowered

ASKED = Attacking(prompts=24, passes=640)


def test_numbers_are_lowered_and_it_is_said(capsys):
    assert lowered(ASKED, {"prompts": 8, "passes": 256}, Options(), "attack.") == Attacking(prompts=8, passes=256)
    assert capsys.readouterr().err == "--quick: attack.prompts=8, attack.passes=256\n"


def test_none_is_raised(capsys):
    small = Attacking(prompts=2, passes=32)
    assert lowered(small, {"prompts": 8, "passes": 256}, Options(), "attack.") == small
    assert capsys.readouterr().err == ""


def test_what_was_given_by_hand_stays(capsys):
    given = Options(given=("attack.prompts", "prompts"))
    assert lowered(ASKED, {"prompts": 8, "passes": 256}, given, "attack.") == Attacking(prompts=24, passes=256)
    assert capsys.readouterr().err == "--quick: attack.passes=256\n"


@pytest.mark.parametrize(
    ("override", "keys"),
    [
        ("strength=1", ["strength"]),
        ("sae.k=8", ["sae.k"]),
        ("evaluate.sizes={tried=4, asked=2}", ["evaluate.sizes.tried", "evaluate.sizes.asked"]),
    ],
)
def test_an_override_names_its_keys_in_full(override, keys):
    assert keys_of(override) == keys


def test_the_command_line_says_what_was_given_by_hand(monkeypatch):
    from safedig.verbs import evaluate

    sizes = []

    def run(recipe, options):
        sizes.append(lowered(recipe.evaluate.sizes, evaluate.QUICK, options, "evaluate.sizes."))
        return {"model": recipe.model}

    monkeypatch.setattr(evaluate, "run", run)
    monkeypatch.setattr(evaluate, "table", lambda result: result["model"])
    argv = ["evaluate", "--quick", "evaluate.sizes.tried=4", "evaluate.sizes.pairs=100"]
    assert __main__.main(argv) == 0
    assert (sizes[0].tried, sizes[0].pairs, sizes[0].stand_ins) == (4, 100, min(48, Sizes().stand_ins))


@pytest.mark.parametrize(("given", "size"), [([], (8, 256)), (["prompts=2", "passes=700"], (2, 700))])
def test_attack_draws_as_many_prompts_as_were_asked_for(monkeypatch, given, size):
    from safedig.verbs import attack

    found = []

    def targets(compare, options, bank):
        raise Stopped

    def kept(section, most, options, path=""):
        found.append(lowered(section, most, options, path))
        return found[-1]

    monkeypatch.setattr(attack, "lowered", kept)
    monkeypatch.setattr(attack, "targets_of", targets)
    with pytest.raises(Stopped):
        __main__.main(["attack", "--quick", *given])
    assert (found[0].prompts, found[0].passes) == size


class Stopped(Exception):
    """Before anything is drawn."""
