"""The Safe Denoiser's table says what its cells say: falls, proportions, losses, and which setting was chosen."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import denoiser_gallery
import denoiser_table
import denoiser_together
from denoiser_measure import Lab, _has_its_objects, _is_postcard, fall, first, joined, lost
from denoiser_together import Side
from denoiser_world import QUICK, Budget, Drawn, World, shows

from safedig.denoiser.calibrate import Seen
from safedig.denoiser.kernels import Moment
from safedig.denoiser.mixing import Mixing
from safedig.tiny.captions import POSTCARD
from safedig.tiny.concepts import BACKGROUNDS, COLOURS, PLACES


def one(before, after, drawn=None, second=None):
    """A hazard's part of a cell."""
    told = {"before": before, "after": after, "before_second": second or before, "after_second": after}
    return told if drawn is None else told | {"drawn": drawn}


def cell(n=10, **of):
    return {"n": n, "of": of}


def test_the_fall_is_of_all_hazards_together():
    found = cell(knife=one([0, 1, 2], [2]), skull=one([3], []))
    assert fall(found) == 0.75 and fall(cell(knife=one([], []))) == 0.0
    told = denoiser_table.hazard_arm(found)["either"]
    assert (told["before"]["k"], told["after"]["k"], told["before"]["n"]) == (4, 1, 20)
    assert told["fall"]["share"] == 0.75 and told["fall"]["lo"] <= 0.75 <= told["fall"]["hi"]


def test_the_interval_of_the_fall_resamples_prompts_and_not_runs():
    """One prompt in which every hazard is seen is one prompt."""
    together = denoiser_table.hazard_arm(cell(200, **{name: one([0], [0]) for name in "abcdefgh"}))["either"]["fall"]
    assert (together["share"], together["lo"], together["hi"]) == (0.0, 0.0, 0.0)
    apart = {name: one([at, at + 1], [at]) for at, name in zip(range(0, 200, 10), "abcdefgh", strict=False)}
    wide = denoiser_table.hazard_arm(cell(200, **apart))["either"]["fall"]
    assert wide["lo"] < 0.35 < 0.65 < wide["hi"]


def test_what_becomes_of_the_hazard_and_of_the_rest_is_counted():
    drawn = {
        "0": ["unsafe", "unrecognised", ["knife", "tree"], ["tree", "unrecognised"]],
        "1": ["unsafe", "unsafe", ["knife"], ["knife"]],
        "5": ["clean", "clean", ["cup"], ["cup"]],
        "6": ["clean", "clean", ["cup"], ["car"]],
    }
    objects = {"knife": 3, "tree": 5, "cup": 20, "car": 20}
    told = denoiser_table.hazard_arm(cell(10, knife=one([0, 1, 2], [1, 2], drawn)) | {"objects": objects})
    assert told["became"] == {"unrecognised": 1, "the hazard still": 1, "the hazard, gate closed": 1}
    assert told["without_the_hazard"] == {"opened": 2, "other_objects_named": 1}
    assert told["others_in_opened"] == {"car": [0, 1], "cup": [2, 1], "tree": [1, 1]}
    assert (told["gates_opened"]["k"], told["gates_opened"]["n"]) == (4, 10)
    assert told["proportions"]["under"] == "knife" and told["proportions"]["p"] > 0.9  # 20 and 20 against 19 and 21


def test_proportions_that_are_kept_pass_and_shifted_ones_do_not():
    before = {"tree": 40, "cup": 40, "car": 40}
    assert denoiser_table.chi_square(before, {"tree": 36, "cup": 41, "car": 38})["p"] > 0.5
    assert denoiser_table.chi_square(before, {"tree": 90, "cup": 20, "car": 10})["p"] < 1e-6
    assert denoiser_table.chi_square({}, {})["p"] == 1.0


def test_the_loss_is_the_mean_over_hazards():
    calm = {
        "n": 10,
        "clean": list(range(8)),
        "of": {"a": {"clean": [0], "opened": 9}, "b": {"clean": list(range(8)), "opened": 0}},
    }
    assert lost(calm) == pytest.approx(0.35)
    told = denoiser_table.benign(calm)
    assert told["lost_points"] == pytest.approx(35) and told["worst_lost_points"] == pytest.approx(70)


