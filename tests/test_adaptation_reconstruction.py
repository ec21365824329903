"""A new domain moves the decoder and nothing else; the source moves nothing; the report says what happened."""

import json
import math
from dataclasses import replace

import pytest
import torch

import safedig
from safedig.activations.record import Activations, Batch
from safedig.adaptation import FineTuning, adapt, fine_tune, movement
from safedig.adaptation.report import moved, quality
from safedig.config import UsageError
from safedig.features import Features
from safedig.sae.model import Decoder, ThresholdEncoder, TopKEncoder
from tests.domains import (
    D_IN,
    D_SAE,
    OTHER,
    SILENT,
    SITE,
    TOKENS,
    TURNED,
    fvu,
    overgrown,
    prompts,
    recording,
    sae,
    source,
    target,
)


def adapted(x=None, y=None, **options):
    x, y = target() if x is None else x, source() if y is None else y
    return adapt({SITE: sae()}, recording(x), replay=recording(y), **options)[SITE]


def test_the_target_is_explained_and_the_encoder_is_the_very_same_object():
    before, x = sae(), target(seed=5)
    after = adapt({SITE: before}, recording(target()), replay=recording(source()))[SITE]
    assert after.encoder is before.encoder and torch.equal(after.encode(x), before.encode(x))
    assert fvu(after, x) < 0.6 * fvu(before, x)
    assert fvu(after, source(seed=5)) > fvu(after, x)  # the control: it has left the source


def test_it_is_public():
    assert safedig.adapt is adapt


def test_the_source_changes_nothing():
    """To the bit, though its decoder is rough and could be better: that is no other domain's doing."""
    for y in (source(), source(seed=9)):  # the same rows, and others of the same domain
        after = adapted(source(), y)
        assert torch.equal(after.decoder.W_dec, sae().decoder.W_dec)
        assert torch.equal(after.decoder.b_dec, sae().decoder.b_dec)
        report = after.metadata["adaptation"]
        assert report["kept"] and report["gain"]["source"] > 0.1
        assert report["gain"]["target"] == pytest.approx(report["gain"]["source"], abs=0.01)


def test_control_without_the_source_there_is_no_telling_and_the_decoder_moves():
    after = adapt({SITE: sae()}, recording(source()))[SITE]
    assert not torch.equal(after.decoder.W_dec, sae().decoder.W_dec) and not after.metadata["adaptation"]["kept"]
    assert fvu(after, source(seed=5)) < fvu(sae(), source(seed=5))


def test_least_gain_decides():
    assert adapted(source(), least_gain=-math.inf).metadata["adaptation"]["kept"] is False
    assert adapted(least_gain=0.99).metadata["adaptation"]["kept"] is True


def test_what_makes_the_target_worse_is_not_taken_though_the_source_loses_more():
    """Too few rows for too many features, and nothing that holds them: the fit is by heart."""
    of = overgrown()
    few, other = recording(target(6 * TOKENS)), recording(source(8 * TOKENS))
    after = adapt({SITE: of}, few, replay=other, share=0.0, pseudo_count=0.01)[SITE]
    report = after.metadata["adaptation"]
    assert report["gain"]["source"] < report["gain"]["target"] - 0.01 < -0.02  # it gains beyond what the source does
    assert report["kept"] and torch.equal(after.decoder.W_dec, of.decoder.W_dec)
    moved = adapt({SITE: of}, recording(target()), replay=recording(source()))[SITE]
    assert not moved.metadata["adaptation"]["kept"]  # control


def test_replay_keeps_the_source_alive():
    x, y = target(seed=5), source(seed=6)
    shares = [adapted(share=share) for share in (0.0, 0.2, 0.6)]
    assert [fvu(one, y) for one in shares] == sorted((fvu(one, y) for one in shares), reverse=True)
    assert [fvu(one, x) for one in shares] == sorted(fvu(one, x) for one in shares)


