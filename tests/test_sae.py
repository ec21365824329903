"""An autoencoder finds what is there, its codes are the encoder's alone, and sae-lens reads its folder."""

import json
from dataclasses import asdict

import pytest
import torch

from safedig.activations.record import Activations, Batch
from safedig.config import UsageError
from safedig.sae.checkpoint import load_sae, save_sae
from safedig.sae.metrics import measure
from safedig.sae.model import Decoder, Encoder, SparseAutoencoder
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


def random_sae(seed=0, d_sae=24):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    encoder = Encoder(normal(D_IN, d_sae), normal(d_sae), normal(d_sae).abs())
    return SparseAutoencoder(encoder, Decoder(normal(d_sae, D_IN), normal(D_IN)), {"site": "txt.embed"})


# ---- the two halves


def test_the_codes_are_bit_equal_under_any_decoder():
    sae, a = random_sae(), mixtures(50)[0]
    other = sae.with_decoder(Decoder(9 * torch.rand_like(sae.decoder.W_dec), torch.rand(D_IN)))
    assert other.encoder is sae.encoder
    assert torch.equal(other.encode(a), sae.encode(a))
    assert not torch.equal(other.decode(other.encode(a)), sae.decode(sae.encode(a)))


def test_a_few_columns_give_the_same_codes():
    sae, a, index = random_sae(), mixtures(50)[0], torch.tensor([7, 2, 19])
    torch.testing.assert_close(sae.encoder.columns(index)(a), sae.encode(a)[:, index])


def test_a_code_is_its_preactivation_or_nothing():
    sae, a = random_sae(), torch.randn(200, D_IN)
    pre, z = a @ sae.encoder.W_enc + sae.encoder.b_enc, sae.encode(a)
    assert torch.equal(z > 0, pre > sae.encoder.threshold)
    assert torch.equal(z[z > 0], pre[z > 0]) and 0.05 < (z > 0).float().mean() < 0.5


def test_low_precision_is_encoded_in_float32():
    sae, a = random_sae(), torch.randn(5, D_IN).bfloat16()
    assert torch.equal(sae.encode(a), sae.encode(a.float()))


def test_metadata_is_added_not_replaced():
    sae = random_sae()
    assert sae.with_decoder(sae.decoder, objective="contrast").metadata == {
        "site": "txt.embed",
        "objective": "contrast",
    }
    assert sae.metadata == {"site": "txt.embed"}


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


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_no_number_is_refused(bad):
    recording = stream(SITES)
    next(batch for batch in recording if batch.site == SITES[1] and batch.step == 3).x[7, 2] = bad
    with pytest.raises(UsageError, match=r"img\.embed' holds NaN or infinity in step 3"):
        train(recording, options=SHORT)


# ---- measures


def test_measures_of_a_perfect_and_an_empty_autoencoder():
    a, eye = torch.rand(100, 3) + 1, torch.eye(3)
    perfect = SparseAutoencoder(Encoder(eye, torch.zeros(3), torch.zeros(3)), Decoder(eye, torch.zeros(3)))
    assert measure(perfect, a.split(30)) == pytest.approx({"fvu": 0.0, "l0": 3.0, "dead": 0.0})
    silent = SparseAutoencoder(Encoder(eye, torch.zeros(3), torch.full((3,), 9.0)), Decoder(eye, a.mean(0)))
    assert measure(silent, [a]) == pytest.approx({"fvu": 1.0, "l0": 0.0, "dead": 1.0}, abs=1e-6)
    with pytest.raises(ValueError, match="stream is empty"):
        measure(silent, [])


# ---- files


def test_saving_and_loading_changes_no_bit(sae, tmp_path):
    save_sae(sae, tmp_path / "deep" / "folder")
    loaded = load_sae(tmp_path / "deep" / "folder")
    a = mixtures(20)[0]
    assert torch.equal(loaded.encode(a), sae.encode(a))
    assert torch.equal(loaded.decode(loaded.encode(a)), sae.decode(sae.encode(a)))
    assert loaded.metadata == sae.metadata
    assert sorted(path.name for path in (tmp_path / "deep" / "folder").iterdir()) == [
        "cfg.json",
        "sae_weights.safetensors",
    ]


def test_sae_lens_loads_the_folder_and_agrees(sae, tmp_path):
    from sae_lens import SAE

    save_sae(sae, tmp_path)
    theirs = SAE.load_from_disk(str(tmp_path))
    a = mixtures(200)[0]
    with torch.no_grad():
        z = theirs.encode(a)
        assert torch.equal(z, sae.encode(a))
        assert torch.equal(theirs.decode(z), sae.decode(z))
    assert theirs.cfg.metadata["safedig"]["site"] == "txt.embed"


def test_a_folder_of_sae_lens_is_read_and_its_codes_no_longer_depend_on_the_decoder(tmp_path):
    from sae_lens import SAE, BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig

    torch.manual_seed(0)
    theirs = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=D_IN, d_sae=40, k=4))
    theirs.b_dec.data, theirs.topk_threshold = 10 * torch.randn(D_IN), torch.tensor(0.05, dtype=torch.double)
    theirs.save_inference_model(tmp_path)
    ours, reference, a = load_sae(tmp_path), SAE.load_from_disk(str(tmp_path)), 10 * torch.randn(100, D_IN)
    with torch.no_grad():
        torch.testing.assert_close(ours.encode(a), reference.encode(a), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.decode(ours.encode(a)), reference(a), atol=1e-5, rtol=1e-5)
    moved = ours.with_decoder(Decoder(ours.decoder.W_dec, torch.zeros(D_IN)))
    assert torch.equal(moved.encode(a), ours.encode(a))
    assert (ours.encode(a) > 0).float().mean() > 0.05
    reference.b_dec.data.zero_()
    assert not torch.allclose(reference.encode(a), ours.encode(a))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "topk"}, "holds a 'topk' SAE.*train BatchTopK"),
        ({"normalize_activations": "layer_norm"}, "normalises or reshapes"),
        ({"reshape_activations": "hook_z"}, "normalises or reshapes"),
    ],
)
def test_what_cannot_be_folded_is_refused(tmp_path, change, message):
    save_sae(random_sae(), tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(config | change))
    with pytest.raises(UsageError, match=message):
        load_sae(tmp_path)


def test_missing_and_broken_files_are_one_line_errors(tmp_path):
    with pytest.raises(UsageError, match="is no SAE folder"):
        load_sae(tmp_path / "nowhere")
    save_sae(random_sae(), tmp_path)
    weights = tmp_path / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(UsageError, match="is no SAE folder"):
        load_sae(tmp_path)
    from safetensors.torch import save_file

    save_file({"W_enc": torch.zeros(2, 2)}, weights)
    with pytest.raises(UsageError, match="has no tensor 'b_enc'"):
        load_sae(tmp_path)


def test_an_interrupted_save_keeps_the_old_files(tmp_path, monkeypatch):
    save_sae(random_sae(0), tmp_path)
    before = load_sae(tmp_path)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save_sae(random_sae(1), tmp_path)
    monkeypatch.undo()
    assert torch.equal(load_sae(tmp_path).encoder.W_enc, before.encoder.W_enc)
    assert len(list(tmp_path.iterdir())) == 2
