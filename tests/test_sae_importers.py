"""What other projects published is read with the codes that their own formulas give, and no pickle runs code."""

import json
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from safedig.config import UsageError
from safedig.sae.checkpoint import load_sae, save_sae
from safedig.sae.importers import import_sae
from safedig.sae.model import Decoder, SparseAutoencoder, ThresholdEncoder, TopKEncoder

D_IN, D_SAE, K = 12, 36, 4
SPARSIFY = {
    "activation": "topk",
    "expansion_factor": 3,
    "normalize_decoder": True,
    "num_latents": 0,
    "k": K,
    "multi_topk": False,
    "skip_connection": False,
    "transcode": False,
    "d_in": D_IN,
}
SAEURON = {
    "expansion_factor": 3,
    "normalize_decoder": True,
    "num_latents": 0,
    "k": K,
    "batch_topk": True,
    "sample_topk": False,
    "input_unit_norm": False,
    "multi_topk": False,
    "d_in": D_IN,
}
UNBOX = {"n_dirs_local": D_SAE, "d_model": D_IN, "k": K, "auxk": 8, "dead_steps_threshold": 2441}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs():
    return normal(200, D_IN, seed=5) + normal(D_IN, seed=6)


def linear_tensors():
    """As torch's `Linear` keeps them, the decoder in rows; nothing is zero and no row is a unit."""
    return {
        "encoder.weight": normal(D_SAE, D_IN, seed=1),
        "encoder.bias": normal(D_SAE, seed=2),
        "W_dec": normal(D_SAE, D_IN, seed=3),
        "b_dec": normal(D_IN, seed=4),
    }


def sparsify_folder(folder, config=SPARSIFY, tensors=None):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(config))
    save_file(linear_tensors() if tensors is None else tensors, folder / "sae.safetensors")
    return folder


def unbox_state():
    return {
        "pre_bias": normal(D_IN, seed=4),
        "latent_bias": normal(D_SAE, seed=2),
        "stats_last_nonzero": torch.zeros(D_SAE, dtype=torch.long),
        "encoder.weight": normal(D_SAE, D_IN, seed=1),
        "decoder.weight": normal(D_IN, D_SAE, seed=3),
    }


def unbox_folder(folder, content=None, config=UNBOX):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    torch.save({"state_dict": unbox_state()} if content is None else content, folder / "state_dict.pth")
    return folder


def by_sparsify(x, tensors):
    """x − b_dec through the linear layer and a ReLU, the k highest, then the rows of W_dec of those k."""
    pre = torch.relu(
        torch.nn.functional.linear(x - tensors["b_dec"], tensors["encoder.weight"], tensors["encoder.bias"])
    )
    top, index = pre.topk(K, dim=-1, sorted=False)
    out = torch.stack([row @ tensors["W_dec"][which] for row, which in zip(top, index, strict=True)])
    return torch.zeros_like(pre).scatter_(-1, index, top), out + tensors["b_dec"]


def by_unbox(x, state):
    """relu(topk(encoder(x − pre_bias) + latent_bias)), then decoder(latents) + pre_bias."""
    pre = (x - state["pre_bias"]) @ state["encoder.weight"].T + state["latent_bias"]
    top, index = pre.topk(K, dim=-1)
    codes = torch.zeros_like(pre).scatter_(-1, index, torch.relu(top))
    return codes, codes @ state["decoder.weight"].T + state["pre_bias"]


def assert_gives(sae, codes, reconstruction):
    z = sae.encode(inputs())
    assert 0.05 < (codes > 0).float().mean() <= K / D_SAE
    torch.testing.assert_close(z, codes, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sae.decode(z), reconstruction, atol=1e-5, rtol=1e-5)


# ---- the formulas


def test_sparsify_gives_the_codes_of_its_own_formula(tmp_path):
    sae = import_sae(sparsify_folder(tmp_path))
    assert sae.metadata["imported_from"] == "sparsify"
    assert_gives(sae, *by_sparsify(inputs(), linear_tensors()))


def test_saeuron_gives_the_codes_that_its_own_inference_takes_k_a_row(tmp_path):
    """It trains with `batch_topk` and switches that off wherever it encodes."""
    sae = import_sae(sparsify_folder(tmp_path, SAEURON))
    assert sae.metadata["imported_from"] == "saeuron"
    assert_gives(sae, *by_sparsify(inputs(), linear_tensors()))


@pytest.mark.parametrize("wrapped", [True, False])
def test_sdxl_unbox_gives_the_codes_of_its_own_formula(tmp_path, wrapped):
    sae = import_sae(unbox_folder(tmp_path, {"state_dict": unbox_state()} if wrapped else unbox_state()))
    assert sae.metadata["imported_from"] == "sdxl-unbox"
    assert_gives(sae, *by_unbox(inputs(), unbox_state()))


def test_control_without_the_decoders_bias_the_codes_would_be_others(tmp_path):
    tensors = linear_tensors()
    unfolded = TopKEncoder(tensors["encoder.weight"].T.contiguous(), tensors["encoder.bias"], K)
    assert ((unfolded(inputs()) > 0) != (by_sparsify(inputs(), tensors)[0] > 0)).float().mean() > 0.02


def test_sae_lens_folders_are_read_as_load_sae_reads_them(tmp_path):
    encoder = ThresholdEncoder(normal(D_IN, D_SAE), normal(D_SAE), normal(D_SAE).abs())
    save_sae(SparseAutoencoder(encoder, Decoder(normal(D_SAE, D_IN), normal(D_IN)), {"site": "txt.embed"}), tmp_path)
    sae = import_sae(tmp_path)
    assert torch.equal(sae.encode(inputs()), load_sae(tmp_path).encode(inputs()))
    assert sae.metadata == {"site": "txt.embed", "imported_from": "sae-lens"}


