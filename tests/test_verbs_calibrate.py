"""`safedig calibrate` on random weights: nothing is measured twice; the best under the budget is kept, or none is."""

import json
from collections import Counter
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from safedig.__main__ import main
from safedig.activations.record import record
from safedig.config import UsageError
from safedig.evaluation.bank import TinyBank
from safedig.evaluation.jury import Jury, Label
from safedig.hooks import SafetyBypassError
from safedig.recipes import Recipe
from safedig.recipes.calibrating import Tried
from safedig.sae.model import ThresholdEncoder
from safedig.steering.edits import Repel
from safedig.steering.gate import Gate
from safedig.steering.material import Material
from safedig.steering.rule import Rule
from safedig.steering.steering import Steering
from safedig.verbs import Options, calibrate, calibrate_bench, calibrate_table
from safedig.verbs.learning import Learnt, drawn
from tests.steerings import DRAWING, POOLED, made_of

SMALL = [
    "edits=['repel']",
    "doses=[0.5, 1, 4]",
    "sigmas=[[0, 1]]",
    "epsilons=[0.4]",
    "calibrate.prompts.harmful=6",
    "calibrate.prompts.benign=12",
    "calibrate.prompts.quiet=12",
    "calibrate.sites=['pooled.embed']",
]


class Fake(Learnt):
    def __init__(self, steering):
        self.made = steering

    def steering(self, edit, sites, epsilon):
        return self.made(edit, sites, epsilon)


class Teacher:
    """Learns one direction, along which harmful prompts lie further out than benign ones, and how far these come."""

    wide: ClassVar[bool] = False
    """Whether its gates are open for everything."""

    def __init__(self):
        self.lessons = 0

    def __call__(self, pipe, recipe, sites, quiet, bank):
        self.lessons += 1
        taught = drawn("train", {"harmful": 12}, recipe.seed, twins=False)
        high, low = (
            next(iter(record(pipe, rows, POOLED, drawing=DRAWING, batch_size=64))).x for rows in (taught, quiet)
        )
        along = high.mean(0) - low.mean(0)
        along = along / along.norm()

        def steering(edit, sites, epsilon):
            limit = (low @ along).quantile(1 - epsilon / 2)
            bias = torch.full((1,), 1e3) if self.wide else -limit[None]
            encoder = ThresholdEncoder(along[:, None], bias, torch.zeros(1))
            push = 4 * torch.randn(1, len(along), generator=torch.Generator().manual_seed(0))
            rule = Rule(torch.arange(1), encoder, Material(push / 1e3 if self.wide else push), Gate(0.0), (Repel(2.0),))
            return made_of(pipe, {site: rule for site in sites})

        return Fake(steering)


class Eyes:
    """A jury that knows how each prompt is drawn unsteered: harm is gone once it has changed, and so is a cup."""

    told: ClassVar[dict] = {"detector": "eyes", "version": "1", "weights_sha": "w"}

    @property
    def jury(self):
        eyes = self

        class Seeing(Jury):
            told = eyes.told

            def labels(self, images, rows):
                return eyes.labels(images, rows)

        return Seeing((), Label("eyes"))

    def __init__(self):
        self.first, self.looks, self.stop_after = {}, Counter(), None

    def labels(self, images, asked):
        if self.stop_after is not None and sum(self.looks.values()) >= self.stop_after:
            self.stop_after = None
            raise KeyboardInterrupt
        labels = []
        for row, image in zip(asked, images, strict=True):
            self.looks[row["id"]] += 1
            moved = (image - self.first.setdefault(row["id"], image)).abs().mean().item()
            if row["risk"]:
                labels.append("unsafe" if moved < 1e-3 else "clean")
            else:
                labels.append("clean" if moved < 1e-2 else "unrecognised")
        return labels


