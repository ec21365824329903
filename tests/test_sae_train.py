"""Training: resumed runs lose nothing, bad rows are named and left out, what is far out is not learnt from."""

import json
import math
import os
import random
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from safedig.activations.processes import Share
from safedig.activations.record import Activations, Batch
from safedig.config import UsageError, from_toml, to_toml
from safedig.sae import fitting
from safedig.sae import train as train_module
from safedig.sae.checkpoint import load_sae
from safedig.sae.held_out import split
from safedig.sae.metrics import measure, measure_by_sigma
from safedig.sae.options import Limits, SAEOptions
from safedig.sae.resume import remove_checkpoints
from safedig.sae.rows import Standard
from safedig.sae.survey import picked, survey
from safedig.sae.train import train, train_on
from safedig.sites import Site

ROOT = Path(__file__).parent.parent
SITES = [Site.parse("txt.embed"), Site.parse("img.embed")]
D_IN = 16
SHORT = SAEOptions(expansion=2, k=2, steps=40, batch_size=32, lr=3e-3)
ARCHITECTURES = ["batchtopk", "topk", "jumprelu", "matryoshka"]


def mixtures(rows, seed=0, d_in=D_IN):
    """Sums of 2 of 24 fixed directions about a distant centre."""
    generator = torch.Generator().manual_seed(7)
    atoms = torch.nn.functional.normalize(torch.randn(24, d_in, generator=generator), dim=1)
    centre = 9 * torch.randn(d_in, generator=generator)
    generator = torch.Generator().manual_seed(100 + seed)
    weight = torch.rand(rows, 24, generator=generator) + 0.5
    return (weight * (torch.rand(rows, 24, generator=generator).argsort(1) < 2)) @ atoms + centre


def stream(sites=SITES, prompts=8, tokens=25, steps=4, spoil=None):
    """A recording of the sites, one batch a step; `spoil` may change each batch's rows."""
    rows = [{"id": f"p{n}", "seed": n, "twin": f"p{n + 1}" if n % 2 == 0 else ""} for n in range(prompts)]
    batches = []
    for step in range(steps):
        for at, site in enumerate(sites):
            x = mixtures(prompts * tokens, 10 * step + at)
            names = [row["id"] for row in rows for _ in range(tokens)]
            seeds = [row["seed"] for row in rows for _ in range(tokens)]
            token = torch.arange(tokens).repeat(prompts)
            batches.append(Batch(site, step, 1 - step / steps, names, seeds, ("cond",) * len(x), token, x))
            if spoil is not None:
                spoil(batches[-1])
    return Activations(lambda sites, ids: batches, list(sites), rows, "fingerprint")


def stored(tmp_path, name="store"):
    """The same on disk."""
    from safedig.activations.filling import fill
    from safedig.activations.plan import Plan

    batches = list(stream())
    rows = [row | {"prompt": "a cup"} for row in stream().prompts]
    plan = Plan.of([row | {"twin": ""} for row in rows], 2)
    facts = {"sites": [str(s) for s in SITES], "batches": len(plan.parts), "model": "fingerprint", "images": plan.sha}

    def drawn(part):
        ids = {image["id"] for image in part.images}
        return [kept for batch in batches if (kept := batch.of(ids)) is not None]

    return fill(tmp_path / name, facts, plan, drawn)


def same(one, other):
    return all(
        torch.equal(a, b)
        for a, b in [
            (one.encoder.W_enc, other.encoder.W_enc),
            (one.encoder.b_enc, other.encoder.b_enc),
            (one.decoder.W_dec, other.decoder.W_dec),
            (one.decoder.b_dec, other.decoder.b_dec),
        ]
    )


# ---- options


