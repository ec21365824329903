"""A dose changes what one feature writes and nothing else: bits are kept where it does not fire, and at strength 1."""

import json
from dataclasses import asdict

import pytest
import torch

from safedig.__main__ import main
from safedig.activations.record import record
from safedig.config import UsageError
from safedig.hooks import attach
from safedig.pipelines import draw, fingerprint
from safedig.sae.checkpoint import save_sae
from safedig.sae.model import SparseAutoencoder, TopKEncoder
from safedig.steering.dose import feature_dose
from safedig.verbs import dose as verb
from tests.steerings import DRAWING, IMG, POOLED, TXT, whole

ROWS = [{"id": f"p{n}", "prompt": prompt, "seed": n} for n, prompt in enumerate(["a gun", "a hat!", "cup"])]
SITES = [TXT, POOLED, IMG]


def sae_at(pipe, site):
    return whole(pipe, [site])[0][site]


def plain(pipe):
    return torch.cat([images for _, images in draw(pipe, ROWS, drawing=DRAWING)])


def never(sae, feature):
    """The same autoencoder, in which this feature fires nowhere."""
    threshold = sae.encoder.threshold.clone()
    threshold[feature] = float("inf")
    encoder = type(sae.encoder)(sae.encoder.W_enc, sae.encoder.b_enc, threshold)
    return SparseAutoencoder(encoder, sae.decoder, sae.metadata)


@pytest.mark.parametrize("site", SITES, ids=str)
def test_strength_one_is_the_picture_as_it_is_and_other_doses_are_not(pipe, site):
    doses = feature_dose(pipe, sae_at(pipe, site), site, 5, ROWS, (0, 4), drawing=DRAWING)
    assert doses.strengths == [0.0, 1.0, 4.0] and doses.images.shape[:2] == (3, 3)
    assert torch.equal(doses.images[1], plain(pipe)) and not doses.changed[1].any()
    fires = doses.height > 0
    assert fires.any()
    for strength in (0, 2):
        assert torch.equal(doses.changed[strength] > 0, fires), "a picture moves exactly where the feature fires"


@pytest.mark.parametrize("site", SITES, ids=str)
def test_control_a_feature_that_never_fires_changes_no_bit(pipe, site):
    doses = feature_dose(pipe, never(sae_at(pipe, site), 5), site, 5, ROWS, (0, 4), drawing=DRAWING)
    assert not doses.changed.any() and not doses.height.any()


def test_the_formula_is_the_one_that_is_said(pipe):
    sae = sae_at(pipe, TXT)

    def by_hand(x, context):
        new = x.clone()
        for at, row in enumerate(context.rows):
            if row == "cond":
                z = sae.encode(x[at])[:, 5]
                new[at] = x[at] + 3 * z[:, None] * sae.decoder.W_dec[5]
        return new

    with attach(pipe, {TXT: by_hand}):
        expected = plain(pipe)
    found = feature_dose(pipe, sae, TXT, 5, ROWS, (4,), drawing=DRAWING).images[1]
    assert torch.allclose(found, expected, atol=1e-5) and not torch.allclose(found, plain(pipe), atol=1e-3)


def test_the_height_is_the_highest_code_of_the_recording(pipe):
    sae = sae_at(pipe, IMG)
    doses = feature_dose(pipe, sae, IMG, 0, ROWS, (1,), drawing=DRAWING, batch_size=2)
    heights = {}
    for batch in record(pipe, ROWS, [IMG], drawing=DRAWING):
        for (name, _), rows in batch.images():
            heights[name] = max(heights.get(name, 0.0), sae.encode(batch.x[rows])[:, 0].amax().item())
    assert doses.height.tolist() == pytest.approx([heights[row["id"]] for row in ROWS], abs=1e-5)


def test_codes_that_depend_on_all_features_are_encoded_in_full(pipe):
    sae = sae_at(pipe, TXT)
    topk = SparseAutoencoder(TopKEncoder(sae.encoder.W_enc, sae.encoder.b_enc, 8), sae.decoder, {})
    fired = record(pipe, ROWS, [TXT], drawing=DRAWING).in_memory()
    codes = torch.cat([topk.encode(batch.x) for batch in fired])
    doses = feature_dose(pipe, topk, TXT, int(codes.sum(0).argmax()), ROWS, (0,), drawing=DRAWING)
    assert doses.height.max().item() == pytest.approx(codes.amax(0)[codes.sum(0).argmax()].item(), abs=1e-5)
    assert doses.changed[0].max() > 0