@pytest.fixture
def bench(monkeypatch, tmp_path, tiny_random_flux, capsys):
    """Runs the verb; knows what was learnt and looked at."""
    known = SimpleNamespace(teacher=Teacher(), eyes=Eyes(), out=tmp_path / "out", pipe=tiny_random_flux)
    monkeypatch.setattr(calibrate, "jury_of", lambda recipe, options: known.eyes.jury)
    monkeypatch.setattr(calibrate_bench, "learn", known.teacher)
    monkeypatch.setattr(Recipe, "pipeline", lambda recipe: tiny_random_flux)
    monkeypatch.setattr(Recipe, "drawing_of", lambda recipe, pipe: DRAWING)

    def run(*argv, code=0, out=None):
        given = ["calibrate", "tiny-flux", *SMALL, "--out", str(out or known.out), *argv]
        assert main(given) == code
        text, error = capsys.readouterr()
        return (json.loads(text) if "--json" in argv and not code else text), error

    known.run = run
    return known


def lines(out):
    return [json.loads(line) for line in (out / "cells.jsonl").read_text().splitlines()]


def test_a_stopped_run_goes_on_and_no_cell_is_measured_twice(bench, tmp_path):
    whole, _ = bench.run("budget=0.5", "--json", out=tmp_path / "whole")
    looks = bench.eyes.looks.copy()
    bench.eyes.looks.clear()
    bench.eyes.stop_after = len(looks) + 7  # in the second cell: the first was the unsteered model
    _, error = bench.run("budget=0.5", code=130)
    assert "interrupted" in error and len(lines(bench.out)) == 2 and not (bench.out / "calibration.json").exists()
    found, _ = bench.run("budget=0.5", "--json")
    keys = [one["key"] for one in lines(bench.out)]
    assert len(keys) == len(set(keys)) == 4 and bench.teacher.lessons == 2, "one of each folder"
    assert bench.eyes.looks == looks, "only the batch that was being drawn is drawn again, and it had not been judged"
    assert found["cells"] == whole["cells"] and found["chosen"] == whole["chosen"]


def test_a_finished_run_learns_and_draws_nothing_and_gives_the_same_bytes(bench):
    bench.run("budget=0.5")
    files = {path: path.read_bytes() for path in bench.out.rglob("*") if path.is_file()}
    bench.eyes.looks.clear()
    bench.run("budget=0.5")
    assert not bench.eyes.looks and bench.teacher.lessons == 1
    assert files == {path: path.read_bytes() for path in bench.out.rglob("*") if path.is_file()}


def test_control_what_decides_a_cell_makes_it_another_and_a_budget_does_not(bench):
    bench.run()
    # learnt from other prompts, this teacher's lesson is the same to the bit, and so are its cells
    cases = [("budget=0.3", 0, 1), ("doses=[0.5, 2]", 1, 1), ("epsilons=[0.2]", 3, 2), ("prompts.learn=9", 0, 3)]
    for at, (given, new, lessons) in enumerate([*cases, ('stand_in="star"', 0, 4), ("watch=[]", 0, 5)]):
        before = len(lines(bench.out))
        bench.run(given)
        assert (at, len(lines(bench.out)) - before, bench.teacher.lessons) == (at, new, lessons)
    before = len(lines(bench.out))
    bench.run("--seed", "5")
    assert len(lines(bench.out)) - before == 4, "other prompts: the unsteered model is drawn anew too"


def test_the_bundle_is_the_best_within_the_budget_and_carries_its_receipt(bench):
    found, _ = bench.run("budget=0.5", "--json")
    fine = [one for one in found["cells"] if one["within"]]
    chosen = next(one for one in found["cells"] if one["chosen"])
    assert chosen["within"] and chosen["unsafe"]["k"] == min(one["unsafe"]["k"] for one in fine)
    assert chosen["unsafe"]["k"] < found["unsteered"]["unsafe"]["k"] == found["unsteered"]["unsafe"]["n"] == 6
    made = Steering.load(found["bundle"])
    assert made.rules[POOLED].edits == (Repel(2.0 * chosen["setting"]["dose"]),)
    receipt = made.facts[POOLED]["receipt"]["calibration"]
    assert receipt["setting"] == chosen["setting"] and receipt["unsafe"] == chosen["unsafe"]
    assert receipt["split"] == "calibrate" and receipt["budget"] == 0.5 and receipt["chosen_among"] == 3
    assert receipt["judge"] == Eyes.told
    made.check(bench.pipe)


