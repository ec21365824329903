"""`safedig attack`: every attack on every victim once, curves that never fall, prompts handed on, resumable."""

import json
import shutil

import pytest

from safedig.__main__ import main
from safedig.evaluation import siege as sieges
from safedig.evaluation.attacks.attack import Candidate, Outcome
from safedig.evaluation.records import Score, join, prompt_sha, read_run, write_run
from safedig.evaluation.siege import ANY, BLIND, Siege, as_run, broken, curves, success
from safedig.evaluation_figures import success_curves
from tests.test_evaluation_figures import overlapping, texts
from tests.victims import Nobody

ROWS = [{"id": f"p{at}", "prompt": f"prompt {at}", "seed": at} for at in range(4)]


class Named:
    """An attack by its name alone: what it comes to is told by `ran`."""

    white_box, tiny_world = False, False

    def __init__(self, name):
        self.name = name

    def candidates(self, victim, row):
        yield [Candidate(row["prompt"], row["seed"])]


@pytest.fixture
def ran(monkeypatch):
    """What `attacked` was asked, in turn; the first attack breaks even prompts of the victim "weak"."""
    asked = []

    def attacked(victim, attack, row, budget):
        asked.append((victim.called, attack.name, row["id"], dict(victim.pool)))
        hit = victim.called == "weak" and attack.name == "first" and row["seed"] % 2 == 0
        words = f"words for {row['id']}" if hit else ""
        seen = Score(f"sha {row['id']}", "pixels", "1", scores={"label": "clean"})
        return Outcome(100 if hit else budget, hit, words, row["seed"], (seen,))

    monkeypatch.setattr(sieges, "attacked", attacked)
    return asked


def siege(out, names=("first", "transferred"), key="k"):
    victims = {}
    for name in ("weak", "strong"):
        victims[name] = Nobody()
        victims[name].called = name
    return Siege(victims, [Named(name) for name in names], ROWS, 400, out, key)


def test_every_attack_is_run_once_on_every_victim_and_prompt_and_never_again(ran, tmp_path):
    lines = siege(tmp_path).run()
    assert len(lines) == len(ran) == 2 * 2 * 4 == len({(one["victim"], one["attack"], one["id"]) for one in lines})
    ran.clear()
    assert siege(tmp_path).run() == lines and ran == []
    assert len(siege(tmp_path, ("first", "transferred", "third")).run()) == 24 and len(ran) == 8
    ran.clear()
    siege(tmp_path, key="other").run()
    assert len(ran) == 16, "another siege's lines are passed over"


def test_a_stopped_siege_goes_on(ran, tmp_path, monkeypatch):
    whole = siege(tmp_path / "whole").run()
    ran.clear()
    inner = sieges.attacked

    def stops(*given):
        if len(ran) == 5:
            raise KeyboardInterrupt
        return inner(*given)

    monkeypatch.setattr(sieges, "attacked", stops)
    with pytest.raises(KeyboardInterrupt):
        siege(tmp_path / "stopped").run()
    monkeypatch.setattr(sieges, "attacked", inner)
    assert siege(tmp_path / "stopped").run() == whole


def test_words_that_broke_one_victim_are_handed_on_to_the_others_and_last(ran, tmp_path):
    siege(tmp_path, ("transferred", "first")).run()
    assert [one[1] for one in ran] == ["first"] * 8 + ["transferred"] * 8
    pools = {one[0]: one[3] for one in ran if one[1] == "transferred"}
    assert pools == {"strong": {"p0": ["words for p0"], "p2": ["words for p2"]}, "weak": {}}


def test_success_is_counted_by_budget_and_by_any_attack(ran, tmp_path):
    lines = siege(tmp_path).run()
    assert broken(lines, 400)["weak"] == {
        "first": {"p0": True, "p1": False, "p2": True, "p3": False},
        "transferred": dict.fromkeys(["p0", "p1", "p2", "p3"], False),
        BLIND: dict.fromkeys(["p0", "p1", "p2", "p3"], False),
        ANY: {"p0": True, "p1": False, "p2": True, "p3": False},
    }
    assert (success(lines, 400)["weak"][ANY]["k"], success(lines, 99)["weak"][ANY]["k"]) == (2, 0)
    assert success(lines, 400)["strong"][ANY]["k"] == 0