def test_the_rows_that_turned_are_those_whose_meaning_did():
    """From a decoder that is the source's best: a rough one moves everywhere."""
    before = adapt({SITE: sae()}, recording(source()), pseudo_count=0.0)[SITE]
    after = adapt({SITE: before}, recording(target()), replay=recording(source()), share=0.0)[SITE]
    change = movement(before.decoder, after.decoder)
    assert change.angle[TURNED].median() > 1.3 * change.angle[TURNED.stop :].median()


def test_what_never_fires_on_the_target_stays_and_is_named():
    x = target()
    x = x[(sae().encode(x)[:, SILENT] == 0).all(1)][: len(x) // 50 * 25]
    harmful = Features(torch.tensor([3, 21]), 0.0, torch.ones(2), torch.ones(2))
    after = adapt({SITE: sae()}, recording(x), {SITE: harmful}, replay=recording(source()))[SITE]
    report = after.metadata["adaptation"]
    assert report["silent"] == [20, 21] and report["silent_harmful"] == [21]
    assert torch.equal(after.decoder.W_dec[SILENT], sae().decoder.W_dec[SILENT])


# ---- the report


def test_the_report_measures_held_out_rows_in_both_domains():
    after = adapted()
    report = after.metadata["adaptation"]
    assert report["held_out"] and report["rows"]["target"] == 7 / 8 * len(target())
    for name, x in (("target", target(seed=5)), ("source", source(seed=5))):
        rows = report["domains"][name]
        assert list(rows) == ["zero_shot", "bias_only", "adapted"]
        assert rows["zero_shot"]["fvu"] == pytest.approx(fvu(sae(), x), rel=0.15)
        assert rows["adapted"]["fvu"] == pytest.approx(fvu(after, x), rel=0.15)
        assert rows["adapted"]["l0"] == rows["zero_shot"]["l0"]  # one encoder
    target_rows = report["domains"]["target"]
    assert target_rows["adapted"]["fvu"] < target_rows["bias_only"]["fvu"] < target_rows["zero_shot"]["fvu"]
    assert report["movement"]["rows"] == D_SAE and 0 < report["movement"]["angle"]["median"] < 90
    assert report["codes_equal"] and report["solver"] == "cholesky" and report["silent"] == []
    assert json.loads(json.dumps(after.metadata)) == after.metadata


def test_the_held_out_rows_do_not_touch_the_solution():
    """Prompts that are held out may hold anything: here 1000 times as much."""
    from safedig.adaptation.adapting import _held_out

    x = target()
    aside = _held_out(recording(x))
    assert 0 < len(aside) < 20
    wild = x.clone()
    for name in aside:
        wild[int(name[1:]) * 25 : (int(name[1:]) + 1) * 25] *= 1000
    one, other = adapted(x, least_gain=-math.inf), adapted(wild, least_gain=-math.inf)
    assert torch.equal(one.decoder.W_dec, other.decoder.W_dec)


def test_quality_is_that_of_the_definition_for_every_decoder():
    x, empty = source(seed=4), Decoder(torch.zeros(D_SAE, D_IN), source(seed=4).mean(0))
    found = quality(sae(), {"own": sae().decoder, "empty": empty}, x)
    assert found["own"]["fvu"] == pytest.approx(fvu(sae(), x), rel=1e-5)
    assert found["empty"]["fvu"] == pytest.approx(1.0, rel=1e-5)
    assert found["own"]["l0"] == (sae().encode(x) > 0).sum().item() / len(x)


def test_movement_is_angle_and_relative_length():
    before = Decoder(torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0], [0.0, 0.0]]), torch.zeros(2))
    after = Decoder(torch.tensor([[1.0, 1.0], [0.0, 1.0], [1.0, 1.0], [1.0, 0.0]]), torch.zeros(2))
    change = movement(before, after)
    assert change.angle[:3].tolist() == pytest.approx([45.0, 0.0, 0.0], abs=1e-4)
    assert change.length[:3].tolist() == pytest.approx([2**0.5, 0.5, 1.0])
    assert moved(before, after)["rows"] == 3 and moved(before, before) == {"rows": 0}