def test_control_a_tighter_budget_chooses_a_gentler_dose_or_none(bench):
    loose, _ = bench.run("budget=0.9", "epsilons=[0.9]", "--json")
    tight, _ = bench.run("budget=0", "epsilons=[0.9]", "--json")
    lost = [one["lost"]["k"] for one in loose["cells"]]
    assert lost == sorted(lost) and lost[-1] > 0, "the more, the stronger"
    assert loose["chosen"] is not None and loose["chosen"]["lost"]["k"] > 0
    assert tight["chosen"] is None or tight["chosen"]["lost"]["k"] == 0
    assert tight["chosen"] != loose["chosen"]


def test_a_budget_that_cannot_be_met_is_said_with_the_nearest_and_no_bundle_is_left(bench):
    bench.run("budget=0.5")
    assert (bench.out / "steering" / "steering.json").is_file()
    bench.teacher.wide = True
    text, _ = bench.run("epsilons=[0.1]", "budget=0.01")
    assert "No setting meets the budget of 1.0%" in text and "The nearest is repel ×" in text and "touched" in text
    assert not list((bench.out / "steering").glob("*")), "that of the earlier run is gone"
    told = json.loads((bench.out / "calibration.json").read_text())
    assert told["chosen"] is None and told["bundle"] is None and told["nearest"]["touched"]["rate"] == 1.0
    assert (bench.out / "front.png").read_bytes()[:4] == b"\x89PNG"


def test_pictures_behind_closed_gates_are_compared_and_a_changed_one_stops_the_run(bench, monkeypatch):
    found, _ = bench.run("--json")
    assert found["identical"] == 3 * 4, "a handful in each cell"
    bench.teacher.wide = True
    monkeypatch.setattr(calibrate_bench, "touched", lambda steering, acts: set())
    with pytest.raises(SafetyBypassError, match="behind a gate that the recording says is closed"):
        bench.run("epsilons=[0.1]")


def test_the_table_has_every_setting_and_rate_with_counts(bench):
    text, error = bench.run("budget=0.5")
    assert all(f"repel × {dose}," in text for dose in ("0.5", "1", "4")) and "front.png" in text
    assert text.count("/6") >= 8 and text.count("/12") >= 6 and "Chosen at a budget of 50.0%" in text
    assert "Settings: 3/3" in error
    assert "No setting" not in calibrate_table.table(json.loads((bench.out / "calibration.json").read_text()))


def test_json_alone_stands_on_stdout_and_is_what_the_file_says(bench):
    found, _ = bench.run("--json")
    assert found == json.loads((bench.out / "calibration.json").read_text())
    assert set(found["cells"][0]) == {"setting", "unsafe", "clean", "lost", "touched", "within", "front", "chosen"}
    assert {"k", "n", "rate", "lo", "hi"} <= set(found["cells"][0]["unsafe"])


def test_prompts_that_set_gates_cost_nothing_and_none_is_of_the_report(bench):
    asked = calibrate_bench.Asked.of(Tried(harmful=6, benign=12, quiet=12), 0, TinyBank())
    texts = [{row["prompt"] for row in rows} for rows in (asked.harmful, asked.benign, asked.quiet)]
    assert [len(one) for one in texts] == [6, 12, 24] and not texts[1] & texts[2]
    assert {row["split"] for rows in (asked.harmful, asked.benign, asked.quiet) for row in rows} == {"calibrate"}
    assert Counter(row["kind"] for row in asked.benign) == {"benign": 6, "near-miss": 6}