def test_the_step_size_rises_then_falls():
    options = SAEOptions(steps=100, warm_up=10)
    rates = [options.rate(step) for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == rates[50] == rates[80] == 1.0 and rates[99] == pytest.approx(0.05)
    assert rates == sorted(rates[:10]) + rates[10:80] + sorted(rates[80:], reverse=True)
    assert SAEOptions(steps=100).rate(0) == 1.0 and SAEOptions(steps=3).rate(2) == 1.0


def test_options_that_are_left_out_are_left_out_of_the_toml():
    assert "architecture" not in to_toml(SAEOptions()) and "limits" not in to_toml(SAEOptions())
    given = SAEOptions(architecture="topk", encoder_dtype="int8", warm_up=5, limits=Limits(clip=3.0))
    assert from_toml(SAEOptions, to_toml(given)) == given


def test_more_active_than_there_are_features_is_refused():
    with pytest.raises(UsageError, match="k=33 of 32 features"):
        train_on(mixtures(50), replace(SHORT, k=33))


@pytest.mark.parametrize(
    ("name", "least"),
    [("k", 1), ("expansion", 1), ("steps", 1), ("batch_size", 1), ("buffer", 1), ("aux", 0), ("warm_up", 0)],
)
def test_an_option_that_nothing_could_be_trained_with_is_named(name, least):
    with pytest.raises(UsageError, match=rf"sae\.{name}={least - 1}: expected a number from {least} on"):
        SAEOptions(**{name: least - 1})
    assert getattr(SAEOptions(**{name: least}), name) == least, "the control"


def test_a_step_size_and_limits_are_above_nought():
    for make in (lambda x: SAEOptions(lr=x), lambda x: Limits(max_norm=x), lambda x: Limits(clip=x)):
        for value in (0.0, -1.0, math.inf, math.nan):
            with pytest.raises(UsageError, match="expected a number above 0"):
                make(value)
        make(0.5)


# ---- architectures


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_learns(architecture):
    options = replace(SHORT, architecture=architecture, steps=300, batch_size=128)
    sae = train_on(mixtures(2000), options)
    start = train_on(mixtures(2000), replace(options, steps=1))
    held_out = mixtures(1000, seed=1)
    assert measure(sae, [held_out])["fvu"] < min(0.35, 0.6 * measure(start, [held_out])["fvu"])
    assert sae.metadata["options"]["architecture"] == architecture


def test_topk_has_exactly_k_active_and_batchtopk_on_average():
    x = mixtures(1000)
    every = (train_on(x, replace(SHORT, architecture="topk", steps=200)).encode(x) > 0).sum(1)
    average = (train_on(x, replace(SHORT, steps=200)).encode(x) > 0).sum(1)
    assert every.unique().tolist() == [2] and len(average.unique()) > 1
    assert average.double().mean() == pytest.approx(2, rel=0.25)


# ---- one pass, several runs


def test_several_options_share_one_pass_and_give_what_each_gives_alone():
    passes = []

    def counted(sites, ids):
        passes.append(1)
        return list(stream())

    recording = Activations(counted, SITES, stream().prompts, "fingerprint")
    options = [SHORT, replace(SHORT, k=3), replace(SHORT, expansion=4, steps=20, batch_size=64)]
    together = train(recording, SITES, options)
    assert len(passes) == 1 and {site: len(saes) for site, saes in together.items()} == dict.fromkeys(SITES, 3)
    for at, one in enumerate(options):
        assert same(train(stream(), SITES[:1], one)[SITES[0]], together[SITES[0]][at])


def test_a_store_is_trained_on_in_its_own_order(tmp_path):
    acts = stored(tmp_path)
    saes = train(acts, SITES[:1], replace(SHORT, steps=200, batch_size=64))
    assert saes[SITES[0]].metadata["data"]["identity"] == acts.store.identity
    assert saes[SITES[0]].metadata["data"]["rows"] == 800 and saes[SITES[0]].metadata["fvu"] < 0.5
    again = train(acts, SITES[:1], replace(SHORT, steps=200, batch_size=64))
    assert same(again[SITES[0]], saes[SITES[0]])


# ---- interruption


class Interruption(Exception):
    pass


def interrupted(monkeypatch, at, call):
    """Run the call until the step number `at` of this process, which is the last thing it begins."""
    count, step = [0], fitting.Run.step

    def breaking(run, x):
        count[0] += 1
        if count[0] == at:
            raise Interruption
        step(run, x)

    with monkeypatch.context() as patch:
        patch.setattr(fitting.Run, "step", breaking)
        with pytest.raises(Interruption):
            call()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_interrupted_at_ten_random_points_has_the_curve_of_an_undisturbed_one(
    architecture, tmp_path, monkeypatch
):
    options = replace(SHORT, architecture=architecture, steps=60)
    whole = train(stream(), SITES[:1], options)[SITES[0]]
    dice = random.Random(3)
    for _ in range(10):
        interrupted(
            monkeypatch,
            dice.randint(1, 12 if _ else 40),
            lambda: train(stream(), SITES[:1], options, checkpoints=tmp_path),
        ) if (list(tmp_path.rglob("state.json")) == [] or left(tmp_path) > 12) else None
    resumed = train(stream(), SITES[:1], options, checkpoints=tmp_path)[SITES[0]]
    assert resumed.metadata == whole.metadata and same(resumed, whole)
    assert len(whole.metadata["curve"]["loss"]) == 60 and list(tmp_path.rglob("*.safetensors")) == []


def test_with_keep_checkpoints_the_same_call_finds_everything_trained_until_they_are_removed(tmp_path, monkeypatch):
    first = train(stream(), SITES, SHORT, checkpoints=tmp_path, keep_checkpoints=True)
    with monkeypatch.context() as patch:
        patch.setattr(fitting.Run, "step", None)  # would be called to train again
        again = train(stream(), SITES, SHORT, checkpoints=tmp_path, keep_checkpoints=True)
    for site in SITES:
        assert same(first[site], again[site]) and first[site].metadata == again[site].metadata
    assert len(list(tmp_path.rglob("state.json"))) == 2
    remove_checkpoints(tmp_path, SITES)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_first_process_removes_checkpoints_once_all_have_read_theirs(rank, tmp_path, monkeypatch):
    seen = []

    class Told(Share):
        def wait(self):
            seen.append(len(list(tmp_path.rglob("state.json"))))

    monkeypatch.setattr(train_module, "Share", SimpleNamespace(of_this_process=lambda: Told(rank, 2)))
    train(stream(), SITES, SHORT, checkpoints=tmp_path)
    assert seen == ([2, 0] if rank == 0 else [2, 2])


def left(folder):
    (state,) = folder.rglob("state.json")
    return 60 - json.loads(state.read_text())["runs"][0]["steps"]


def test_from_a_store_and_over_several_sites_too(tmp_path, monkeypatch):
    acts, options = stored(tmp_path), [SHORT, replace(SHORT, k=3, steps=25)]
    whole = train(acts, SITES, options)
    for at in (30, 45):
        interrupted(monkeypatch, at, lambda: train(acts, SITES, options, checkpoints=tmp_path / "c"))
    resumed = train(acts, SITES, options, checkpoints=tmp_path / "c")
    for site in SITES:
        assert all(same(a, b) and a.metadata == b.metadata for a, b in zip(whole[site], resumed[site], strict=True))


def test_control_a_checkpoint_without_its_optimiser_resumes_to_other_losses(tmp_path, monkeypatch):
    whole = train(stream(), SITES[:1], SHORT)[SITES[0]]
    interrupted(monkeypatch, 25, lambda: train(stream(), SITES[:1], SHORT, checkpoints=tmp_path))
    forgetful = dict.fromkeys(("step", "exp_avg", "exp_avg_sq"))
    from safedig.sae import resume

    restore = resume._restore

    def without(run, tensors, numbers):
        restore(run, {k: x * 0 if k.split(".")[-1] in forgetful else x for k, x in tensors.items()}, numbers)

    monkeypatch.setattr(resume, "_restore", without)
    other = train(stream(), SITES[:1], SHORT, checkpoints=tmp_path)[SITES[0]]
    assert other.metadata["curve"]["loss"][:20] == whole.metadata["curve"]["loss"][:20]
    assert other.metadata["curve"]["loss"] != whole.metadata["curve"]["loss"]


def test_a_checkpoint_of_another_training_is_refused_and_a_damaged_one_named(tmp_path, monkeypatch):
    interrupted(monkeypatch, 25, lambda: train(stream(), SITES[:1], SHORT, checkpoints=tmp_path))
    with pytest.raises(UsageError, match=r"holds the checkpoint of another training: its options"):
        train(stream(), SITES[:1], replace(SHORT, k=3), checkpoints=tmp_path)
    with pytest.raises(UsageError, match=r"its data is"):
        train(stream(prompts=6), SITES[:1], SHORT, checkpoints=tmp_path)
    moved = stream()
    moved.model = "another"
    with pytest.raises(UsageError, match=r"its model is fingerprint, here it is another"):
        train(moved, SITES[:1], SHORT, checkpoints=tmp_path)
    (weights,) = tmp_path.rglob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(UsageError, match=r"is damaged .*: remove it"):
        train(stream(), SITES[:1], SHORT, checkpoints=tmp_path)


def test_a_checkpoint_is_safetensors_and_json_and_the_last_one_alone_is_kept(tmp_path, monkeypatch):
    interrupted(monkeypatch, 25, lambda: train(stream(), SITES[:1], SHORT, checkpoints=tmp_path))
    assert sorted(path.name for path in (tmp_path / "txt.embed").iterdir()) == [
        "state.json",
        "step-000000024.safetensors",
    ]


# ---- rows that are no numbers


def spoiled(count, value=float("nan")):
    """The first rows of the second prompt in step 2 of img.embed hold the value."""

    def spoil(batch):
        if batch.site == SITES[1] and batch.step == 2:
            batch.x[25 : 25 + count, 3] = value

    return spoil


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_no_number_is_named_counted_and_never_trained_on(value, capfd):
    saes = train(stream(spoil=spoiled(3, value)), options=SHORT)
    error = capfd.readouterr().err
    assert "'img.embed' holds NaN or infinity for prompt 'p1' at σ = 0.500: 3 rows skipped." in error
    assert saes[SITES[1]].metadata["data"]["faulty_rows"] == 3 and saes[SITES[0]].metadata["data"]["faulty_rows"] == 0
    assert saes[SITES[1]].encoder.W_enc.isfinite().all() and saes[SITES[1]].metadata["fvu"] < 2
    clean = [batch for batch in stream()]
    keep = torch.ones(200, dtype=torch.bool)
    keep[25:28] = False
    for batch in clean:
        if batch.site == SITES[1] and batch.step == 2:
            index = keep.nonzero()[:, 0].tolist()
            clean[clean.index(batch)] = replace(
                batch,
                x=batch.x[keep],
                token=batch.token[keep],
                row=batch.row[:197],
                prompt_ids=[batch.prompt_ids[i] for i in index],
                seeds=[batch.seeds[i] for i in index],
            )
    without = train(Activations(lambda s, i: clean, SITES, stream().prompts, "fingerprint"), options=SHORT)
    assert same(saes[SITES[1]], without[SITES[1]])


def test_in_a_store_too(tmp_path, capfd):
    acts = stored(tmp_path)
    (first, *_) = acts.store.shards.values()
    read = type(first).read_block

    def spoil(shard, address, name, block, room):
        read(shard, address, name, block, room)
        torch.frombuffer(room, dtype=torch.float32)[0] = float("nan")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(first), "read_block", spoil)
        sae = train(acts, SITES[:1], SHORT)[SITES[0]]
    assert sae.encoder.W_enc.isfinite().all() and sae.decoder.W_dec.isfinite().all()