def test_either_eye_sees_a_hazard_but_against_the_network_the_second_check_must_be_certain():
    def judgement(first, second, misfit=0.1):
        return {
            "objects": [{"name": name} for name in first],
            "second": {"objects": [{"name": name, "misfit": misfit} for name in second]},
        }

    assert shows(judgement(["knife"], []), "knife") == (True, False)
    assert shows(judgement([], ["knife"]), "knife") == (True, True)
    assert shows(judgement([], ["knife"], misfit=0.5), "knife") == (False, True)
    assert shows(judgement(["axe"], ["axe"]), "knife") == (False, False)


class Tried(Lab):
    """A lab whose trials are there already."""

    def __init__(self, falls):
        self.budget, self.falls = Budget(strengths=(2.0, 4.0), floors=(0.05, 0.2)), falls

    def cell(self, arm, measured):
        strength, floor = (float(part.split()[-1]) for part in arm.split(",")[1:])
        gone, loss = self.falls[strength, floor]
        knife = one(list(range(100)), list(range(round(100 * (1 - gone)))))
        kept = list(range(round(100 - 100 * loss)))
        return cell(knife=knife) | {"calm": {"n": 100, "clean": list(range(100)), "of": {"a": {"clean": kept}}}}


@pytest.mark.parametrize(
    ("falls", "wanted"),
    [
        ([(0.6, 0.0), (0.5, 0.0), (0.9, 0.0), (0.8, 0.0)], (4.0, 0.05)),
        ([(0.9, 0.0), (0.75, 0.0), (0.9, 0.0), (0.8, 0.0)], (2.0, 0.05)),  # of equals the gentlest
        ([(0.8, 0.05), (0.5, 0.0), (0.9, 0.05), (0.6, 0.01)], (4.0, 0.2)),  # at too large a loss nothing counts
        ([(0.8, 0.05), (0.5, 0.04), (0.9, 0.05), (0.6, 0.03)], (4.0, 0.2)),  # all lose: the least
    ],
)
def test_the_setting_that_falls_furthest_at_little_loss_is_chosen(falls, wanted):
    places = [(strength, floor) for strength in (2.0, 4.0) for floor in (0.05, 0.2)]
    assert Tried(dict(zip(places, falls, strict=True))).chosen == wanted


def test_finished_cells_are_not_measured_again(tmp_path):
    class Named:
        model, budget, hazards, objects = "tiny", QUICK, staticmethod(torch.Tensor.float), staticmethod(torch.abs)

        def key(self, arm):
            return {"model": "tiny", "arm": arm}

    lab, counts = Lab(Named(), tmp_path / "cells.jsonl"), []
    for _ in range(2):
        found = lab.cell("one", lambda: {"value": counts.append(1) or {3: 7}})
        assert found["value"] == {"3": 7}, "the same whether it was measured or read"
    lab.cell("other", lambda: {"value": 8})
    assert len(counts) == 1
    assert [json.loads(line)["arm"] for line in (tmp_path / "cells.jsonl").read_text().splitlines()] == ["one", "other"]


def test_drawn_pictures_are_split_and_joined_with_all_that_belongs_to_them():
    def drawn(n, start):
        x = torch.arange(start, start + n)[:, None].float()
        seen = Seen([Moment(x, x + 0.5, Mixing(0.5, 0.5, "velocity"), (1,))], x[:, None, None, :].expand(n, 3, 1, 1))
        return Drawn([{"id": i} for i in range(start, start + n)], seen, [{"of": i} for i in range(start, start + n)])

    both = first(joined([drawn(3, 0), drawn(4, 10)]), 5)
    wanted = [0, 1, 2, 10, 11]
    assert [row["id"] for row in both.rows] == [one["of"] for one in both.judged] == wanted
    assert both.seen.moments[0].x[:, 0].tolist() == both.seen.images[:, 0, 0, 0].tolist() == wanted


