"""`safedig evaluate`: the same prompts for all, a run that resumes to the same counts, one line for a mistake."""

import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from safedig import recipes
from safedig.__main__ import main
from safedig.config import UsageError
from safedig.evaluation.bank import TinyBank
from safedig.evaluation.contest import Contest
from safedig.evaluation.curriculum import Curriculum, Sizes
from safedig.evaluation.jury import Jury
from safedig.evaluation.methods import Lesson
from safedig.evaluation.methods.method import AtSites
from safedig.evaluation.methods.unsteered import Unsteered
from safedig.evaluation.records import read_run
from safedig.evaluation.rules import Above
from safedig.evaluation.sweep import flat, sweep
from safedig.sites import Site
from safedig.verbs import evaluate
from tests.contests import PixelJudge
from tests.steerings import DRAWING

SMALL = Sizes(pairs=4, target=4, stand_ins=2, benign=6, quiet=8, tried=6, asked=6, near_misses=4, images=2)


def test_no_prompt_is_learnt_from_chosen_on_and_reported():
    given = Curriculum("fire", SMALL)
    parts = [given.taught(), given.tried(), given.asked()]
    texts = [{row["prompt"] for rows in part.values() for row in rows} for part in parts]
    assert not (texts[0] & texts[1] or texts[0] & texts[2] or texts[1] & texts[2])
    quiet, calm = ({row["prompt"] for row in rows} for rows in (parts[0]["quiet"], parts[1]["benign"]))
    assert quiet and calm and not quiet & calm
    assert (
        {row["kind"] for row in parts[0]["quiet"]}
        == {row["kind"] for row in parts[1]["benign"]}
        == {"benign", "near-miss"}
    )


def test_the_target_is_learnt_from_its_own_pairs_alone_and_strengths_never_see_it():
    given = Curriculum("fire", SMALL)
    lessons, chosen_on, shown = given.taught(), given.tried(), given.asked()
    assert {row["risk"] for row in lessons["target"]} == {"fire", ""} and "fire" not in given.sources
    assert "fire" not in {row["risk"] for row in (*lessons["source"], *chosen_on["source"], *shown["source"])}
    assert {row["risk"] for row in shown["target"]} == {"fire"} and len(shown["target"]) == 12
    seeds = {}
    for row in shown["target"]:
        seeds.setdefault(row["id"], set()).add(row["seed"])
    assert len(seeds) == 6 and all(len(own) == 2 for own in seeds.values())
    assert len(Curriculum("composition", SMALL).taught()["target"]) == 8, "compositions stand beside no other object"


ROWS = {
    role: [{"id": f"{role}{at}", "prompt": f"{role} {at}", "seed": at, "risk": risk} for at in range(3)]
    for role, risk in (("source", "sign"), ("target", "fire"), ("benign", ""), ("near-miss", ""))
}


@dataclass(frozen=True)
class Push:
    """Moves the pooled text; counts how often it has learnt."""

    name: str = "push"
    unit: float = 2.0
    lessons: ClassVar[list] = []

    def learn(self, lesson):
        self.lessons.append(lesson)
        return lambda strength: AtSites({Site.parse("pooled.embed"): lambda x, context: x + strength})


@dataclass(frozen=True)
class Impossible:
    name: str = "impossible"
    unit: float = 1.0

    def learn(self, lesson):
        raise UsageError("it needs what this model lacks")


def contest(pipe, out, methods=None, **facts):
    rows = {role: ROWS[role] for role in ("source", "benign")}
    manifest = {"run_id": "run", **facts}
    looks = Jury((PixelJudge(),), Above("pixels", "p_unsafe", 0.5))
    lesson = Lesson(pipe, [], [], [], [], ("pooled.embed",), strengths=(0.5, 1.0), drawing=DRAWING)
    methods = methods or [Unsteered(), Push()]
    return Contest(lesson, methods, rows, ROWS, looks, out, manifest, 1.0)


@pytest.fixture(scope="module")
def flux():
    from tests.tiny_pipelines import tiny_flux

    return tiny_flux()


def test_every_method_draws_the_same_prompts_and_seeds_and_all_is_recorded(flux, tmp_path):
    found = contest(flux, tmp_path).run()
    run = read_run(tmp_path)
    keys = {
        name: {(one.role, one.prompt_id, one.seed) for one in run.records if one.method == name}
        for name in found.choices
    }
    assert keys["unsteered"] == keys["push"] and len(keys["push"]) == 12 == len(found.verdicts) / 2
    assert all((tmp_path / one.image).is_file() and one.seconds for one in run.records)
    assert {one.strength for one in run.records if one.method == "unsteered"} == {0.0}
    tries = {one.method for one in read_run(tmp_path / "tried").records}
    assert tries == {"unsteered at 0", "push at 1", "push at 2"}, "as many as the lesson's ladder has, in its units"
    assert "prompt" not in (tmp_path / "records.jsonl").read_text().replace("prompt_id", "").replace("prompt_sha", "")


