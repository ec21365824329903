"""A recording is what really passes the site, labelled with whose it is; running it again gives the same bits."""

from dataclasses import replace

import pytest
import torch

from safedig.activations import record as recording
from safedig.activations.plan import Plan
from safedig.activations.record import record, record_once
from safedig.activations.schedule import schedule
from safedig.config import UsageError
from safedig.hooks import attach
from safedig.pipelines import Drawing, draw, fingerprint
from safedig.prompts import prompts_from_rows
from safedig.sites import Site, resolve, transformer

DRAWING = Drawing(steps=2, guidance=3.0, height=32, width=32, max_sequence_length=12, true_cfg=True)
IMG = Site.parse("transformer_blocks.1.img.resid_post")
POOLED = Site.parse("pooled.embed")
SITES = [IMG, POOLED, Site.parse("txt.embed")]
ROWS = [
    {"id": "gun", "prompt": "a gun", "risk": "weapons", "twin": "cup", "seed": 3},
    {"id": "hat", "prompt": "a hat", "seed": 4},
    {"id": "cup", "prompt": "a cup", "seed": 8},
    {"id": "axe", "prompt": "an axe", "risk": "weapons", "twin": "cup", "seed": 5},
]
PLAN = [("gun", 3), ("cup", 3), ("hat", 4), ("axe", 5), ("cup", 5)]


@pytest.fixture
def prompts():
    return prompts_from_rows(ROWS)


def recorded(pipe, prompts, sites=SITES, **options):
    return record(pipe, prompts, sites, drawing=DRAWING, batch_size=2, **options)


def same(first, second):
    pairs = list(zip(first, second, strict=True))
    return all(
        (a.site, a.step, a.prompt_ids, a.seeds, a.row) == (b.site, b.step, b.prompt_ids, b.seeds, b.row)
        and torch.equal(a.x, b.x)
        and torch.equal(a.token, b.token)
        for a, b in pairs
    )


def test_twins_are_drawn_beside_their_prompts_and_from_their_seed(pipe, prompts):
    activations = recorded(pipe, prompts)
    assert [(row["id"], row["seed"]) for row in activations.prompts] == PLAN
    drawn = [
        (batch.prompt_ids[rows.start], batch.seeds[rows.start])
        for batch in activations.at(POOLED)
        if batch.step == 0
        for _, rows in batch.images()
    ]
    assert drawn == PLAN


def test_where_only_the_prompt_passes_one_step_is_recorded_with_the_bits_of_them_all(pipe, prompts):
    """Beside a site that knows σ every step is, which is the control."""
    every = list(record(pipe, prompts, SITES[1:], drawing=DRAWING))
    once = list(record_once(pipe, prompts, SITES[1:], DRAWING))
    assert {batch.step for batch in every} == {0, 1} and {batch.step for batch in once} == {0}
    for site in SITES[1:]:
        known = torch.cat([batch.x for batch in once if batch.site == site])
        for step in (0, 1):
            passed = [batch.x for batch in every if (batch.site, batch.step) == (site, step)]
            assert torch.equal(torch.cat(passed), known)
    beside = record_once(pipe, prompts, [POOLED, IMG], DRAWING)
    assert {(batch.site, batch.step) for batch in beside} == {(site, step) for site in (POOLED, IMG) for step in (0, 1)}


def test_what_is_recorded_is_what_passes_the_site(pipe, prompts):
    """Against a hook put on by hand, for the conditional rows of the first batch in each step."""
    passed = []

    def take(module, args, output):
        passed.append(output[1].clone())

    handle = transformer(pipe).get_submodule("transformer_blocks.1").register_forward_hook(take)
    try:
        list(draw(pipe, [ROWS[0], ROWS[2] | {"seed": 3}], drawing=DRAWING, batch_size=2))
    finally:
        handle.remove()
    calls = len(passed) // 2  # FLUX: cond, then uncond; SD3: one call with rows [uncond, cond]
    batches = [batch for batch in recorded(pipe, prompts).at(IMG)][:2]
    for step, batch in enumerate(batches):
        expected = passed[step * calls][-2:]
        assert torch.equal(batch.x, expected.flatten(0, 1))
        assert batch.prompt_ids == ["gun"] * 64 + ["cup"] * 64 and batch.token.tolist() == [*range(64)] * 2
        assert (batch.step, batch.row) == (step, ("cond",) * 128)


