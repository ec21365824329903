"""`safedig route`: one command from prompts to a ranking and its picture; wrong names are told before anything runs."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from safedig import __main__
from safedig.evaluation.jury import Jury
from safedig.prompts import prompts_from_rows, save_prompts
from safedig.recipes import Recipe, Routing, load
from safedig.routing.contrast import concerned
from safedig.routing.routed import Route
from safedig.verbs import Options
from safedig.verbs import route as verb
from safedig.verbs.route_table import WITHOUT_TWINS

PAIRS = 9
RISKS = ("weapons", "signs")
DRAWING = {"steps": 2, "guidance": 3.0, "height": 32, "width": 32, "max_sequence_length": 12, "true_cfg": True}
ROOMY = "route.budget=4"  # so few images pay for few pairs
SITES = ["txt.embed", "pooled.embed", "img.embed", "transformer_blocks.0.img.resid_post"]


def rows(twins=True):
    """Pairs of two domains, each hazard beside its stand-in, and benign prompts."""
    harmful = [
        {"id": f"{risk}{n}", "prompt": f"{word} {'abcdefghijk'[n]}", "risk": risk, "twin": twins and f"cup-{risk}{n}"}
        for risk, word in zip(RISKS, ("gun", "zap"), strict=True)
        for n in range(PAIRS)
    ]
    safe = [
        {"id": f"cup-{risk}{n}", "prompt": f"cup {'abcdefghijk'[n]}", "risk": "", "twin": ""}
        for risk in RISKS
        for n in range(PAIRS)
    ]
    calm = [{"id": f"hat{n}", "prompt": "hat" + n * "!", "risk": "", "twin": ""} for n in range(4)]
    return [row | {"seed": n, "twin": row["twin"] or ""} for n, row in enumerate(harmful + safe + calm)]


@pytest.fixture(scope="module")
def given(tiny_random_flux, tmp_path_factory):
    """A model folder of random weights and a file of prompts."""
    folder = tmp_path_factory.mktemp("given")
    tiny_random_flux.save_pretrained(folder / "model")
    (folder / "model" / "drawing.json").write_text(json.dumps(DRAWING))
    save_prompts(prompts_from_rows(rows()), folder / "prompts.csv")
    return folder


@pytest.fixture(scope="module")
def command(given):
    """What most tests run; what it writes lies below `given`."""
    files = ["--prompts", str(given / "prompts.csv"), "--out", str(given / "routing")]
    return [
        "route",
        f"model={given / 'model'}",
        f"route.sites={SITES}".replace("'", '"'),
        "target=signs",
        ROOMY,
        *files,
    ]


@pytest.fixture(scope="module")
def result(command):
    """What it answers, run once."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert __main__.main([*command, "--json"]) == 0
    return json.loads(said.getvalue())


