"""sae-lens and we read each other's folders and agree, before and after adaptation; what does not fit is one line."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from safedig.config import UsageError
from safedig.sae.checkpoint import encoder_sha256, load_decoder, load_sae, sae_folder, save_sae
from safedig.sae.model import Decoder, SparseAutoencoder, ThresholdEncoder, TopKEncoder
from safedig.sites import Site

D_IN, D_SAE, K = 16, 40, 4
_NAMES = {
    "topk": "TopK",
    "batchtopk": "BatchTopK",
    "jumprelu": "JumpReLU",
    "matryoshka_batchtopk": "MatryoshkaBatchTopK",
    "standard": "Standard",
}
SITE = Site.parse("txt.embed")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_sae(kind="threshold", seed=0):
    W_enc, b_enc, high = (
        normal(D_IN, D_SAE, seed=seed),
        normal(D_SAE, seed=seed + 1),
        normal(D_SAE, seed=seed + 2).abs(),
    )
    encoder = TopKEncoder(W_enc, b_enc, K) if kind == "topk" else ThresholdEncoder(W_enc, b_enc, high)
    return SparseAutoencoder(encoder, random_decoder(seed + 3), {"site": str(SITE), "model": "fingerprint"})


def random_decoder(seed=0, centre=None):
    """Rows of very different lengths, none of length 1."""
    return Decoder(
        normal(D_SAE, D_IN, seed=seed) * (0.1 + normal(D_SAE, 1, seed=seed).abs()), normal(D_IN, seed=9), centre
    )


def inputs():
    return normal(200, D_IN, seed=5) + normal(D_IN, seed=6)


def trained_by_sae_lens(architecture):
    """One of sae-lens' training models in a state that training could leave: no bias is 0, no decoder row is a unit."""
    import sae_lens

    name = _NAMES[architecture]
    options = {"k": K} if "topk" in architecture else {}
    options |= {"matryoshka_widths": [10, D_SAE]} if "matryoshka" in architecture else {}
    config = getattr(sae_lens, f"{name}TrainingSAEConfig")(d_in=D_IN, d_sae=D_SAE, **options)
    torch.manual_seed(0)
    model = getattr(sae_lens, f"{name}TrainingSAE")(config)
    model.b_dec.data, model.b_enc.data = normal(D_IN, seed=1), 0.3 * normal(D_SAE, seed=2)
    model.W_dec.data = random_decoder(3).W_dec
    if architecture == "jumprelu":
        model.threshold.data = 0.5 * normal(D_SAE, seed=4).abs()
    if "batchtopk" in architecture:
        model.topk_threshold = torch.tensor(0.7, dtype=torch.double)
    return model


def stock(folder):
    from sae_lens import SAE

    return SAE.load_from_disk(str(folder))


@torch.no_grad()
def assert_agree(ours, theirs):
    a = inputs()
    z = theirs.encode(a)
    assert 0.02 < (z > 0).float().mean() < 0.6, "the comparison must be able to fail"
    torch.testing.assert_close(ours.encode(a), z, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.decode(ours.encode(a)), theirs.decode(z), atol=1e-5, rtol=1e-5)


def edit_config(folder, **change):
    file = folder / "cfg.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


def encoder_bytes(folder):
    tensors = load_file(folder / "sae_weights.safetensors")
    return {name: t.numpy().tobytes() for name, t in tensors.items() if name in ("W_enc", "b_enc", "threshold")}


@pytest.fixture(params=["threshold", "topk"])
def sae(request):
    return random_sae(request.param)


# ---- with sae-lens


def test_sae_lens_reads_our_folder_and_agrees(sae, tmp_path):
    save_sae(sae, tmp_path)
    theirs = stock(tmp_path)
    assert_agree(sae, theirs)
    assert theirs.cfg.metadata["safedig"]["site"] == "txt.embed"


def test_and_bit_for_bit_where_codes_have_a_threshold(tmp_path):
    sae = random_sae("threshold")
    save_sae(sae, tmp_path)
    with torch.no_grad():
        assert torch.equal(stock(tmp_path).encode(inputs()), sae.encode(inputs()))