def test_many_are_told_by_their_number(capfd):
    def spoil(batch):
        batch.x[::160, 0] = float("nan")  # two prompts in each of 4 batches

    train(stream(SITES[:1], spoil=spoil), options=SHORT)
    lines = [line for line in capfd.readouterr().err.splitlines() if "NaN" in line or "counted" in line]
    assert len(lines) == 6 and lines[-1].endswith("they are counted in the report.")


def test_more_than_one_in_a_hundred_aborts_and_the_last_good_checkpoint_stays(tmp_path, monkeypatch):
    interrupted(monkeypatch, 25, lambda: train(stream(), SITES[1:], SHORT, checkpoints=tmp_path))
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
    with pytest.raises(UsageError, match=r"'img.embed' holds NaN or infinity in 9 of 800 rows, more than 1%"):
        train(stream(spoil=spoiled(9)), SITES[1:], SHORT, checkpoints=tmp_path)
    assert kept and all(path.read_bytes() == data for path, data in kept.items())
    train(stream(spoil=spoiled(8)), SITES[1:], SHORT)


def test_a_loss_that_is_no_number_ends_the_training_before_the_next_checkpoint(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="The loss is no number after .* lower it"):
        train(stream(), SITES[:1], replace(SHORT, lr=1e30), checkpoints=tmp_path)
    for path in tmp_path.rglob("*.safetensors"):
        from safetensors.torch import load_file

        assert all(x.isfinite().all() for x in load_file(path).values())


