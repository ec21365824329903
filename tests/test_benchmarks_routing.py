"""The proof of the router: cells are learnt without the target's help, never twice, and rules are compared fairly."""

# ruff: noqa: E402 — the benchmarks are scripts in a folder of their own, no package

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import routing_measure
from routing_compare import (
    Ranked,
    among_live,
    by_model,
    changes,
    compare,
    halves,
    interval,
    met,
    prompt_interval,
    reached,
    reached_on_others,
    rho,
)
from routing_figure import scatter
from routing_folds import QUICK, Budget, Fold, Prompts, stand_ins
from routing_measure import Tool, Trial, cells_of, chosen, gain, letters, lost, measure
from routing_rules import SIMPLER, Made, ablated, by_criteria, by_place, dead_ends, described, ranked

import routing
from safedig.config import UsageError
from safedig.routing.routed import Route, RoutedSite
from safedig.routing.scorers import DEFAULT
from safedig.sites import Site, stage
from safedig.tiny.concepts import RISKS

SMALL = Budget(targets=("fire", "sign"), pairs=8, stand_ins=8, benign=8, tried=4, asked=6)


@pytest.fixture(scope="module")
def given():
    return Prompts(SMALL)


# --- what a fold may see ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", SMALL.targets)
def test_features_and_strength_are_learnt_without_any_prompt_of_the_target(given, target):
    fold = Fold.of(given, target)
    for rows in (fold.features, fold.gate, *fold.tried.values()):
        assert target not in {row["risk"] for row in rows}
    assert {row["risk"] for row in fold.asked["harmful"]} == {target}
    assert {row["risk"] for row in fold.features} == set(RISKS) - {target} | {""}


def test_only_the_contrast_sees_the_target_and_no_more_pairs_of_it_than_the_budget_says(given):
    seen = [row for row in Fold.of(given, "fire").contrast if row["risk"] == "fire"]
    assert len(seen) == SMALL.stand_ins and {row["split"] for row in seen} == {"train"}


def test_what_is_reported_is_learnt_from_nowhere(given):
    fold = Fold.of(given, "sign")
    learnt = {row["prompt"] for row in (*fold.features, *fold.contrast, *fold.gate, *fold.tried["harmful"])}
    learnt |= {row["prompt"] for row in (*fold.tried["benign"], *given.routed_on())}
    reported = {row["prompt"] for rows in fold.asked.values() for row in rows}
    assert reported and not learnt & reported
    gate, strength = ({row["prompt"] for row in rows} for rows in (fold.gate, fold.tried["benign"]))
    assert not gate & strength, "the loss is counted on prompts that did not set the gate"


def test_every_prompt_that_is_judged_was_recorded_and_its_id_is_its_own(given):
    looked_at = [row["id"] for row in given.looked_at()]
    assert len(looked_at) == len(set(looked_at))
    for target in SMALL.targets:
        fold = Fold.of(given, target)
        judged = [row for rows in (*fold.tried.values(), *fold.asked.values()) for row in rows]
        assert {row["id"] for row in (*judged, *fold.gate)} <= set(looked_at)


@pytest.mark.parametrize("risk", RISKS)
def test_a_stand_in_stands_where_the_hazard_stood(risk):
    rows = stand_ins(risk, 6, seed=0)
    assert len(rows) == 12
    for one, twin in zip(rows[::2], rows[1::2], strict=True):
        assert one["risk"] == risk and one["twin"] == twin["id"] and not twin["risk"]
        assert "tree" in twin["objects"] and "tree" not in one["objects"]


def test_too_many_stand_ins_are_an_error_that_says_how_many_there_are(monkeypatch):
    monkeypatch.setattr("safedig.tiny.stand_ins.DRAWS", 1)
    with pytest.raises(ValueError, match=r"Only \d+ prompts of 'fire' have a twin that shows a tree"):
        stand_ins("fire", 12, seed=0)


def test_options_that_change_a_cell_change_its_name_and_those_that_choose_cells_do_not():
    assert replace(SMALL, strengths=(1.0,)).sha != SMALL.sha
    assert replace(SMALL, targets=("fire",), models=("tiny-sd3",), sites=("txt.embed",)).sha == SMALL.sha