@pytest.mark.parametrize("architecture", _NAMES)
def test_we_read_their_folder_before_and_after_adaptation_and_they_read_ours(architecture, tmp_path):
    trained_by_sae_lens(architecture).save_inference_model(tmp_path / "theirs")
    ours = load_sae(tmp_path / "theirs")
    assert_agree(ours, stock(tmp_path / "theirs"))
    save_sae(ours, tmp_path / "ours")
    assert_agree(ours, stock(tmp_path / "ours"))
    adapted = ours.with_decoder(random_decoder(11), objective="reconstruction")
    save_sae(adapted, tmp_path / "adapted")
    assert_agree(adapted, stock(tmp_path / "adapted"))
    assert_agree(load_sae(tmp_path / "adapted"), stock(tmp_path / "adapted"))
    assert encoder_bytes(tmp_path / "ours") == encoder_bytes(tmp_path / "adapted")
    with torch.no_grad():
        before, after = stock(tmp_path / "ours").encode(inputs()), stock(tmp_path / "adapted").encode(inputs())
    assert torch.equal(before, after), "frozen for sae-lens too"


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_control_under_the_settings_of_sae_lens_a_new_decoder_changes_the_codes(architecture, tmp_path):
    """Why everything is folded: the encoder's tensors are the same here and the codes are not."""
    trained_by_sae_lens(architecture).save_inference_model(tmp_path)
    theirs, a = stock(tmp_path), inputs()
    with torch.no_grad():
        before = theirs.encode(a)
        theirs.W_dec.data, theirs.b_dec.data = random_decoder(11).W_dec, torch.zeros(D_IN)
        assert ((theirs.encode(a) > 0) != (before > 0)).float().mean() > 0.01


@pytest.mark.parametrize("architecture", _NAMES)
def test_a_checkpoint_of_training_gives_the_codes_of_what_sae_lens_would_export(architecture, tmp_path):
    trained = trained_by_sae_lens(architecture)
    trained.save_model(tmp_path / "training")
    trained.save_inference_model(tmp_path / "exported")
    theirs, a = stock(tmp_path / "exported"), inputs()
    ours = load_sae(tmp_path / "training")
    with torch.no_grad():
        torch.testing.assert_close(ours.encode(a), theirs.encode(a), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.decode(ours.encode(a)), theirs(a), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", _NAMES)
def test_the_input_scale_of_an_unfinished_training_is_folded_as_sae_lens_does_at_its_end(architecture, tmp_path):
    trained, a = trained_by_sae_lens(architecture), inputs()
    trained.cfg.normalize_activations = "expected_average_only_in"
    trained.save_model(tmp_path / "training")
    (tmp_path / "training" / "activation_scaler.json").write_text('{"scaling_factor": 0.3, "has_whitening": false}')
    trained.fold_activation_norm_scaling_factor(0.3)
    trained.save_inference_model(tmp_path / "exported")
    theirs, ours = stock(tmp_path / "exported"), load_sae(tmp_path / "training")
    with torch.no_grad():
        torch.testing.assert_close(ours.encode(a), theirs.encode(a), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.decode(ours.encode(a)), theirs(a), atol=1e-5, rtol=1e-5)
    (tmp_path / "training" / "activation_scaler.json").write_text('{"scaling_factor": null}')
    assert not torch.allclose(load_sae(tmp_path / "training").encode(a), ours.encode(a), atol=1e-2)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"scaling_factor": None, "has_whitening": True}, "whitening was not yet folded in"),
        ({"scaling_factor": "0.3"}, "scaling_factor='0.3': expected a number above 0"),
        ({"scaling_factor": 0}, "scaling_factor=0: expected a number above 0"),
    ],
)
def test_an_input_scale_that_cannot_be_folded_is_refused(tmp_path, said, message):
    save_sae(random_sae(), tmp_path)
    (tmp_path / "activation_scaler.json").write_text(json.dumps(said))
    load_sae(tmp_path)  # what says that its input is as it is needs none
    edit_config(tmp_path, normalize_activations="expected_average_only_in")
    with pytest.raises(UsageError, match=message):
        load_sae(tmp_path)