# ---- what is far out


def test_a_far_out_row_is_replaced_and_a_far_out_value_cut():
    x = mixtures(4000)
    wild = x.clone()
    wild[7] += 1e4
    standard = Standard.of(wild, Limits())
    plain = Standard.of(x, Limits())
    assert standard.scale == pytest.approx(plain.scale, rel=1e-2), "the scale is fitted without it"
    given = standard(wild[:20])
    assert given.shape == (20, D_IN) and given.norm(dim=1).max() <= standard.reach
    assert torch.equal(given[:7], standard(wild[:7]))
    assert Standard.of(x, Limits(clip=0.5))(x).abs().max() == 0.5


def test_what_is_not_far_out_passes_unchanged():
    x = mixtures(4000)
    standard = Standard.of(x, Limits())
    assert torch.equal(standard(x), (x - standard.centre) / standard.scale)
    assert standard(x).mean(0).abs().max() < 1e-4 and standard(x).square().mean() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("share", [0.01, 0.05, 0.3])
def test_a_kind_of_row_that_makes_up_a_hundredth_is_never_lost_however_far_it_lies(share):
    x = torch.randn(2000, D_IN, generator=torch.Generator().manual_seed(0))
    x[: int(share * 2000)] += 1e3
    standard = Standard.of(x, Limits())
    assert ((x - standard.centre) / standard.scale).norm(dim=1).max() <= standard.reach