@pytest.mark.parametrize("make", [sparsify_folder, unbox_folder])
def test_the_codes_do_not_depend_on_the_decoder_any_more_and_sae_lens_reads_the_result(make, tmp_path):
    from sae_lens import SAE

    sae = import_sae(make(tmp_path / "theirs"))
    moved = sae.with_decoder(Decoder(normal(D_SAE, D_IN, seed=8), normal(D_IN, seed=9)))
    assert torch.equal(moved.encode(inputs()), sae.encode(inputs()))
    save_sae(moved, tmp_path / "ours")
    with torch.no_grad():
        stock = SAE.load_from_disk(str(tmp_path / "ours"))
        torch.testing.assert_close(stock.encode(inputs()), sae.encode(inputs()), atol=1e-5, rtol=1e-5)


def test_half_precision_is_read_in_float32(tmp_path):
    tensors = {name: tensor.bfloat16() for name, tensor in linear_tensors().items()}
    sae = import_sae(sparsify_folder(tmp_path, tensors=tensors))
    assert_gives(sae, *by_sparsify(inputs(), {name: tensor.float() for name, tensor in tensors.items()}))


# ---- which format


def test_a_format_may_be_named_and_what_steering_needs_added(tmp_path):
    sae = import_sae(sparsify_folder(tmp_path, SAEURON), "sparsify", site="txt.embed", model="fingerprint")
    assert sae.metadata == {"imported_from": "sparsify", "site": "txt.embed", "model": "fingerprint"}


def test_an_unknown_format_and_an_unknown_folder_say_what_there_is(tmp_path):
    with pytest.raises(UsageError, match="no format 'sparsfy'. Did you mean 'sparsify'"):
        import_sae(tmp_path, "sparsfy")
    with pytest.raises(UsageError, match="holds no SAE of a known format: expected cfg.json with"):
        import_sae(tmp_path)
    with pytest.raises(UsageError, match="is no SAE folder: cfg.json cannot be read"):
        import_sae(tmp_path, "saeuron")


# ---- what is refused


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (SPARSIFY | {"activation": "groupmax"}, "activation='groupmax': only activation='topk'"),
        (SPARSIFY | {"transcode": True}, "transcode=True"),
        (SPARSIFY | {"skip_connection": True}, "skip_connection=True"),
        (SPARSIFY | {"embed_skip": True}, "embed_skip=True"),
        (SPARSIFY | {"gram_lookup": True}, "gram_lookup=True"),
        (SPARSIFY | {"signed": True}, "signed=True"),
        (SAEURON | {"input_unit_norm": True}, "input_unit_norm=True"),
        (SPARSIFY | {"k": 37}, "says k=37 and 'sae.safetensors' has only 36 features"),
        (SPARSIFY | {"k": None}, "gives k=None: expected a whole number"),
    ],
)
def test_what_is_no_encoder_and_decoder_alone_is_refused(tmp_path, config, message):
    with pytest.raises(UsageError, match=message):
        import_sae(sparsify_folder(tmp_path, config))


@pytest.mark.parametrize("missing", ["encoder.weight", "encoder.bias", "W_dec", "b_dec"])
def test_a_missing_tensor_is_named(tmp_path, missing):
    tensors = {name: tensor for name, tensor in linear_tensors().items() if name != missing}
    with pytest.raises(UsageError, match=f"has no tensor '{missing}': copy the file again"):
        import_sae(sparsify_folder(tmp_path, tensors=tensors))


@pytest.mark.parametrize("missing", ["encoder.weight", "latent_bias", "pre_bias"])
def test_in_a_state_dict_too(tmp_path, missing):
    state = {name: tensor for name, tensor in unbox_state().items() if name != missing}
    with pytest.raises(UsageError, match=f"has no tensor '{missing}'"):
        import_sae(unbox_folder(tmp_path, state))


def test_tensors_of_another_shape_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"'b_enc' has shape \(35,\)"):
        import_sae(sparsify_folder(tmp_path, tensors=linear_tensors() | {"encoder.bias": torch.zeros(D_SAE - 1)}))
    with pytest.raises(UsageError, match=r"'W_dec' has shape \(12, 36\)"):
        import_sae(sparsify_folder(tmp_path, tensors=linear_tensors() | {"W_dec": torch.zeros(D_IN, D_SAE)}))


class Planted:
    """A pickle that leaves a file behind wherever it is unpickled."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return os.mkdir, (self.file,)


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path):
    folder, trace = (
        unbox_folder(tmp_path / "sae", {"state_dict": unbox_state(), "run": Planted(tmp_path / "ran")}),
        tmp_path / "ran",
    )
    with pytest.raises(UsageError, match="is refused: reading it would run code .*Ask for its tensors as safetensors"):
        import_sae(folder)
    assert not trace.exists()
    (folder / "state_dict.pth").write_bytes(pickle.dumps(Planted(trace), protocol=2))
    with pytest.raises(UsageError, match="is refused"):
        import_sae(folder)
    assert not trace.exists()


def test_control_the_planted_pickle_does_run_where_it_is_let(tmp_path):
    pickle.loads(pickle.dumps(Planted(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


def test_a_damaged_state_dict_is_one_line(tmp_path):
    file = unbox_folder(tmp_path) / "state_dict.pth"
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(UsageError, match="is damaged"):
        import_sae(tmp_path)
    file.write_bytes(b"")
    with pytest.raises(UsageError, match="is damaged"):
        import_sae(tmp_path)


def test_a_truncated_safetensors_file_is_one_line(tmp_path):
    file = sparsify_folder(tmp_path) / "sae.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UsageError, match="is damaged or was copied in part"):
        import_sae(tmp_path)
