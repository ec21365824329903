"""A pipeline is found or its absence explained; an image depends on its own prompt and seed; a model is known again."""

import json
import re

import pytest
import torch

from safedig.config import UsageError
from safedig.pipelines import Drawing, draw, fingerprint, load_pipeline
from tests.tiny_pipelines import tiny_flux, tiny_sd3

DRAWING = Drawing(steps=2, guidance=3.0, height=32, width=32, max_sequence_length=12, true_cfg=True)
ROWS = [{"prompt": prompt, "seed": seed} for seed, prompt in enumerate(["a cup", "a gun", "a hat", "", "a cup"])]


def images_of(pipe, rows, **options):
    return torch.cat([images for _, images in draw(pipe, rows, drawing=DRAWING, **options)])


@pytest.fixture(scope="module")
def folder(tiny_random_flux, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "flux"
    tiny_random_flux.save_pretrained(folder)
    return folder


@pytest.fixture
def broken(folder, tmp_path):
    """A copy to break, sharing nothing with the original."""
    import shutil

    return shutil.copytree(folder, tmp_path / "broken")


# ---- drawing


def test_images_are_float32_in_the_unit_range_in_the_rows_order(pipe):
    batches = list(draw(pipe, ROWS, drawing=DRAWING, batch_size=2))
    assert [len(rows) for rows, _ in batches] == [2, 2, 1]
    assert [row for rows, _ in batches for row in rows] == ROWS
    images = torch.cat([images for _, images in batches])
    assert images.shape == (5, 3, 32, 32) and images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1


def test_drawing_again_gives_the_same_bits_whatever_the_global_generator(pipe):
    first = images_of(pipe, ROWS)
    torch.rand(7)
    assert torch.equal(images_of(pipe, ROWS), first)
    assert not torch.equal(images_of(pipe, [row | {"seed": row["seed"] + 1} for row in ROWS]), first)


def test_an_image_does_not_depend_on_its_neighbours(pipe):
    torch.testing.assert_close(images_of(pipe, ROWS)[2:3], images_of(pipe, ROWS[2:3]), atol=1e-4, rtol=0)


def test_drawing_equals_the_plain_pipeline_call(tiny_random_flux, tiny_random_sd3):
    call = {"height": 32, "width": 32, "num_inference_steps": 2, "max_sequence_length": 12, "output_type": "pt"}
    for pipe, guided in (
        (tiny_random_flux, {"true_cfg_scale": 3.0, "negative_prompt": ""}),
        (tiny_random_sd3, {"guidance_scale": 3.0}),
    ):
        plain = pipe("a gun", generator=torch.Generator().manual_seed(1), **call, **guided).images
        assert torch.equal(images_of(pipe, ROWS[1:2]), plain)


def test_latents_can_be_had_instead_of_images(pipe):
    latents = images_of(pipe, ROWS[:2], output_type="latent")
    assert latents.shape[0] == 2 and latents[0].numel() == 4 * 16 * 16


def test_the_progress_bar_is_off_while_drawing_and_back_afterwards(pipe, capfd):
    pipe.set_progress_bar_config(leave=True)
    try:
        images_of(pipe, ROWS[:1])
        assert capfd.readouterr().err == "" and pipe._progress_bar_config == {"leave": True}
        del pipe._progress_bar_config
        images_of(pipe, ROWS[:1])
        assert "_progress_bar_config" not in vars(pipe)
    finally:
        pipe.set_progress_bar_config(disable=True)


def test_a_folder_says_how_it_draws(folder):
    (folder / "drawing.json").write_text(json.dumps({**DRAWING.__dict__, "guidance": 2}))
    pipe = load_pipeline(folder)
    assert Drawing.of(pipe) == Drawing(2, 2.0, 32, 32, 12, True)
    (folder / "drawing.json").write_text('{"stepz": 4}')
    with pytest.raises(UsageError, match=r"drawing\.json: Unknown key 'stepz'. Did you mean 'steps'"):
        Drawing.of(pipe)
    (folder / "drawing.json").unlink()


def test_without_one_the_defaults_are_the_authors(tiny_random_flux, tiny_random_sd3):
    assert Drawing.of(tiny_random_flux) == Drawing(4, 0.0, 256, 256, 256)
    assert Drawing.of(tiny_random_sd3) == Drawing(28, 3.5, 32, 32, 256)


# ---- loading


def test_a_saved_pipeline_draws_the_same_bits(folder, tiny_random_flux):
    loaded = load_pipeline(str(folder))
    assert torch.equal(images_of(loaded, ROWS), images_of(tiny_random_flux, ROWS))
    assert load_pipeline(folder, dtype=torch.bfloat16).transformer.dtype == torch.bfloat16


@pytest.fixture
def no_hub(monkeypatch):
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    def refuse(*args, **kwargs):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(DiffusionPipeline, "download", refuse)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tiny-flx", "There is no model 'tiny-flx'. Did you mean 'tiny-flux'?"),
        ("stable-diffusion", "Or give a local folder, or a Hub id with a '/'"),
        ("./nowhere", "There is no folder './nowhere'"),
        ("/nowhere/at/all", "There is no folder '/nowhere/at/all'"),
        ("", "There is no model ''"),
    ],
)
def test_a_name_that_is_no_model_is_refused_without_the_network(no_hub, name, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        load_pipeline(name)


def test_a_device_and_a_dtype_may_be_given_by_name(folder):
    pipe = load_pipeline(folder, dtype="bfloat16", device="auto")
    assert pipe.transformer.dtype == torch.bfloat16 and pipe.device.type in ("cpu", "cuda", "mps", "xpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bfloat61"}, "dtype='bfloat61': Did you mean 'bfloat16'?"),
        ({"device": "gpu"}, "The device 'gpu' cannot be used"),
        ({"offload": "modle"}, "offload='modle': Did you mean 'model'?"),
    ],
)
def test_a_wrong_option_is_named_before_anything_is_read(options, message):
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        load_pipeline("./nowhere", **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("options", [{"offload": "group"}, {"offload": "sequential", "device": "cpu"}])
def test_offload_without_an_accelerator_says_so(folder, monkeypatch, options):
    monkeypatch.setattr("diffusers.utils.torch_utils.get_device", lambda: "cpu")
    with pytest.raises(UsageError, match="needs an accelerator and there is none: leave offload out"):
        load_pipeline(folder, **options)


@pytest.mark.parametrize("offload", ["model", "group"])
def test_an_offloaded_pipeline_draws_the_same_bits_and_keeps_its_fingerprint(folder, tiny_random_flux, offload):
    pipe = load_pipeline(folder, device="cpu", offload=offload)
    assert fingerprint(pipe) == fingerprint(tiny_random_flux)
    assert torch.equal(images_of(pipe, ROWS[:2]), images_of(tiny_random_flux, ROWS[:2]))
    assert fingerprint(pipe) == fingerprint(tiny_random_flux)


def test_what_sequential_offload_keeps_aside_counts_in_the_fingerprint(tiny_random_flux):
    from accelerate import cpu_offload

    pipe = tiny_flux()
    cpu_offload(pipe.transformer, torch.device("cpu"))
    assert all(p.is_meta for p in pipe.transformer.parameters())
    assert fingerprint(pipe) == fingerprint(tiny_random_flux)
    pipe.transformer.proj_out._hf_hook.weights_map["weight"][0, 0] += 1
    assert fingerprint(pipe) != fingerprint(tiny_random_flux)


def test_a_folder_without_an_index_is_no_pipeline(tmp_path):
    with pytest.raises(UsageError, match="is no pipeline folder.*save_pretrained"):
        load_pipeline(tmp_path)


def test_missing_weights_are_named(broken):
    weights = next((broken / "transformer").glob("*.safetensors"))
    weights.unlink()
    with pytest.raises(UsageError, match=r"transformer' has no \*\.safetensors"):
        load_pipeline(broken)


def test_pickled_weights_are_not_read(broken):
    weights = next((broken / "vae").glob("*.safetensors"))
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(UsageError, match=r"vae' has no \*\.safetensors \(other formats are not read\)"):
        load_pipeline(broken)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_weights_are_named(broken, keep):
    weights = next((broken / "transformer").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(UsageError, match=r"\.safetensors' is truncated"):
        load_pipeline(broken)


def test_a_missing_shard_is_named(broken):
    (broken / "transformer" / "x.safetensors.index.json").write_text('{"weight_map": {"a": "shard-2.safetensors"}}')
    with pytest.raises(UsageError, match=r"shard-2\.safetensors' is missing"):
        load_pipeline(broken)


def test_a_missing_part_is_named(broken):
    import shutil

    shutil.rmtree(broken / "tokenizer")
    with pytest.raises(UsageError, match="has no 'tokenizer'"):
        load_pipeline(broken)


def test_a_folder_that_diffusers_cannot_load_is_one_line(broken):
    config = broken / "transformer" / "config.json"
    config.write_text(config.read_text().replace('"num_layers": 2', '"num_layers": "two"'))
    index = json.loads((broken / "model_index.json").read_text())
    index["transformer"] = ["diffusers", "NoSuchModel"]
    (broken / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UsageError, match="cannot be loaded") as caught:
        load_pipeline(broken)
    assert "\n" not in str(caught.value)


# ---- fingerprint


def test_a_fingerprint_survives_saving_and_a_change_of_dtype(folder, tiny_random_flux):
    assert fingerprint(load_pipeline(folder)) == fingerprint(tiny_random_flux)
    assert fingerprint(load_pipeline(folder, dtype=torch.bfloat16)) == fingerprint(tiny_random_flux)
    assert len(fingerprint(tiny_random_flux)) == 64


def test_other_weights_or_another_class_have_another_fingerprint(tiny_random_flux, tiny_random_sd3):
    assert fingerprint(tiny_flux(seed=1)) != fingerprint(tiny_random_flux)
    assert fingerprint(tiny_sd3()) == fingerprint(tiny_random_sd3) != fingerprint(tiny_random_flux)


@pytest.mark.parametrize(
    ("part", "counts"), [("transformer", True), ("text_encoder", True), ("text_encoder_2", True), ("vae", False)]
)
def test_one_changed_weight_of_what_makes_activations_changes_the_fingerprint(part, counts):
    pipe = tiny_flux()
    before = fingerprint(pipe)
    with torch.no_grad():
        next(getattr(pipe, part).parameters()).flatten()[0].add_(0.1)
    assert (fingerprint(pipe) != before) == counts


def test_a_pipeline_without_one_of_its_text_encoders_has_another_fingerprint(tiny_random_sd3):
    pipe = tiny_sd3()
    assert fingerprint(pipe) == fingerprint(tiny_random_sd3)
    pipe.text_encoder_3 = None  # as is done where T5 does not fit
    assert fingerprint(pipe) != fingerprint(tiny_random_sd3)


def test_large_tensors_are_sampled(monkeypatch):
    monkeypatch.setattr("safedig.pipelines._MAX_HASHED", 10)
    assert fingerprint(tiny_flux()) == fingerprint(tiny_flux()) != fingerprint(tiny_flux(seed=1))


def test_shapes_without_weights_have_no_fingerprint():
    pipe = tiny_flux()
    pipe.transformer.to("meta")
    with pytest.raises(UsageError, match="has no weights, only shapes.*load it with its weights"):
        fingerprint(pipe)