def test_limits_are_of_training_alone():
    """The autoencoder itself sees the row as it is."""
    x = mixtures(4000)
    sae = train_on(x, replace(SHORT, limits=Limits(clip=0.5)))
    assert sae.encode(x).shape == (4000, 32)
    assert not torch.equal(sae.encode(x), sae.encode(x.clamp(-1, 1)))


# ---- what is measured


def test_measures_by_sigma_add_up_to_the_whole():
    sae, x = train_on(mixtures(1000), SHORT), mixtures(900, seed=3)
    sigma = torch.tensor([1.0, 0.7, 0.3], dtype=torch.float64).repeat(300)
    told = measure_by_sigma(sae, x, sigma)
    plain = measure(sae, x.split(100))
    assert {key: told[key] for key in plain} == pytest.approx(plain)
    assert list(told["sigmas"]) == ["1.000", "0.700", "0.300"]
    here = measure(sae, [x[sigma == 0.7]]) | {"rows": 300}
    assert told["sigmas"]["0.700"] == pytest.approx(here)
    many = measure_by_sigma(sae, x, torch.linspace(0, 1, 900).double())
    assert next(iter(many["sigmas"])) == "0.9-1.0" and len(many["sigmas"]) == 10
    assert sum(one["rows"] for one in many["sigmas"].values()) == 900


def test_it_is_measured_on_prompts_that_were_held_out():
    acts = stream(SITES[:1])
    rest, aside = split(acts, 0.25)
    sae = train(rest, SITES[:1], replace(SHORT, steps=200), held_out=aside)[SITES[0]]
    told = sae.metadata
    assert told["measured_on"] == "held-out prompts" and told["stream"] == "txt"
    x = torch.cat([batch.x for batch in aside])
    assert told["fvu"] == pytest.approx(measure(sae, [x])["fvu"]) and told["rows"] == len(x)
    assert len(told["sigmas"]) == 4 and [check["step"] for check in told["checks"]] == [40, 80, 120, 160, 200]
    plain = train(rest, SITES[:1], replace(SHORT, steps=200))[SITES[0]]
    assert same(plain, sae) and plain.metadata["measured_on"] == "training rows"


