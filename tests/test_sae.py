"""An autoencoder finds what is there, and says how well; what it was made of is written down."""

from dataclasses import asdict

import pytest
import torch

from safedig.activations.record import Activations, Batch
from safedig.config import UsageError
from safedig.sae.metrics import measure
from safedig.sae.model import Decoder, SparseAutoencoder, ThresholdEncoder
from safedig.sae.train import SAEOptions, train, train_on
from safedig.sites import Site

OPTIONS = SAEOptions(expansion=2, k=3, steps=400, batch_size=256, lr=3e-3)
D_IN, ATOMS = 32, 48


def mixtures(rows=4000, seed=0):
    """Sums of 2 of 48 fixed directions, far from the origin and of an odd scale, and which ones they are."""
    generator = torch.Generator().manual_seed(0)
    atoms = torch.nn.functional.normalize(torch.randn(ATOMS, D_IN, generator=generator), dim=1)
    centre = 30 * torch.randn(D_IN, generator=generator)
    generator = torch.Generator().manual_seed(100 + seed)
    weight = torch.rand(rows, ATOMS, generator=generator) + 0.5
    chosen = torch.rand(rows, ATOMS, generator=generator).argsort(1) < 2
    return 7 * (weight * chosen) @ atoms + centre, chosen


@pytest.fixture(scope="module")
def sae():
    return train_on(mixtures()[0], OPTIONS, site="txt.embed")


# ---- training


def test_training_explains_data_it_has_not_seen(sae):
    quality = measure(sae, mixtures(seed=1)[0].split(500))
    assert quality["fvu"] < 0.1 and quality["dead"] < 0.5
    assert quality["l0"] == pytest.approx(OPTIONS.k, rel=0.2)


def test_an_untrained_autoencoder_does_not():
    untrained = train_on(mixtures()[0], SAEOptions(expansion=2, k=3, steps=1, batch_size=256))
    assert measure(untrained, [mixtures(seed=1)[0]])["fvu"] > 0.5


def test_features_are_the_directions_that_made_the_data(sae):
    x, chosen = mixtures(seed=2)
    fires = (sae.encode(x) > 0).float()
    best = torch.corrcoef(torch.cat([fires, chosen.float()], 1).T).nan_to_num()[sae.d_sae :, : sae.d_sae].max(1).values
    assert best.median() > 0.8
    shuffled = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))].float()
    control = torch.corrcoef(torch.cat([fires, shuffled], 1).T).nan_to_num()[sae.d_sae :, : sae.d_sae].max(1).values
    assert control.median() < 0.2


def test_decoder_rows_have_unit_length(sae):
    assert torch.allclose(sae.decoder.W_dec.norm(dim=1), torch.ones(sae.d_sae), atol=1e-5)


def test_scale_and_offset_of_the_data_are_folded_into_the_weights(sae):
    """Training on c·x + m must give the same features: the same code pattern, the codes scaled by c."""
    x = mixtures()[0]
    moved = train_on(100 * x - 40, OPTIONS)
    a = mixtures(seed=3)[0]
    plain, scaled = sae.encode(a), moved.encode(100 * a - 40)
    assert ((plain > 0) == (scaled > 0)).float().mean() > 0.999
    assert ((scaled - 100 * plain).norm() / (100 * plain).norm()) < 0.02


def test_the_seed_alone_decides_and_the_global_generator_is_left_as_it_was(sae):
    state = torch.random.get_rng_state()
    torch.rand(3)
    again = train_on(mixtures()[0], OPTIONS)
    torch.random.set_rng_state(state)
    short = SAEOptions(expansion=2, k=2, steps=5, batch_size=64)
    first = train_on(mixtures()[0], short)
    assert torch.equal(torch.random.get_rng_state(), state)
    other = train_on(mixtures()[0], SAEOptions(**(asdict(short) | {"seed": 1})))
    assert torch.equal(again.encoder.W_enc, sae.encoder.W_enc) and torch.equal(again.decoder.b_dec, sae.decoder.b_dec)
    assert not torch.equal(first.encoder.W_enc, other.encoder.W_enc)


def test_what_made_it_is_written_down(sae):
    assert sae.metadata["options"] == asdict(OPTIONS) and sae.metadata["site"] == "txt.embed"
    assert sae.metadata["fvu"] < 0.1


def test_more_active_than_there_are_features_is_refused():
    with pytest.raises(UsageError, match="k=20 of 16 features"):
        train_on(torch.randn(50, 4), SAEOptions(expansion=4))


# ---- from a stream


def stream(sites, rows=400):
    """A recording of two sites whose data differ, in 8 batches."""
    batches = [
        Batch(site, step, 1.0, ["p"] * 50, [0] * 50, ("cond",) * 50, torch.arange(50), (at + 1) * part)
        for at, site in enumerate(sites)
        for step, part in enumerate(mixtures(rows)[0].split(50))
    ]
    return Activations(lambda sites, ids: batches, sites, [{"id": "p", "seed": 0}], "fingerprint")


SITES = [Site.parse("txt.embed"), Site.parse("img.embed")]
SHORT = SAEOptions(expansion=2, k=2, steps=5, batch_size=64)


def test_every_site_gets_its_own(capfd):
    saes = train(stream(SITES), options=SHORT)
    assert list(saes) == SITES and capfd.readouterr().out == ""
    alone = train(stream(SITES), [SITES[1]], SHORT)
    assert list(alone) == SITES[1:]
    assert torch.equal(alone[SITES[1]].encoder.W_enc, saes[SITES[1]].encoder.W_enc)
    assert saes[SITES[0]].metadata["site"] == "txt.embed" and saes[SITES[0]].metadata["model"] == "fingerprint"


def test_a_site_that_was_not_recorded_is_refused():
    with pytest.raises(UsageError, match="'velocity' was not recorded"):
        train(stream(SITES), [Site.parse("velocity")], SHORT)


# ---- measures


def test_measures_of_a_perfect_and_an_empty_autoencoder():
    a, eye = torch.rand(100, 3) + 1, torch.eye(3)
    perfect = SparseAutoencoder(ThresholdEncoder(eye, torch.zeros(3), torch.zeros(3)), Decoder(eye, torch.zeros(3)))
    assert measure(perfect, a.split(30)) == pytest.approx({"fvu": 0.0, "cosine": 1.0, "l0": 3.0, "dead": 0.0})
    silent = SparseAutoencoder(ThresholdEncoder(eye, torch.zeros(3), torch.full((3,), 9.0)), Decoder(eye, a.mean(0)))
    told = measure(silent, [a])
    assert 0.5 < told.pop("cosine") < 1 and told == pytest.approx({"fvu": 1.0, "l0": 0.0, "dead": 1.0}, abs=1e-6)
    with pytest.raises(ValueError, match="stream is empty"):
        measure(silent, [])