def test_sigma_falls_from_one(pipe, prompts):
    sigmas = [batch.sigma for batch in recorded(pipe, prompts).at(POOLED)][:2]
    assert sigmas[0] == 1.0 and 0 < sigmas[1] < 1


def test_running_it_again_gives_the_same_bits(pipe, prompts):
    activations = recorded(pipe, prompts)
    assert same(activations, activations)
    assert same(activations, activations.in_memory())
    other = recorded(pipe, prompts_from_rows([row | {"seed": 77} for row in ROWS]))
    assert not torch.equal(next(iter(activations.at(IMG))).x, next(iter(other.at(IMG))).x)


def test_one_pass_for_all_sites_equals_one_pass_for_each(pipe, prompts):
    together = recorded(pipe, prompts)
    for site in SITES:
        assert same(together.at(site), recorded(pipe, prompts, site))


def test_a_part_of_the_prompts_has_the_bits_of_the_whole(pipe, prompts):
    whole = recorded(pipe, prompts).in_memory()
    for source in (recorded(pipe, prompts), whole):
        part = source.of([ROWS[3]])
        assert [row["id"] for row in part.prompts] == ["axe"]
        batches = list(part.at(IMG))
        assert len(batches) == 2 and set(batches[0].prompt_ids) == {"axe"}
        axe = next(batch for batch in whole.at(IMG) if "axe" in batch.prompt_ids)
        assert torch.equal(batches[0].x, axe.x[axe.prompt_ids.index("axe") :][:64])


def test_only_what_is_wanted_is_drawn(pipe, prompts, monkeypatch):
    drawn = []
    plain = type(pipe).encode_prompt
    monkeypatch.setattr(type(pipe), "encode_prompt", lambda *a, **k: drawn.append(1) or plain(*a, **k))
    activations = recorded(pipe, prompts)
    assert not drawn
    list(activations.of([ROWS[3]]))
    half = len(drawn)
    list(activations)
    assert len(drawn) == half * 4


@pytest.mark.parametrize(("rows", "labels"), [("cond", {"cond"}), ("uncond", {"uncond"}), ("all", {"cond", "uncond"})])
def test_rows_are_chosen_by_what_they_are(pipe, prompts, rows, labels):
    batches = list(recorded(pipe, prompts, POOLED, rows=rows))
    assert {label for batch in batches for label in batch.row} == labels
    counted = sum(len(batch.x) for batch in batches)
    assert counted == len(labels) * 5 * DRAWING.steps
    if rows == "all":
        uncond = [batch.x[at] for batch in batches for at, row in enumerate(batch.row) if row == "uncond"]
        assert all(torch.allclose(x, uncond[0], atol=1e-5) for x in uncond)
    names = [batch.prompt_ids for batch in batches if batch.step == 0]
    assert {name for group in names for name in group} == {"gun", "cup", "hat", "axe"}


def test_unconditional_rows_are_refused_where_there_are_none(pipe, prompts):
    flux = "Flux" in type(pipe).__name__
    for changes in ({"guidance": 1.0}, *([{"true_cfg": False}] if flux else [])):
        drawing = replace(DRAWING, **changes)
        wish = "true_cfg=True and guidance above 1" if flux else "guidance above 1"
        with pytest.raises(UsageError, match=rf"rows='uncond': nothing is drawn without.*give a drawing with {wish}"):
            record(pipe, prompts, POOLED, rows="uncond", drawing=drawing)
        labels = {row for batch in record(pipe, prompts, POOLED, rows="all", drawing=drawing) for row in batch.row}
        assert labels == {"cond"}, "control: there are none"


