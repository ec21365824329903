"""The contrast decoder predicts what harm adds, and leaves the codes bit-equal; pairs meet whatever the order."""

from dataclasses import replace

import pytest
import torch

from safedig.activations.pairs import Pairing, benign, twins
from safedig.activations.record import Activations
from safedig.adaptation import adapt, fit_contrast
from safedig.config import UsageError
from safedig.features import Features, find_features
from safedig.sae.model import Decoder
from tests.synthetic import D_IN, HARM, RARE, SITE, STEPS, WEAK, activation, recording, rows, sae


def features(*index):
    count = len(index)
    return Features(torch.tensor(index), 0.0, torch.ones(count), torch.ones(count))


def fit(*index, activations=None, **options):
    saes = fit_contrast({SITE: sae()}, activations or recording(), {SITE: features(*index)}, **options)
    return saes[SITE]


def test_the_codes_are_bit_equal_before_and_after():
    before = sae()
    found = find_features({SITE: before}, recording())
    after = fit_contrast({SITE: before}, recording(), found)[SITE]
    a = torch.randn(100, D_IN)
    assert after.encoder is before.encoder
    assert torch.equal(after.encode(a), before.encode(a))
    assert not torch.equal(after.decoder.W_dec, before.decoder.W_dec)


def test_a_centre_that_the_decoder_subtracts_is_read_with_and_kept():
    """As `adapt(align_mean=True)` leaves it: the rows answer to the codes that the gate will read."""
    centre, index = torch.full((D_IN,), 0.2), torch.tensor([HARM, RARE])
    moved = replace(sae(), decoder=replace(sae().decoder, centre=centre))
    after = fit_contrast({SITE: moved}, recording(), {SITE: features(HARM, RARE)})[SITE]
    a = torch.randn(100, D_IN)
    assert torch.equal(after.encode(a), moved.encode(a)) and not torch.equal(after.encode(a), sae().encode(a))
    shifted = replace(sae().encoder, b_enc=sae().encoder.b_enc - centre @ sae().encoder.W_enc)
    other = fit_contrast({SITE: replace(sae(), encoder=shifted)}, recording(), {SITE: features(HARM, RARE)})[SITE]
    torch.testing.assert_close(after.decoder.W_dec[index], other.decoder.W_dec[index])


def test_twins_that_name_each_other_are_one_pair_and_no_harm_is_learnt_of_the_safe_one():
    given = recording()
    back = {row["twin"]: row["id"] for row in given.prompts if row.get("twin")}
    mutual = [row | {"twin": row.get("twin") or back.get(row["id"], "")} for row in given.prompts]
    assert sum(bool(row["twin"]) for row in mutual) == 2 * len(back), "the control"
    both = Activations(lambda sites, ids: given, given.sites, mutual, given.model)
    assert twins(both.prompts) == twins(given.prompts)
    assert torch.equal(fit(HARM, activations=both).decoder.W_dec, fit(HARM).decoder.W_dec)


def test_only_the_harmful_rows_are_not_zero():
    decoder = fit(HARM, RARE).decoder
    others = [row for row in range(16) if row not in (HARM, RARE)]
    assert decoder.b_dec.abs().sum() == 0 and decoder.W_dec[others].abs().sum() == 0
    assert (decoder.W_dec[[HARM, RARE]].norm(dim=1) > 0.5).all()


def test_the_rows_solve_the_ridge_regression():
    """Against the definition: harmful tokens of pairs have Δ = harmful − safe, all benign tokens have Δ = 0."""
    inputs, targets = [], []
    for row in rows():
        for step in range(STEPS):
            x, twin = activation(row, step), activation(row | {"id": f"s{row['seed']}"}, step)
            if row["id"][0] != "u":
                inputs.append(x)
                targets.append((x.double() - twin.double()) * (row["id"][0] == "h"))
    Z, D = sae().encode(torch.cat(inputs)).double()[:, [HARM, WEAK]], torch.cat(targets)
    penalty = 0.05 * (Z.T @ Z).trace() / 2
    expected = torch.linalg.solve(Z.T @ Z + penalty * torch.eye(2).double(), Z.T @ D)
    torch.testing.assert_close(fit(HARM, WEAK, ridge=0.05).decoder.W_dec[[HARM, WEAK]].double(), expected)


def test_what_harm_adds_is_taken_away_and_benign_tokens_are_hardly_touched():
    after, found = fit(HARM, RARE, ridge=1e-6), torch.tensor([HARM, RARE])
    for row in rows()[:10:2]:
        x = activation(row, 0)
        steered = x - after.encoder.columns(found)(x) @ after.decoder.W_dec[found]
        safe = activation(row | {"id": row["twin"]}, 0)
        assert (steered[1] - safe[1]).norm() < 0.02 * (x[1] - safe[1]).norm()
        assert torch.equal(safe - after.encoder.columns(found)(safe) @ after.decoder.W_dec[found], safe)


def test_a_feature_that_also_fires_on_benign_tokens_is_fitted_weaker():
    """WEAK is 1.0 on harm and 0.8 on its twin: the contrast is 0.2, and the benign 0.8 must predict nothing."""
    weak = fit(WEAK, ridge=1e-6).decoder.W_dec[WEAK, WEAK]
    assert 0.05 < weak < 0.2