# --- how the strength is chosen --------------------------------------------------------------------------------------


def trial(strength, *, unsafe, clean, loss):
    return Trial(0.97, strength, {"unsafe": unsafe, "clean": clean}, loss)


def test_the_strongest_setting_within_the_loss_is_chosen_and_of_equals_the_gentlest():
    mild, strong = trial(1.5, unsafe=0.5, clean=0.4, loss=0.01), trial(3.0, unsafe=0.8, clean=0.1, loss=0.03)
    wild, same = trial(4.0, unsafe=0.9, clean=0.0, loss=0.04), trial(2.0, unsafe=0.8, clean=0.1, loss=0.0)
    assert chosen([mild, strong, wild], 0.03, "unsafe") is strong
    assert chosen([mild, strong, wild], 0.05, "unsafe") is wild
    assert chosen([strong, same], 0.03, "unsafe") is same
    assert chosen([mild, strong, wild], 0.05, "clean") is mild, "a wrecked picture is not unsafe, and not clean"


def test_a_site_where_nothing_helps_or_all_harms_is_left_alone():
    useless, harmful = trial(1.5, unsafe=0.0, clean=0.0, loss=0.0), trial(3.0, unsafe=0.9, clean=0.9, loss=0.2)
    assert chosen([useless, harmful], 0.03, "unsafe") is None and chosen([], 0.03, "clean") is None


class Stub:
    """A model that draws harm unless it is steered, and counts what it was asked to draw."""

    def __init__(self):
        self.unsteered, self.drawn = {"a": "U", "b": "U", "c": "C"}, []

    def labels(self, rows, steering):
        self.drawn += [row["id"] for row in rows]
        return {row["id"]: "C" for row in rows}


def test_only_pictures_whose_gate_opens_are_drawn_again_and_the_others_keep_their_label(monkeypatch):
    monkeypatch.setattr(routing_measure, "Steering", lambda *given, **options: None)
    monkeypatch.setattr(routing_measure, "replace", lambda features, threshold: features)
    heights = SimpleNamespace(of={("a", 0): 2.0, ("b", 1): 1.0, ("c", 2): 0.5})
    world, sae = Stub(), SimpleNamespace(metadata={"site": "txt.embed"})
    tool = Tool(world, sae, features=object(), heights=heights, gates={0.97: 1.0, 0.9: 0.7}, facts={})
    asked = {"harmful": [{"id": "a", "seed": 0}, {"id": "b", "seed": 1}], "benign": [{"id": "c", "seed": 2}]}
    assert tool.labels(asked, 0.97, 1.5) == {"harmful": "CU", "benign": "C"} and world.drawn == ["a"]
    assert tool.labels(asked, 0.9, 1.5) == {"harmful": "CC", "benign": "C"} and world.drawn == ["a", "a", "b"]


def test_letters_follow_the_prompts_and_a_wrecked_picture_is_safe_but_not_clean():
    rows = [{"id": "x"}, {"id": "y"}]
    assert letters({"y": "C", "x": "U"}, rows) == "UC"
    assert gain("UUCC", "RRCC", "unsafe") == 0.5 and gain("UUCC", "RRCC", "clean") == 0
    assert gain("UUCC", "CRRR", "clean") == -0.25 and lost("UUCC", "CRRR") == 0.25
    assert changes("UUCU", "CUUR", "unsafe") == [1, 0, -1, 1] and changes("UUCU", "CUUR", "clean") == [1, 0, -1, 0]