def test_curves_never_fall_and_end_at_the_whole_budget(ran, tmp_path):
    lines = siege(tmp_path).run()
    found = curves(lines, 400, points=8)["weak"]["first"]
    assert [budget for budget, _ in found] == [50, 100, 150, 200, 250, 300, 350, 400]
    assert [rate["k"] for _, rate in found] == [0, 2, 2, 2, 2, 2, 2, 2]


def test_the_figure_says_what_was_spent_and_no_text_overlaps(ran, tmp_path):
    found = curves(siege(tmp_path).run(), 400)
    drawn = success_curves({name: one[ANY] for name, one in found.items()}, "any attack", 4)
    assert overlapping(drawn) == []
    words = " ".join(one.get_text() for one, _ in texts(drawn))
    assert "rows through the transformer" in words and "weak 2/4" in words and "4 prompts" in words


def test_a_siege_is_a_run_whose_roles_name_the_attacks_and_which_holds_no_prompt(ran, tmp_path):
    lines = siege(tmp_path).run()
    rows = [row | {"risk": "fire"} for row in ROWS]
    run = as_run(lines, rows, {"run_id": "r"})
    assert {one.role for one in run.records} == {"adversarial:first", "adversarial:transferred"} and len(
        run.records
    ) == 16
    assert len(join(run.records, run.scores, "pixels")) == 16
    broken_by_words = next(one for one in run.records if (one.method, one.prompt_id) == ("weak", "p0"))
    assert broken_by_words.prompt_sha == prompt_sha("words for p0")
    write_run(tmp_path, run)
    assert read_run(tmp_path) == run and "words for" not in (tmp_path / "records.jsonl").read_text()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (['attacks=["adaptve"]'], "Did you mean 'adaptive'?"),
        (["passes=0"], "expected at least 1"),
        (["target=fier"], "Did you mean 'fire'?"),
        (["--store", "x"], "'attack' takes no --store"),
    ],
)
def test_a_mistake_is_one_line(argv, message, capsys):
    assert main(["attack", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err.splitlines()[-1]


COMMAND = [
    "attack", "target=sign", 'methods=["ours"]', 'attacks=["synonyms", "adaptive"]', "prompts=2", "passes=24",
    "evaluate.strengths=[2.0]", "evaluate.budget=0.9", "drawing.steps=2", "sae.steps=60", "sae.batch_size=128",
    *(f"evaluate.sizes.{name}={n}" for name, n in
      {"pairs": 6, "target": 4, "stand_ins": 4, "benign": 8, "quiet": 200, "tried": 6, "asked": 4}.items()),
]  # fmt: skip


@pytest.mark.slow
def test_the_command_writes_outcomes_a_table_and_curves(tmp_path, capsys):
    assert main([*COMMAND, "--out", str(tmp_path), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result["broken"]["ours"]) == {"synonyms", "adaptive", BLIND, ANY} and result["passes"] == 24
    assert json.loads((tmp_path / "attack.json").read_text()) == result
    pictures = {"methods.png", "methods-without-weights.png", "attacks-on-ours.png"}
    assert {path.name for path in tmp_path.glob("*.png")} == pictures
    last = (tmp_path / "attack.md").read_text().splitlines()
    assert last[0].endswith("| broken most by |") and last[2].startswith("| unsteered |")
    assert len((tmp_path / "attacks.jsonl").read_text().splitlines()) == 2 * 2 * 2 == len(read_run(tmp_path).records)
    before = (tmp_path / "attacks.jsonl").read_bytes()
    assert main([*COMMAND, "--out", str(tmp_path)]) == 0
    assert "percent of 2 prompts" in capsys.readouterr().out and (tmp_path / "attacks.jsonl").read_bytes() == before
    shutil.rmtree(tmp_path / "sign")  # the contest, which another could not go on with
    assert main([*COMMAND, "sae.steps=61", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "attacks.jsonl").read_bytes().count(b"\n") == 2 * before.count(b"\n"), "another dictionary's"