def test_a_configuration_from_before_sae_lens_6_is_understood(tmp_path):
    tensors = {
        "W_enc": normal(D_IN, D_SAE),
        "b_enc": normal(D_SAE),
        "W_dec": normal(D_SAE, D_IN),
        "b_dec": normal(D_IN),
    }
    save_file(tensors | {"scaling_factor": torch.ones(D_SAE)}, tmp_path / "sae_weights.safetensors")
    old = {
        "d_in": D_IN,
        "d_sae": D_SAE,
        "dtype": "float32",
        "hook_point": "blocks.1.hook_resid_pre",
        "normalize_activations": False,
    }
    topk = old | {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}
    for config in (old, topk):
        (tmp_path / "cfg.json").write_text(json.dumps(config))
        assert_agree(load_sae(tmp_path), stock(tmp_path))
    assert isinstance(load_sae(tmp_path).encoder, TopKEncoder)


def test_a_decoder_with_a_centre_is_refused_by_sae_lens_instead_of_giving_other_codes(sae, tmp_path):
    centred = sae.with_decoder(random_decoder(11, centre=normal(D_IN, seed=12)))
    save_sae(centred, tmp_path / "centred")
    loaded, a = load_sae(tmp_path / "centred"), inputs()
    assert torch.equal(loaded.encode(a), centred.encode(a)) and not torch.equal(loaded.encode(a), sae.encode(a))
    with pytest.raises(RuntimeError, match='Unexpected key.*"centre"'):
        stock(tmp_path / "centred")
    assert "a − centre" in json.loads((tmp_path / "centred" / "cfg.json").read_text())["metadata"]["note"]
    save_sae(sae, tmp_path / "plain")
    assert encoder_bytes(tmp_path / "centred") == encoder_bytes(tmp_path / "plain")


# ---- ours again


def test_saving_and_loading_changes_no_bit(sae, tmp_path):
    save_sae(sae, tmp_path / "deep" / "folder")
    loaded, a = load_sae(tmp_path / "deep" / "folder"), inputs()
    assert torch.equal(loaded.encode(a), sae.encode(a))
    assert torch.equal(loaded.decode(loaded.encode(a)), sae.decode(sae.encode(a)))
    assert loaded.metadata == sae.metadata
    assert sorted(file.name for file in (tmp_path / "deep" / "folder").iterdir()) == [
        "cfg.json",
        "sae_weights.safetensors",
    ]


def test_the_same_autoencoder_gives_the_same_bytes(sae, tmp_path):
    for name in ("first", "second"):
        save_sae(sae, tmp_path / name)
    for file in ("cfg.json", "sae_weights.safetensors"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


def test_the_hash_is_of_the_encoder_alone(sae, tmp_path):
    save_sae(sae, tmp_path / "before")
    save_sae(sae.with_decoder(random_decoder(11)), tmp_path / "after")
    hashes = [
        json.loads((tmp_path / name / "cfg.json").read_text())["metadata"]["safedig"] for name in ("before", "after")
    ]
    assert hashes[0]["encoder_sha256"] == hashes[1]["encoder_sha256"] == encoder_sha256(sae.encoder)
    assert hashes[0]["decoder_sha256"] != hashes[1]["decoder_sha256"]
    assert encoder_sha256(random_sae(seed=1).encoder) != encoder_sha256(random_sae(seed=2).encoder)
    W_enc, b_enc = sae.encoder.W_enc, sae.encoder.b_enc
    assert encoder_sha256(TopKEncoder(W_enc, b_enc, 3)) != encoder_sha256(TopKEncoder(W_enc, b_enc, 4))


def test_another_decoder_is_read_beside_the_same_encoder_object(sae, tmp_path):
    adapted = sae.with_decoder(random_decoder(11, centre=normal(D_IN, seed=12)), objective="contrast")
    save_sae(adapted, tmp_path)
    switched = load_decoder(tmp_path, beside=sae)
    assert switched.encoder is sae.encoder and switched.metadata == adapted.metadata
    for name in ("W_dec", "b_dec", "centre"):
        assert torch.equal(getattr(switched.decoder, name), getattr(adapted.decoder, name))


def test_the_decoder_of_another_encoder_is_refused(sae, tmp_path):
    save_sae(random_sae(seed=20), tmp_path)
    with pytest.raises(UsageError, match="was fitted for encoder .*… and this is .*…: load the encoder beside it"):
        load_decoder(tmp_path, beside=sae)
    edit_config(tmp_path, metadata={})
    with pytest.raises(UsageError, match="was fitted for encoder None"):
        load_decoder(tmp_path, beside=sae)


# ---- where they lie


def test_the_layout_says_model_site_source_target_and_objective():
    plain = sae_folder("sae_checkpoints", "black-forest-labs/FLUX.1-dev", SITE, "violence")
    assert plain == Path("sae_checkpoints/FLUX.1-dev/txt.embed/violence")
    adapted = sae_folder("sae_checkpoints", "runs/models/FLUX.1-dev/", "txt.embed", "violence", "hate", "contrast")
    assert adapted == plain.with_name("violence--hate.contrast")
    assert sae_folder("x", "tiny-flux", SITE, ["hate", "arms", "hate"]).name == "arms+hate"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"target": "hate"}, "give both or neither"),
        ({"objective": "contrast"}, "give both or neither"),
        ({"target": "hate", "objective": "contrst"}, "objectives are reconstruction and contrast"),
        ({"source": "a/b"}, "'a/b' cannot name a folder"),
        ({"source": "a--b"}, "'a--b' cannot name a folder"),
        ({"source": ""}, "'' cannot name a folder"),
        ({"source": []}, "'' cannot name a folder"),
        ({"source": ["hate", ".."]}, "'..' cannot name a folder"),
        ({"site": "no such site"}, "site"),
    ],
)
def test_names_that_cannot_be_told_apart_on_disk_are_refused(given, message):
    with pytest.raises(UsageError, match=message):
        sae_folder(**({"root": "x", "model": "tiny-flux", "site": SITE, "source": "violence"} | given))