def test_both_goals_are_reported_at_their_own_setting_and_a_setting_is_drawn_once(monkeypatch):
    rows = {"harmful": [{"id": "h", "seed": 0}], "benign": [{"id": "b", "seed": 1}]}
    fold, drawn = SimpleNamespace(target="fire", asked=rows, tried=rows), []

    class FakeTool:
        features, facts = object(), {"features": 3}

        def trials(self, fold):
            return [trial(1.0, unsafe=0.2, clean=0.3, loss=0.0), trial(4.0, unsafe=0.9, clean=clean, loss=0.0)]

        def labels(self, asked, quantile, strength):
            drawn.append(strength)
            return {"harmful": "R" if strength > 2 else "C", "benign": "C"}

    world = SimpleNamespace(model="m", budget=SMALL, unsteered={"h": "U", "b": "C"}, key=lambda *given: {})
    monkeypatch.setattr(routing_measure.Tool, "learnt", lambda *given: FakeTool())
    clean = 0.1
    found = routing_measure.measured(world, fold, "txt.embed")["outcomes"]
    assert (found["unsafe"]["strength"], found["unsafe"]["gain"]) == (4.0, 1) and drawn == [4.0, 1.0]
    assert (found["clean"]["strength"], found["clean"]["gain"]) == (1.0, 1) and found["clean"]["loss"] == 0
    clean = 0.9
    drawn.clear()
    routing_measure.measured(world, fold, "txt.embed")
    assert drawn == [4.0]


# --- cells are finished once -----------------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch):
    """Measuring that costs nothing: two models of two sites; `done` is every cell that was measured."""
    done = []

    class World:
        def __init__(self, model, budget):
            self.model, self.budget, self.prompts = model, budget, None
            self.sites = [Site.parse("txt.embed"), Site.parse("temb.out")]

        def key(self, target, site):
            return {"model": self.model, "judge": "a", "options": self.budget.sha, "target": target, "site": str(site)}

    def measured(world, fold, site):
        done.append((world.model, fold, str(site)))
        return world.key(fold, site) | {"outcomes": len(done)}

    monkeypatch.setattr(routing_measure, "World", World)
    monkeypatch.setattr(routing_measure, "Fold", SimpleNamespace(of=lambda prompts, target: target))
    monkeypatch.setattr(routing_measure, "measured", measured)
    return done


def test_a_run_that_was_stopped_goes_on_where_it_was_and_gives_the_same_cells(counted, tmp_path, monkeypatch):
    def stopping(world, fold, site, go_on=routing_measure.measured):
        if len(counted) == 3:
            raise KeyboardInterrupt
        return go_on(world, fold, site)

    with monkeypatch.context() as patch:
        patch.setattr(routing_measure, "measured", stopping)
        with pytest.raises(KeyboardInterrupt):
            measure(SMALL, tmp_path / "r.json")
    first = cells_of(tmp_path / "r.json", "tiny-flux").read_text()
    assert len(counted) == 3 and first.count("\n") == 3
    cells = measure(SMALL, tmp_path / "r.json")
    assert len(counted) == len(set(counted)) == len(cells) == 8
    assert cells_of(tmp_path / "r.json", "tiny-flux").read_text().startswith(first)
    assert measure(SMALL, tmp_path / "r.json") == cells and len(counted) == 8


def test_cells_of_other_options_or_another_judge_do_not_count(counted, tmp_path):
    budget = replace(SMALL, models=("tiny-sd3",), targets=("fire",))
    measure(budget, tmp_path / "r.json")
    measure(replace(budget, k=8), tmp_path / "r.json")
    assert len(counted) == 4
    file = cells_of(tmp_path / "r.json", "tiny-sd3")
    file.write_text(file.read_text().replace('"judge": "a"', '"judge": "b"'))
    measure(budget, tmp_path / "r.json")
    assert len(counted) == 6


def test_comparing_before_all_is_measured_names_what_is_missing(counted, tmp_path):
    with pytest.raises(UsageError, match=r"no cell of fire at txt\.embed under these options: measure it first"):
        measure(SMALL, tmp_path / "r.json", finished_only=True)
    assert counted == []


# --- rules against what was measured ---------------------------------------------------------------------------------


def test_rho_is_of_ranks_alone_and_nothing_where_nothing_differs():
    score, reduction = np.array([1.0, 2.0, 3.0, 4.0]), np.array([0.0, 0.1, 0.5, 0.9])
    assert rho(score, reduction) == rho(np.exp(score), reduction**3) == pytest.approx(1)
    assert rho(-score, reduction) == pytest.approx(-1)
    assert rho(score, np.zeros(4)) == rho(np.ones(4), reduction) == 0


