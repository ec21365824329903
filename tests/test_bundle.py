"""A bundle gives the same bits on the model it was made for; damaged, torn, foreign or outdated, it is refused."""

import json
import shutil
from dataclasses import replace

import huggingface_hub
import huggingface_hub.errors as errors
import pytest
import torch
from safetensors.torch import load_file

from safedig.config import UsageError
from safedig.features import Dose
from safedig.pipelines import fingerprint
from safedig.sites import Site, SiteError
from safedig.steering import bundle
from safedig.steering.edits import Blend, Repel, Replace
from safedig.steering.gate import Gate
from safedig.steering.guard import Ellipsoid, Guard
from safedig.steering.holding import apply_steering, remove_steering
from safedig.steering.rule import Rule
from safedig.steering.steering import Steering
from tests.steerings import EVERY_EDIT, EVERYWHERE, IMG, TXT, edited, known, made_of, rule, steering, weighed, whole
from tests.tiny_pipelines import draw_images

FILES = ["README.md", "steering.json", "steering.safetensors"]


def guard(d):
    """Bounds at two σ that any edit meets."""
    shape = Ellipsoid(torch.zeros(2, d), torch.eye(d)[None, :3].repeat(2, 1, 1), torch.ones(2, 3), *torch.ones(2, 2))
    return Guard((1.0, 0.4), torch.tensor([2.0, 1.0]), shape)


def guarded(pipe, edits):
    made = edited(pipe, edits)
    bound = {site: replace(one, guard=guard(one.material.directions.shape[1])) for site, one in made.rules.items()}
    made.rules = bound
    return made


@pytest.fixture
def saved(tiny_random_flux, tmp_path):
    """A small bundle."""
    steering(tiny_random_flux).save(tmp_path)
    return tmp_path


def change(folder, edit):
    """Rewrite the JSON on purpose, hash and all."""
    file = folder / "steering.json"
    file.write_text(json.dumps(bundle.sealed(edit(json.loads(file.read_text())))))


# ---- there and back


def test_saving_loading_and_applying_gives_the_same_bits(pipe, tmp_path):
    for number, edits in enumerate([*EVERY_EDIT, (Repel(3.0), Blend(0.5))]):
        made = guarded(pipe, edits) if number == len(EVERY_EDIT) else edited(pipe, edits)
        folder = tmp_path / str(number)
        made.save(folder)
        assert sorted(path.name for path in folder.iterdir()) == FILES
        loaded = Steering.load(folder)
        with made.apply(pipe):
            expected = draw_images(pipe, ["a gun", "a cup"])
        with loaded.apply(pipe):
            assert torch.equal(draw_images(pipe, ["a gun", "a cup"]), expected)
        assert loaded.report == made.report and str(loaded) == str(made) and loaded.facts == made.facts


@pytest.mark.parametrize("scope", ["token", "image"])
def test_a_dose_and_counterparts_are_saved_loaded_and_applied_to_the_same_bits(pipe, tmp_path, scope):
    saes, _, features = whole(pipe)
    options = {"counterparts": known(pipe), "scope": scope}
    made = Steering(saes, weighed(features), [Replace(by="counterparts", nearest=2)], **options)
    made.save(tmp_path)
    loaded = Steering.load(tmp_path)
    for site, one in made.rules.items():
        mine, theirs = one.tensors(), loaded.rules[site].tensors()
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
        assert {"material.dose.pairs", "material.dose.bias", "material.counterparts.together.delta"} <= mine.keys()
    with made.apply(pipe):
        expected = draw_images(pipe, ["a gun", "a cup"])
    with loaded.apply(pipe):
        assert torch.equal(draw_images(pipe, ["a gun", "a cup"]), expected)
    assert loaded.report == made.report and str(loaded) == str(made)
    assert all(count["touched"] > 0 for count in made.report.values())
    assert not torch.equal(expected, draw_images(pipe, ["a gun", "a cup"])), "the control: it does act"


def test_a_dose_alone_decides_where_the_gate_opens_and_is_saved_with_any_edit(tiny_random_flux, tmp_path):
    """Lowered out of reach it changes no bit; the same features by their sum do."""
    pipe = tiny_random_flux
    saes, _, features = whole(pipe, gate=0.0)
    out_of_reach = {site: replace(one, dose=one.dose.lowered(1e9, 1e9)) for site, one in weighed(features).items()}
    plain = draw_images(pipe, ["a gun"])
    for edit in (Repel(), Replace(by="counterparts")):
        Steering(saes, out_of_reach, [edit], counterparts=known(pipe)).save(tmp_path)
        with Steering.load(tmp_path).apply(pipe):
            assert torch.equal(draw_images(pipe, ["a gun"]), plain), edit
        with Steering(saes, features, [edit], counterparts=known(pipe)).apply(pipe):
            assert not torch.equal(draw_images(pipe, ["a gun"]), plain), "the control"


