"""One pass keeps what a ranking needs, exactly and in known memory, however the prompts were ordered or shared out."""

import itertools
from dataclasses import replace

import pytest
import torch

from safedig.activations.pairs import dealt
from safedig.activations.record import Activations, record
from safedig.config import UsageError
from safedig.pipelines import Drawing
from safedig.recipes import load
from safedig.routing.statistics import Statistics, collect, memory
from safedig.sites import sites
from safedig.skeleton import skeleton
from tests.planted import BIND, D_IN, NOISE, STEPS, TOKENS, TRANSFERS, TXT, recording, rows
from tests.together import together

PLANTED = {TXT: TRANSFERS, BIND: NOISE}


def tokens(activations, site=TXT, step=0):
    """From the stream itself: the token rows of each image at one site in one step."""
    found = {}
    for batch in activations:
        if (batch.site, batch.step) == (site, step):
            found |= {image: batch.x[part].float() for image, part in batch.images()}
    return found


def same(one, other):
    """Every number that can be read off."""
    assert one.prompts == other.prompts and one.sites == other.sites
    for site in one.sites:
        left, right = one.at(site), other.at(site)
        assert (left.steps, left.sigmas, left.tokens) == (right.steps, right.sigmas, right.tokens)
        assert torch.equal(left.rows, right.rows)
        torch.testing.assert_close(left.within, right.within, rtol=1e-12, atol=1e-14)


# ---- what is kept


@pytest.mark.parametrize("count", [1, 4, 20])
def test_a_row_is_the_mean_over_the_tokens_of_its_image(count):
    activations = recording(PLANTED, tokens=count)
    statistics = collect(activations)
    for site, step in itertools.product(PLANTED, range(STEPS)):
        by_image = tokens(activations, site, step)
        expected = torch.stack([by_image[row["id"], row["seed"]].mean(0) for row in statistics.prompts])
        torch.testing.assert_close(statistics.at(site).rows[step].float(), expected)


@pytest.mark.parametrize(("count", "used"), [(4, slice(None)), (20, slice(None, None, 3))])
def test_the_scatter_of_a_class_is_that_of_its_tokens_about_their_images(count, used):
    """Of at most eight tokens an image, evenly spread over it."""
    activations = recording(PLANTED, tokens=count)
    by_image = tokens(activations)
    for at, harmful in enumerate((True, False)):
        kept = [x for (name, _), x in by_image.items() if name.endswith("-safe") != harmful]
        about = torch.cat([x[used] - x.mean(0) for x in kept]).double()
        expected = about.T @ about / len(about)
        torch.testing.assert_close(collect(activations).at(TXT).within[0, at], expected, rtol=1e-5, atol=1e-6)


def test_only_conditional_rows_count():
    activations = recording(PLANTED)
    doubled = [
        replace(
            batch,
            prompt_ids=batch.prompt_ids * 2,
            seeds=batch.seeds * 2,
            row=("uncond",) * len(batch.x) + ("cond",) * len(batch.x),
            token=batch.token.repeat(2),
            x=torch.cat([torch.full_like(batch.x, 99.0), batch.x]),
        )
        for batch in activations
    ]
    guided = Activations(lambda sites, ids: doubled, activations.sites, activations.prompts, activations.model)
    same(collect(guided), collect(activations))


def test_what_may_draw_anything_is_of_neither_class():
    prompts = [row | ({"kind": "underspecified"} if row["id"] == "fire-0-safe" else {}) for row in rows()]
    statistics = collect(recording(PLANTED, prompts))
    scattered = statistics._scattered[TXT, 0]
    assert scattered.tolist() == [48 * TOKENS, 47 * TOKENS]


def test_it_is_the_pooled_recording_of_a_real_pipeline(tiny_random_flux):
    prompts = [row | {"prompt": f"a {row['id']}"} for row in rows(2, domains=("fire",))]
    drawing = replace(Drawing.of(tiny_random_flux), steps=2)
    names = ["txt.embed", "pooled.embed", "single_transformer_blocks.0.img.resid_post"]
    whole = collect(record(tiny_random_flux, prompts, names, drawing=drawing, paired=True))
    pooled = collect(record(tiny_random_flux, prompts, names, tokens="pooled", drawing=drawing, paired=True))
    for site in whole.sites:
        torch.testing.assert_close(whole.at(site).rows, pooled.at(site).rows)
        assert pooled.at(site).tokens == 1 <= whole.at(site).tokens
        assert whole.at(site).sigmas == sorted(whole.at(site).sigmas, reverse=True)


# ---- however it was gathered


def halves(per_batch=8):
    activations = recording(PLANTED, per_batch=per_batch)
    half = len(activations.prompts) // 2
    return [activations.of(part) for part in (activations.prompts[:half], activations.prompts[half:])]


@pytest.mark.parametrize("first", [0, 1])
def test_processes_merge_to_what_one_would_have_seen(first):
    parts = [collect(half) for half in halves()]
    merged = parts[first].merge(parts[1 - first])
    same(merged, collect(recording(PLANTED)))