# ---- what is refused


def test_an_autoencoder_of_another_site_or_model_is_refused(sae, tmp_path):
    save_sae(sae, tmp_path)
    assert load_sae(tmp_path, site=SITE, model="fingerprint").d_in == D_IN
    assert load_sae(tmp_path, site="txt.embed").d_in == D_IN
    with pytest.raises(UsageError, match="trained on the site 'txt.embed', and 'img.embed' is asked for"):
        load_sae(tmp_path, site=Site.parse("img.embed"))
    with pytest.raises(UsageError, match="trained on the model 'fingerprint', and 'another' is asked for"):
        load_sae(tmp_path, model="another")


def test_an_autoencoder_that_does_not_say_where_it_is_from_is_refused_where_it_matters(tmp_path):
    trained_by_sae_lens("standard").save_inference_model(tmp_path)
    assert load_sae(tmp_path).metadata == {}
    with pytest.raises(UsageError, match="no site that it names, and 'txt.embed' is asked for"):
        load_sae(tmp_path, site=SITE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "gated"}, "holds a 'gated' SAE .*expected one of standard, jumprelu, topk"),
        ({"architecture": "standard", "activation_fn_str": "tanh-relu"}, "with activation 'tanh-relu'"),
        ({"architecture": "topk"}, "TopK SAE with k=None"),
        ({"architecture": "topk", "k": 2.5}, "TopK SAE with k=2.5"),
        ({"architecture": "topk", "k": 41}, "says k=41 and .* has only 40 features"),
        ({"architecture": "topk", "k": 0}, "k=0 of 40 features"),
        ({"normalize_activations": "layer_norm"}, "normalises or reshapes"),
        ({"reshape_activations": "hook_z"}, "normalises or reshapes"),
        ({"d_in": 17}, r"says \(d_in, d_sae\) = \(17, 40\) and the tensors have \(16, 40\)"),
        ({"d_sae": 41}, r"says \(d_in, d_sae\) = \(16, 41\)"),
        ({"apply_b_dec_to_input": True}, "The encoder in .* is not the one that cfg.json describes"),
    ],
)
def test_a_configuration_that_cannot_be_right_is_refused(tmp_path, change, message):
    save_sae(random_sae(), tmp_path)
    edit_config(tmp_path, **change)
    with pytest.raises(UsageError, match=message):
        load_sae(tmp_path)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("W_enc", None, "has no tensor 'W_enc'"),
        ("b_dec", None, "has no tensor 'b_dec'"),
        ("threshold", None, "has no tensor 'threshold'"),
        ("W_enc", torch.zeros(D_IN), r"'W_enc' has shape \(16,\)"),
        ("W_dec", torch.zeros(D_IN, D_SAE), r"'W_dec' has shape \(16, 40\) where .*\(d_sae, d_in\) = \(40, 16\)"),
        ("b_enc", torch.zeros(D_SAE - 1), r"'b_enc' has shape \(39,\)"),
        ("threshold", torch.zeros(()), r"'threshold' has shape \(\)"),
        ("centre", torch.zeros(D_SAE), r"'centre' has shape \(40,\)"),
        ("b_enc", torch.zeros(D_SAE), "The encoder in .* is not the one"),
        ("b_dec", torch.zeros(D_IN), "The decoder in .* is not the one"),
    ],
)
def test_tensors_that_cannot_be_right_are_refused(tmp_path, name, tensor, message):
    save_sae(random_sae(), tmp_path)
    tensors = load_file(tmp_path / "sae_weights.safetensors") | {name: tensor}
    save_file({key: value for key, value in tensors.items() if value is not None}, tmp_path / "sae_weights.safetensors")
    with pytest.raises(UsageError, match=message):
        load_sae(tmp_path)


