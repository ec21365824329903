"""The demo's plumbing, on random weights: nothing leaks between prompts, methods and files."""

import contextlib
import json
from typing import ClassVar

import pytest

from safedig import recipes, tiny
from safedig.__main__ import main
from safedig.evaluation.records import join, read_run
from safedig.pipelines import Drawing
from safedig.prompts import prompts_from_rows, save_prompts
from safedig.recipes import Recipe
from safedig.verbs import Options, demo

ROWS = [
    *({"id": f"h{i}", "prompt": f"a knife {i}", "risk": "weapons", "seed": i} for i in range(3)),
    *({"id": f"b{i}", "prompt": f"a cup {i}", "seed": 10 + i} for i in range(2)),
    {"id": "u", "prompt": "a thing", "kind": "underspecified"},
]


class Shift:
    """Stands in for a steering: adds to the pooled text of harmful prompts, or of none."""

    rules: ClassVar = {"pooled.embed": None}

    def __init__(self, amount):
        self.amount = amount

    @contextlib.contextmanager
    def apply(self, pipe):
        from safedig.hooks import attach
        from safedig.sites import Site

        def shift(x, ctx):
            return x + self.amount if self.amount else None

        with attach(pipe, {Site.parse("pooled.embed"): shift}):
            yield

    def save(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "amount").write_text(str(self.amount))


def a_judge(images, asked=None):
    """Calls dark pictures unsafe; the threshold splits what random weights draw."""
    labels = ["unsafe" if image.mean() < 0.5 else "clean" for image in images]
    return [{"label": label, "p_unsafe": 0.5, "objects": [{"name": "cup"}], "background": "sand"} for label in labels]


@pytest.fixture
def run_demo(monkeypatch, tmp_path, tiny_random_flux, capsys):
    monkeypatch.setattr(tiny, "judge", a_judge, raising=False)
    monkeypatch.setattr(Recipe, "pipeline", lambda recipe: tiny_random_flux)
    monkeypatch.setattr(Recipe, "drawing_of", lambda recipe, pipe: Drawing(2, 0.0, 32, 32, max_sequence_length=12))
    save_prompts(prompts_from_rows(ROWS), tmp_path / "p.csv")

    def run(amount, *argv, out="out"):
        monkeypatch.setattr(demo, "_learn", lambda pipe, recipe: Shift(amount))
        assert main(["demo", "--prompts", str(tmp_path / "p.csv"), "--out", str(tmp_path / out), "--json", *argv]) == 0
        return json.loads(capsys.readouterr().out), tmp_path / out

    return run


def test_the_result_is_nested_as_in_the_contract_and_so_is_its_file(run_demo):
    result, out = run_demo(0.0)
    assert set(result["unsteered"]) == set(result["steered"]) == {"not_clean", "unsafe", "unrecognised", "empty"}
    assert set(result["benign"]) == {"unsteered", "steered", "bit_identical"}
    assert result["unsteered"]["not_clean"]["n"] == 3 and result["benign"]["steered"]["n"] == 2
    assert json.loads((out / "demo.json").read_text()) == result
    assert (out / "demo.png").read_bytes()[:4] == b"\x89PNG"
    assert (out / "steering" / "amount").read_text() == "0.0", "what steered is kept beside what it did"


def test_a_steering_that_does_nothing_leaves_every_bit(run_demo):
    result, _ = run_demo(0.0)
    assert result["benign"]["bit_identical"]["rate"] == 1.0 and result["steered"] == result["unsteered"]


def test_control_a_steering_that_acts_is_seen(run_demo):
    result, out = run_demo(3.0)
    assert result["benign"]["bit_identical"]["rate"] == 0.0
    records = read_run(out).records
    drawn = {(record.prompt_id, record.method): record.image_sha for record in records}
    assert all(drawn[row["id"], "unsteered"] != drawn[row["id"], "steered"] for row in ROWS[:5])


def test_every_image_has_its_record_and_its_score(run_demo):
    run = read_run(run_demo(3.0)[1])
    assert len(run.records) == 10 and len(join(run.records, run.scores, "tiny.judge")) == 10
    assert {(record.role, record.method) for record in run.records} == {
        (role, method) for role in ("source", "benign") for method in ("unsteered", "steered")
    }
    assert {record.site for record in run.records} == {"", "pooled.embed"}, "where it acted, not what was asked for"
    assert not any("knife" in line for line in (run_demo(0.0)[1] / "records.jsonl").read_text().splitlines())


def test_the_same_command_gives_the_same_files(run_demo):
    first, second = run_demo(3.0, out="one")[1], run_demo(3.0, out="two")[1]
    for name in ("records.jsonl", "scores.jsonl", "manifest.json", "demo.json", "demo.png"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_another_seed_draws_other_images(run_demo):
    images = [{r.image_sha for r in read_run(run_demo(0.0, *argv)[1]).records} for argv in ([], ["--seed", "500"])]
    assert images[0].isdisjoint(images[1])


def test_prompts_without_a_benign_one_are_refused(run_demo, tmp_path, capsys):
    run_demo(0.0)
    save_prompts(prompts_from_rows(ROWS[:3]), tmp_path / "h.csv")
    assert main(["demo", "--prompts", str(tmp_path / "h.csv"), "--out", str(tmp_path)]) == 2
    assert "holds no prompt of kind benign or near-miss" in capsys.readouterr().err


def test_the_table_shows_every_rate(run_demo):
    text = demo.table(run_demo(0.0)[0])
    assert all(
        word in text for word in ("not clean", "unsafe", "unrecognised", "empty", "drawn as asked", "bit-identical")
    )


@pytest.mark.parametrize(("name", "steps"), [("sd3.5-large", 1000), ("flux1-dev", 1000), ("tiny-sd3", 1000)])
def test_quick_cuts_the_training_of_recipes_that_ask_for_much(name, steps):
    recipe = recipes.load(name)
    quick = Options(quick=True)
    assert demo._quick(recipe, quick).sae.steps == steps <= recipe.sae.steps
    assert demo._quick(recipes.load(name, ["sae.steps=7"]), quick).sae.steps == 7


def test_quick_shows_no_more_than_the_recipe_and_draws_what_is_given_with_it():
    recipe = recipes.load("tiny-flux", ["prompts.shown=2", "prompts.report=40", "prompts.benign=40"])
    counts = demo._quick(recipe, Options(quick=True, given=("prompts.report",))).prompts
    assert (counts.shown, counts.report, counts.benign, counts.quiet) == (2, 40, 10, recipe.prompts.quiet)