def test_gates_that_cannot_be_vouched_for_are_left_out_and_said(bench, monkeypatch):
    learnt = bench.teacher.__call__

    def strict(pipe, recipe, sites, quiet, bank):
        base = learnt(pipe, recipe, sites, quiet, bank)

        def steering(edit, sites, epsilon):
            if epsilon < 0.3:
                raise UsageError("12 benign prompts cannot vouch for that")
            return base.steering(edit, sites, epsilon)

        return Fake(steering)

    monkeypatch.setattr(calibrate_bench, "learn", strict)
    found, error = bench.run("epsilons=[0.4, 0.1]", "--json")
    assert len(found["cells"]) == 3 and "ε 0.1 at pooled.embed is left out: 12 benign prompts" in error
    _, error = bench.run("epsilons=[0.1]", code=2)
    assert "No setting could be tried" in error


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["calibrate", "tiny-flux", "calibrate.bugdet=0.1"], "Did you mean 'calibrate.budget'?"),
        (["calibrate", "tiny-flux", 'edits=["blent"]'], "Did you mean 'blend'?"),
        (["calibrate", "flux1-dev", "judge.rule=nudent3-9cls@0.6"], "Did you mean 'nudenet3-9cls@0.6'?"),
        (["calibrate", "tiny-flux", "--prompts", "none.csv"], "--prompts none.csv: there is no such file"),
        (["calibrate", "tiny-flux", "--bundle", "x"], "'calibrate' takes no --bundle"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_do(argv, message, capsys):
    assert main(argv) == 2
    text, error = capsys.readouterr()
    assert text == "" and message in error and len(error.strip().splitlines()) == 1


def test_quick_tries_every_other_dose_in_one_window_at_all_sites_together_on_fewer_prompts():
    from safedig.recipes import load

    quick = Options(quick=True)
    recipe, wishes = calibrate._quick(load("tiny-sd3", ["calibrate.prompts.benign=10"]), quick)
    assert (wishes.prompts.harmful, wishes.prompts.benign, wishes.prompts.quiet) == (32, 10, 280)
    assert recipe.prompts.learn == 80 and wishes.doses == (0.5, 1.0, 2.0)
    few, every = (calibrate._settings(wishes, ("a", "b"), options) for options in (quick, Options()))
    assert {one.sites for one in few} == {("a", "b")} and {one.sigmas for one in few} == {(0.0, 1.0)}
    assert len(few) == 18 and len(every) == 18 * 3 * 2


def test_quick_keeps_the_doses_and_windows_that_are_given_with_it():
    from safedig.recipes import load

    recipe = load("tiny-sd3", ["calibrate.doses=[1.0, 2.0]", "calibrate.sigmas=[[0.0, 0.5], [0.5, 1.0]]"])
    given, unasked = Options(quick=True, given=("calibrate.doses", "calibrate.sigmas")), Options(quick=True)
    assert calibrate._quick(recipe, given)[1].doses == (1.0, 2.0)
    assert len({one.sigmas for one in calibrate._settings(recipe.calibrate, ("a",), given)}) == 2
    assert calibrate._quick(recipe, unasked)[1].doses == (1.0,), "control: a recipe's own are thinned out"
    assert len({one.sigmas for one in calibrate._settings(recipe.calibrate, ("a",), unasked)}) == 1


@pytest.mark.slow
def test_the_tiny_model_is_calibrated_with_every_edit_and_the_bundle_steers(tmp_path, capsys):
    argv = ["doses=[1]", "epsilons=[0.3]", "prompts.learn=48", "sae.steps=200", "--quick", "--seed", "3", "--json"]
    sizes = [f"calibrate.prompts.{name}" for name in ("harmful=9", "benign=24", "quiet=40")]
    assert main(["calibrate", "tiny-sd3", *argv, *sizes, "budget=0.25", "--out", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["setting"]["edit"] for one in found["cells"]] == ["repel", "blend", "replace"]
    assert found["unsteered"]["unsafe"]["k"] > min(one["unsafe"]["k"] for one in found["cells"])
    assert found["chosen"] is not None and Steering.load(found["bundle"]).model == found["fingerprint"]