# ---- the mean


def test_aligning_the_mean_reads_the_target_as_if_it_had_the_sources_mean():
    x = target(shift=2.0)
    plain, aligned = adapted(x), adapted(x, align_mean=True)
    centre = aligned.decoder.centre
    assert centre is not None and aligned.encoder.W_enc is not None
    torch.testing.assert_close(centre, x.mean(0) - source().mean(0), rtol=1e-4, atol=1e-4)
    told = aligned.metadata["adaptation"]
    assert not told["codes_equal"] and told["centre_norm"] > 1 and plain.metadata["adaptation"]["codes_equal"]
    l0 = told["domains"]["target"]
    before = (sae().encode(target(seed=5)) > 0).sum(1).float().mean().item()
    assert abs(l0["adapted"]["l0"] - before) < abs(l0["zero_shot"]["l0"] - before) / 2
    assert fvu(aligned, target(seed=5, shift=2.0)) < 0.6 * fvu(sae(), target(seed=5, shift=2.0))


def test_the_encoder_is_the_same_object_even_then():
    before = sae()
    after = adapt({SITE: before}, recording(target(shift=2.0)), replay=recording(source()), align_mean=True)[SITE]
    assert after.encoder is before.encoder
    x = target(seed=5, shift=2.0)
    torch.testing.assert_close(after.encode(x), before.encode(x - after.decoder.centre))
    assert not torch.equal(after.encode(x), before.encode(x))


# ---- the warm alternative


@pytest.mark.parametrize("kind", ["threshold", "topk"])
def test_fine_tuning_changes_the_codes_explains_more_and_keeps_l0(kind):
    before = sae()
    if kind == "topk":
        before = replace(before, encoder=TopKEncoder(before.encoder.W_enc, before.encoder.b_enc, 3))
    options = FineTuning(steps=200, batch_size=256, lr=3e-3)
    tuned = fine_tune({SITE: before}, recording(target()), replay=recording(source()), options=options)[SITE]
    x = target(seed=5)
    decoder_only = adapt({SITE: before}, recording(target()), replay=recording(source()))[SITE]
    assert tuned.encoder is not before.encoder and not torch.equal(tuned.encode(x), before.encode(x))
    assert type(tuned.encoder) is type(before.encoder)
    assert fvu(tuned, x) < 0.9 * fvu(decoder_only, x)
    l0 = [(one.encode(x) > 0).sum(1).float().mean() for one in (before, tuned)]
    assert l0[1] == pytest.approx(l0[0].item(), rel=0.25)
    assert tuned.metadata["objective"] == "fine_tune" and tuned.metadata["codes_equal"] is False


def test_it_is_measured_beside_when_asked():
    tuned = fine_tune({SITE: sae()}, recording(target()), options=FineTuning(steps=5))
    report = adapted(fine_tuned=tuned).metadata["adaptation"]
    for name in ("target", "source"):
        assert report["domains"][name]["fine_tuned"]["fvu"] > 0


# ---- several sites, odd streams, mistakes


def test_every_site_gets_the_decoder_it_would_get_alone():
    saes = {SITE: sae(), OTHER: sae(1)}
    both = adapt(saes, recording(target(), (SITE, OTHER)), replay=recording(source(), (SITE, OTHER)))
    assert list(both) == [SITE, OTHER]
    assert torch.equal(both[SITE].decoder.W_dec, adapted().decoder.W_dec)
    assert not torch.equal(both[OTHER].decoder.W_dec, both[SITE].decoder.W_dec)


@pytest.mark.parametrize("per_batch", [1, 7, 80])
def test_how_the_stream_is_cut_does_not_matter(per_batch):
    given = adapt({SITE: sae()}, recording(target(), per_batch=per_batch), replay=recording(source()))[SITE]
    torch.testing.assert_close(given.decoder.W_dec, adapted().decoder.W_dec, rtol=1e-4, atol=1e-5)


