"""What a swap or a removal does: all of it where the prompt enters, nothing at a dead site, no trace afterwards."""

import pytest
import torch

from safedig.activations.processes import Share
from safedig.config import UsageError
from safedig.pipelines import Drawing, fingerprint, load_pipeline
from safedig.prompts import as_rows
from safedig.routing import causal
from safedig.routing.causal import interchange, interchange_together
from safedig.routing.direction import direction_of, removing
from safedig.routing.replay import Replay
from safedig.routing.trial import Trial, chosen, spread
from safedig.sites import DEAD, Site, architecture, places, resolve, sites, transformer
from safedig.tiny import prompts

SMALL = {"pairs": 5, "sigmas": 2, "batch_size": 8}
ENTRIES = ["txt.embed", "pooled.embed"]
MIDDLE = "transformer_blocks.1.img.resid_post"


@pytest.fixture(scope="module", params=["tiny-flux", "tiny-sd3"])
def shipped(request):
    return load_pipeline(request.param)


@pytest.fixture(scope="module")
def rows():
    """Six pairs and three benign prompts."""
    return as_rows(prompts("harmful", "train", seed=3, n=6)) + as_rows(prompts("benign", "train", seed=3, n=3))


@pytest.fixture(scope="module")
def tried(shipped, rows):
    """The entries, an image stream in the middle, sites without effect, and the last one; and the rows of forwards."""
    last = resolve(shipped, f"{list(architecture(transformer(shipped)).families)[-1]}.-1.img.resid_post")
    seen, handle = counted_rows(shipped)
    found = interchange(shipped, rows, [*ENTRIES, MIDDLE, "img.embed", *last_text(shipped), *last], **SMALL)
    handle.remove()
    return found, sum(seen)


def last_text(pipe):
    """The text stream behind the last block, where it has one: no one reads it."""
    return [place.site for place in places(pipe) if place.why_not == DEAD and place.site.point == "resid_post"]


def counted_rows(pipe):
    """A list that grows by the rows of each forward, and what takes the counter off again."""
    seen = []
    handle = transformer(pipe).register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    return seen, handle


def at(found, site, table="interchange"):
    return getattr(found, table)[[str(one) for one in found.sites].index(str(site))]


def hooks_of(pipe):
    return [
        name for name, module in transformer(pipe).named_modules() if module._forward_hooks or module._forward_pre_hooks
    ]


# ---- what the swap must show


def test_swapping_all_that_carries_the_prompt_gives_the_twins_velocity(shipped, rows):
    effect = interchange_together(shipped, rows, ENTRIES, **SMALL)
    assert effect.shape == (2, 5) and (effect - 1).abs().max() < 1e-3


def test_control_one_entry_alone_does_not(tried):
    assert all((at(tried[0], site) - 1).abs().max() > 0.01 for site in ENTRIES)


def test_a_dead_site_and_one_that_the_prompt_does_not_reach_have_no_effect_at_all(tried, shipped):
    for site in ("img.embed", *last_text(shipped)):
        assert all(at(tried[0], site, table).abs().max() == 0 for table in ("interchange", "removal", "harm"))
    assert at(tried[0], MIDDLE).abs().min() > 0 and at(tried[0], MIDDLE, "harm").min() > 0


def test_the_image_behind_the_last_block_carries_everything(tried):
    assert (tried[0].interchange[-1].mean() - 1).abs() < 0.1


def test_a_site_replaced_by_its_own_values_changes_no_bit(pipe):
    replay = Replay(pipe, drawing_of(pipe))
    inputs = replay.catch([{"prompt": "a gun", "seed": 1}, {"prompt": "a hat", "seed": 2}], [0, 1])[1]
    plain = replay.velocity(inputs)
    live = [site for site in sites(pipe, editable=True) if site.point in ("embed", "out", "resid_post")]
    assert len(live) > 6
    for site in live:
        assert torch.equal(replay.velocity(inputs, {site: torch.clone}), plain), site
        moved = replay.velocity(inputs, {site: lambda x: x + 1})
        assert not torch.equal(moved, plain), site


def test_the_caught_inputs_give_the_velocity_of_the_drawing(pipe):
    from safedig.hooks import attach
    from safedig.pipelines import draw

    images, seen = [{"prompt": "a gun", "seed": 1}, {"prompt": "a hat", "seed": 2}], []

    def look(x, context):
        if context.step == 2 and "cond" in context.rows:
            seen.append(x[[row == "cond" for row in context.rows]].clone())

    with attach(pipe, {Site.parse("velocity"): look}):
        list(draw(pipe, images, drawing=drawing_of(pipe), output_type="latent"))
    replay = Replay(pipe, drawing_of(pipe))
    (inputs,) = replay.catch(images, [2])
    v = replay.velocity(inputs)
    assert sorted(v.flatten().tolist()) == pytest.approx(sorted(seen[0].flatten().tolist()), abs=1e-5)


