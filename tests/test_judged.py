"""Whole images are judged where Δ is taken out: all are freed where the prompt enters, none at a dead site."""

from dataclasses import replace

import pytest
import torch

from safedig.activations.processes import Share
from safedig.activations.record import record
from safedig.pipelines import Drawing, draw, fingerprint, load_pipeline
from safedig.prompts import as_rows
from safedig.routing.judged import STRENGTHS, ImageCheck, Judged, _Easel, judged
from safedig.routing.linear import Map, Moments, half, halves, linearity
from safedig.routing.measuring import Measured, with_judged
from safedig.routing.ranking import shortlist
from safedig.routing.scorers import DEFAULT, JUDGED, parts, scorer
from safedig.routing.statistics import collect
from safedig.sites import DEAD, Site, d_in, places
from safedig.tiny import prompts

TEXT, POOLED = Site.parse("txt.embed"), Site.parse("pooled.embed")
IMAGE = Site.parse("transformer_blocks.1.img.resid_post")


def a_map(width, told=0.0):
    """Tells the same of every token."""
    return Map(torch.zeros(width, width), torch.full((width,), told))


def labelled(verdict):
    """A judge that looks at the images alone: `verdict` of each."""
    return lambda images, rows: [verdict(image) for image in images]


@pytest.fixture
def rows():
    return [
        {"id": f"{word}{n}", "prompt": f"a {word}", "risk": risk, "twin": twin and f"{twin}{n}", "seed": n}
        for n in range(6)
        for word, risk, twin in (("gun", "weapons", "cup"), ("cup", "", ""))
    ] + [{"id": f"hat{n}", "prompt": f"hat {n}", "risk": "", "twin": "", "seed": n} for n in range(5)]


DRAWING = Drawing(steps=4, guidance=3.0, height=32, width=32, max_sequence_length=12, true_cfg=True)


def asked(judge, **options):
    given = {"drawing": DRAWING, "pairs": 5, "benign": 5, "batch_size": 4} | options
    return ImageCheck(judge, **given)


def by_prompt(images, rows):
    """Harm is what harmful prompts show, whatever is done."""
    return ["unsafe" if row["risk"] else "clean" for row in rows]


class Remembers:
    """Calls what a prompt shows unedited unsafe or clean, and every other picture unrecognised."""

    def __init__(self, pipe, rows):
        self.plain = {}
        for some, images in draw(pipe, rows, drawing=DRAWING, batch_size=4):
            self.plain |= {row["id"]: image for row, image in zip(some, images, strict=True)}

    def __call__(self, images, rows):
        same = [
            torch.allclose(image, self.plain[row["id"]], atol=1e-4) for image, row in zip(images, rows, strict=True)
        ]
        return [name if kept else "unrecognised" for name, kept in zip(by_prompt(images, rows), same, strict=True)]


def dead_text(pipe):
    """The text stream behind the last block, where the model has one: no one reads it."""
    return [place.site for place in places(pipe) if place.why_not == DEAD and place.site.point == "resid_post"]


# ---- what is seen


def test_an_edit_is_seen_where_the_image_listens_and_not_at_a_dead_site(pipe, rows):
    sites = [TEXT, POOLED, *dead_text(pipe)]
    maps = {site: (a_map(d_in(pipe, site), 2.0),) * 2 for site in sites}
    found = judged(pipe, rows, maps, asked(Remembers(pipe, rows)))
    assert (found.pairs, found.benign) == (5, 5)
    for site in sites[:2]:  # everything moves: as many are lost as are freed, so that nothing is gained
        assert found.at[site].value < 0.2
    for dead in (found.at[site] for site in sites[2:]):
        assert dead.strength == 0 and not dead.freed.any() and not dead.lost.any()


def test_what_tells_nothing_takes_nothing_out(pipe, rows):
    found = judged(pipe, rows, {TEXT: (a_map(d_in(pipe, TEXT)),) * 2}, asked(Remembers(pipe, rows)))
    assert found.at[TEXT].strength == 0 and not found.at[TEXT].freed.any()


def test_the_strength_that_frees_most_net_of_what_it_loses_is_taken(pipe, rows, monkeypatch):
    """Freed and lost of each strength, as planted: a gentle edit that frees some, a strong one that frees all."""
    planted = {1.0: (2, 0), 4.0: (5, 1)}

    def labels(self, some, site=None, maps=None, strength=0.0):
        good, bad = ("unsafe", "clean") if some[0]["risk"] else ("clean", "unrecognised")
        count = planted[strength][0 if some[0]["risk"] else 1] if strength else 0
        return [bad if at < count else good for at in range(len(some))]

    monkeypatch.setattr(_Easel, "labels", labels)
    one = judged(pipe, rows, {TEXT: (a_map(3),) * 2}, asked(by_prompt)).at[TEXT]
    assert one.strength == 4 and one.freed.sum() == 5 and one.lost.sum() == 1
    assert one.value == pytest.approx(6 / 7 - 1 / 5)
    planted[4.0] = (5, 4)
    one = judged(pipe, rows, {TEXT: (a_map(3),) * 2}, asked(by_prompt)).at[TEXT]
    assert one.strength == 1 and one.value == pytest.approx(3 / 7)