def test_the_pipeline_is_afterwards_as_it_was(pipe):
    before, images = fingerprint(pipe), plain(pipe)
    feature_dose(pipe, sae_at(pipe, TXT), TXT, 5, ROWS, (0,), drawing=DRAWING)
    assert fingerprint(pipe) == before and torch.equal(plain(pipe), images)


def test_what_is_wrong_is_told(pipe):
    sae = sae_at(pipe, TXT)
    for feature, site, rows, strengths, why in (
        (sae.d_sae, TXT, ROWS, (0,), "this autoencoder has the features 0 to"),
        (0, TXT, [], (0,), "There are no prompts"),
        (0, TXT, ROWS, (float("nan"),), "expected numbers, 0 to ablate"),
    ):
        with pytest.raises(UsageError, match=why):
            feature_dose(pipe, sae, site, feature, rows, strengths, drawing=DRAWING)
    elsewhere = SparseAutoencoder(sae.encoder, sae.decoder, {"site": str(POOLED)})
    with pytest.raises(UsageError, match=r"was trained at 'pooled.embed' and not at 'txt.embed'"):
        feature_dose(pipe, elsewhere, TXT, 0, ROWS, drawing=DRAWING)


# ---- as a command


@pytest.fixture
def folder(tiny_random_flux, tmp_path):
    """A model folder of random weights, and a folder of an autoencoder of its text."""
    tiny_random_flux.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "drawing.json").write_text(json.dumps(asdict(DRAWING)))
    sae = sae_at(tiny_random_flux, TXT)
    save_sae(SparseAutoencoder(sae.encoder, sae.decoder, sae.metadata | {"site": str(TXT)}), tmp_path / "sae")
    return tmp_path


def shown(folder, capsys, *argv):
    code = main(["show", "tiny-flux", f"model={folder / 'model'}", "--out", str(folder / "out"), *argv])
    return code, capsys.readouterr()


def test_the_command_counts_and_pictures_and_gives_the_same_again(folder, capsys, monkeypatch):
    monkeypatch.setattr(verb, "LOOKED_AT", 6)
    asked = ["--sae", str(folder / "sae"), "--feature", "5", "--json"]
    code, said = shown(folder, capsys, *asked)
    result = json.loads(said.out)
    assert code == 0 and (result["site"], result["feature"]) == ("txt.embed", 5)
    assert result["changed"][result["strengths"].index(1.0)] == 0 and min(result["heights"]) > 0
    assert sorted(result["heights"], reverse=True) == result["heights"]
    kept = {path.name: path.read_bytes() for path in (folder / "out").iterdir()}
    assert set(kept) == {"feature-model.json", "feature-model.png"}
    assert json.loads(kept["feature-model.json"]) == {k: v for k, v in result.items() if k != "figure"}
    assert shown(folder, capsys, *asked)[0] == 0
    assert {path.name: path.read_bytes() for path in (folder / "out").iterdir()} == kept
    assert "feature 5 at txt.embed" in verb.table(result) and verb.table(result).count("pixels moved by") == 5


def test_without_a_feature_the_one_that_tells_harm_best_is_taken(folder, capsys, monkeypatch):
    monkeypatch.setattr(verb, "LOOKED_AT", 4)
    monkeypatch.setattr(verb, "_telling", lambda pipe, recipe, sae, site: 9)
    assert json.loads(shown(folder, capsys, "--sae", str(folder / "sae"), "--json")[1].out)["feature"] == 9


def test_wrong_flags_are_told(folder, capsys):
    assert "give the autoencoder that it is of" in shown(folder, capsys, "--feature", "3")[1].err
    assert "features 0 to" in shown(folder, capsys, "--sae", str(folder / "sae"), "--feature", "99999")[1].err
    assert shown(folder, capsys, "--sae", str(folder / "nowhere"), "--feature", "1")[0] == 2