def test_more_ridge_is_a_smaller_edit():
    norms = [fit(HARM, ridge=ridge).decoder.W_dec.norm() for ridge in (1e-6, 0.1, 10.0)]
    assert norms[0] > norms[1] > norms[2] > 0


def test_ridge_does_not_depend_on_the_sample_size():
    once = fit(HARM, ridge=0.1).decoder.W_dec
    given = recording()
    twice = Activations(lambda sites, ids: list(given) * 2, [SITE], given.prompts, "fingerprint")
    torch.testing.assert_close(fit(HARM, ridge=0.1, activations=twice).decoder.W_dec, once)


def test_what_it_is_is_written_down():
    metadata = fit(HARM, ridge=0.1).metadata
    assert metadata["objective"] == "contrast" and metadata["ridge"] == 0.1 and metadata["pairs"] == 20 * STEPS
    assert metadata["model"] == "fingerprint"


def test_what_cannot_be_fitted_is_an_error_that_says_why():
    with pytest.raises(UsageError, match="no harmful prompt was recorded with its safe twin"):
        fit(HARM, activations=recording(rows(twins=False)))
    with pytest.raises(UsageError, match=r"ridge=0\.0 is not positive"):
        fit(HARM, ridge=0.0)
    with pytest.raises(UsageError, match="no harmful feature fires"):
        fit(15)


# ---- two domains


def test_the_rows_of_a_replay_have_their_share_of_the_weight():
    """Replaying the recording itself changes nothing; replaying another pulls the rows towards what it says."""
    found = {SITE: features(WEAK)}
    once, again = fit(WEAK), fit_contrast({SITE: sae()}, recording(), found, replay=recording())[SITE]
    torch.testing.assert_close(again.decoder.W_dec, once.decoder.W_dec)
    calm = recording([row for row in rows() if row["id"][0] in "sb"])  # WEAK fires on twins and nothing is to be taken
    pulled = [
        fit_contrast({SITE: sae()}, recording(), found, replay=calm, share=share)[SITE].decoder.W_dec[WEAK, WEAK]
        for share in (0.0, 0.2, 0.8)
    ]
    assert pulled[0] == once.decoder.W_dec[WEAK, WEAK] and pulled[0] > pulled[1] > pulled[2] > 0


def test_adapt_offers_it_as_an_objective_and_reports_what_is_unexplained():
    before = sae().with_decoder(Decoder(0.5 * sae().decoder.W_dec, torch.zeros(D_IN)))
    found = {SITE: features(HARM, RARE)}
    after = adapt({SITE: before}, recording(), found, replay=recording(), objective="contrast")[SITE]
    assert after.encoder is before.encoder and after.metadata["objective"] == "contrast"
    report = after.metadata["adaptation"]
    assert 0 < report["unexplained"]["adapted"] < report["unexplained"]["zero_shot"] and report["codes_equal"]
    assert report["pairs"] == {"target": 20 * STEPS, "source": 20 * STEPS} and report["silent_harmful"] == []


def test_harmful_features_that_no_target_pair_fires_are_named():
    report = fit(HARM, 15).metadata["adaptation"]
    assert report["silent_harmful"] == [15]


# ---- pairs


def images_of(pairs):
    return [(pair.step, pair.harmful[1, HARM].item() > 1, pair.safe[1, HARM].item() < 1) for pair in pairs]


def met(activations):
    pairing = Pairing(activations)
    pairs = [pair for batch in activations for pair in pairing.add(batch)]
    return pairs, pairing


@pytest.mark.parametrize("batch_size", [1, 2, 7, 100])
def test_every_pair_meets_once_whatever_the_batches_and_nothing_is_held_at_the_end(batch_size):
    pairs, pairing = met(recording(batch_size=batch_size))
    assert len(pairs) == 20 * STEPS and all(harm and safe for _, harm, safe in images_of(pairs))
    assert not pairing._waiting


def test_pairs_meet_in_any_order():
    pairs, pairing = met(recording(rows()[::-1]))
    assert len(pairs) == 20 * STEPS and all(harm and safe for _, harm, safe in images_of(pairs))
    assert not pairing._waiting


def test_one_twin_may_serve_several_prompts():
    shared = [row | {"seed": 1, "twin": "s0" if row["id"][0] == "h" else ""} for row in rows(3)]
    pairs, pairing = met(recording(shared))
    assert len(pairs) == 3 * STEPS and not pairing._waiting


def test_a_prompt_and_its_twin_from_another_seed_are_no_pair():
    apart = [row | {"seed": row["seed"] + (row["id"][0] == "h")} for row in rows()]
    assert twins(recording(apart).prompts) == []


def test_only_little_is_held_when_twins_are_neighbours():
    activations = recording(batch_size=2)
    pairing = Pairing(activations)
    held = 0
    for batch in activations:
        list(pairing.add(batch))
        held = max(held, len(pairing._waiting))
    assert held == 0


def test_benign_images_are_those_in_which_no_harm_is_expected():
    assert {name[0] for name, _ in benign(recording().prompts)} == {"s", "b"}