@pytest.mark.parametrize(
    ("planted", "drawn"),
    [
        ({1.0: (5, 0), 4.0: (5, 0)}, ["freed 1", "lost 1"]),  # no strong edit can do better
        ({1.0: (2, 0), 4.0: (5, 0)}, ["freed 1", "lost 4", "freed 4"]),  # whatever the gentle one loses
        ({1.0: (4, 0), 4.0: (5, 3)}, ["freed 1", "lost 4", "lost 1"]),  # it spoils too many to be tried further
        ({1.0: (0, 0), 4.0: (0, 5)}, ["freed 1", "lost 4"]),  # nothing is gained: taken out is nothing
        ({1.0: (4, 2), 4.0: (3, 1)}, ["freed 1", "lost 4", "lost 1", "freed 4"]),
    ],
)
def test_what_cannot_become_the_best_is_not_followed_up(pipe, rows, monkeypatch, planted, drawn):
    asked_for = []

    def labels(self, some, site=None, maps=None, strength=0.0):
        harmful = bool(some[0]["risk"])
        if strength:
            asked_for.append(f"{'freed' if harmful else 'lost'} {strength:g}")
        good, bad = ("unsafe", "clean") if harmful else ("clean", "unrecognised")
        count = planted[strength][0 if harmful else 1] if strength else 0
        return [bad if at < count else good for at in range(len(some))]

    monkeypatch.setattr(_Easel, "labels", labels)
    one = judged(pipe, rows, {TEXT: (a_map(3),) * 2}, asked(by_prompt)).at[TEXT]
    assert asked_for == drawn
    worth = {strength: (freed + 1) / 7 - lost / 5 for strength, (freed, lost) in ({0.0: (0, 0)} | planted).items()}
    assert one.value == pytest.approx(max(worth.values()))
    assert one.strength == min(strength for strength, value in worth.items() if value == max(worth.values()))


def test_a_prompt_is_edited_by_the_map_that_has_not_seen_it(pipe, rows):
    seen = {}

    def judge(images, some):
        seen.update({row["id"]: image for row, image in zip(some, images, strict=True)})
        return by_prompt(images, some)

    nothing, much = a_map(d_in(pipe, TEXT)), a_map(d_in(pipe, TEXT), 2.0)
    judged(pipe, rows, {TEXT: (nothing, nothing)}, asked(judge, pairs=6))
    plain, seen = dict(seen), {}

    def moved(images, some):
        for row, image in zip(some, images, strict=True):
            seen.setdefault(row["id"], []).append(not torch.equal(image, plain[row["id"]]))
        return by_prompt(images, some)

    judged(pipe, rows, {TEXT: (nothing, much)}, asked(moved, pairs=6))
    harmful = [row for row in rows if row["risk"] and row["id"] in seen]
    assert {half(row["twin"]) for row in harmful} == {0, 1}
    assert all(any(seen[row["id"]]) == (half(row["twin"]) == 0) for row in harmful)


def test_the_formula_of_the_map_is_the_regression_of_linearity():
    rows = torch.randn(40, 5, generator=torch.Generator().manual_seed(0)).double()
    told = rows @ torch.randn(5, 5, generator=torch.Generator().manual_seed(1)).double() + 1
    sums = Moments(torch.tensor(40.0), rows.sum(0), told.sum(0), rows.T @ rows, rows.T @ told, told.square().sum())
    found = Map.of(sums)
    assert (rows @ found.weight + found.offset - told).abs().max() < 0.1 and linearity(sums, sums) > 0.99


# ---- what it costs


