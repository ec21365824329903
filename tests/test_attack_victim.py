"""A victim is drawn from with everything on it, every pass is counted, and attacks leave it as it was."""

from itertools import islice

import pytest
import torch

from safedig.evaluation.attacks import ATTACKS, Candidate, attacked
from safedig.evaluation.attacks.ablation import without_one
from safedig.evaluation.attacks.switching import switched
from safedig.evaluation.attacks.victim import standing_in
from safedig.evaluation.methods.text import encode
from safedig.evaluation.records import Score
from safedig.pipelines import draw
from tests.lessons import HARMFUL, learnt, lesson, state
from tests.victims import victim

ROW = HARMFUL[0]
CUP = "a red cup on the left in a field"


@pytest.fixture(params=["tiny-flux", pytest.param("tiny-sd3", marks=pytest.mark.slow)])
def model(request):
    return request.param


def picture(one, prompt, seed=0, *around):
    from contextlib import ExitStack

    with ExitStack() as stack:
        for context in around:
            stack.enter_context(context)
        ((_, images),) = draw(one.pipe, [{"prompt": prompt, "seed": seed}], drawing=one.drawing)
    return images


def test_two_rows_a_step_are_counted_for_an_image_and_more_for_what_takes_more(model):
    one = victim(model=model)
    with one.metered() as meter:
        one.draw([Candidate(CUP, 0), Candidate(CUP, 1)])
    assert meter.passes == 2 * one.passes_an_image == 2 * 2 * 4
    dear = victim(learnt(model, "SLD")(1.0), model=model)
    with dear.metered() as meter:
        dear.draw([Candidate(CUP, 0)])
    assert meter.passes == 3 * 4 == dear.passes_an_image


def test_the_steering_is_on_and_what_is_drawn_is_judged(model):
    plain, steered = victim(model=model), victim(learnt(model, "Repel, contrast decoder")(8.0), model=model)
    candidates = [Candidate(ROW["prompt"], ROW["seed"])]
    ((label, (seen,)),) = plain.draw(candidates)
    assert label in ("unsafe", "unrecognised", "empty", "clean") and seen.scores["label"] == label
    assert steered.draw(candidates)[0][1][0].image_sha != seen.image_sha and plain.draw(candidates) == [(label, [seen])]


def alike(one, other):
    """To the rounding of float32: texts that are encoded in another batch may differ in their last bits."""
    return torch.allclose(one, other, atol=1e-4)


def test_a_text_stands_in_for_the_prompt_and_for_no_other(model):
    one = victim(model=model)
    text = encode(one.pipe, [CUP], 16)
    instead = standing_in(["a knife"], [text])
    assert alike(picture(one, "a knife", 0, instead.apply(one.pipe)), picture(one, CUP))
    assert not alike(picture(one, "a knife", 0, instead.apply(one.pipe)), picture(one, "a knife"))
    assert torch.equal(picture(one, "a gun", 0, instead.apply(one.pipe)), picture(one, "a gun"))


def test_what_acts_on_text_comes_after_what_stands_in(model):
    """Embeddings handed in do not get around a method that acts at the transformer."""
    steered = victim(learnt(model, "mean difference")(8.0), model=model)
    text = encode(steered.pipe, [ROW["prompt"]], 16)
    same, asked = (steered.draw([Candidate(ROW["prompt"], 0, text=given)]) for given in (text, None))
    assert same[0][0] == asked[0][0]
    (one,), (other,) = same[0][1], asked[0][1]
    assert one.scores["p_unsafe"] == pytest.approx(other.scores["p_unsafe"], abs=1e-3)
    assert one.image_sha != victim(model=model).draw([Candidate(ROW["prompt"], 0)])[0][1][0].image_sha


@pytest.mark.parametrize("name", ["ours", "Repel, contrast decoder"])
def test_the_reading_is_above_nought_where_a_gate_opens_and_nowhere_else(model, name):
    one = victim(learnt(model, name)(1.0), model=model)
    assert set(one.gates) == set(one.acting.rules)
    seen = set()
    for prompt in (ROW["prompt"], CUP):
        with one.reading() as margins, one.acting.apply(one.pipe) as on:
            picture(one, prompt, ROW["seed"])
            last = {touch.site: bool(touch.open.any()) for touch in on.audit[0]}
            assert {site: bool(found.max() > 0) for site, found in margins.items()} == last
            seen |= set(last.values())
    assert True in seen or name == "ours", "so that something has opened"
    assert victim(model=model).gates == {}


@pytest.mark.parametrize("when", ["late", "early"])
def test_switching_reads_the_neutral_text_on_one_side_of_the_step(model, when):
    one = victim(model=model)
    neutral = encode(one.pipe, [CUP], 16)
    whole = {step: picture(one, ROW["prompt"], 0, switched(one.pipe, neutral, step, when)) for step in (0, 2, 4)}
    ends = picture(one, ROW["prompt"]), picture(one, CUP)
    harm, cup = ends if when == "late" else ends[::-1]
    assert alike(whole[0], harm) and alike(whole[4], cup) and not alike(harm, cup)
    assert not alike(whole[2], harm) and not alike(whole[2], cup)


def test_one_site_off_leaves_the_others(model):
    ours = learnt(model, "Repel, contrast decoder")(4.0)
    left = without_one(ours)
    assert [set(one.rules) for one in left] == [set(ours.rules) - {site} for site in ours.rules]
    plain = learnt(model, "mean difference")(4.0)
    assert [set(one.functions) for one in without_one(plain)] == [set(plain.functions) - {s} for s in plain.functions]
    assert without_one(victim(model=model).acting)[0] is not None


def test_the_budget_is_kept_and_the_first_unsafe_image_ends_it(model, monkeypatch):
    one = victim(model=model)
    drawn = []

    def draw(candidates):
        drawn.append(len(candidates))
        one.meter.passes += len(candidates) * one.passes_an_image
        return [("unsafe" if sum(drawn) >= 6 else "clean", [Score(f"{len(drawn)}", "d")])] * len(candidates)

    monkeypatch.setattr(one, "draw", draw)
    found = attacked(one, ATTACKS["seed search"], ROW, 80)
    assert (found.success, found.passes, drawn) == (True, 64, [4, 4]) and found.prompt == ROW["prompt"]
    drawn.clear()
    found = attacked(one, ATTACKS["seed search"], ROW, 40)
    assert (found.success, found.passes, drawn) == (False, 40, [4, 1]), "a fifth fits, no more"


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_leaves_the_pipeline_as_it_was_and_repeats_itself(model, name):
    one = victim(learnt(model, "Repel, contrast decoder")(4.0), model=model)
    before = state(lesson(model).pipe)
    found = [attacked(one, ATTACKS[name], ROW, 5 * one.passes_an_image) for _ in range(2)]
    assert found[0] == found[1] and 0 < found[0].passes <= 5 * one.passes_an_image
    assert state(lesson(model).pipe) == before


def test_control_another_seed_is_another_attack():
    one = victim(learnt("tiny-flux", "Repel, contrast decoder")(4.0))
    seeds = [
        [c.seed for batch in islice(ATTACKS["seed search"].candidates(one, row), 2) for c in batch]
        for row in HARMFUL[:2]
    ]
    assert seeds[0] != seeds[1]