def test_a_dose_as_weighing_leaves_it_is_saved_too(tiny_random_flux, tmp_path):
    """Its two biases must not be one tensor, nor its weights those that the features rank by."""
    saes, _, features = whole(tiny_random_flux, [TXT])
    never = {
        site: replace(one, dose=Dose.of(one.ratio.clone()), threshold=float("inf")) for site, one in features.items()
    }
    made = Steering(saes, never, [Replace(by="counterparts")], counterparts=known(tiny_random_flux, [TXT]))
    made.save(tmp_path)
    loaded = Steering.load(tmp_path).rules[TXT].tensors()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in made.rules[TXT].tensors().items())


def test_counterparts_that_are_missing_at_a_site_are_asked_for(tiny_random_flux):
    saes, _, features = whole(tiny_random_flux)
    for given in (None, {}, known(tiny_random_flux, [TXT])):
        with pytest.raises(UsageError, match=r"counterparts at '.*' and there are none: give those of fit"):
            Steering(saes, features, [Replace(by="counterparts")], counterparts=given)


def test_all_of_a_rule_is_saved(tiny_random_flux, tmp_path):
    made = guarded(tiny_random_flux, (Replace(0.5, nearest=3),))
    gate = Gate(0.25, "image", "all", (0.2, 0.7))
    made.rules = {site: replace(one, gate=gate) for site, one in made.rules.items()}
    made.save(tmp_path)
    loaded = Steering.load(tmp_path)
    assert list(loaded.rules) == EVERYWHERE
    for site, one in made.rules.items():
        other = loaded.rules[site]
        assert other.gate == gate and other.edits == one.edits and other.facts()["guard"] == {"sigmas": [1.0, 0.4]}
        mine, theirs = one.tensors(), other.tensors()
        assert mine.keys() == theirs.keys() and {"guard.ellipsoid.basis", "material.bank.values"} <= mine.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_only_the_paper_form_of_blend_takes_the_whole_dictionary_along(tiny_random_flux, tmp_path):
    sizes = {}
    for edit in (Repel(), Blend(), Blend(form="paper")):
        edited(tiny_random_flux, [edit], [TXT]).save(tmp_path)
        sizes[edit.form, type(edit)] = sum(t.numel() for t in load_file(tmp_path / "steering.safetensors").values())
    d = 32
    assert sizes["paper", Blend] > 2 * d * 3 * d > sizes["delta", Blend] and sizes["delta", Repel] < 10 * d


def test_it_can_be_put_on_from_its_folder(tiny_random_flux, saved):
    pipe = tiny_random_flux
    with steering(pipe).apply(pipe):
        expected = draw_images(pipe, ["a gun"])
    apply_steering(pipe, saved)
    try:
        assert torch.equal(draw_images(pipe, ["a gun"]), expected)
    finally:
        remove_steering(pipe)


def test_the_card_says_what_it_is_and_the_json_of_what(tiny_random_flux, tmp_path):
    made = edited(tiny_random_flux, [Repel(), Blend()])
    made.save(tmp_path)
    card, facts = (tmp_path / "README.md").read_text(), json.loads((tmp_path / "steering.json").read_text())
    assert facts["model"] == made.model == fingerprint(tiny_random_flux)
    for site, entry in facts["sites"].items():
        assert entry["receipt"] == {"harmful": {"weapons": 7}, "threshold": -1.0} and len(entry["sae"]) == 2
        assert f"`{site}`" in card and entry["sae"]["encoder_sha256"][:16] in card
    for words in (
        made.model,
        facts["tensors_sha256"],
        str(made),
        "safedig attest",
        '"weapons": 7',
        "library_name: safedig",
    ):
        assert words in card
    assert {"safedig", "torch", "diffusers"} <= facts["packages"].keys()


# ---- refused


@pytest.mark.parametrize("file", ["steering.json", "steering.safetensors"])
def test_a_flipped_byte_is_refused_wherever_it_is(saved, file):
    data = (saved / file).read_bytes()
    for at in range(0, len(data), max(1, len(data) // 60)):
        (saved / file).write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(UsageError, match="is not as it was written|is no steering folder|has format"):
            Steering.load(saved)
    (saved / file).write_bytes(data)
    assert Steering.load(saved).rules.keys() == set(EVERYWHERE)  # the control


@pytest.mark.parametrize("file", ["steering.json", "steering.safetensors"])
def test_a_missing_file_is_refused(saved, file):
    (saved / file).unlink()
    with pytest.raises(UsageError, match=f"is no steering folder.*{file}"):
        Steering.load(saved)


def test_tensors_of_another_bundle_are_refused(tiny_random_flux, saved, tmp_path):
    steering(tiny_random_flux, [IMG]).save(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "steering.safetensors", saved)
    with pytest.raises(UsageError, match=r"steering.safetensors' is not as it was written \(its SHA-256 differs\)"):
        Steering.load(saved)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda facts: facts | {"sites": {"txt.embed": {"edits": []}}}, "is incomplete: 'gate' is missing"),
        (
            lambda facts: facts | {"sites": {"txt.embed": facts["sites"]["txt.embed"] | {"gate": {"treshold": 1}}}},
            "Did you mean 'gate.threshold'",
        ),
        (
            lambda facts: facts | {"sites": {"velocity": facts["sites"]["txt.embed"]}},
            "is incomplete: 'index' is missing",
        ),
        (
            lambda facts: {key: value for key, value in facts.items() if key != "model"},
            "is incomplete: 'model' is missing",
        ),
        (
            lambda facts: json.loads(json.dumps(facts).replace('"repel"', '"repell"')),
            "no edit 'repell'. Did you mean 'repel'",
        ),
    ],
)
def test_a_folder_that_was_written_wrong_is_explained(saved, edit, message):
    change(saved, edit)
    with pytest.raises(UsageError, match=message):
        Steering.load(saved)