def drawing_of(pipe):
    from safedig.pipelines import is_flux

    return Drawing(steps=3, guidance=3.0, height=32, width=32, max_sequence_length=12, true_cfg=is_flux(pipe))


# ---- what the removal must show


def test_the_direction_of_delta_does_more_than_a_random_one_where_harm_is_carried(shipped, rows, tried, monkeypatch):
    def random(delta, mean, counted, sigmas):
        noise = torch.randn(delta.shape, generator=torch.Generator().manual_seed(0))
        return direction_of(noise, mean, counted, sigmas)

    monkeypatch.setattr(causal, "direction_of", random)
    control = interchange(shipped, rows, [*ENTRIES, MIDDLE], **SMALL)
    assert torch.equal(at(control, MIDDLE), at(tried[0], MIDDLE))
    real = torch.stack([at(tried[0], site, "removal") for site in control.sites])
    assert real.mean() > 2 * control.removal.mean().abs()


def test_a_prompts_own_delta_is_left_out_of_what_is_removed():
    generator = torch.Generator().manual_seed(0)
    delta, mean = torch.randn(8, 5, generator=generator), torch.randn(8, 5, generator=generator)
    counted = [True, True, True, False]
    before = direction_of(delta, mean, counted, 2)
    changed = delta.clone()
    changed[1] += 100
    after = direction_of(changed, mean, counted, 2)
    same = (before.unit == after.unit).all(1)
    assert same.tolist() == [False, True, False, False, True, True, True, True]
    changed[3] += 100  # a pair of the target: it counts for nobody
    assert torch.equal(direction_of(changed, mean, counted, 2).unit, after.unit)
    expected = (delta[0] + delta[2]) / (delta[0] + delta[2]).norm()
    assert torch.allclose(before.unit[1], expected) and torch.allclose(before.centre[1], (mean[0] + mean[2]) / 2)
    assert torch.allclose(before.unit_benign.norm(dim=1), torch.ones(2))


def test_what_is_removed_is_put_to_the_centre_and_the_rest_stays():
    x, unit, centre = torch.randn(3, 4, 6), torch.zeros(3, 6), torch.randn(3, 6)
    unit[:, 2] = 1
    without = removing(unit, centre)(x)
    assert torch.allclose(without[:, :, 2], centre[:, 2:3].expand(3, 4), atol=1e-6)
    kept = [0, 1, 3, 4, 5]
    assert torch.equal(without[:, :, kept], x[:, :, kept])
    assert torch.equal(removing(torch.zeros(3, 6), centre)(x), x)


# ---- what it costs, and that it leaves no trace


def test_the_forwards_are_as_many_as_said_and_as_forecast(tried):
    found, seen = tried
    sites = len(found.sites)
    assert seen == found.forwards == Trial(sites, 5, 3, spread(8, 2), doubled=True).forwards
    assert found.harm.shape == (sites, 2, 3) and found.interchange.shape == found.removal.shape == (sites, 2, 5)
    assert found.sigmas == sorted(found.sigmas, reverse=True) and 0 < found.sigmas[-1] < found.sigmas[0] < 1


def test_a_budget_is_kept_and_costs_pairs_before_it_costs_sigmas():
    def within(budget):
        return Trial.within(budget, sites=17, pairs=32, benign=99, sigmas=3, steps=8, doubled=True)

    whole = within(None)
    assert (whole.pairs, whole.benign, len(whole.steps)) == (32, 16, 3)
    sizes = [within(budget) for budget in (6000, 4096, 2600, 1500, 700)]
    for budget, trial in zip((6000, 4096, 2600, 1500, 700), sizes, strict=True):
        assert trial.forwards <= budget
    assert sizes[1].pairs < 32 and len(sizes[1].steps) == 3 and len(sizes[-1].steps) == 1
    with pytest.raises(UsageError, match="A budget of 20 rows is too small for 17 sites"):
        within(20)


def test_a_budget_is_respected_by_what_is_run(shipped, rows):
    found = interchange(shipped, rows, ENTRIES, budget=110, **SMALL)
    assert found.forwards <= 110 and len(found.prompt_ids) < 5