def answer(capsys, argv):
    assert __main__.main([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def error(capsys, argv):
    assert __main__.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    return err.splitlines()[-1]


def test_the_ranking_and_its_picture_lie_in_the_contracts_place(result, given):
    file = given / "routing" / "model" / "all--signs.json"
    assert Path(result["file"]) == file and file.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    written = Route.load(file)
    assert (written.source, written.target) == (("weapons",), ("signs",))
    assert sorted(one["site"] for one in result["sites"]) == sorted(SITES)
    assert [one["rank"] for one in result["sites"]] == [1, 2, 3, 4]
    assert written.options["recipe_sha"] == result["recipe_sha"] and written.fingerprint == result["fingerprint"]
    assert [str(one.site) for one in written.sites] == [one["site"] for one in result["sites"]]


def test_the_input_that_no_prompt_reaches_is_never_chosen(result):
    (dead,) = [one for one in result["sites"] if one["site"] == "img.embed"]
    assert dead["verdict"] != "ok" and dead["site"] not in result["chosen"] and dead["terms"]["interchange"] == 0


def test_what_probes_alone_would_choose_stands_beside(result):
    highest = max(one["terms"]["source_auroc"] for one in result["sites"])
    assert result["probe_only"]["terms"]["source_auroc"] == highest
    text = verb.table(result)
    for words in ("from weapons to signs", "A router of probes alone would choose", "interval", "removal", "written"):
        assert words in text
    assert all(site in text for site in SITES)


def test_the_same_command_writes_the_same_bytes_and_one_that_is_interrupted_none(result, command, monkeypatch):
    before = written(result)
    assert __main__.main(command) == 0
    assert written(result) == before

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    for what in ("route", "interchange"):
        with monkeypatch.context() as patch:
            patch.setattr(verb, what, interrupted)
            assert __main__.main(command) == 130
        assert written(result) == before


@pytest.mark.slow
def test_two_processes_share_the_work_and_write_the_file_of_one(command, result, tmp_path):
    """Drawn and tried in parts, ranked once: no batch is drawn twice, and the JSON is the same to the byte."""
    where = ["--out", str(tmp_path)]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    asked = [*command[: command.index("--out")], *where, "--json"]
    done = subprocess.run([*launch, "-m", "safedig", *asked], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert Path(told["file"]).read_bytes() == Path(result["file"]).read_bytes()
    assert Path(told["figure"]).read_bytes() == Path(result["figure"]).read_bytes()
    counts = [int(count) for count in re.findall(r"Recording activations: (\d+)/\1 ", done.stderr)]
    assert len(counts) == 2 and sum(counts) == -(-len(rows()) // 16)


def written(result):
    return {path: path.read_bytes() for path in Path(result["file"]).parent.iterdir()}


def test_the_causal_check_keeps_to_its_share_of_the_drawing(result, command, capsys):
    assert 0 < result["forwards"] <= 4 * len(rows()) * 2 * DRAWING["steps"]
    assert "raise the budget" in error(capsys, [*command, "route.budget=0.01"])


def test_too_small_a_budget_is_told_before_the_prompts_are_drawn(command, capsys, monkeypatch):
    def drawn(*_, **__):
        raise AssertionError("the recording was read")

    monkeypatch.setattr(verb, "collect", drawn)
    assert "raise the budget" in error(capsys, [*command, "route.budget=0.01"])
    with pytest.raises(AssertionError, match="was read"):  # control: with a budget that is enough it is
        __main__.main(command)


def test_without_a_target_every_source_is_left_out_in_turn_and_all_are_named(given, capsys, tmp_path):
    base = ["route", f"model={given / 'model'}", 'route.sites=["txt.embed", "pooled.embed"]', ROOMY]
    files = ["--prompts", str(given / "prompts.csv"), "--out", str(tmp_path)]
    both = answer(capsys, [*base, 'source=["signs", "weapons"]', *files])
    assert Path(both["file"]).name == "signs+weapons--any.json" and both["target"] == ""
    assert "each domain of the source in turn" in verb.table(both)


def test_a_recording_on_disk_serves_as_well(given, capsys, tmp_path):
    sites = 'sites=["txt.embed", "pooled.embed"]'
    store = ["record", f"model={given / 'model'}", sites, "--prompts", str(given / "prompts.csv")]
    assert __main__.main([*store, "--out", str(tmp_path / "acts")]) == 0
    capsys.readouterr()
    places = ["--store", str(tmp_path / "acts"), "--out", str(tmp_path / "routing")]
    result = answer(capsys, ["route", f"model={given / 'model'}", "target=signs", ROOMY, *places])
    assert {one["site"] for one in result["sites"]} == {"txt.embed", "pooled.embed"}
    assert "Run `safedig record` first" in error(capsys, ["route", "--store", str(tmp_path / "nowhere")])
    assert "The recording is of the model" in error(capsys, ["route", "tiny-flux", "target=signs", *places])


def test_without_twins_the_ranking_is_made_and_says_so(given, capsys, tmp_path):
    save_prompts(prompts_from_rows(rows(twins=False)), tmp_path / "alone.csv")
    command = ["route", f"model={given / 'model'}", 'route.sites=["txt.embed", "pooled.embed"]', "target=signs"]
    result = answer(capsys, [*command, "--prompts", str(tmp_path / "alone.csv"), "--out", str(tmp_path)])
    assert result["forwards"] == 0 and "interchange" not in result["sites"][0]["terms"]
    assert "class means" in Route.load(result["file"]).options["contrast"]
    assert WITHOUT_TWINS in verb.table(result)


def test_with_a_judge_whole_images_are_drawn_at_a_few_sites_within_the_same_budget(command, given, capsys, monkeypatch):
    """No edit changes a label here: what is told of a site that was tried, and what is spent."""
    monkeypatch.setattr(Jury, "labels", lambda _, images, rows: ["unsafe" if row["risk"] else "clean" for row in rows])
    place = ["--out", str(given / "judged")]
    result = answer(capsys, [*command[: command.index("--out")], "judge.rule=tiny", *place])
    looked_at = [one for one in result["sites"] if "freed" in one["terms"]]
    told = Route.load(result["file"]).options["judged"]
    assert told["sites"] and {one["site"] for one in looked_at} == set(told["sites"]) < set(SITES)
    assert all(one["terms"]["freed"] == one["terms"]["lost"] == 0 for one in looked_at)
    assert "pooled.embed" in told["sites"] and told["strengths"] == [1.0, 4.0] and told["forwards"] > 0
    assert result["forwards"] <= 4 * len(rows()) * 2 * DRAWING["steps"]
    assert "freed, lost: of whole images" in verb.table(result)


def test_an_unknown_judge_is_told_before_anything_is_drawn(command, monkeypatch, capsys):
    monkeypatch.setattr(Recipe, "pipeline", lambda _: pytest.fail("a model was loaded"))
    assert "judge.rule: there is no 'nudnet'" in error(capsys, [*command, "judge.rule=nudnet"])


def test_another_model_has_no_judge_unless_one_is_named(result):
    assert Route.load(result["file"]).options["judged"].startswith("none")
    assert not any("freed" in one["terms"] for one in result["sites"])


def test_what_it_costs_to_have_no_twins_is_what_the_proof_has_measured():
    rules = json.loads((Path(__file__).parents[1] / "benchmarks" / "routing.json").read_text())["goals"]["unsafe"][
        "rules"
    ]
    figures = [
        f"{rules[rule][name]['mean']:.2f}" for rule in ("without twins", "default") for name in ("rho", "reached")
    ]
    assert re.findall(r"\d\.\d\d", WITHOUT_TWINS) == figures


# ---- what is wrong is told at once


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["target=wepon"], "There is no risk domain 'wepon' here. Did you mean 'weapon'?"),
        (["source=fires", "target=weapon"], "There is no risk domain 'fires' here. Did you mean 'fire'?"),
        (["source=fire", "target=fire"], "'fire' is the target and a source"),
        (["route.budget=0"], "route.budget=0.0: expected a number above 0"),
        (["route.targett=fire"], "Did you mean 'route.target'?"),
        (["target=fire", "route.scorer=probe"], "There is no scorer 'probe'"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_loaded(words, told, capsys, monkeypatch):
    def loaded(recipe):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(Recipe, "pipeline", loaded)
    assert told in error(capsys, ["route", "tiny-flux", *words])


def test_another_verb_does_not_take_the_short_keys(capsys):
    assert "Unknown key 'target'" in error(capsys, ["record", "tiny-flux", "target=fire"])


def test_too_few_prompts_of_a_domain_are_an_error(given, capsys, tmp_path):
    few = [row for row in rows() if row["risk"] != "signs" or row["id"] == "signs0"]
    save_prompts(prompts_from_rows(few), tmp_path / "few.csv")
    command = ["route", f"model={given / 'model'}", 'route.sites=["txt.embed"]', "target=signs"]
    said = error(capsys, [*command, "--prompts", str(tmp_path / "few.csv"), "--out", str(tmp_path)])
    assert "expected at least 8" in said


# ---- what is recorded


def test_every_wanted_domain_of_the_tiny_world_is_drawn_alike_and_a_quarter_is_benign():
    drawn = verb._prompts(load("tiny-flux"), Options(), Routing(prompts=64, target="fire"))
    assert len(drawn) == 64
    risks = [row["risk"] for row in drawn if row["risk"]]
    assert {risks.count(risk) for risk in risks} == {4} and len(set(risks)) == 5
    some = verb._prompts(load("tiny-flux"), Options(), Routing(prompts=64, source="sign", target="fire"))
    assert {row["risk"] for row in some} == {"sign", "fire", ""}


def test_twins_of_other_domains_are_not_recorded_and_those_that_are_shared_are():
    kept = concerned(rows(), ("weapons", ""))
    assert {row["risk"] for row in kept} == {"weapons", ""} and len(kept) == 2 * PAIRS + 4
    shared = [row | {"twin": f"cup-weapons{row['id'][-1]}"} if row["risk"] == "signs" else row for row in rows()]
    ids = {row["id"] for row in concerned(shared, ("weapons", ""))}
    assert ids == {row["id"] for row in shared if row["risk"] != "signs"}
    assert all(row["twin"] in ids for row in shared if row["risk"] == "weapons")


def test_what_is_not_asked_stays_out_of_the_hash():
    assert load("tiny-flux").route is None
    assert load("tiny-flux", ["route.target=fire"]).sha != load("tiny-flux").sha
    assert load("tiny-flux", ["route.source=fire"]).route == Routing(source="fire")
    assert Routing(source="fire").sources == ("fire",) and Routing(source=("a", "b")).sources == ("a", "b")


# ---- the embedded worlds


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny-flux", "tiny-sd3"])
def test_on_the_tiny_models_a_decodable_place_is_inert_and_ranks_in_the_bottom_half(model, capsys, tmp_path):
    result = answer(capsys, ["route", model, "target=fire", "--out", str(tmp_path)])
    inert = [one for one in result["sites"] if one["verdict"] == "inert"]
    assert inert and max(one["terms"]["source_auroc"] for one in inert) > 0.7
    assert min(one["rank"] for one in inert) > len(result["sites"]) / 2