def test_the_mean_over_tokens(pipe, prompts):
    every, mean = recorded(pipe, prompts).at(IMG), recorded(pipe, prompts, tokens="pooled").at(IMG)
    for whole, pooled in zip(every, mean, strict=True):
        expected = torch.stack([whole.x[rows].mean(0) for _, rows in whole.images()])
        torch.testing.assert_close(pooled.x, expected)
        assert set(pooled.token.tolist()) == {-1} and len(pooled.images()) == len(whole.images())


def test_a_quota_is_drawn_for_each_image_and_step_alike_in_twins_and_at_all_sites(pipe, prompts):
    sites = [IMG, Site.parse("transformer_blocks.0.img.resid_post")]
    quota = list(recorded(pipe, prompts, sites, tokens=5))
    tokens = {}
    for whole, part in zip(recorded(pipe, prompts, sites), quota, strict=True):
        for (image, rows), (_, few) in zip(whole.images(), part.images(), strict=True):
            kept = part.token[few]
            assert len(set(kept.tolist())) == 5 and torch.equal(part.x[few], whole.x[rows][kept])
            tokens[image, part.step, part.site] = kept.tolist()
    for (image, step, _), kept in tokens.items():
        assert all(kept == tokens[image, step, site] for site in sites)
    at = {(image, step): kept for (image, step, _), kept in tokens.items()}
    assert at[("gun", 3), 0] == at[("cup", 3), 0] and at[("axe", 5), 1] == at[("cup", 5), 1]
    assert len({tuple(kept) for kept in at.values()}) == 3 * DRAWING.steps, "control: other seeds and steps differ"
    assert same(recorded(pipe, prompts, tokens=5), recorded(pipe, prompts, tokens=5))
    assert len(next(iter(recorded(pipe, prompts, tokens=500).at(IMG))).x) == 2 * 64


@pytest.mark.filterwarnings("error")
def test_a_quota_before_the_first_step_is_each_large_seeds_own_too():
    """The text encoders' step is −1, and a seed may have 63 bits: as floats those would be of one and the same lot."""
    seeds = tuple(2**62 + k for k in range(20))
    token, _ = recording._quota(seeds, -1, 64, 5, torch.device("cpu"))
    assert len({tuple(one) for one in token.tolist()}) == len(seeds)
    assert torch.equal(token[:1], recording._quota(seeds[:1], -1, 64, 5, torch.device("cpu"))[0])


def test_pooled_vectors_have_no_token(pipe, prompts):
    batch = next(iter(recorded(pipe, prompts).at(POOLED)))
    assert batch.token.tolist() == [-1, -1] and batch.x.shape[0] == 2


def test_recorded_tensors_are_copies_and_nothing_stays_hooked(pipe, prompts):
    activations = recorded(pipe, prompts)
    iterator = iter(activations.at(IMG))
    batch = next(iterator)
    assert batch.x.untyped_storage().nbytes() == batch.x.numel() * batch.x.element_size()
    assert not transformer(pipe)._forward_hooks and "step" not in vars(pipe.scheduler)
    plain = [images for _, images in draw(pipe, ROWS[:2], drawing=DRAWING)]
    list(iterator)
    assert torch.equal(plain[0], next(images for _, images in draw(pipe, ROWS[:2], drawing=DRAWING)))


def test_a_step_leaves_the_device_in_one_piece(pipe, prompts):
    """All that its sites have shown in a step shares one block of memory, and steps share none."""
    pieces = {}
    for batch in list(recorded(pipe, prompts))[: 3 * DRAWING.steps]:
        pieces.setdefault(batch.step, set()).add(batch.x.untyped_storage().data_ptr())
    assert len(pieces) == DRAWING.steps and all(len(piece) == 1 for piece in pieces.values())
    assert len(set.union(*pieces.values())) == DRAWING.steps