@pytest.mark.parametrize("world", [2, 3])
def test_processes_that_run_together_all_get_what_one_would_have_seen(world):
    whole = collect(recording(PLANTED))
    for found in together(world, lambda share: collect(recording(PLANTED), share=share)):
        assert found.prompts == whole.prompts and found.nbytes == whole.nbytes
        same(found, whole)


def test_an_image_that_no_process_has_seen_is_missing_still():
    def all_but_one(share):
        statistics = Statistics(recording(PLANTED).prompts, [TXT], "model")
        for batch in dealt(recording(PLANTED), share):
            if batch.site == TXT and (part := batch.of({row["id"] for row in statistics.prompts[1:]})):
                statistics.update(part)
        return statistics.summed(share)

    with pytest.raises(UsageError, match="was not recorded at"):
        together(2, all_but_one)[0].at(TXT)


def test_the_order_of_prompts_changes_nothing():
    shuffled = [rows()[at] for at in torch.randperm(len(rows()), generator=torch.Generator().manual_seed(3))]
    one, other = collect(recording(PLANTED)), collect(recording(PLANTED, shuffled))
    assert one.prompts == other.prompts
    for site in one.sites:
        torch.testing.assert_close(one.at(site).rows, other.at(site).rows, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(one.at(site).within, other.at(site).within, rtol=1e-5, atol=1e-6)


def test_what_does_not_add_up_is_refused():
    one, other = (collect(half) for half in halves())
    for wrong, why in (
        (one, "48 images are in several"),
        (collect(halves()[1], width=4), "2 kinds"),
        (collect(halves()[1].at(TXT)), "2 kinds"),
    ):
        with pytest.raises(UsageError, match=why):
            one.merge(wrong)
    assert len(one.merge(other).prompts) == 96


# ---- memory


def test_memory_is_what_the_formula_says_and_no_token_is_kept():
    for count in (2, 30):
        statistics = collect(recording(PLANTED, tokens=count), width=8)
        assert statistics.nbytes == memory(sites=2, steps=STEPS, images=96, width=8, domains=3)


def test_all_sites_of_flux1_dev_fit_in_eight_gigabytes():
    pipe, recipe = skeleton(load("flux1-dev").model), load("flux1-dev")
    assert recipe.record is not None
    all_, sigmas = len(sites(pipe)), recipe.record.sigmas
    assert isinstance(sigmas, int)
    steered = [site for site in sites(pipe, editable=True) if site.point in ("embed", "out", "resid_post")]
    assert memory(all_, sigmas, 640) == pytest.approx(5.9e9, rel=0.02) and all_ == 610
    assert memory(len(steered), 28, 640) == pytest.approx(4.2e9, rel=0.02) and len(steered) == 117
    assert memory(all_, sigmas, 640, width=3072) > 8e9  # control: without the sketch they do not


def test_a_sketch_keeps_lengths_and_is_the_same_in_every_process():
    exact, sketched = collect(recording(PLANTED)), collect(recording(PLANTED), width=8)
    parts = [collect(half, width=8) for half in halves()]
    assert sketched.at(TXT).rows.shape == (STEPS, 96, 8) and sketched.at(TXT).d_in == D_IN
    lengths = [statistics.at(TXT).rows.square().sum(2).mean().item() for statistics in (exact, sketched)]
    assert lengths[1] == pytest.approx(lengths[0], rel=0.5)
    same(parts[0].merge(parts[1]), sketched)


def test_a_site_that_is_narrow_enough_is_kept_as_it_is():
    same(collect(recording(PLANTED), width=D_IN), collect(recording(PLANTED)))


# ---- what is wrong is said


def test_an_image_that_is_missing_somewhere_is_named():
    activations = recording(PLANTED)
    batches = [batch for batch in activations if batch.site == TXT or "weapon-3" not in batch.prompt_ids]
    torn = Activations(lambda sites, ids: batches, activations.sites, activations.prompts, "fingerprint")
    statistics = collect(torn)
    assert statistics.at(TXT).rows.isfinite().all()
    with pytest.raises(UsageError, match=r"'weapon-\d+(-safe)?' was not recorded at 'transformer_blocks.0.img"):
        statistics.at(BIND)


def test_a_number_that_is_none_is_not_averaged_away():
    activations = recording(PLANTED)
    batches = list(activations)
    batches[3].x[1, 2] = torch.inf
    with pytest.raises(UsageError, match="not finite"):
        collect(Activations(lambda sites, ids: batches, activations.sites, activations.prompts, "fingerprint"))


def test_images_of_unequal_length_are_refused():
    batch = next(iter(recording(PLANTED)))
    torn = replace(
        batch,
        prompt_ids=batch.prompt_ids[1:],
        seeds=batch.seeds[1:],
        row=batch.row[1:],
        token=batch.token[1:],
        x=batch.x[1:],
    )
    with pytest.raises(UsageError, match=r"\[3, 4\] rows"):
        Statistics(rows(), [TXT], "fingerprint").update(torn)


def test_a_site_that_was_not_recorded_is_an_error():
    with pytest.raises(UsageError, match="was not recorded: there are txt.embed"):
        collect(recording({TXT: NOISE})).at(BIND)
    with pytest.raises(UsageError, match="width=0"):
        collect(recording(PLANTED), width=0)
