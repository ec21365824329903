"""A released model is known without its weights and without the network: sizes, sites, schedule."""

import json
import shutil

import pytest
import torch

from safedig import model_folders
from safedig.config import UsageError
from safedig.pipelines import Drawing, draw, fingerprint
from safedig.recipes import load
from safedig.sites import d_in, resolve, sites
from safedig.skeleton import schedule, skeleton
from tests.tiny_pipelines import tiny_flux

RELEASED = {  # recipe: 10⁹ parameters of the transformer, its width, its blocks
    "flux1-dev": (11.90, 3072, 19 + 38),
    "flux1-schnell": (11.89, 3072, 19 + 38),
    "sd3.5-large": (8.06, 2432, 38),
    "sd3.5-medium": (2.24, 1536, 24),
}


@pytest.fixture(scope="module", params=RELEASED)
def released(request):
    return request.param, skeleton(load(request.param).model)


def test_every_released_model_has_its_published_size(released):
    name, pipe = released
    billions, width, blocks = RELEASED[name]
    model = pipe.transformer
    assert round(sum(p.numel() for p in model.parameters()) / 1e9, 2) == billions and model.inner_dim == width
    assert len(model.transformer_blocks) + len(getattr(model, "single_transformer_blocks", ())) == blocks
    text = {
        part: sum(p.numel() for p in getattr(pipe, part).parameters())
        for part in pipe.components
        if part.startswith("text_encoder")
    }
    t5, clip_l = ("text_encoder_2" if "flux" in name else "text_encoder_3"), text["text_encoder"]
    assert text.get(t5) == 4_762_310_656 and clip_l == pytest.approx(123e6, rel=0.01)
    assert sum(p.numel() for p in pipe.vae.parameters()) == 83_819_683
    assert pipe.vae_scale_factor == 8 and pipe.vae.config.latent_channels == 16


def test_no_weight_is_there(released):
    _, pipe = released
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    assert len(parts) >= 4 and all(p.is_meta for part in parts for p in part.parameters())
    with pytest.raises(UsageError, match="has no weights, only shapes"):
        fingerprint(pipe)


def test_its_sites_are_resolved_as_on_the_live_model(released):
    name, pipe = released
    found = resolve(pipe, load(name).sites)
    assert [site.index for site in found] == {"f": [None, 18, 18], "s": [None, *[RELEASED[name][2] - 2] * 2]}[name[0]]
    assert {d_in(pipe, site) for site in found} == {RELEASED[name][1]}
    assert len(sites(pipe)) > 2 * RELEASED[name][2]


def test_only_medium_has_a_second_attention_in_its_first_blocks():
    dual = {
        name: [block.attn2 is not None for block in skeleton(load(name).model).transformer.transformer_blocks]
        for name in ("sd3.5-large", "sd3.5-medium")
    }
    assert not any(dual["sd3.5-large"]) and dual["sd3.5-medium"] == [True] * 13 + [False] * 11


@pytest.mark.parametrize(
    ("name", "ends"),
    [  # measured on the released schedulers at 1024 × 1024: the first and the last values
        ("flux1-dev", (1.0, 0.988, 0.195, 0.105)),
        ("flux1-schnell", (1.0, 0.75, 0.5, 0.25)),
        ("sd3.5-large", (1.0, 0.987, 0.111, 0.0089)),
    ],
)
def test_the_schedule_is_the_published_one(name, ends):
    pipe = skeleton(load(name).model)
    found = schedule(pipe, load(name).drawing_of(pipe))
    assert [*found[:2], *found[-2:]] == pytest.approx(ends, abs=6e-4)


def test_the_authors_ways_of_drawing():
    drawings = {name: load(name).drawing_of(skeleton(load(name).model)) for name in RELEASED}
    assert drawings == {
        "flux1-dev": Drawing(28, 3.5, 1024, 1024, 512),
        "flux1-schnell": Drawing(4, 0.0, 1024, 1024, 256),
        "sd3.5-large": Drawing(28, 3.5, 1024, 1024, 256),
        "sd3.5-medium": Drawing(40, 4.5, 1024, 1024, 256),
    }


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("side", [32, 64])
def test_the_schedule_is_the_one_that_a_drawing_takes(pipe, dynamic, side):
    drawing = Drawing(5, 3.0, side, side, 12)
    given = pipe.scheduler
    pipe.scheduler = type(given).from_config(given.config, use_dynamic_shifting=dynamic)
    try:
        before = schedule(pipe, drawing)
        list(draw(pipe, [{"prompt": "a cup", "seed": 0}], drawing=drawing, output_type="latent"))
        assert before == pipe.scheduler.sigmas[:-1].tolist()
    finally:
        pipe.scheduler = given


# ---- what it is built from


def test_a_local_folder_is_as_good_as_an_embedded_one(tmp_path):
    tiny_flux().save_pretrained(tmp_path)
    for weights in tmp_path.glob("*/*.safetensors"):
        weights.unlink()  # they are not read
    pipe = skeleton(tmp_path)
    shapes = {name: p.shape for name, p in pipe.transformer.named_parameters()}
    assert shapes == {name: p.shape for name, p in tiny_flux().transformer.named_parameters()}


def test_every_shipped_recipe_of_a_released_model_has_its_configuration():
    assert {load(name).model for name in RELEASED} == set(model_folders.released())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "black-forest-labs/FLUX.1-dv",
            "is not embedded. Did you mean 'black-forest-labs/FLUX.1-dev'.* Or give a local",
        ),
        ("some/model", "is not embedded. Expected one of: black-forest-labs/FLUX.1-dev, .*stable-diffusion-3.5-medium"),
        ("tiny-flx", "There is no model 'tiny-flx'. Did you mean 'tiny-flux'"),
        ("../configs", "There is no folder '../configs'"),
    ],
)
def test_an_unknown_model_is_told_what_there_is(name, message):
    with pytest.raises(UsageError, match=message):
        skeleton(name)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("transformer/config.json", {"num_layers": "two"}),
        ("model_index.json", {"transformer": ["diffusers", "Unheard"]}),
    ],
)
def test_a_broken_configuration_is_one_line(tmp_path, part, change):
    folder = shutil.copytree(model_folders.described("black-forest-labs/FLUX.1-dev"), tmp_path / "copy")
    (folder / part).write_text(json.dumps(json.loads((folder / part).read_text()) | change))
    with pytest.raises(UsageError, match="cannot be built from its configuration files") as caught:
        skeleton(folder)
    assert "\n" not in str(caught.value)