def test_the_first_choice_reaches_its_share_of_the_best_and_a_tie_is_a_lot():
    reduction = np.array([0.2, 0.8, 0.4])
    assert reached(np.array([0.0, 1.0, 0.5]), reduction) == 1
    assert reached(np.array([0.0, 0.1, 0.5]), reduction) == pytest.approx(0.5)
    assert reached(np.array([1.0, 1.0, 0.0]), reduction) == pytest.approx(0.625)
    assert reached(np.zeros(3), np.zeros(3)) == 1, "where nothing is to be had nothing is missed"


def test_the_best_of_many_noisy_sites_looks_too_good_unless_it_is_known_from_other_prompts():
    """All sites are equally good, so that every choice is as good as the best one."""
    rng, plain, fair = np.random.default_rng(0), [], []
    for _ in range(1000):
        prompts = rng.random((17, 96)) < 0.5
        sides = np.stack([prompts[:, ::2].mean(1), prompts[:, 1::2].mean(1)])
        score = rng.random(17)
        plain.append(reached(score, prompts.mean(1)))
        fair.append(reached_on_others(score, sides))
    assert np.mean(plain) < 0.88 and abs(np.mean(fair) - 1) < 0.03


def folds(n=8, sites=9, seed=0):
    """`default` knows the reduction up to noise, `paper` is its opposite, `random` knows nothing, `twin` is default."""
    rng, found = np.random.default_rng(seed), []
    for at in range(n):
        reduction = rng.random(sites)
        default = reduction + 0.05 * rng.random(sites)
        scores = {"default": default, "paper": -reduction, "random": np.zeros(sites), "twin": default.copy()}
        live = np.arange(sites) < 5
        model = "one" if at % 2 else "other"
        found.append(Ranked(model, f"d{at}", tuple("abcdefghi"), reduction, np.stack([reduction] * 2), live, scores))
    return found


def test_a_rule_that_is_right_is_ahead_of_wrong_ones_and_not_of_its_twin():
    rules = compare(folds())
    assert rules["default"]["rho"]["mean"] > 0.9 and rules["default"]["reached"]["lo"] > 0.9
    assert rules["paper"]["rho"]["mean"] == pytest.approx(-1) and rules["paper"]["default_ahead"]["rho"]["lo"] > 0
    assert rules["random"]["rho"]["mean"] == 0 and rules["random"]["default_ahead"]["reached"]["lo"] > 0
    assert rules["twin"]["default_ahead"]["rho"] == {"mean": 0, "lo": 0, "hi": 0, "folds": 8}


def test_goals_are_met_only_if_every_simpler_rule_is_beaten_in_both_measures():
    rules = compare(folds())
    assert met(rules, ["paper", "random"])["ahead of every simpler rule"]
    assert not met(rules, ["paper", "twin"])["ahead of every simpler rule"]
    assert (
        met(rules, ["paper"])["rho >= 0.7"]
        and not met(compare(folds(), "default") | {"default": rules["paper"]}, [])["rho >= 0.7"]
    )


def test_live_sites_are_compared_among_themselves_and_too_few_of_them_say_nothing():
    fold = folds(1)[0]
    scrambled = fold.scores["default"].copy()
    scrambled[5:] = 9 - scrambled[5:]
    assert among_live(scrambled, fold) == among_live(fold.scores["default"], fold) > 0.85
    assert np.isnan(among_live(scrambled, replace(fold, live=np.arange(9) < 2)))


def test_folds_without_a_value_do_not_count_and_one_fold_has_no_width():
    assert interval(np.array([0.5, np.nan, 0.5])) == {"mean": 0.5, "lo": 0.5, "hi": 0.5, "folds": 2}
    assert interval(np.array([np.nan]))["folds"] == 0
    wide = interval(np.array([0.0, 1.0] * 5))
    assert wide["lo"] < 0.3 and wide["hi"] > 0.7


def test_each_model_has_its_own_means():
    parts = by_model(folds())
    assert set(parts) == {"one", "other"} and all(part["rho"] > 0.9 for part in parts.values())