def test_recorded_images_are_bit_identical_to_unrecorded_ones(pipe, prompts, monkeypatch):
    drawn = []

    def keeping(*args, **options):
        for rows, images in draw(*args, **options):
            drawn.append(images)
            yield rows, images

    monkeypatch.setattr(recording, "draw", keeping)
    activations = recorded(pipe, prompts, rows="all", tokens=3)
    list(activations)
    plain = draw(pipe, activations.prompts, drawing=DRAWING, batch_size=2, output_type="latent")
    for one, (_, other) in zip(drawn, plain, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("rows", ["cond", "all"])
def test_a_chosen_sigma_has_the_rows_of_the_whole_schedule(pipe, prompts, rows):
    levels = schedule(pipe, DRAWING)
    whole = list(recorded(pipe, prompts, rows=rows))
    assert levels == sorted({batch.sigma for batch in whole}, reverse=True) and levels[0] == 1.0
    for step, sigma in enumerate(levels):
        part = list(recorded(pipe, prompts, rows=rows, sigmas=[round(sigma, 3)]))
        assert part and same(part, [batch for batch in whole if batch.step == step])
    assert same(recorded(pipe, prompts, rows=rows, sigmas=reversed(levels)), whole)


def test_nothing_is_denoised_beyond_the_last_sigma_and_the_pipeline_draws_on_as_before(pipe, prompts):
    plain = next(images for _, images in draw(pipe, ROWS[:1], drawing=DRAWING))
    passes = []
    handle = transformer(pipe).register_forward_pre_hook(lambda *_: passes.append(1))
    try:
        schedule(pipe, DRAWING)
        assert not passes, "asking for the schedule runs no transformer"
        list(recorded(pipe, prompts, sigmas=[1.0]))
        first = len(passes)
        list(recorded(pipe, prompts))
        assert len(passes) == first + DRAWING.steps * first
    finally:
        handle.remove()
    assert not pipe.interrupt and torch.equal(
        plain, next(images for _, images in draw(pipe, ROWS[:1], drawing=DRAWING))
    )


def test_an_unknown_sigma_is_an_error_that_names_those_that_exist(pipe, prompts):
    second = f"{schedule(pipe, DRAWING)[1]:.3f}"
    with pytest.raises(
        UsageError, match=rf"σ = 0\.123 is not on the schedule of 2 steps: choose from 1\.000, {second}\."
    ):
        recorded(pipe, prompts, sigmas=[1.0, 0.123])
    with pytest.raises(UsageError, match=r"σ = nan is not on the schedule"):
        recorded(pipe, prompts, sigmas=[float("nan")])
    with pytest.raises(UsageError, match="sigmas is empty"):
        recorded(pipe, prompts, sigmas=[])


def by_image(activations, site):
    return {(image, batch.step): batch.x[rows] for batch in activations.at(site) for image, rows in batch.images()}


def test_paired_twins_pass_on_the_latents_of_their_prompt(pipe, prompts):
    """What enters the blocks from the image is then the same in both, in every step; prompts alone are not touched."""
    embedded = Site.parse("img.embed")
    free = by_image(recorded(pipe, prompts, embedded), embedded)
    paired = by_image(recorded(pipe, prompts, [embedded, IMG], paired=True), embedded)
    assert free.keys() == paired.keys()
    for step in range(DRAWING.steps):
        for harmful, safe in ((("gun", 3), ("cup", 3)), (("axe", 5), ("cup", 5))):
            assert torch.equal(paired[harmful, step], paired[safe, step])
            assert torch.equal(free[harmful, step], free[safe, step]) == (step == 0), "control: free twins drift apart"
    at = by_image(recorded(pipe, prompts, IMG, paired=True), IMG)
    assert not torch.equal(at[("gun", 3), 1], at[("cup", 3), 1]), "the prompt still tells them apart"


def test_the_prompts_of_pairs_are_drawn_as_without_their_twins(pipe, prompts):
    drawing = {"drawing": DRAWING, "batch_size": 2}
    alone = record(pipe, [{**ROWS[0], "twin": ""}, {"id": "x", "prompt": "a cup", "seed": 3}], IMG, **drawing)
    paired = record(pipe, [ROWS[0], ROWS[2]], IMG, paired=True, **drawing)
    assert torch.equal(by_image(alone, IMG)[("gun", 3), 1], by_image(paired, IMG)[("gun", 3), 1])


def test_pairs_are_never_parted_and_a_full_batch_is_never_exceeded(pipe):
    rows = [row for n in range(5) for row in (
        {"id": f"h{n}", "prompt": "a gun", "seed": n, "twin": f"s{n}"}, {"id": f"s{n}", "prompt": "a cup", "seed": 0},
        {"id": f"b{n}", "prompt": "a hat", "seed": n})]  # fmt: skip
    for size in (2, 3, 4, 7):
        parts = Plan.of(rows, size, paired=True).parts
        assert all(len(part.images) <= size for part in parts)
        pairs = [(part.images[a]["id"], part.images[b]["id"]) for part in parts for a, b in part.followers]
        assert pairs == [(f"h{n}", f"s{n}") for n in range(5)]
        assert all(part.images[a]["seed"] == part.images[b]["seed"] for part in parts for a, b in part.followers)
        images = [(image["id"], image["seed"]) for part in parts for image in part.images]
        assert images == [(image["id"], image["seed"]) for image in Plan.of(rows, size).images]


def test_a_pair_that_cannot_be_drawn_is_refused(pipe):
    both = [
        {"id": "a", "prompt": "a gun", "seed": 1, "twin": "s"},
        {"id": "b", "prompt": "an axe", "seed": 1, "twin": "s"},
    ]
    safe = {"id": "s", "prompt": "a cup", "seed": 0}
    assert len(Plan.of([*both, safe], 4).images) == 3, "control: free twins may share one image"
    with pytest.raises(UsageError, match="'s' with seed 1 cannot be the image of two pairs.*different seeds"):
        recorded(pipe, [*both, safe], paired=True)
    with pytest.raises(UsageError, match="batch_size=1: expected at least 2"):
        record(pipe, [both[0], safe], IMG, paired=True, batch_size=1, drawing=DRAWING)


def test_a_recording_is_not_disturbed_by_an_edit_that_is_in_force(pipe, prompts):
    """It records what the model computes under the edit: the tap sees the edited tensor downstream."""
    first = Site.parse("transformer_blocks.0.img.resid_post")
    plain = next(iter(recorded(pipe, prompts).at(IMG))).x
    with attach(pipe, {first: lambda x, _: x * 1.5}):
        assert not torch.equal(next(iter(recorded(pipe, prompts).at(IMG))).x, plain)
    assert torch.equal(next(iter(recorded(pipe, prompts).at(IMG))).x, plain)


def test_patterns_and_the_fingerprint(pipe, prompts):
    activations = recorded(pipe, prompts, "*.img.resid_post")
    assert activations.sites == resolve(pipe, "*.img.resid_post") and activations.model == fingerprint(pipe)


def test_what_was_not_recorded_is_named(pipe, prompts):
    activations = recorded(pipe, prompts, POOLED)
    with pytest.raises(UsageError, match=r"'velocity' was not recorded: there are pooled\.embed"):
        activations.at(Site.parse("velocity"))
    with pytest.raises(UsageError, match="None of the 1 prompts was recorded"):
        activations.of([{"id": "other"}])
    with pytest.raises(UsageError, match="no prompts to record"):
        recorded(pipe, [])
    with pytest.raises(UsageError, match="Row 1 has no id"):
        recorded(pipe, [{"prompt": "a cup", "seed": 1}])
    with pytest.raises(UsageError, match="Row 2, column id: 'a' is taken by another prompt in row 1"):
        recorded(pipe, [{"id": "a", "prompt": "a cup", "seed": 1}, {"id": "a", "prompt": "a hat", "seed": 1}])
    for tokens in (0, -3):
        with pytest.raises(UsageError, match=f"tokens={tokens}: expected at least 1"):
            recorded(pipe, ROWS, tokens=tokens)


def test_one_prompt_may_be_drawn_from_several_seeds(pipe):
    rows = [{"id": "a", "prompt": "a cup", "seed": seed} for seed in (1, 2, 1)]
    assert [image for batch in recorded(pipe, rows, POOLED) if batch.step == 0 for image, _ in batch.images()] == [
        ("a", 1), ("a", 2),
    ]  # fmt: skip