@pytest.mark.parametrize("left", [0, 4, 100, 0.5, -1])
def test_truncated_weights_are_refused_wherever_they_end(sae, tmp_path, left):
    save_sae(sae, tmp_path)
    weights = tmp_path / "sae_weights.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: int(left * len(whole)) if isinstance(left, float) else left])
    for read in (load_sae, lambda folder: load_decoder(folder, beside=sae)):
        with pytest.raises(UsageError, match="is damaged or was copied in part"):
            read(tmp_path)


def test_missing_and_broken_files_are_one_line_errors(tmp_path):
    with pytest.raises(UsageError, match="is no SAE folder: cfg.json cannot be read .*import_sae reads other formats"):
        load_sae(tmp_path / "nowhere")
    save_sae(random_sae(), tmp_path)
    (tmp_path / "sae_weights.safetensors").rename(tmp_path / "other.safetensors")
    with pytest.raises(UsageError, match="is no SAE folder: sae_weights.safetensors cannot be read"):
        load_sae(tmp_path)
    for broken, message in (("{", "is no JSON"), ("[]", "is not a JSON object")):
        (tmp_path / "cfg.json").write_text(broken)
        with pytest.raises(UsageError, match=message):
            load_sae(tmp_path)


def test_a_negative_threshold_is_not_written(tmp_path):
    encoder = ThresholdEncoder(normal(D_IN, D_SAE), normal(D_SAE), torch.full((D_SAE,), -1.0))
    with pytest.raises(UsageError, match="A threshold is negative"):
        save_sae(SparseAutoencoder(encoder, random_decoder()), tmp_path)


# ---- interrupted


def interrupt_after(monkeypatch, files):
    """Let so many files be renamed into place, then stop the process as a key press would."""
    import os

    rename, done = os.replace, []

    def replace(*args):
        if len(done) == files:
            raise KeyboardInterrupt
        done.append(args)
        rename(*args)

    monkeypatch.setattr("os.replace", replace)


def test_an_interrupted_save_keeps_the_old_files(tmp_path, monkeypatch):
    save_sae(random_sae(seed=0), tmp_path)
    before = load_sae(tmp_path)
    interrupt_after(monkeypatch, files=0)
    with pytest.raises(KeyboardInterrupt):
        save_sae(random_sae(seed=1), tmp_path)
    monkeypatch.undo()
    assert torch.equal(load_sae(tmp_path).encoder.W_enc, before.encoder.W_enc)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("new", [random_sae(seed=1), random_sae(seed=0).with_decoder(random_decoder(9))])
def test_between_the_two_files_it_is_noticed(tmp_path, monkeypatch, new):
    save_sae(random_sae(seed=0), tmp_path)
    interrupt_after(monkeypatch, files=1)
    with pytest.raises(KeyboardInterrupt):
        save_sae(new, tmp_path)
    monkeypatch.undo()
    with pytest.raises(UsageError, match="is not the one that cfg.json describes: copy both files again"):
        load_sae(tmp_path)
