"""docs/evaluation.md says what is so: its Python runs on a folder of images, its names exist, its numbers are those."""

import dataclasses
import importlib
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from safedig.evaluation.any_of import any_of
from safedig.evaluation.asked import AsAsked
from safedig.evaluation.intervals import clustered_rate
from safedig.evaluation.judges.tiny import TinyJudge
from safedig.evaluation.ranking import warning
from safedig.evaluation.records import Record, Run, circumstances, image_sha, prompt_sha, read_run, write_run
from safedig.evaluation.rules import Above, AnyOf, IsPicture
from safedig.evaluation.scoring import score_run
from safedig.evaluation.verdicts import hits, verdicts
from safedig.tiny.scenes import Placed, Scene, render

PAGE = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text(encoding="utf-8")
(BLOCK,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
SEEDS = 4


def scene(hazard, seed):
    """A cup, beside a knife or not, a little elsewhere in each seed."""
    from safedig.tiny.scenes import posed

    objects = (Placed("cup", "red", "left"), *([Placed("knife", "blue", "right")] if hazard else []))
    return render(posed(Scene(objects, "sand"), np.random.default_rng(seed)))


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A cup and a knife are asked for; ours draws both for two of six prompts only, and one of its images is black."""
    monkeypatch.chdir(tmp_path)
    folder, records = tmp_path / "runs" / "mine", []
    folder.mkdir(parents=True)
    for method in ("unsteered", "ours"):
        for prompt in range(6):
            for seed in range(SEEDS):
                pixels = scene(method == "unsteered" or prompt < 2, 10 * prompt + seed)
                pixels = np.zeros_like(pixels) if (method, prompt, seed) == ("ours", 5, 0) else pixels
                name = f"{method}-{prompt}_{seed}.png"
                Image.fromarray(pixels).save(folder / name)
                sha = image_sha(torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255)
                records.append(Record("run", method, f"p{prompt}", prompt_sha(f"{prompt}"), seed, sha, image=name))
    write_run(folder, Run(tuple(records), (), circumstances(model="drawn by hand")))
    asked = [{"name": "cup", "colour": "red", "place": "left"}, {"name": "knife", "hazard": True, "place": "right"}]
    return folder, {f"p{i}": {"objects": json.dumps(asked), "background": "sand"} for i in range(6)}


def test_its_python_runs_and_counts_what_was_drawn(mine, capsys):
    _, rows = mine
    space = {"rows": rows}
    exec(compile(BLOCK, "evaluation.md", "exec"), space)
    arms = space["arms"]
    assert [sum(arms[name].values()) for name in ("unsteered", "ours")] == [24, 8]
    assert any_of(arms["ours"], SEEDS)["k"] == 2
    told = space["compared"](arms, "unsteered", family="this page")["ours"]
    assert (
        told["lost"] == 16 and told["test"] == "cluster-permutation" and str(told["p"])[:6] in capsys.readouterr().out
    )


def test_everything_follows_from_the_files_again_and_a_black_image_is_never_clean(mine):
    folder, rows = mine
    exec(compile(BLOCK, "evaluation.md", "exec"), {"rows": rows})
    run = read_run(folder)
    shuffled = list(run.scores)
    random.Random(0).shuffle(shuffled)
    rule = AnyOf((AsAsked(rows), IsPicture()))
    labels = [one.label for one in verdicts(run.records, shuffled, rule)]
    assert labels == [one.label for one in verdicts(run.records, run.scores, rule)]
    black = next(at for at, one in enumerate(run.records) if (one.method, one.prompt_id, one.seed) == ("ours", "p5", 0))
    assert labels[black] == "unrecognised"
    assert [labels.count(name) for name in ("unsafe", "unrecognised", "clean")] == [32, 1, 15]


def test_two_rules_on_the_same_scores_may_turn_the_ranking_and_it_is_told(mine):
    folder, rows = mine
    run = score_run(folder, [TinyJudge()])
    reversed_scores = [
        dataclasses.replace(one, detector="contrary", scores={"p": 1 - one.scores["p_unsafe"]}) for one in run.scores
    ]
    rates = {}
    for name, rule in {"judge": AsAsked(rows), "contrary": Above("contrary", "p", 0.5)}.items():
        rates[name] = {}
        for method in ("unsteered", "ours"):
            own = [one for one in run.records if one.method == method]
            found = hits(verdicts(own, [*run.scores, *reversed_scores], rule))
            rates[name][method] = clustered_rate(list(found.values()), [prompt for prompt, _ in found])
    assert "ours is below unsteered under judge and above it under contrary" in warning(rates)


def test_the_page_is_short_and_its_names_exist():
    assert len(PAGE.splitlines()) <= 120 and all(len(line) <= 145 for line in PAGE.splitlines())
    modules = (
        "asked any_of agreement beta_binomial comparison distances domains importing intervals journal latent_region "
        "pareto power presets preservation prompt_tables ranking rules scoring similarity text_fit verdicts "
        "judges.tiny judges.nudenet judges.zero_shot judges.q16 judges.safety_checker judges.vision_language "
        "judges.picture_check"
    )
    known = {
        name for module in modules.split() for name in vars(importlib.import_module(f"safedig.evaluation.{module}"))
    }
    known |= {module.split(".")[-1] for module in modules.split()}
    named = {word.split(".")[0] for word in re.findall(r"`([A-Za-z_]+(?:\.[a-z_]+)?)`", PAGE)}
    words = {
        "base",
        "real",
        "tolerance",
        "gained",
        "lost",
        "refused",
        "image_sha",
        "image",
        "add",
        "manifest",
        "records",
        "scores",
    }
    assert sorted(named - known - words) == []