def test_a_run_that_was_stopped_goes_on_to_the_same_images_and_a_finished_one_learns_nothing(
    flux, tmp_path, monkeypatch
):
    whole = contest(flux, tmp_path / "whole").run()
    judged = PixelJudge.__call__

    def stops(self, images):
        stops.left -= 1
        if stops.left < 0:
            raise KeyboardInterrupt
        return judged(self, images)

    for left in (3, 2, 4):
        stops.left = left
        monkeypatch.setattr(PixelJudge, "__call__", stops)
        with pytest.raises(KeyboardInterrupt):
            contest(flux, tmp_path / "stopped").run()
    monkeypatch.setattr(PixelJudge, "__call__", judged)
    again = contest(flux, tmp_path / "stopped").run()
    assert [(one.record.image_sha, one.label) for one in again.verdicts] == [
        (one.record.image_sha, one.label) for one in whole.verdicts
    ]
    Push.lessons.clear()
    assert contest(flux, tmp_path / "stopped").run().choices == whole.choices and Push.lessons == []


def test_another_run_is_not_mixed_in(flux, tmp_path):
    contest(flux, tmp_path).run()
    with pytest.raises(UsageError, match="holds a run with other options"):
        contest(flux, tmp_path, seed=1).run()


def test_a_method_that_cannot_act_is_left_out_and_one_that_found_no_strength_stays_off(flux, tmp_path, capsys):
    found = contest(flux, tmp_path, [Unsteered(), Impossible()]).run()
    assert found.left_out == {"impossible": "it needs what this model lacks"} and set(found.choices) == {"unsteered"}
    assert "impossible is left out" in capsys.readouterr().err
    still = contest(flux, tmp_path / "still", [Unsteered(), Push(unit=1e-9)]).run()
    assert still.choices["push"].strength is None
    images = {
        name: [one.record.image_sha for one in still.verdicts if one.record.method == name] for name in still.choices
    }
    assert images["push"] == images["unsteered"]


def test_the_sweep_counts_what_lies_above_each_threshold(flux, tmp_path):
    contest(flux, tmp_path).run()
    run = read_run(tmp_path)
    raw = {one.image_sha: one.scores["p_unsafe"] for one in run.scores}
    curves = sweep(run.records, run.scores, "pixels", thresholds=(0.0, 0.5, 1.0))
    mine = [raw[one.image_sha] for one in run.records if one.method == "push"]
    assert [rate["k"] for _, rate in curves["push"]] == [sum(p > at for p in mine) for at in (0.0, 0.5, 1.0)]
    assert len(flat(curves)) == 7 and flat(curves)[0][:2] == ["method", "threshold"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["target=fier"], "Did you mean 'fire'?"),
        (['methods=["orus"]'], "there is no method 'orus'. Did you mean 'ours'?"),
        (["strengths=[]"], "expected at least one strength"),
        (["judge.rule=nudenet2-cls@0.6"], "come by CSV alone"),
        (["--prompts", "none.csv"], "--prompts none.csv: there is no such file"),
        (["--bundle", "x"], "'evaluate' takes no --bundle"),
    ],
)
def test_a_mistake_is_one_line(argv, message, capsys):
    assert main(["evaluate", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err.splitlines()[-1]


def test_quick_holds_one_domain_out_and_all_methods_stay():
    from safedig.verbs import Options

    wishes = recipes.Evaluating()
    assert (
        evaluate.targets_of(wishes, Options(quick=True), TinyBank()) == ["weapon"]
        and len(evaluate.targets_of(wishes, Options(), TinyBank())) == 5
    )
    assert evaluate.methods_of(wishes)[0] == "unsteered" and len(evaluate.methods_of(wishes)) == 16
    assert evaluate.methods_of(recipes.Evaluating(methods="ours")) == ["unsteered", "ours"]


COMMAND = [
    "evaluate", "target=sign", 'methods=["ours", "prompt filter"]', "strengths=[1.0]", "drawing.steps=2",
    "sae.steps=60", "sae.batch_size=128",
    *(f"evaluate.sizes.{name}={n}" for name, n in
      {"pairs": 6, "target": 4, "stand_ins": 4, "benign": 8, "quiet": 200, "tried": 6, "asked": 6}.items()),
]  # fmt: skip


@pytest.mark.slow
def test_the_command_writes_records_tables_and_figures_and_repeats_itself(tmp_path, capsys):
    assert main([*COMMAND, "--out", str(tmp_path / "a"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert list(result["methods"]) == ["unsteered", "prompt filter", "ours"] and result["targets"] == ["sign"]
    assert {path.name for path in (tmp_path / "a").glob("*.png")} == {
        f"{name}.png"
        for name in ("forest-target", "forest-source", "pareto", "any-of-n", "cost", "threshold-sweep", "contact-sheet")
    }
    assert json.loads((tmp_path / "a" / "evaluate.json").read_text()) == result
    torch.manual_seed(1)  # nothing rests on the global state
    assert main([*COMMAND, "--out", str(tmp_path / "b")]) == 0
    assert "sign" in capsys.readouterr().out
    counts = [
        {(o.method, o.role, o.prompt_id, o.image_sha) for o in read_run(tmp_path / at / "sign").records} for at in "ab"
    ]
    assert counts[0] == counts[1]
    assert "tuned_on" in read_run(tmp_path / "a" / "sign").manifest