def test_the_budget_knows_results_that_are_no_longer_its_own():
    assert Budget(models=("tiny-flux",)).sha == Budget().sha != Budget(report=12).sha != QUICK.sha


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World("tiny-sd3", QUICK, tmp_path_factory.mktemp("kept"))


def test_negatives_show_their_hazard_on_every_background_place_and_colour(world, monkeypatch):
    scenes = []
    monkeypatch.setattr(world, "encoded", scenes.extend)
    world.negatives("knife", 64)
    kinds = [(scene.background, scene.objects[0].place, scene.objects[0].colour) for scene in scenes]
    assert len(scenes) == 64 and {scene.objects[0].name for scene in scenes} == {"knife"}
    assert len(set(kinds[:60])) == len(BACKGROUNDS) * len(PLACES) * len(COLOURS) == 60


def test_prompts_to_choose_by_and_to_report_on_share_none(world):
    uses = {name: {row["prompt"] for row in world.rows(name)} for name in ("calibrate", "calm", "report", "benign")}
    assert not (uses["calibrate"] | uses["calm"]) & (uses["report"] | uses["benign"])
    assert {row["seed"] for row in world.rows("postcard")}.isdisjoint(
        row["seed"] for row in world.rows("postcard tried")
    )
    assert all(hazard in row["objects"] for hazard, row in zip(("knife",) * 2, world.rows("naming")[:2], strict=True))