def sigmas_of(stream):
    return {tuple(row): batch.sigma for batch in stream for row in batch.x.tolist()}


def test_what_is_measured_on_the_way_is_a_sample_of_all_sigmas_and_the_same_every_time(monkeypatch):
    rest, aside = split(stream(SITES[:1]), 0.25)
    level, seen, whole = sigmas_of(aside), [], train(rest, SITES[:1], SHORT, held_out=aside)[SITES[0]]

    def watched(sae, batches):
        seen.append([tuple(row) for a in batches for row in a.tolist()])
        return {"fvu": 0.0}

    monkeypatch.setattr(train_module, "_CHECKED", 40)
    monkeypatch.setattr(train_module, "measure", watched)
    assert same(train(rest, SITES[:1], SHORT, held_out=aside)[SITES[0]], whole), "what is learnt does not change"
    assert len(seen) == 5 and all(rows == seen[0] for rows in seen) and len(set(seen[0])) == 40
    assert {level[row] for row in seen[0]} == {1.0, 0.75, 0.5, 0.25}


def test_what_is_measured_at_the_end_is_a_sample_of_all_sigmas(monkeypatch):
    whole = train(stream(), SITES[:1], SHORT)[SITES[0]]
    monkeypatch.setattr(train_module, "_SAMPLE", 100)
    part = train(stream(), SITES[:1], SHORT)[SITES[0]]
    assert same(part, whole), "what is learnt does not change"
    assert whole.metadata["rows"] == 800 and part.metadata["rows"] == 100
    assert list(part.metadata["sigmas"]) == ["1.000", "0.750", "0.500", "0.250"]
    assert all(level["rows"] >= 10 for level in part.metadata["sigmas"].values())


def test_rows_that_are_there_already_are_measured_on_a_sample_too(monkeypatch):
    """The first quarter is noise, and is all that the first rows would show."""
    x = torch.cat([9 * torch.randn(300, D_IN, generator=torch.Generator().manual_seed(1)), mixtures(900)])
    whole = train_on(x, SHORT)
    monkeypatch.setattr(train_module, "_SAMPLE", 300)
    part = train_on(x, SHORT)
    assert same(part, whole) and part.metadata["fvu"] == pytest.approx(whole.metadata["fvu"], rel=0.1)
    assert measure(whole, [x[:300]])["fvu"] > 1.2 * whole.metadata["fvu"]


def test_a_part_of_what_is_picked_is_picked_first():
    assert picked(9, 9, seed=0) == picked(9, 12, seed=0) == slice(None)
    few, many = picked(900, 40, seed=3), picked(900, 400, seed=3)
    assert torch.equal(many[:40], few) and len(many.unique()) == 400 and not torch.equal(picked(900, 40, seed=4), few)


def test_a_prompt_and_its_twin_are_on_the_same_side():
    acts = stream(prompts=40)
    rest, aside = split(acts, 0.3)
    sides = [{row["id"] for row in part.prompts} for part in (rest, aside)]
    assert sides[0].isdisjoint(sides[1]) and len(sides[1]) == 12 and len(sides[0] | sides[1]) == 40
    for row in acts.prompts:
        if row["twin"]:
            assert any({row["id"], row["twin"]} <= side for side in sides)
    assert [row["id"] for row in split(acts, 0.3, seed=1)[1].prompts] != [row["id"] for row in aside.prompts]
    with pytest.raises(UsageError, match="cannot be held out"):
        split(acts.of(acts.prompts[:2]), 0.3)


def test_the_sample_knows_the_sigma_of_its_rows():
    acts = stream(SITES[:1])
    found = survey(acts, SITES[:1], 150, seed=1)[SITES[0]]
    assert found.seen == 800 and found.x.shape == (150, D_IN)
    level = {tuple(row): batch.sigma for batch in acts for row in batch.x.tolist()}
    assert [level[tuple(row)] for row in found.x.tolist()] == found.sigma.tolist()