def test_the_interval_of_a_cell_is_of_pairs_of_pictures():
    assert prompt_interval([0, 0, 0]) == (0, 0) and prompt_interval([1, 1]) == (1, 1)
    lo, hi = prompt_interval([0, 1] * 48)
    assert 0.35 < lo < 0.5 < hi < 0.65
    assert halves([1, 0, 1, -1]) == (1, -0.5)


# --- what the rules say ----------------------------------------------------------------------------------------------

NAMES = [
    "txt.embed",
    "temb.out",
    *(f"transformer_blocks.{n}.{stream}.resid_post" for n in range(3) for stream in ("txt", "img")),
    *(f"single_transformer_blocks.{n}.{stream}.resid_post" for n in range(2) for stream in ("txt", "img")),
]


def test_fixed_rules_know_only_the_place_and_prefer_the_image():
    rules = by_place([Site.parse(name) for name in NAMES])
    first = {rule: NAMES[int(score.argmax())] for rule, score in rules.items()}
    assert first["middle block"] == "transformer_blocks.2.img.resid_post"
    assert first["last block"] == "single_transformer_blocks.1.img.resid_post"
    assert all(rules[rule][:2].max() < rules[rule][2:].min() for rule in ("middle block", "last block"))
    assert np.ptp(rules["random"]) == 0


EQUAL = {"linearity": 0.5, "distance": 0.5, "removal": 0.1}
TERMS = [
    EQUAL | {"source_auroc": 0.99, "transfer": 0.9, "interchange": 0.0, "reach": 0.0, "stability": 0.9, "cost": 0.1},
    EQUAL | {"source_auroc": 0.9, "transfer": 0.8, "interchange": 0.6, "reach": 1.0, "stability": 0.7, "cost": 1.0},
]


def test_a_probe_chooses_the_dead_site_and_the_default_does_not():
    assert by_criteria("source_auroc", TERMS).argmax() == by_criteria("paper", TERMS).argmax() == 0
    assert by_criteria("default", TERMS).argmax() == by_criteria("causal", TERMS).argmax() == 1


def test_the_ablation_leaves_out_each_term_and_adds_each_criterion_that_was_measured():
    names = set(ablated(TERMS))
    assert {f"without {name}" for name in DEFAULT} <= names
    assert "with stability" in names and "with harm" not in names
    assert not {f"with {name}" for name in DEFAULT} & names
    np.testing.assert_array_equal(ablated(TERMS)["score alone"], by_criteria("default", TERMS))


@pytest.fixture
def fold():
    """A dead site that probes like best, one where steering works, and one that is live and of little use."""
    names = ["transformer_blocks.0.txt.resid_post", "txt.embed", "transformer_blocks.1.img.resid_post"]
    sites = [Site.parse(name) for name in names]
    terms = [*TERMS, TERMS[1] | {"transfer": 0.6, "source_auroc": 0.7}]
    verdicts, ranks = ("inert", "ok", "ok"), (3, 1, 2)
    routed = [
        RoutedSite(site, stage(site), "repel", (0.0, 1.0), 1 / rank, 0.0, 1.0, rank, verdict, term)
        for site, verdict, rank, term in zip(sites, verdicts, ranks, terms, strict=True)
    ]
    made = Made(Route("tiny-flux", "f", ("sign",), ("fire",), {}, {}, tuple(routed), ()))
    after = {"transformer_blocks.0.txt.resid_post": "UUUU", "txt.embed": "CCRR"}
    cells = []
    for name in names:
        seen = {"harmful": after.get(name, "UUUR")}
        outcomes = {
            goal: {
                "gain": gain("UUUU", seen["harmful"], goal),
                "loss": 0.0,
                "quantile": 0.9,
                "strength": 1.0,
                "after": seen,
            }
            for goal in ("unsafe", "clean")
        }
        key = {"model": "tiny-flux", "target": "fire", "site": name}
        cells.append(key | {"before": {"harmful": "UUUU"}, "outcomes": outcomes, "learnt": {"features": 3}})
    return cells, made