def test_the_rows_are_counted_and_a_budget_is_kept(pipe, rows):
    maps = {site: (a_map(d_in(pipe, site), 0.5),) * 2 for site in (TEXT, POOLED)}
    counted = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: counted.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    found = judged(pipe, rows, maps, asked(by_prompt))
    handle.remove()
    assert found.forwards == sum(counted)
    whole = 10 * 8 * (1 + 2 * len(STRENGTHS))
    assert found.forwards <= whole
    small = judged(pipe, rows, maps, asked(by_prompt, budget=int(whole * 0.85)))
    assert small.pairs == small.benign == 4 and small.forwards <= whole * 0.85
    none = judged(pipe, rows, maps, asked(by_prompt, budget=whole // 2))
    assert none.at == {} and none.forwards == 0


def test_half_the_steps_are_drawn_but_not_fewer_than_four(pipe, rows):
    for steps, drawn in ((16, 8), (6, 4), (3, 3)):
        found = judged(
            pipe, rows, {TEXT: (a_map(d_in(pipe, TEXT)),) * 2}, asked(by_prompt, drawing=replace(DRAWING, steps=steps))
        )
        assert found.forwards % (drawn * 2) == 0 and found.forwards >= 10 * drawn * 2


def test_where_nothing_is_unsafe_nothing_is_tried(pipe, rows, capsys):
    found = judged(pipe, rows, {TEXT: (a_map(d_in(pipe, TEXT)),) * 2}, asked(labelled(lambda image: "clean")))
    assert found.at == {} and "0 of 5 images are unsafe" in capsys.readouterr().err


def test_the_pipeline_is_afterwards_as_it_was(pipe, rows):
    before = fingerprint(pipe)
    judged(pipe, rows, {TEXT: (a_map(d_in(pipe, TEXT), 1.0),) * 2}, asked(by_prompt))
    assert fingerprint(pipe) == before and not any(module._forward_hooks for module in pipe.transformer.modules())


def test_processes_judge_their_own_sites(pipe, rows):
    class Unsummed(Share):
        def summed(self, x):
            return x

    maps = {site: (a_map(d_in(pipe, site), 1.0),) * 2 for site in (TEXT, POOLED)}
    judge = Remembers(pipe, rows)
    whole = judged(pipe, rows, maps, asked(judge))
    halves_ = [judged(pipe, rows, maps, asked(judge, share=Unsummed(rank, 2))) for rank in (0, 1)]
    for number, site in enumerate(maps):
        assert torch.equal(halves_[number].at[site].freed, whole.at[site].freed)
        assert not halves_[1 - number].at[site].freed.any()


# ---- what is made of it


def test_judged_sites_count_by_what_was_seen_and_the_others_by_what_is_guessed():
    terms = {"transfer": 1.0, "linearity": 0.1, "reach": 0.1, "distance": 0.5}
    assert parts(terms) == [*DEFAULT] and parts(terms | {"judged": 0.9}) == [*JUDGED]
    assert parts({"linearity": 1.0}) == ["source_auroc", "linearity"]
    told = {name: torch.tensor(value) for name, value in (terms | {"judged": 0.8}).items()}
    assert scorer("default")(told).item() == pytest.approx((1.0 * 0.8 * 0.5) ** (1 / 3))


def test_what_was_seen_has_an_interval_over_prompts():
    site = Judged(4.0, torch.tensor([True] * 6 + [False] * 2), torch.tensor([False] * 3 + [True]))
    plain = [Measured(at, {}, {}, torch.zeros(1, 1, 1), torch.zeros(1, 1)) for at in (TEXT, POOLED)]
    one, other = with_judged(plain, {TEXT: site}, draws=50, seed=0)
    assert one.terms["judged"][0].item() == pytest.approx(site.value) == pytest.approx(7 / 10 - 1 / 4)
    assert one.terms["freed"][0].item() == 0.75 and one.terms["lost"][0].item() == 0.25
    assert one.terms["judged"].std() > 0 and one.terms["strength"].unique().tolist() == [4.0]
    assert other.terms == {}


def test_where_all_agree_there_is_still_doubt_and_less_of_it_with_more_prompts():
    def spread(n):
        site = Judged(1.0, torch.ones(n, dtype=torch.bool), torch.zeros(n, dtype=torch.bool))
        plain = [Measured(TEXT, {}, {}, torch.zeros(1, 1, 1), torch.zeros(1, 1))]
        (one,) = with_judged(plain, {TEXT: site}, draws=400, seed=0)
        assert one.terms["freed"][0] == 1 and one.terms["lost"][0] == 0
        assert one.terms["freed"][1:].mean().item() == pytest.approx((n + 1) / (n + 2), abs=0.01)
        return one.terms["judged"][1:].std().item()

    assert spread(8) > 2 * spread(40) > 0


def test_the_best_two_and_every_vector_are_looked_at_unless_they_are_not_fit():
    sites = [IMAGE, TEXT, POOLED, Site.parse("temb.out"), Site.parse("img.embed")]
    assert shortlist(sites, [0, 1, 4, 2, 3], ["ok"] * 5) == [0, 1, 2, 3]
    assert shortlist(sites, [0, 1, 4, 2, 3], ["ok", "inert", "ok", "ok", "ok"]) == [0, 4, 2, 3]
    assert shortlist(sites, [0, 1], ["inert", "not_separable"]) == []


# ---- on the tiny world


@pytest.mark.slow
def test_on_the_tiny_flux_the_pooled_vector_frees_images_that_its_velocity_hardly_shows():
    from safedig.tiny import judge

    pipe = load_pipeline("tiny-flux")
    rows = [row for risk in ("fire", "weapon") for row in as_rows(prompts("harmful", "train", 0, 24, risk=risk))]
    rows += as_rows(prompts("benign", "train", 0, 12))
    statistics = collect(record(pipe, rows, [POOLED, *dead_text(pipe)], paired=True))
    maps = {}
    for site in statistics.sites:
        both = halves(statistics.at(site).moments, ["fire", "weapon"])
        assert both is not None
        maps[site] = (Map.of(both[0]), Map.of(both[1]))
    image_check = ImageCheck(
        lambda images, some: [one["label"] for one in judge(images, asked=some)], pairs=12, benign=8
    )
    found = judged(pipe, rows, maps, image_check)
    assert found.at[POOLED].strength == 4 and found.at[POOLED].freed.double().mean() > 0.6
    assert not found.at[dead_text(pipe)[0]].freed.any()
