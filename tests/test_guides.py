"""The guides of the real models say what is so: commands parse, numbers are those of the plan, the Python runs."""

import json
import re
import shlex
from pathlib import Path

import pytest

from safedig.__main__ import FLAGS, main
from safedig.recipes import load
from safedig.verbs import VERBS
from tests.reduced_models import write

DOCS = Path(__file__).parents[1] / "docs"
GUIDES = {"flux.md": ("flux1-dev", "flux1-schnell"), "sd3.md": ("sd3.5-large", "sd3.5-medium")}
PROMPTS = "id,prompt,risk,twin,seed\n" + "".join(
    f"v{i},a {harm} in {place},violence,s{i},{i}\ns{i},a {safe} in {place},,,{i}\n"
    for i, (harm, safe, place) in enumerate(
        [("knife", "flower", "a street"), ("gun", "cup", "a house"), ("blade", "hat", "the old town")] * 4
    )
)


def commands(text):
    lines = re.findall(r"^    (?:accelerate launch -m )?safedig (.*)$", text, flags=re.MULTILINE)
    return [shlex.split(line.split("  #")[0], posix=False) for line in lines]


@pytest.mark.parametrize("guide", GUIDES)
def test_it_is_short_and_its_links_lead_somewhere(guide):
    text = (DOCS / guide).read_text()
    assert len(text.splitlines()) <= 120 and all(len(line) <= 140 for line in text.splitlines())
    assert all((DOCS / link).exists() for link in re.findall(r"\]\(([^)#]+)\)", text))


@pytest.mark.parametrize("guide", GUIDES)
def test_every_command_names_a_verb_a_recipe_flags_and_overrides_that_exist(guide):
    given = commands((DOCS / guide).read_text())
    assert {words[0] for words in given} == set(VERBS)
    for verb, recipe, *rest in given:
        load(recipe, [word for word in rest if "=" in word and not word.startswith("--")])
        flags = [word for word in rest if word.startswith("--")]
        assert set(flags) <= set(FLAGS) and {flag[2:] for flag in flags} <= {*VERBS[verb].flags, "json"}


def test_control_a_wrong_override_would_be_noticed():
    with pytest.raises(ValueError, match="Did you mean 'record.tokens'"):
        load("flux1-dev", ["record.token=64"])


@pytest.mark.parametrize(("guide", "recipe"), [(guide, recipe) for guide, both in GUIDES.items() for recipe in both])
def test_the_numbers_are_those_of_the_plan(guide, recipe, capsys):
    assert main(["plan", recipe, "--json"]) == 0
    found, text = json.loads(capsys.readouterr().out), (DOCS / guide).read_text()
    said = (
        f"{found['bytes']:,} bytes",
        f"{found['tflop_per_forward']:.1f} TFLOP",
        f"{found['weights']['bytes']['bfloat16'] / 1e9:.1f} GB",
        f"{found['weights']['bytes_of_the_largest']['bfloat16'] / 1e9:.1f} GB",
        f"{found['weights']['parameters']['transformer'] / 1e9:.2f} B",
        f"{found['drawing']['steps']}, ",
    )
    assert [words for words in said if words not in text] == []
    if recipe in ("flux1-dev", "sd3.5-large"):
        (listed,) = re.findall(r"sigmas=\[([^\]]*)\],  #", text)
        assert [float(sigma) for sigma in listed.split(",")] == [round(sigma, 3) for sigma in found["sigmas"]]


@pytest.mark.slow
@pytest.mark.parametrize("guide", GUIDES)
def test_its_python_runs_on_a_reduced_folder(guide, tmp_path, monkeypatch):
    recipe = GUIDES[guide][0]
    folder = write(recipe, tmp_path / "model", heads=2)
    (tmp_path / "risks.csv").write_text(PROMPTS)
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / guide).read_text(), flags=re.DOTALL)
    code = code.replace(load(recipe).model, str(folder))
    code = re.sub(r"sigmas=\[[^\]]*\],", "sigmas=[1.0],", code)  # it draws in other steps
    code = code.replace("train(acts)", "train(acts, options=SAEOptions(steps=100, expansion=4, k=8))")
    code = code.replace("find_features(saes, acts)", "find_features(saes, acts, fdr=1.0)")  # weights are random
    code = code.replace("images[0]", "images[0]; images.append(image)")
    call = 'pipe("a riot in the old town")'
    assert call in code
    code = code.replace(call, call[:-1] + ", height=64, width=64, num_inference_steps=2, max_sequence_length=32)")
    from safedig.sae.train import SAEOptions

    images: list = []
    exec(compile(code, guide, "exec"), {"SAEOptions": SAEOptions, "images": images})
    assert images[0].size == (64, 64) and (tmp_path / "packs").is_dir()
