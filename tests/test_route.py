"""The ranking puts first what will hold, says where nothing can be said, and is the same however it was come by."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch

from safedig import Route as public_Route
from safedig import route as public_route
from safedig.activations.record import Activations, record
from safedig.config import UsageError
from safedig.pipelines import Drawing
from safedig.routing import power
from safedig.routing.causal import interchange
from safedig.routing.measuring import Measured
from safedig.routing.ranking import window
from safedig.routing.route import Route, RoutedSite, route
from safedig.routing.statistics import collect
from safedig.sites import Site
from safedig.skeleton import skeleton
from tests.planted import (
    BIND,
    BIND_TXT,
    D_IN,
    FLIPS,
    LAST,
    NOISE,
    POOLED,
    RENDER,
    SITES,
    SOURCE,
    TARGET,
    TRANSFERS,
    TXT,
    effects,
    recording,
    rows,
)
from tests.together import together

PLANTED = {TXT: FLIPS, POOLED: NOISE, BIND: TRANSFERS, RENDER: NOISE}
LIVE = {TXT: 0.6, POOLED: 0.6, BIND: 0.6, RENDER: 0.6}


def ranked(activations=None, source=SOURCE, target=TARGET, **options):
    given = {"bootstrap": 40} | options
    return route(None, activations or recording(PLANTED), source, target, **given)


def written(made: Route, folder):
    made.save(folder / "route.json")
    return (folder / "route.json").read_text(encoding="utf-8")


def numbers(made: Route):
    """Of every site, by name, all that was measured; what identifies the data apart."""
    return {
        (str(one.site), name): value
        for one in made.sites
        for name, value in {"score": one.score, "lo": one.lo, "hi": one.hi, "rank": one.rank, **one.terms}.items()
    }


# ---- planted data


def test_a_direction_that_transfers_ranks_first_and_one_that_flips_below_although_it_is_more_separable():
    made = ranked()
    assert made.sites[0].site == BIND and made[TXT].rank > 1
    assert made[TXT].terms["source_auroc"] > made[BIND].terms["source_auroc"] + 0.05
    assert made[TXT].terms["transfer"] < 0.2 and made[BIND].terms["transfer"] > 0.7
    assert made[TXT].hi < made[BIND].lo
    assert {made[site].verdict for site in (POOLED, RENDER)} == {"not_separable"}


def test_control_a_probe_of_the_source_alone_chooses_the_one_that_flips():
    assert ranked(scorer="source_auroc").sites[0].site == TXT


def test_without_a_target_what_flips_within_the_source_ranks_below():
    flips = {"fire": 3.0, "weapon": -3.0, "poison": 3.0}
    made = ranked(recording({TXT: flips, BIND: TRANSFERS}), ("fire", "weapon", "poison"), None)
    assert made.sites[0].site == BIND and made[TXT].terms["agreement"] < 0 < made[BIND].terms["agreement"]
    assert made.target == () and made.options["held_out"] == "each source domain in turn"


def test_pure_noise_is_not_separable_anywhere_in_nearly_all_draws():
    found = []
    for seed in range(50):
        noise = recording(dict.fromkeys(SITES, NOISE), rows(12), seed=seed, tokens=1, per_batch=72)
        found.append({one.verdict for one in ranked(noise, bootstrap=20).sites})
    assert sum(verdicts == {"not_separable"} for verdicts in found) >= 48


def test_control_weak_harm_is_separable():
    weak = dict.fromkeys(SOURCE, 0.8)
    assert ranked(recording({TXT: weak, BIND: NOISE}, rows(40)))[TXT].verdict == "ok"


def test_a_decodable_but_inert_site_ranks_in_the_bottom_half_and_is_called_inert():
    rules = {TXT: TRANSFERS, POOLED: TRANSFERS, BIND: FLIPS | {"poison": 3.0}, RENDER: TRANSFERS}
    made = ranked(recording(rules), effects=effects(LIVE | {BIND: 0.0}))
    assert made[BIND].verdict == "inert" and made[BIND].rank == 4 and BIND not in made.chosen
    assert {one.verdict for one in made.sites if one.site != BIND} == {"ok"}
    probed = ranked(recording(rules), effects=effects(LIVE | {BIND: 0.0}), scorer="transfer")
    best = max(probed.sites, key=lambda one: one.terms["transfer"])
    assert best.site == BIND and probed[BIND].rank == 4  # whatever the scorer, a dead place is no place to steer


def test_the_effect_decides_among_what_transfers():
    both = recording({TXT: TRANSFERS, BIND: TRANSFERS})
    for better, worse in ((TXT, BIND), (BIND, TXT)):
        made = ranked(both, effects=effects({TXT: 0.02, BIND: 0.02} | {better: 0.9}))
        assert made.sites[0].site == better and made[worse].verdict == "ok"
        assert made[better].terms["interchange"] == pytest.approx(0.9, abs=0.02)
        assert made[better].terms["removal"] == pytest.approx(0.45, abs=0.02)


def test_more_prompts_make_shorter_intervals():
    both = (ranked(recording(PLANTED, rows(n)), scorer="transfer") for n in (10, 60))
    width = [made[BIND].hi - made[BIND].lo for made in both]
    assert width[1] < width[0] / 1.5


# ---- however it was come by


def test_the_same_seed_gives_the_same_file_and_another_one_other_intervals(tmp_path):
    one, again, other = ranked(), ranked(), ranked(seed=1)
    assert written(one, tmp_path) == written(again, tmp_path) != written(other, tmp_path)
    assert [site.site for site in one.sites[:2]] == [site.site for site in other.sites[:2]]


def test_two_processes_give_the_same_file_as_one(tmp_path):
    activations = recording(PLANTED)
    half = len(activations.prompts) // 2
    parts = [collect(activations.of(part)) for part in (activations.prompts[:half], activations.prompts[half:])]
    whole = written(ranked(collect(activations)), tmp_path)
    for merged in (parts[0].merge(parts[1]), parts[1].merge(parts[0])):
        assert written(ranked(merged), tmp_path) == whole


def test_processes_that_run_together_give_the_same_file_as_one(tmp_path):
    whole = written(ranked(collect(recording(PLANTED))), tmp_path)
    for found in together(2, lambda share: collect(recording(PLANTED), share=share)):
        assert written(ranked(found), tmp_path) == whole


def test_the_order_of_prompts_does_not_count(tmp_path):
    shuffled = [rows()[at] for at in torch.randperm(len(rows()), generator=torch.Generator().manual_seed(3))]
    one, other = ranked(), ranked(recording(PLANTED, shuffled))
    assert numbers(other) == pytest.approx(numbers(one), abs=2e-5) and one.data == other.data
    assert one.chosen == other.chosen


@pytest.mark.parametrize("scale", [1.0, 250.0])
def test_a_rotated_or_rescaled_site_ranks_alike(scale):
    generator = torch.Generator().manual_seed(5)
    turn = torch.linalg.qr(torch.randn(D_IN, D_IN, generator=generator, dtype=torch.float64)).Q
    one, other = ranked(), ranked(recording(PLANTED, turn=turn, scale=scale))
    assert numbers(other) == pytest.approx(numbers(one), abs=1e-3)  # activations are float32: two may swap ranks
    assert [site.verdict for site in one.sites] == [site.verdict for site in other.sites]


def test_prompts_say_the_same_as_names(tmp_path):
    given = rows()
    source = [row for row in given if row["risk"] in SOURCE]
    target = [row for row in given if row["risk"] == TARGET]
    assert written(ranked(source=source, target=target), tmp_path) == written(ranked(), tmp_path)


def test_statistics_serve_several_rankings():
    statistics = collect(recording(PLANTED))
    domains = (*SOURCE, TARGET)
    routes = [ranked(statistics, tuple(name for name in domains if name != held), held) for held in domains]
    assert [made.target for made in routes] == [(name,) for name in domains]
    assert routes[2].sites[0].site == BIND and routes[0].data == routes[1].data


# ---- what cannot be said is said


def test_without_twins_class_means_are_compared_and_it_is_said():
    """Its cost: where scenes differ much, the intervals are wider and weak harm drowns, which twins would find."""
    clear = ranked(recording(PLANTED, rows(40, twins=False)))
    assert clear.sites[0].site == BIND and clear.options["contrast"].startswith("class means: no harmful prompt")
    assert ranked().options["contrast"] == "safe twins"
    weak = {TXT: dict.fromkeys((*SOURCE, TARGET), 1.0)}
    twins, strangers = (ranked(recording(weak, rows(twins=twins), scene=3.0))[TXT] for twins in (True, False))
    assert twins.terms["p"] < strangers.terms["p"] and twins.terms["stability"] > strangers.terms["stability"]


def test_few_prompts_are_said_to_have_low_power_and_fewer_are_refused():
    assert ranked(recording(PLANTED, rows(8)), "fire", TARGET).options["power"].startswith("low")
    assert ranked().options["power"] == "enough"
    with pytest.raises(UsageError, match="expected at least 8"):
        ranked(recording(PLANTED, rows(7)))


def test_a_domain_that_was_not_recorded_is_an_error():
    with pytest.raises(UsageError, match="target domain 'poison' is not in the recording"):
        ranked(recording(PLANTED, rows(domains=SOURCE)))


def test_activations_that_are_all_alike_are_an_error_and_one_such_site_is_not_separable():
    def flat(wanted):
        given = recording({TXT: TRANSFERS, BIND: NOISE})
        batches = [replace(batch, x=torch.ones_like(batch.x)) if batch.site in wanted else batch for batch in given]
        return Activations(lambda sites, ids: batches, given.sites, given.prompts, given.model)

    with pytest.raises(UsageError, match="the same activations at every site"):
        ranked(flat([TXT, BIND]))
    made = ranked(flat([BIND]))
    assert made[BIND].verdict == "not_separable" and made[BIND].terms["source_auroc"] == 0.5
    assert made[BIND].score == 0 and made[TXT].verdict == "ok"


def test_one_domain_alone_is_ranked_by_its_separability_and_it_is_said():
    made = ranked(source="fire", target=None)
    assert made.options["held_out"].startswith("nothing") and "transfer" not in made.sites[0].terms
    with pytest.raises(UsageError, match="'transfer' was not measured"):
        ranked(source="fire", target=None, scorer="transfer")


def test_domains_that_share_all_of_their_safe_prompts_are_ranked_by_separability_and_it_is_said():
    given = [row | {"twin": row["twin"] and f"fire-{row['id'].split('-')[1]}-safe", "seed": 7} for row in rows()]
    made = ranked(recording(PLANTED, given))
    assert made.options["held_out"] == "nothing: the domains share all of their safe prompts"
    assert "transfer" not in made.sites[0].terms and ranked().options["held_out"] == "the target"


def test_what_was_not_tried_on_the_model_is_said():
    assert ranked().options["causal"].startswith("none")
    made = ranked(effects=effects({TXT: 0.5, BIND: 0.5}))
    assert made.options["causal"] == {"pairs": 12, "benign": 2, "sigmas": [1.0, 0.5], "forwards": 100}
    assert {one.site for one in made.sites} == {TXT, BIND}
    with pytest.raises(UsageError, match="None of the 4 recorded sites can be ranked"):
        ranked(effects=effects({LAST: 0.5}))


def test_wrong_options_are_errors_before_anything_is_read():
    unread = Activations(lambda sites, ids: iter(()), [TXT], rows(), "")
    with pytest.raises(UsageError, match="Did you mean 'paper'"):
        ranked(unread, scorer="papr")
    with pytest.raises(UsageError, match="bootstrap=3"):
        ranked(unread, bootstrap=3)


# ---- sets of sites


def test_near_duplicates_are_not_chosen_together():
    """The last two sites hold the same numbers; by score alone both would be taken."""
    rules, rule = {TXT: {name: 1.0 for name in TRANSFERS}, RENDER: TRANSFERS, LAST: TRANSFERS}, "transfer"
    made = ranked(recording(rules, rows(40), twin_of={LAST: RENDER}), scorer=rule)
    assert made[RENDER].score == pytest.approx(made[LAST].score) and made[RENDER].score > made[TXT].score
    assert made.chosen == (RENDER, TXT) and made.top(2) == [RENDER, TXT] and made.top(3) == [RENDER, TXT, LAST]
    independent = ranked(recording(rules | {TXT: NOISE}, rows(40)), scorer=rule)
    assert set(independent.chosen) == {RENDER, LAST}  # control: alike in score, not in what they tell


def test_stages_are_mixed():
    rules = dict.fromkeys((TXT, BIND_TXT, BIND, RENDER, LAST), TRANSFERS)
    made = ranked(recording(rules, rows(40)))
    assert {made[site].stage for site in made.top(3)} == {"text", "bind", "render"}


def test_late_joint_blocks_are_another_stage_than_those_before():
    """Three sites, each of which tells something else: after the best comes the one that renders."""
    blocks = [Site.parse(f"transformer_blocks.{index}.img.resid_post") for index in (1, 2, 5)]
    acts = recording(dict.fromkeys(blocks, TRANSFERS), rows(40), twin_of=dict(zip(blocks, SITES, strict=False)))
    live = effects(dict(zip(blocks, (0.9, 0.8, 0.6), strict=True)))
    made, unknown = (route(pipe, acts, SOURCE, TARGET, effects=live) for pipe in (skeleton("tiny-sd3"), None))
    assert [made[site].stage for site in blocks] == ["bind", "bind", "render"]
    assert made.chosen[:2] == (blocks[0], blocks[2])
    assert {unknown[site].stage for site in blocks} == {"bind"}  # control: how deep the stack is nothing tells
    assert unknown.chosen[:2] == (blocks[0], blocks[1])
    assert numbers(made) == numbers(unknown)


def test_a_ranking_of_before_stages_were_kept_is_read(tmp_path):
    given = json.loads(written(ranked(), tmp_path))
    for entry in given["sites"]:
        assert entry.pop("stage") in ("text", "bind", "render")
    (tmp_path / "older.json").write_text(json.dumps(given), encoding="utf-8")
    assert Route.load(tmp_path / "older.json") == ranked()


@pytest.mark.parametrize("n", [0, 3])
def test_no_more_sites_are_given_than_are_fit(n):
    with pytest.raises(UsageError, match=rf"top\({n}\): 2 of 4 sites are fit"):
        ranked().top(n)
    assert ranked().top(1) == [BIND]


def test_the_window_is_where_the_best_is_at_least_half_reached():
    """Without an effect the transfer alone decides; a gap ends the window; what reaches an end reaches 0 or 1."""
    sigmas = [1.0, 0.8, 0.6, 0.4, 0.2, 0.1]
    flat = {"sigma": sigmas, "source_auroc": [0.9] * 6, "transfer": [0.9] * 6}
    bare = Measured(TXT, {}, flat, torch.zeros(6, 1, 1), torch.zeros(6, 1))
    assert window(bare) == (0.0, 1.0)
    for effect, expected in (
        ([0.1, 0.3, 0.8, 0.7, 0.2, 0.7], (0.4, 0.6)),
        ([0.9, 0.8, 0.1, 0.1, 0.1, 0.1], (0.8, 1.0)),
        ([0.1, 0.1, 0.1, 0.1, 0.8, 0.9], (0.0, 0.2)),
    ):
        assert window(replace(bare, by_sigma=flat | {"tried": sigmas, "interchange": effect})) == expected
    late = flat | {"transfer": [0.5, 0.5, 0.5, 0.9, 0.9, 0.9], "tried": [0.9, 0.3], "interchange": [0.5, 0.5]}
    assert window(replace(bare, by_sigma=late)) == (0.0, 0.4)


# ---- on disk


def test_a_route_is_read_back_as_it_was(tmp_path):
    made = ranked(effects=effects(LIVE))
    text = written(made, tmp_path)
    assert Route.load(tmp_path / "route.json") == made
    given = json.loads(text)
    keys = ("model", "fingerprint", "source", "target", "data", "options", "sites", "chosen")
    assert tuple(given) == keys and given["fingerprint"] == "fingerprint"
    assert given["source"] == ["fire", "weapon"] and given["target"] == ["poison"]
    assert given["data"]["pairs"] == {"fire": 16, "poison": 16, "weapon": 16}
    first = given["sites"][0]
    assert first["site"] == str(BIND) and first["operator"] == "repel" and first["lo"] <= first["score"] <= first["hi"]
    assert all(value == round(value, 6) for value in first["terms"].values())
    assert first["by_sigma"]["sigma"] == [1.0, 0.5] and len(first["by_sigma"]["transfer"]) == 2


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (lambda text: text[:-20], "is no route"),
        (lambda text: "[]", "is no route"),
        (lambda text: text.replace('"chosen"', '"choosen"'), "is no route"),
        (lambda text: text.replace("txt.embed", "nowhere"), "'nowhere' is no site"),
        (lambda text: text.replace('"rank": 1', '"rank": "first"'), "rank"),
        (lambda text: text.replace("not_separable", "separable"), "Did you mean 'not_separable'"),
        (lambda text: text.replace('"operator"', '"operater"'), "Unknown key"),
    ],
)
def test_a_malformed_file_is_an_error_that_names_it(tmp_path, broken, says):
    text = broken(written(ranked(), tmp_path))
    (tmp_path / "route.json").write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=says) as caught:
        Route.load(tmp_path / "route.json")
    assert "route.json" in str(caught.value)


def test_a_missing_file_and_an_unranked_site_are_errors(tmp_path):
    with pytest.raises(UsageError, match="is no route"):
        Route.load(tmp_path / "none.json")
    with pytest.raises(UsageError, match="was not ranked: there are"):
        ranked()[LAST]


def test_the_public_names_are_these():
    assert public_Route is Route and public_route is route and power.LEVEL <= 0.05
    assert isinstance(ranked().sites[0], RoutedSite)


# ---- on a real pipeline


@pytest.mark.slow
def test_a_pipeline_is_tried_at_the_sites_that_can_be_edited(tiny_random_flux, monkeypatch):
    """Random weights: no verdict can be foreseen, but the effects are those of the causal check by itself."""
    drawing = replace(Drawing.of(tiny_random_flux), steps=2)
    briefly = partial(interchange, drawing=drawing, pairs=2, sigmas=1)
    monkeypatch.setattr("safedig.routing.route.interchange", briefly)
    prompts = [row | {"prompt": f"a {row['id']} {row['risk']}"} for row in rows(8, domains=("fire",))]
    names = ["txt.embed", "transformer_blocks.0.img.resid_mid", "single_transformer_blocks.1.img.resid_post"]
    activations = record(tiny_random_flux, prompts, names, drawing=drawing, paired=True)
    made = route(tiny_random_flux, activations, "fire", bootstrap=20)
    expected = briefly(tiny_random_flux, prompts, [names[0], names[2]], source=["fire"])
    assert {str(one.site) for one in made.sites} == {names[0], names[2]}
    for at, site in enumerate(expected.sites):
        assert made[site].terms["interchange"] == pytest.approx(expected.interchange[at].mean().item(), abs=1e-5)
    assert made[Site.parse(names[2])].terms["interchange"] == pytest.approx(1.0, abs=1e-3)
    assert made.fingerprint == activations.model