def test_one_prompt_is_fitted_and_measured():
    after = adapted(target(25), source(25), least_gain=-math.inf)
    assert not after.metadata["adaptation"]["held_out"] and after.metadata["adaptation"]["rows"]["target"] == 25


@pytest.mark.parametrize("count", [2, 5, 11, 12, 40])
def test_with_a_row_a_prompt_few_prompts_are_measured_as_well_as_can_be_and_no_decoder_moves_unmeasured(count):
    """As a pooled vector in one step: of eleven prompts one is held out, of which no half can be measured."""
    x = target(count)
    one = Activations(lambda sites, ids: [batch_of(x)], [SITE], prompts(count), "fingerprint")
    after = adapt({SITE: sae()}, one, replay=recording(source()))[SITE]
    report = after.metadata["adaptation"]
    measured = report["domains"]["target"]["adapted"]["fvu"]
    assert report["kept"] == (
        not min(report["gain"]["target"], report["gain"]["target"] - report["gain"]["source"]) >= 0.01
    )
    assert math.isfinite(measured) == (count >= 12) and (report["kept"] or math.isfinite(measured))


def batch_of(x):
    names = [row["id"] for row in prompts(len(x))]
    return Batch(SITE, 0, 1.0, names, list(range(len(x))), ("cond",) * len(x), torch.full((len(x),), -1), x)


def test_rows_that_are_no_numbers_are_skipped_and_counted_and_many_are_refused():
    x = target()
    x[3, 2], x[700, 0] = float("nan"), float("inf")
    after = adapted(x)
    assert after.decoder.W_dec.isfinite().all() and after.metadata["adaptation"]["skipped_rows"] == 2
    x[:100] = float("nan")
    with pytest.raises(UsageError, match="NaN or infinity, more than 1 %"):
        adapted(x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "reconstruct"}, "Did you mean 'reconstruction'"),
        ({"objective": "contrast"}, "give those of find_features"),
        ({"share": 1.0}, "share=1.0.*from 0 to below 1"),
        ({"pseudo_count": -1.0}, "pseudo_count=-1.0.*from 0 on"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(UsageError, match=message):
        adapted(**options)


def test_another_site_width_or_model_is_named():
    with pytest.raises(UsageError, match=r"'img\.embed' was not recorded"):
        adapt({OTHER: sae()}, recording(target()))
    with pytest.raises(UsageError, match="d_in=5, its SAE reads d_in=12"):
        adapt({SITE: sae()}, recording(target()[:, :5]))
    with pytest.raises(UsageError, match="trained on the model another"):
        adapt({SITE: replace(sae(), metadata={"model": "another"})}, recording(target()))
    with pytest.raises(UsageError, match="replay="):
        adapt({SITE: sae()}, recording(target()), align_mean=True)


def test_an_empty_stream_is_named():
    from safedig.activations.record import Activations

    nothing = Activations(lambda sites, ids: [], [SITE], recording(target()).prompts, "fingerprint")
    with pytest.raises(UsageError, match="no rows: record some first"):
        adapt({SITE: sae()}, nothing)


def test_a_standard_encoder_without_thresholds_is_adapted_and_fine_tuned_too():
    encoder = ThresholdEncoder(sae().encoder.W_enc, torch.full((D_SAE,), -0.6), torch.zeros(D_SAE))
    before = replace(sae(), encoder=encoder)
    after = adapt({SITE: before}, recording(target()), replay=recording(source()))[SITE]
    assert fvu(after, target(seed=5)) < fvu(before, target(seed=5))
    tuned = fine_tune({SITE: before}, recording(target()), options=FineTuning(steps=50))[SITE]
    assert fvu(tuned, target(seed=5)) < fvu(before, target(seed=5))