def test_where_images_were_judged_that_is_ablated_to_what_stood_for_it():
    seen = [TERMS[0], TERMS[1] | {"judged": 0.25}]
    found = ablated(seen)
    np.testing.assert_array_equal(found["without judged"], ablated(TERMS)["score alone"])
    assert found["score alone"][1] != found["without judged"][1]
    assert found["without linearity"][1] == found["score alone"][1]  # it has no say where images were judged
    assert found["without linearity"][0] != found["score alone"][0] or TERMS[0]["reach"] == 0


def test_a_ranking_without_twins_stands_beside_and_a_site_that_it_lacks_comes_last(fold):
    cells, made = fold
    few = replace(made.route, sites=tuple(site for site in made.route.sites if site.verdict == "ok"))
    one = ranked(cells, replace(made, strangers=few), "unsafe")
    assert one.scores["without twins"].tolist() == [-3.0, -1.0, -2.0]
    assert "without twins" not in ranked(cells, made, "unsafe").scores


def test_what_a_probe_would_have_chosen_is_told_with_its_cost(fold):
    cells, made = fold
    one, told = ranked(cells, made, "unsafe"), described(cells, made, "unsafe")
    assert told["first_choice"]["source_auroc"] == {"sites": ["transformer_blocks.0.txt.resid_post"], "gain": 0}
    assert told["first_choice"]["default"] == {"sites": ["txt.embed"], "gain": 1} and told["best"] == "txt.embed"
    assert described(cells, made, "clean")["sites"]["txt.embed"]["gain"] == 0.5
    assert one.live.tolist() == [False, True, True] and set(SIMPLER) < one.scores.keys()
    assert rho(one.scores["default"], one.gain) > 0.99 > 0 > rho(one.scores["paper"], one.gain)


def test_a_decodable_but_inert_site_is_named_and_must_rank_in_the_bottom_half(fold):
    sites = described(*fold, "unsafe")["sites"]
    found = dead_ends(sites)
    assert list(found["sites"]) == ["transformer_blocks.0.txt.resid_post"] and found["all_in_bottom_half"]
    sites["transformer_blocks.0.txt.resid_post"]["rank"] = 1
    assert not dead_ends(sites)["all_in_bottom_half"]


# --- what is shown ---------------------------------------------------------------------------------------------------


def test_the_table_has_a_line_for_each_rule_and_the_figure_is_a_picture(tmp_path):
    lines = routing.table(compare(folds())).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["default", "paper", "random", "twin"]
    assert len({line.count("|") for line in lines}) == 1
    site = {"score": 0.5, "gain": 0.7, "verdict": "ok", "terms": {"interchange": 0.5, "source_auroc": 0.9}}
    dead = site | {"verdict": "inert", "gain": 0.0}
    scatter([{"model": "tiny-flux", "sites": {"a": site, "b": dead}}], tmp_path / "figure.png", "clean now")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_quick_proof_measures_every_cell_once_and_compares_every_rule(tmp_path):
    command = [sys.executable, BENCHMARKS / "routing.py", "--quick", "--out", tmp_path / "quick.json"]
    subprocess.run(command, check=True, capture_output=True)
    result = json.loads((tmp_path / "quick.json").read_text())
    files = [cells_of(tmp_path / "quick.json", model) for model in QUICK.models]
    lines = [file.read_text() for file in files]
    assert [text.count("\n") for text in lines] == [len(QUICK.sites)] * 2
    for goal in QUICK.goals:
        found = result["goals"][goal]
        assert set(SIMPLER) < set(found["rules"]) and (tmp_path / f"quick-{goal}.png").is_file()
        assert [fold["model"] for fold in found["folds"]] == list(QUICK.models)
        for fold in found["folds"]:
            assert 0.8 < fold["unsafe_unsteered"] <= 1
            assert goal == "clean" or max(site["gain"] for site in fold["sites"].values()) > 0.2
    subprocess.run([*command, "--only", "compare"], check=True, capture_output=True)
    assert [file.read_text() for file in files] == lines
    assert json.loads((tmp_path / "quick.json").read_text())["goals"] == result["goals"]
