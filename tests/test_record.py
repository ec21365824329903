"""A recording is what really passes the site, labelled with whose it is; running it again gives the same bits."""

import pytest
import torch

from safedig.activations.record import record
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


def test_the_mean_over_tokens(pipe, prompts):
    every, mean = recorded(pipe, prompts).at(IMG), recorded(pipe, prompts, tokens="pooled").at(IMG)
    for whole, pooled in zip(every, mean, strict=True):
        expected = torch.stack([whole.x[rows].mean(0) for _, rows in whole.images()])
        torch.testing.assert_close(pooled.x, expected)
        assert set(pooled.token.tolist()) == {-1} and len(pooled.images()) == len(whole.images())


def test_a_quota_keeps_the_same_tokens_in_every_image(pipe, prompts):
    quota = list(recorded(pipe, prompts, tokens=5).at(IMG))
    for whole, part in zip(recorded(pipe, prompts).at(IMG), quota, strict=True):
        for (_, rows), (_, few) in zip(whole.images(), part.images(), strict=True):
            kept = part.token[few]
            assert len(kept) == 5 and torch.equal(part.x[few], whole.x[rows][kept])
            assert torch.equal(kept, part.token[:5])
    assert not torch.equal(quota[0].token, quota[1].token)
    assert recorded(pipe, prompts, tokens=5).at(POOLED).in_memory() is not None


def test_pooled_vectors_have_no_token(pipe, prompts):
    batch = next(iter(recorded(pipe, prompts).at(POOLED)))
    assert batch.token.tolist() == [-1, -1] and batch.x.shape[0] == 2


def test_recorded_tensors_are_copies_and_nothing_stays_hooked(pipe, prompts):
    activations = recorded(pipe, prompts)
    iterator = iter(activations)
    batch = next(iterator)
    assert batch.x.untyped_storage().nbytes() == batch.x.numel() * batch.x.element_size()
    assert not transformer(pipe)._forward_hooks and "step" not in vars(pipe.scheduler)
    plain = [images for _, images in draw(pipe, ROWS[:2], drawing=DRAWING)]
    list(iterator)
    assert torch.equal(plain[0], next(images for _, images in draw(pipe, ROWS[:2], drawing=DRAWING)))


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