def test_another_format_is_refused(saved):
    file = saved / "steering.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 2}))
    with pytest.raises(UsageError, match="has format 2; this version reads format 3"):
        Steering.load(saved)


def test_a_folder_that_is_not_there_is_explained(tmp_path):
    for place in (tmp_path / "nowhere", "./nowhere/at/all", "nowhere"):
        with pytest.raises(UsageError, match="is no steering folder"):
            Steering.load(place)


def test_another_model_is_refused_unless_it_is_named(tiny_random_flux, tiny_random_sd3, tmp_path):
    """A model of other weights: fine-tuned, say. Forced, the bundle acts there as it does at home."""
    pipe, mine = tiny_random_flux, fingerprint(tiny_random_flux)
    made = steering(pipe)
    made.model = "0" * 64
    made.save(tmp_path)
    loaded = Steering.load(tmp_path)
    for force in (None, "", "0" * 64, mine[:-1]):
        expected = pytest.raises(UsageError, match=rf"made for the model 000000000000….*force='{mine}'")
        with expected, loaded.apply(pipe, force=force):
            raise AssertionError
    with steering(pipe).apply(pipe):
        expected = draw_images(pipe, ["a gun"])
    with loaded.apply(pipe, force=mine):
        assert torch.equal(draw_images(pipe, ["a gun"]), expected)
    apply_steering(pipe, tmp_path, force=mine)
    remove_steering(pipe)
    with pytest.raises(UsageError, match="Nor does it fit: '.*' has another width"):
        apply_steering(tiny_random_sd3, tmp_path, force=fingerprint(tiny_random_sd3))


def test_a_site_that_vanished_is_refused(tiny_random_flux, tiny_random_sd3):
    single = Site.parse("single_transformer_blocks.0.img.resid_post")
    gone = made_of(tiny_random_sd3, {single: rule(tiny_random_sd3, IMG)})
    forced = made_of(tiny_random_flux, {single: rule(tiny_random_flux, IMG)})
    for made, force in ((gone, None), (forced, fingerprint(tiny_random_sd3))):
        with (
            pytest.raises(SiteError, match=f"'{single}', which is no live site"),
            made.apply(tiny_random_sd3, force=force),
        ):
            raise AssertionError


def test_a_rule_from_which_something_is_missing_is_a_key_error_that_names_it(tiny_random_flux):
    made = guarded(tiny_random_flux, (Blend(),)).rules[TXT]
    tensors = made.tensors()
    assert Rule.of(tensors, made.gate, made.edits, made.facts()).tensors().keys() == tensors.keys()
    for name in ("encoder.W_enc", "material.directions", "material.bank.harmful", "guard.norm"):
        short = {key: tensor for key, tensor in tensors.items() if key != name}
        with pytest.raises(KeyError, match=name.rpartition(".")[2]):
            Rule.of(short, made.gate, made.edits, made.facts())


# ---- from the Hub


def test_a_bundle_comes_from_the_hub_by_its_id(tiny_random_flux, tmp_path, monkeypatch):
    pipe, asked = tiny_random_flux, []
    made = steering(pipe)
    made.save(tmp_path / "there")

    def snapshot_download(repo_id, *, revision, allow_patterns):
        asked.append((repo_id, sorted(allow_patterns)))
        return str(tmp_path / "there")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    loaded = Steering.load("someone/flux-violence")
    assert asked == [("someone/flux-violence", FILES)] and str(loaded) == str(made)
    monkeypatch.chdir(tmp_path)
    made.save("someone/flux-violence")
    assert str(Steering.load("someone/flux-violence")) == str(made) and len(asked) == 1  # a folder comes first


@pytest.mark.parametrize("flip", FILES[1:])
def test_what_the_hub_gave_damaged_is_refused(tiny_random_flux, tmp_path, monkeypatch, flip):
    steering(tiny_random_flux).save(tmp_path)
    data = (tmp_path / flip).read_bytes()
    (tmp_path / flip).write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(UsageError, match="is not as it was written|is no steering folder"):
        Steering.load("someone/flux-violence")


def test_what_the_hub_refuses_is_one_line(monkeypatch):
    def refuse(*_, **__):
        raise errors.OfflineModeIsEnabled("off")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(UsageError, match="'a/b' is not in the local cache and the Hub is switched off"):
        Steering.load("a/b")


def test_control_the_hubs_own_function_takes_what_ours_is_given():
    import inspect

    assert {"repo_id", "revision", "allow_patterns"} <= set(
        inspect.signature(huggingface_hub.snapshot_download).parameters
    )
    assert sorted([bundle.JSON, bundle.TENSORS, bundle.CARD]) == FILES