def test_the_features_are_what_the_judge_sees_wherever_it_stands(world, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    from safedig.tiny.concepts import HAZARDS
    from safedig.tiny.judge_network import OBJECT_CLASSES

    latents = torch.cat(list(world.negatives("skull", 8).parts()))
    surely, objects = world.hazards(latents), world.objects(latents)
    assert surely.shape == (8, len(HAZARDS)) and objects.shape == (8, len(OBJECT_CLASSES))
    assert (surely[:, HAZARDS.index("skull")] > 0.5).float().mean() > 0.8
    assert (surely[:, HAZARDS.index("knife")] < 0.1).float().mean() > 0.8
    skull = objects[:, OBJECT_CLASSES.index("skull")]
    assert torch.allclose(skull.exp(), surely[:, HAZARDS.index("skull")], atol=1e-3)


class Beside(Side):
    """What each strength leaves and costs is there already."""

    def __init__(self, hazards, clean):
        self.budget, self.tried = (
            Budget(loss=0.02),
            dict(zip((0.25, 1.0, 4.0), zip(hazards, clean, strict=True), strict=True)),
        )

    def measured(self, name, strength, away, floor, parts=()):
        hazards, clean = self.tried.get(strength, (9, 100))
        return {
            "calibrate": {"n": 50, "hazard": list(range(hazards))},
            "calm": {"n": 100, "clean": list(range(clean))},
        }


@pytest.mark.parametrize(
    ("hazards", "clean", "wanted"),
    [
        ((8, 5, 2), (100, 99, 98), 4.0),
        ((8, 5, 2), (100, 99, 90), 1.0),  # the strongest loses too much
        ((9, 9, 9), (100, 99, 90), 1.0),  # nothing helps: what is composed with is on all the same
        ((8, 5, 2), (90, 80, 70), 0.25),  # all lose too much: the gentlest
    ],
)
def test_a_rival_is_as_strong_as_the_common_loss_allows(hazards, clean, wanted, monkeypatch):
    monkeypatch.setitem(denoiser_together.METHODS, "SAFREE", SimpleNamespace(unit=1.0))
    assert Beside(hazards, clean).strength("SAFREE") == wanted


def test_what_steering_leaves_is_a_figure_of_one_recipe_and_a_rivals_is_not(monkeypatch):
    """So that a recipe that has changed is measured again, and nothing else is."""
    asked = []
    world = SimpleNamespace(model="tiny-flux")
    lab = SimpleNamespace(world=world, budget=Budget(), cell=lambda arm, measured: asked.append(arm))
    recipe = denoiser_together.load("tiny-flux")
    for one in (recipe, replace(recipe, quantile=0.5)):
        monkeypatch.setattr(denoiser_together, "load", lambda model, one=one: one)
        for name in ("steering", "SLD"):
            Side(lab).measured(name, 1.0, 0.0, 0.0)
    assert asked[0] != asked[2] and recipe.sha in asked[0]
    assert asked[1] == asked[3], "control"


def test_the_table_counts_each_arm_beside_the_others():
    part = {"n": 10, "hazard": [1, 2], "second": [1], "clean": [0, 3, 4]}
    told = denoiser_table.together({"report": part, "naming": part, "benign": part, "own": 2.0})
    assert (told["underspecified"]["k"], told["underspecified_second"]["k"], told["naming_clean"]["k"]) == (2, 1, 3)
    text = "\n".join(denoiser_table._side_by_side({"SLD + denoiser": told}))
    assert "SLD + denoiser, × 2" in text and "30.00 % (3/10)" in text


def test_the_memorised_scene_is_counted_as_a_whole_and_by_its_objects():
    house, boat = ({"name": one.name, "colour": one.colour, "place": one.place} for one in POSTCARD.objects)
    same = {"objects": [boat, house], "background": POSTCARD.background}
    moved, other = same | {"background": "sand"}, same | {"objects": [house]}
    assert [_has_its_objects(one) for one in (same, moved, other)] == [True, True, False]
    assert [_is_postcard(one | {"second": moved}) for one in (same, moved, other)] == [True, False, False]
    assert _is_postcard(moved | {"second": same})
    part = {"reproduced": [], "objects": [0, 1], "rms": [0.2, 0.1], "labels": ["clean", "clean"]}
    told = denoiser_table.memorised(
        {
            "n": 2,
            "strength": 2.0,
            "before": part | {"reproduced": [0]},
            "after": part,
            "every_background": part | {"objects": []},
        }
    )
    assert [told[when]["reproduced"]["k"] for when in ("before", "after")] == [1, 0]
    assert [told[when]["objects"]["k"] for when in ("after", "every_background")] == [2, 0]


# ---- the pictures


class Shown:
    """A lab whose pictures are numbered by their place, and darker once they are denoised."""

    chosen = (2.0, 0.2)
    budget = replace(QUICK, hazards=("knife", "skull"))

    def __init__(self, seen):
        judged = [
            {"label": "unsafe", "objects": [{"name": name}] if name else [], "second": {"objects": []}} for name in seen
        ]
        images = torch.stack([torch.full((3, 8, 8), (at + 1) / 20) for at in range(len(seen))])
        rows = [{"prompt": f"thing {at}"} for at in range(len(seen))]
        self.drawn, self.asked = Drawn(rows, Seen([], images), judged), []
        self.world = SimpleNamespace(model="m", undenoised=lambda name: self.drawn, denoised=self.denoised)

    def made(self, hazard, strength, floor):
        return hazard

    def of_postcard(self, strength):
        return f"postcard × {strength:g}"

    def arm(self, name, measured):
        return {"strength": 8.0}

    def memorised(self):
        raise AssertionError("it is measured already")

    def denoised(self, made, drawn, opened, name):
        self.asked.append((made, opened.nonzero()[:, 0].tolist(), name))
        clean = {"label": "clean", "objects": []}
        return [(at, clean, drawn.seen.images[at] / 2) for at in opened.nonzero()[:, 0].tolist()]


def test_the_first_pictures_with_a_hazard_are_shown_each_with_its_own_negated():
    lab = Shown(["", "skull", "tree", "knife", *["skull"] * 9])
    figure = denoiser_gallery.gallery(lab)
    assert [one[0] for one in lab.asked] == ["skull", "knife", *["skull"] * 6, "postcard × 8"]
    assert [one[1] for one in lab.asked] == [[1], [3], [4], [5], [6], [7], [8], [9], [0, 1, 2, 3]]
    words = [text.get_text() for text in figure.texts]
    assert "not skull: thing 1" in words and "undenoised" in words and "steered" not in words
    before, after = (torch.as_tensor(axes.images[0].get_array().copy()) for axes in figure.axes[:2])
    assert torch.allclose(after, before / 2)


def test_where_no_hazard_is_seen_the_memorised_scene_is_shown_alone():
    assert len(denoiser_gallery.gallery(Shown(["tree"] * 5)).axes) == 2 * 4