def test_neither_the_batches_nor_the_order_of_the_prompts_count(shipped, rows, tried):
    one, other = tried[0], interchange(shipped, rows[::-1], ENTRIES, **SMALL | {"batch_size": 3})
    assert one.prompt_ids == other.prompt_ids and one.benign_ids == other.benign_ids
    for site in ENTRIES:
        for table in ("interchange", "removal", "harm"):
            assert (at(one, site, table) - at(other, site, table)).abs().max() < 1e-4


def test_processes_try_their_own_sites_and_together_find_what_one_does(shipped, rows, tried):
    """Each fills in its own rows, which the exchange adds up; alone, those of the others are nought."""

    class Unsummed(Share):
        def summed(self, x):
            return x

    options = SMALL | {"pairs": 3}
    whole = interchange(shipped, rows, [*ENTRIES, MIDDLE], **options)
    seen, handle = counted_rows(shipped)
    parts = [interchange(shipped, rows, [*ENTRIES, MIDDLE], share=Unsummed(rank, 2), **options) for rank in (0, 1)]
    handle.remove()
    for table in ("interchange", "removal", "harm"):
        one, other = (getattr(part, table) for part in parts)
        assert torch.equal(one + other, getattr(whole, table)) and not (one * other).any()
    assert {part.forwards for part in parts} == {whole.forwards} and sum(seen) < 2 * whole.forwards
    with pytest.raises(UsageError, match="4 processes share 3 sites"):
        interchange(shipped, rows, [*ENTRIES, MIDDLE], share=Share(0, 4), **options)


def test_the_pipeline_is_afterwards_as_it_was(pipe, monkeypatch):
    given = [
        {"id": f"{word}{n}", "prompt": f"a {word}", "risk": risk, "twin": twin and f"{twin}{n}", "seed": n}
        for n in range(3)
        for word, risk, twin in (("gun", "weapons", "cup"), ("cup", "", ""))
    ]
    before, keys, scheduler = fingerprint(pipe), set(vars(pipe)), set(vars(pipe.scheduler))
    interchange(pipe, given, ["txt.embed"], drawing=drawing_of(pipe), pairs=3, sigmas=1)
    assert fingerprint(pipe) == before and hooks_of(pipe) == [] and "step" not in vars(pipe.scheduler)
    assert keys <= set(vars(pipe))

    def broken(*_):
        raise RuntimeError("lost")

    monkeypatch.setattr(causal, "_effect", broken)
    with pytest.raises(RuntimeError, match="lost"):
        interchange(pipe, given, ["txt.embed"], drawing=drawing_of(pipe), pairs=3, sigmas=1)
    assert fingerprint(pipe) == before and hooks_of(pipe) == []
    assert "step" not in vars(pipe.scheduler) and scheduler <= set(vars(pipe.scheduler))
    assert "encode_prompt" not in vars(pipe)


# ---- which prompts


def test_the_domains_take_turns_and_benign_prompts_are_nobodys_twin(rows):
    harmful, safe, benign = chosen(rows, 4)
    assert len({row["risk"] for row in harmful}) == min(4, len({row["risk"] for row in rows} - {""}))
    assert [row["twin"] for row in harmful] == [row["id"] for row in safe]
    assert all(one["seed"] == other["seed"] for one, other in zip(harmful, safe, strict=True))
    assert len(benign) == 3 and not {row["id"] for row in benign} & {row["twin"] for row in rows}


def test_without_other_benign_prompts_the_twins_are_taken(rows):
    pairs = [row for row in rows if row["twin"] or row["id"] in {one["twin"] for one in rows}]
    assert {row["id"] for row in chosen(pairs, 4)[2]} == {row["twin"] for row in rows if row["twin"]}


def test_what_cannot_be_tried_is_told(shipped, rows):
    alone = [row for row in rows if not row["risk"]]
    with pytest.raises(UsageError, match="0 of 9 prompts have a safe twin among them: expected at least 2"):
        interchange(shipped, alone, ENTRIES)
    with pytest.raises(
        UsageError, match="0 of the pairs that are tried are of plague.*raise the budget.*there are pairs of"
    ):
        interchange(shipped, rows, ENTRIES, source=["plague"], **SMALL)
    with pytest.raises(UsageError, match="is passed before the first σ"):
        interchange(shipped, rows, ["text_encoder:final.txt.resid_post"], **SMALL)


def test_the_middle_steps_of_equal_parts_are_tried():
    assert [spread(8, n) for n in (1, 2, 3, 8, 20)] == [(4,), (2, 6), (1, 4, 6), tuple(range(8)), tuple(range(8))]
    assert spread(1, 3) == (0,)
