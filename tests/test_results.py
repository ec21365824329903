"""Committed results belong to the committed weights and recipes: a figure that no longer does is stale."""

import json
from pathlib import Path

import pytest

from safedig import recipes
from safedig.evaluation.siege import ANY, BLIND
from safedig.pipelines import fingerprint, load_pipeline
from safedig.routing.routed import Route
from safedig.sites import Site
from safedig.tiny.concepts import RISKS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
PAGE = (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")
MODELS = ("tiny-flux", "tiny-sd3")


def stale(result, pipe, sha):
    """Why a result is out of date, by the options that decide it; empty if it is not."""
    weights = result.get("fingerprint") or result["model"]["fingerprint"]
    reasons = {"weights": weights != fingerprint(pipe), "recipe": sha != result["recipe_sha"]}
    return [name for name, changed in reasons.items() if changed]


@pytest.mark.parametrize("model", MODELS)
def test_every_committed_result_is_of_the_shipped_weights_and_recipe(model):
    pipe, recipe = load_pipeline(model), recipes.load(model)
    decided = {f"{model}.json": recipe.drawn_sha, f"demo-{model}.json": recipe.sha}
    decided |= {f"feature-{model}.json": recipe.drawn_sha, f"evaluate-{model}/evaluate.json": recipe.sha}
    found = {name: stale(json.loads((RESULTS / name).read_text()), pipe, sha) for name, sha in decided.items()}
    assert found == {name: [] for name in decided}


@pytest.mark.parametrize("model", MODELS)
def test_every_domain_has_a_committed_route_of_the_shipped_weights_and_its_recipe(model):
    pipe = load_pipeline(model)
    for risk in RISKS:
        route = Route.load(ROOT / "routing" / model / f"all--{risk}.json")
        told = {"fingerprint": route.fingerprint, "recipe_sha": route.options["recipe_sha"]}
        assert stale(told, pipe, recipes.load(model, [f"route.target={risk}"]).routed_sha) == []
        assert route.target == (risk,) and set(route.source) == set(RISKS) - {risk}


@pytest.mark.parametrize("model", MODELS)
def test_the_proof_of_the_routes_was_measured_on_the_shipped_weights(model):
    cells = (ROOT / "benchmarks" / f"routing.{model}.jsonl").read_text().splitlines()
    assert {json.loads(cell)["fingerprint"] for cell in cells} == {fingerprint(load_pipeline(model))}


def compared(page, names):
    """Method → the six counts of its row; None where there is none."""
    rows = [[cell.strip() for cell in line.strip("|\n ").split("|")] for line in page.splitlines() if line[:2] == "| "]
    counts = {row[0]: row[1:] for row in rows if row[0] in names and len(row) == 7}
    return {name: [None if cell == "–" else int(cell) for cell in row] for name, row in counts.items()}


def test_the_page_of_compared_methods_shows_the_committed_counts():
    boards = [json.loads((RESULTS / f"evaluate-{model}" / "evaluate.json").read_text())["methods"] for model in MODELS]
    told = {
        name: [
            count["k"]
            for board in boards
            for count in (
                *(board[name]["harmful"]["target"][one] for one in ("unsafe", "not_clean")),
                benign(board[name]),
            )
        ]
        for name in boards[0]
    }
    page = PAGE.split("## Methods attacked")[0]
    assert compared(page, told) == told and len(told) == 16
    assert compared(page.replace("| 0 | 8 |", "| 1 | 8 |"), told) != told, "control"


def test_the_page_of_attacked_methods_shows_the_committed_counts():
    found = [json.loads((RESULTS / f"attack-{model}" / "attack.json").read_text())["broken"] for model in MODELS]
    shown = ("seed search", BLIND, ANY)
    told = {
        name: [one[name][attack]["k"] if name in one else None for one in found for attack in shown]
        for name in found[0]
    }
    page = PAGE.split("## Methods attacked")[1]
    assert compared(page, told) == told and found[1].keys() <= told.keys()
    for attack in found[0]["ours"].keys() - {BLIND, ANY}:
        assert f"| {attack} | {' | '.join(str(one['ours'][attack]['k']) for one in found)} |" in page


def test_the_page_of_attacks_by_words_shows_the_committed_counts():
    """They are of the recipes' own sites, watched ones too, at the strengths that the committed comparison chose."""
    found = [json.loads((RESULTS / f"attack-words-{model}" / "attack.json").read_text()) for model in MODELS]
    for model, one in zip(MODELS, found, strict=True):
        compared = json.loads((RESULTS / f"evaluate-{model}" / "evaluate.json").read_text())
        chosen = {name: choice["strength"] or 0.0 for name, choice in compared["choices"][one["target"]].items()}
        assert one["watch"] == list(recipes.load(model).watch) and one["strengths"].items() <= chosen.items()
    for name in found[0]["broken"]:
        counts = [
            str(one["broken"][name][attack]["k"]) if name in one["broken"] else "–"
            for one in found
            for attack in (BLIND, "token search")
        ]
        assert [] in rows_of(PAGE, [name, *counts]), name
    assert [] not in rows_of(PAGE, ["ours", "0", "9", "0", "12"]), "control"


@pytest.mark.parametrize("folder", ["attack", "attack-words"])
@pytest.mark.parametrize("model", MODELS)
def test_attacks_were_on_the_shipped_weights(model, folder):
    told = json.loads((RESULTS / f"{folder}-{model}" / "attack.json").read_text())
    assert told["fingerprint"] == fingerprint(load_pipeline(model)) and told["prompts"] == 24 and not told["quick"]


def rows_of(page, cells):
    """The rows of a page's tables whose first cells are these, the rest of each as it stands."""
    found = [[cell.strip() for cell in line.strip("|\n ").split("|")] for line in page.splitlines() if line[:2] == "| "]
    return [row[len(cells) :] for row in found if row[: len(cells)] == cells]


def short(name, library=None):
    """A contender as the page calls it."""
    words = {"float32": "fp32", "bfloat16": "bf16", "sae_lens": library or "sae_lens"}
    return " ".join(words.get(word, word) for word in name.split())


def test_the_page_of_autoencoders_shows_the_committed_figures():
    page = (ROOT / "docs" / "autoencoders.md").read_text(encoding="utf-8")
    told, matrix_units, kept = (
        json.loads((ROOT / "benchmarks" / f"sae_{name}.json").read_text())
        for name in ("training", "training_amx", "quality")
    )
    speeds = told["speed"] + matrix_units["speed"]  # the four columns
    peers = {"fastest_peer_float32": "the fastest peer in fp32", "fastest_peer": "the fastest peer in either type"}
    for name in told["speed"][0]["rows_per_s"]:
        (speed,) = [row for row in rows_of(page, [short(name)]) if len(row) == 4]
        there = [one["rows_per_s"].get(name) for one in speeds]
        assert speed == [f"{one['median']:,.0f}" if one else "–" for one in there]
        for row in [row for row in rows_of(page, [short(name)]) if len(row) == 2]:
            assert [cell.split()[0] for cell in row] == [f"{o['learnt'][name]['fvu']:.4f}" for o in told["quality"]]
    for name, ratios in told["speed"][0]["ratios"].items():
        peer = "fastest_peer_float32" if name.endswith("float32") else "fastest_peer"
        for over, label in (("sae_lens", short(ratios["sae_lens"]["peer"], "sae-lens")), (peer, peers[peer])):
            (row,) = rows_of(page, [short(name), label])
            there = [one["ratios"].get(name) for one in speeds]
            assert [cell.split()[0] for cell in row] == [f"{one[over]['median']:.2f}" if one else "–" for one in there]
    for model, sites in kept["models"].items():
        for site, one in sites.items():
            (row,) = rows_of(page, [f"`{model}`", f"`{site}`"])
            bold = "" if one["met"] else "**"
            assert row[0] == one["stage"]
            assert row[3] == f"{bold}{one['fvu']:.4f}{bold}" and row[5] == f"{100 * one['dead']:.1f} %"
        image = {one["stage"] for site, one in sites.items() if one["met"] and Site.parse(site).stream == "img"}
        assert image == {"bind", "render"}, model


def test_the_page_of_adaptation_shows_the_committed_figures():
    page = (ROOT / "docs" / "adaptation.md").read_text(encoding="utf-8")
    for size, told in json.loads((ROOT / "benchmarks" / "adaptation.json").read_text())["sizes"].items():
        assert told["source_moved"] == 0
        for shift, one in told["shifts"].items():
            (row,) = rows_of(page, [f"{int(size):,}", shift])
            best = min(tried["fvu"] for tried in one["descent"].values())
            ratios = f"{one['fvu_ratio']:.4f}", f"{one['descent_ratio']:.1f}", f"{one['retraining_ratio']:.1f}"
            assert row == [f"{one['zero_shot']:.4f}", f"{best:.4f}", f"{one['fvu']:.4f}", *ratios]


def benign(row):
    return row["benign"]["benign"]


def test_a_changed_weight_or_recipe_is_noticed():
    pipe, recipe = load_pipeline("tiny-flux"), recipes.load("tiny-flux")
    result = json.loads((RESULTS / "demo-tiny-flux.json").read_text())
    assert stale(result, pipe, recipes.load("tiny-flux", ["strength=9.5"]).sha) == ["recipe"]
    next(pipe.transformer.parameters()).data.add_(1)
    assert stale(result, pipe, recipe.sha) == ["weights"]


def test_an_option_makes_those_results_stale_that_it_decides_and_no_others():
    plain, steered, routed = (recipes.load("tiny-flux", wishes) for wishes in ([], ["strength=9.5"], ["route.pairs=9"]))
    assert steered.sha != plain.sha and steered.drawn_sha == plain.drawn_sha and steered.routed_sha == plain.routed_sha
    assert routed.routed_sha != plain.routed_sha and routed.drawn_sha == plain.drawn_sha
    assert recipes.load("tiny-flux", ["drawing={steps=4}"]).drawn_sha != plain.drawn_sha


@pytest.mark.parametrize("model", MODELS)
def test_the_demo_meets_what_the_documentation_says(model):
    result = json.loads((RESULTS / f"demo-{model}.json").read_text())
    assert result["unsteered"]["unsafe"]["rate"] > result["steered"]["unsafe"]["rate"]
    assert result["benign"]["bit_identical"]["n"] == result["benign"]["unsteered"]["n"]
