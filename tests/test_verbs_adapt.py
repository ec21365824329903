"""`safedig adapt`: decoders beside the trained ones; what is missing is named with its verb."""

import json
from pathlib import Path

import pytest
import torch

from safedig import __main__
from safedig.activations.filling import fill
from safedig.activations.plan import Plan
from safedig.activations.stream import Batch
from safedig.adaptation import Movement
from safedig.figures import decoder_movement, save
from safedig.recipes import Adapting, Recipe, load
from safedig.sae.checkpoint import load_decoder, load_sae, sae_folder, save_sae
from tests.domains import D_SAE, SITE, TOKENS, fvu, sae, source, target
from tests.synthetic import rows as pairs

WEAPONS, SIGNS = "weapons", "signs"


def store(folder, x, risk, model="fingerprint"):
    """These rows on disk, as tokens of harmful prompts, each followed by its safe twin, and of benign ones."""
    images = [row | {"prompt": row["id"], "risk": row["risk"] and risk} for row in pairs(20)][: len(x) // TOKENS]
    plan = Plan.of(images, 4)
    place = {row["id"]: at for at, row in enumerate(images)}

    def drawn(part):
        names = [image["id"] for image in part.images for _ in range(TOKENS)]
        seeds = [image["seed"] for image in part.images for _ in range(TOKENS)]
        here = torch.cat([x[place[image["id"]] * TOKENS :][:TOKENS] for image in part.images])
        token = torch.arange(TOKENS).repeat(len(part.images))
        return [Batch(SITE, 0, 1.0, names, seeds, ("cond",) * len(names), token, here)]

    facts = {"sites": [str(SITE)], "batches": len(plan.parts), "model": model, "images": plan.sha}
    fill(folder, facts, plan, drawn)


@pytest.fixture
def given(tmp_path):
    """Two stores and a trained SAE."""
    store(tmp_path / "source", source(), WEAPONS)
    store(tmp_path / "target", target(), SIGNS)
    save_sae(sae(), sae_folder(tmp_path / "saes", "tiny-flux", SITE, WEAPONS))
    return tmp_path


def command(given, *more):
    places = [f"adapt.target={given / 'target'}", "--store", str(given / "source"), "--out", str(given / "saes")]
    objectives = [] if any("objectives" in word for word in more) else ['adapt.objectives=["reconstruction"]']
    return ["adapt", "tiny-flux", *places, *objectives, *more]


def answer(capsys, *argv):
    assert __main__.main([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_new_decoder_lies_beside_the_old_one_with_the_same_encoder(given, capsys):
    capsys.readouterr()
    result = answer(capsys, *command(given))
    (told,) = result["decoders"]
    folder = given / "saes" / "tiny-flux" / str(SITE) / "weapons--signs.reconstruction"
    assert Path(told["folder"]) == folder and (result["source"], result["target"]) == (["weapons"], ["signs"])
    after, before, x = load_sae(folder), load_sae(folder.with_name("weapons")), target(seed=5)
    for name in ("W_enc", "b_enc", "threshold"):
        assert torch.equal(getattr(after.encoder, name), getattr(before.encoder, name))
    assert fvu(after, x) < 0.6 * fvu(before, x)
    assert after.metadata["adaptation"]["domains"] == told["domains"] and not told["kept"]
    assert (given / "saes" / "tiny-flux" / "movement-signs.png").read_bytes()[:4] == b"\x89PNG"


def test_switching_to_it_keeps_the_encoder_object(given, capsys):
    answer(capsys, *command(given))
    before = load_sae(sae_folder(given / "saes", "tiny-flux", SITE, WEAPONS))
    after = load_decoder(sae_folder(given / "saes", "tiny-flux", SITE, WEAPONS, SIGNS, "reconstruction"), before)
    assert after.encoder is before.encoder and not torch.equal(after.decoder.W_dec, before.decoder.W_dec)


def test_the_source_as_its_own_target_keeps_its_decoder(given, capsys):
    (told,) = answer(capsys, *command(given, f"adapt.target={given / 'source'}"))["decoders"]
    assert told["kept"] and told["folder"].endswith("weapons--weapons.reconstruction")
    after = load_sae(told["folder"])
    assert torch.equal(after.decoder.W_dec, sae().decoder.W_dec)


def test_both_objectives_lie_side_by_side(given, capsys, monkeypatch):
    from safedig.features import Features

    found = {SITE: Features(torch.tensor([1, 4]), 0.0, torch.ones(2), torch.ones(2))}
    monkeypatch.setattr("safedig.verbs.adapt.find_features", lambda saes, source: found)
    result = answer(capsys, *command(given, 'adapt.objectives=["reconstruction", "contrast"]'))
    assert [one["objective"] for one in result["decoders"]] == ["reconstruction", "contrast"]
    contrast = load_sae(result["decoders"][1]["folder"])
    assert contrast.decoder.W_dec.norm(dim=1).nonzero()[:, 0].tolist() == [1, 4]
    assert result["decoders"][1]["unexplained"]["adapted"] > 0


def test_the_table_shows_domains_and_decoders_for_people(given, capsys):
    assert __main__.main(command(given, "adapt.fine_tune=5", "adapt.align_mean=true")) == 0
    out = capsys.readouterr().out
    for words in ("from weapons to signs", "zero shot", "bias only", "adapted", "fine tuned", "rows moved", "silent"):
        assert words in out
    assert "codes are not those of the source (mean aligned)" in out


def test_what_is_missing_is_named_with_the_verb_that_makes_it(given, capsys):
    for more, words in (
        ([f"adapt.target={given / 'nowhere'}"], ("of the target domain", "Run `safedig record`")),
        (["--store", str(given / "nowhere")], ("of the source domain", "Run `safedig record`")),
        (["--out", str(given / "empty")], ("There are no SAEs of this recording", "run `safedig train`")),
    ):
        assert __main__.main(command(given, *more)) == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert all(word in last for word in words), last


def test_an_sae_of_another_model_is_refused(given, capsys):
    store(given / "other", source(), WEAPONS, model="another")
    assert __main__.main(command(given, "--store", str(given / "other"))) == 2
    assert "another" in capsys.readouterr().err.splitlines()[-1]


def test_unknown_objectives_are_refused(given, capsys):
    assert __main__.main(command(given, 'adapt.objectives=["reconstruct"]')) == 2
    assert "reconstruction" in capsys.readouterr().err.splitlines()[-1]


def test_the_recipes_hash_is_what_it_was_where_nothing_is_asked():
    assert load("tiny-flux").adapt is None
    with_defaults = Recipe(model="m", sites=("txt.embed",), adapt=Adapting())
    assert with_defaults.sha != Recipe(model="m", sites=("txt.embed",)).sha


# ---- the figure


def some_movement():
    generator = torch.Generator().manual_seed(0)
    return Movement(90 * torch.rand(D_SAE, generator=generator), 1 + torch.rand(D_SAE, generator=generator))


def test_the_figure_has_two_panels_a_site_and_marks_the_harmful(tmp_path):
    one = {"txt.embed": some_movement(), "img.embed": some_movement()}
    figure = decoder_movement(one, {"txt.embed": torch.tensor([1, 2])})
    assert len(figure.axes) == 4
    legends = [axes.get_legend() is not None for axes in figure.axes]
    assert legends == [False, True, False, False]
    first = save(figure, tmp_path / "a.png").read_bytes()
    marked = save(decoder_movement(one), tmp_path / "b.png").read_bytes()
    assert first != marked and first[:4] == b"\x89PNG"


def test_a_row_that_is_zero_has_no_angle_and_is_drawn_all_the_same():
    change = some_movement()
    change.angle[0], change.length[0] = float("nan"), float("nan")
    assert len(decoder_movement({"txt.embed": change}).axes) == 2


def test_nothing_to_show_is_an_error():
    with pytest.raises(ValueError, match="nothing to show"):
        decoder_movement({})