def test_data_options_and_preprocessing_are_written_down():
    told = train(stream(), SITES[:1], SHORT)[SITES[0]].metadata
    assert told["options"] == asdict(SHORT) and told["model"] == "fingerprint" and told["site"] == "txt.embed"
    assert told["data"]["rows"] == 800 and told["data"]["sigma"] == [0.25, 1.0] and told["preprocessing"]["scale"] > 0
    assert told["doctor"]["dead_trained"] == told["dead"] and "dead_predicted" in told["doctor"]
    assert json.loads(json.dumps(told)) == told


def test_progress_is_told_with_fvu_l0_and_dead(capfd):
    rest, aside = split(stream(SITES[:1]), 0.25)
    train(rest, SITES[:1], [SHORT, replace(SHORT, k=3)], held_out=aside)
    lines = [line for line in capfd.readouterr().err.splitlines() if ", step " in line]
    assert len(lines) == 10 and all(word in lines[-1] for word in ("k 3", "step 40", "FVU", "L0", "dead", "held out"))


# ---- what cannot be


def test_an_empty_stream_and_a_changing_width_are_refused():
    empty = Activations(lambda sites, ids: [], SITES, stream().prompts, "fingerprint")
    with pytest.raises(UsageError, match=r"Nothing passed 'txt.embed': the stream is empty"):
        train(empty, SITES[:1], SHORT)
    first, *_, last = stream(SITES[:1])
    odd = [first, replace(last, x=mixtures(200, d_in=D_IN + 1))]
    with pytest.raises(UsageError, match="rows of 16 and of 17 numbers"):
        train(Activations(lambda sites, ids: odd, SITES[:1], stream().prompts, "f"), options=SHORT)


def test_no_options_and_an_unrecorded_site_are_refused():
    with pytest.raises(UsageError, match="no options to train with"):
        train(stream(), SITES, [])
    with pytest.raises(UsageError, match="'velocity' was not recorded"):
        train(stream(), [Site.parse("velocity")], SHORT)


def test_activations_of_another_width_are_refused_by_what_was_trained():
    sae = train_on(mixtures(100), SHORT)
    with pytest.raises(UsageError, match="d_in=17 and this SAE reads d_in=16"):
        measure(sae, [torch.randn(5, 17)])


# ---- several processes


SCRIPT = """
import sys, torch
torch.set_num_threads(1)
from tests.test_sae_train import SHORT, SITES, stream
from dataclasses import replace
from safedig.sae.train import train
from safedig.sae.averaging import Share
options = [replace(SHORT, architecture="topk"), replace(SHORT, architecture="batchtopk")]
saes = train(stream(), SITES[:1], options, checkpoints=f"{sys.argv[1]}/unfinished")[SITES[0]]
if Share.of_this_process().first:
    from safedig.sae.checkpoint import save_sae
    for at, sae in enumerate(saes):
        save_sae(sae, f"{sys.argv[1]}/{at}")
"""


@pytest.mark.slow
def test_two_processes_that_share_every_batch_learn_what_one_does(tmp_path):
    """Exactly, up to the order of sums, where codes are a row's own; nearly so where rows compete within a part."""
    (tmp_path / "shared.py").write_text(SCRIPT)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    command = [*launch, str(tmp_path / "shared.py"), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, timeout=900)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.rglob("state.json")) == []
    alone = train(stream(), SITES[:1], [replace(SHORT, architecture=name) for name in ("topk", "batchtopk")])
    for at, one in enumerate(alone[SITES[0]]):
        two = load_sae(tmp_path / str(at))
        assert two.metadata["fvu"] == pytest.approx(one.metadata["fvu"], rel=1e-3 if at == 0 else 0.1)
    torch.testing.assert_close(
        load_sae(tmp_path / "0").decoder.W_dec, alone[SITES[0]][0].decoder.W_dec, atol=2e-3, rtol=0
    )
