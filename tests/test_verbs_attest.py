"""`safedig attest`: a sound bundle passes; one that acts nowhere, or a sentinel that sleeps, is found out."""

import json
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from safedig import __main__
from safedig.hooks import attach
from safedig.pipelines import load_pipeline
from safedig.steering import applied
from safedig.steering.edits import Blend, Repel, Replace
from safedig.verbs import attest
from tests.steerings import ALWAYS, NEVER, POOLED, TXT, edited

FAST, EDITS = ("drawing.steps=2",), (Repel(2.0), Blend(0.5))


@pytest.fixture(scope="module")
def shipped():
    return load_pipeline("tiny-flux")


def command(folder, *more):
    return ["attest", "--bundle", str(folder), "--out", str(folder / "report"), *FAST, *more]


def saved(pipe, folder, edits=EDITS, gate=3.0, **options):
    made = edited(pipe, edits, [TXT, POOLED], gate, **options)
    made.save(folder)
    return made


def failed(capsys, folder):
    """The names of the checks that did not pass, from the report that is written all the same."""
    assert __main__.main(command(folder)) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert "did not pass on this model" in err and str(folder / "report" / "attest.json") in err
    report = json.loads((folder / "report" / "attest.json").read_text())
    assert not report["passed"]
    return [one["check"] for one in report["checks"] if not one["passed"]]


def test_a_sound_bundle_passes_every_check(shipped, tmp_path, capsys):
    made = saved(shipped, tmp_path)
    assert __main__.main(command(tmp_path, "--json")) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["passed"] and all(one["passed"] for one in result["checks"]) and len(result["checks"]) == 8
    assert result["fingerprint"] == made.model and result["steering"] == str(made).splitlines()
    found = {one["check"]: one["found"] for one in result["checks"]}
    assert found["forced open, every site acts"] == "2 of 2 images changed"
    assert found["closed gates change no bit"].startswith("0 of ")
    assert "Armed but not fired" in found["'txt.embed' bypassed raises SafetyBypassError"]
    assert json.loads((tmp_path / "report" / "attest.json").read_text()) == result


def test_a_site_that_is_watched_is_asked_whether_it_opens_the_others(shipped, tmp_path, capsys):
    made = saved(shipped, tmp_path, (Repel(2.0),), watch=[POOLED], scope="image")
    assert made.rules[POOLED].edits == () and __main__.main(command(tmp_path, "--json")) == 0
    found = {one["check"]: one["found"] for one in json.loads(capsys.readouterr().out)["checks"]}
    assert found["'pooled.embed' opens the gates of others"] == "2 of 2 images changed"
    assert found["forced open, every site acts"] == "2 of 2 images changed", "which it need not itself"


def test_control_a_watched_site_that_opens_nothing_is_found_out(shipped, tmp_path, capsys):
    made = saved(shipped, tmp_path, (Repel(2.0),), watch=[POOLED], scope="image")
    text = made.rules[TXT]
    made.rules[TXT] = replace(text, gate=replace(text.gate, scope="token"))
    made.save(tmp_path)
    assert failed(capsys, tmp_path) == ["'pooled.embed' opens the gates of others"]


def test_the_report_is_for_people_too(shipped, tmp_path, capsys):
    saved(shipped, tmp_path, (Replace(),), gate=NEVER)
    (tmp_path / "mine.csv").write_text("id,prompt\none,a boat\n")
    assert __main__.main(command(tmp_path, "--prompts", str(tmp_path / "mine.csv"), "--seed", "5")) == 0
    out = capsys.readouterr().out
    for words in (
        "Steering at 2 sites",
        "on tiny-flux",
        "1 images",
        "pass  closed gates",
        "All checks passed; safedig",
    ):
        assert words in out
    assert "FAIL" not in out


def test_control_a_bundle_that_acts_nowhere_is_found_out(shipped, tmp_path, capsys):
    """Directions of zeros, and a window of σ that holds no step."""
    made = saved(shipped, tmp_path)
    for site, rule in made.rules.items():
        nothing = replace(rule.material, directions=torch.zeros_like(rule.material.directions))
        made.rules[site] = replace(rule, material=nothing, edits=(Repel(2.0),))
    made.save(tmp_path)
    assert failed(capsys, tmp_path) == ["forced open, every site acts"]
    saved(shipped, tmp_path, sigmas={POOLED: (0.01, 0.02), TXT: (0.0, 1.0)})
    assert failed(capsys, tmp_path) == ["forced open, every site acts"]


def test_control_a_sentinel_that_sleeps_is_found_out(shipped, tmp_path, capsys, monkeypatch):
    saved(shipped, tmp_path)
    monkeypatch.setattr(applied, "attach", lambda pipe, functions: attach(pipe, functions, strict=False))
    assert failed(capsys, tmp_path) == [f"'{site}' bypassed raises SafetyBypassError" for site in (TXT, POOLED)]


def test_control_an_edit_that_leaks_through_a_closed_gate_is_found_out(shipped, tmp_path, capsys, monkeypatch):
    saved(shipped, tmp_path)

    @contextmanager
    def leaking(pipe, functions):
        def leak(function):
            def run(x, context):
                out = function(x, context)
                return None if out is None else out + 1e-3

            return run

        with attach(pipe, {site: leak(function) for site, function in functions.items()}):
            yield

    monkeypatch.setattr(applied, "attach", leaking)
    assert failed(capsys, tmp_path) == ["closed gates change no bit"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["attest"], "There is nothing to attest: give --bundle"),
        (["attest", "--bundle", "nowhere"], "'nowhere' is no steering folder"),
        (["attest", "tiny-sd3", "--bundle", "BUNDLE"], "This steering was made for the model"),
    ],
)
def test_a_mistake_is_one_line(shipped, tmp_path, monkeypatch, capsys, argv, message):
    saved(shipped, tmp_path, gate=ALWAYS)
    monkeypatch.chdir(tmp_path)
    assert __main__.main([str(tmp_path) if word == "BUNDLE" else word for word in argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err.splitlines()[-1]


def test_the_hooks_are_back_after_the_bypass(shipped):
    made = edited(shipped, [Repel()], [TXT])
    module = shipped.transformer.context_embedder
    with made.apply(shipped):
        before = dict(module._forward_hooks)
        with attest._unhooked(shipped, TXT):
            assert not module._forward_hooks
        assert dict(module._forward_hooks) == before and before
    assert not module._forward_hooks
