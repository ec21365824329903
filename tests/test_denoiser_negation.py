"""A negation set holds latents as the scheduler sees them, encodes none twice, and measures distances exactly."""

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from safedig.config import UsageError
from safedig.denoiser import cached
from safedig.denoiser.negation import NegationSet
from safedig.denoiser.pictures import CorruptError
from tests.tiny_pipelines import draw_images, tiny_flux, tiny_sd3


def latents(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def held(negation):
    return torch.cat(list(negation.parts()))


# ---- from images to the generation's frame


def test_latents_are_those_that_the_pipeline_decodes_to_the_image():
    """Encoded with shift and scale, in the place and packing where decoding undoes them."""
    for pipe in (tiny_flux(), tiny_sd3()):
        pipe.vae.register_to_config(scaling_factor=1.7, shift_factor=0.3)
        drawn = draw_images(pipe, ["a cup"], output_type="latent", num_inference_steps=1)
        negation = NegationSet.of(rand(2, 3, 32, 32), pipe, height=32, width=32, cache=None)
        assert negation.shape == tuple(drawn.shape[1:]) and negation.frame == (32, 32)
        mode = pipe.vae.encode(rand(2, 3, 32, 32) * 2 - 1).latent_dist.mode()
        wanted = (mode - 0.3) * 1.7
        found = held(negation)
        if found.ndim == 3:
            found = pipe._unpack_latents(found, 32, 32, pipe.vae_scale_factor)
        assert torch.allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (16, 48), (64, 16)])
def test_any_resolution_and_aspect_is_encoded_as_it_is_drawn(pipe, height, width):
    drawn = draw_images(pipe, ["a cup"], output_type="latent", num_inference_steps=1, height=height, width=width)
    images = [rand(3, 20, 20), rand(3, 64, 16), rand(1, 7, 90)]
    negation = NegationSet.of(images, pipe, height=height, width=width, cache=None)
    assert negation.shape == tuple(drawn.shape[1:]) and len(negation) == 3


def test_a_size_the_pipeline_cannot_draw_is_refused(pipe):
    with pytest.raises(UsageError, match="height=30, width=32: expected multiples of 4 pixels"):
        NegationSet.of(rand(1, 3, 32, 32), pipe, height=30, width=32, cache=None)


def test_a_pipeline_without_a_vae_or_with_another_kind_is_refused():
    pipe = tiny_flux()
    vae, pipe.vae = pipe.vae, None
    with pytest.raises(UsageError, match="FluxPipeline has no VAE.*NegationSet.latents."):
        NegationSet.of(rand(1, 3, 32, 32), pipe)
    pipe.vae = torch.nn.Linear(1, 1)
    with pytest.raises(UsageError, match="The VAE is a Linear, and only AutoencoderKL"):
        NegationSet.of(rand(1, 3, 32, 32), pipe)
    pipe.vae = vae
    assert len(NegationSet.of(rand(1, 3, 32, 32), pipe, height=32, width=32, cache=None)) == 1


# ---- the cache


@pytest.fixture
def encodings(monkeypatch):
    """How many images are encoded."""
    counts, encode = [], cached.encode

    def counting(pipe, pixels):
        counts.append(len(pixels))
        return encode(pipe, pixels)

    monkeypatch.setattr(cached, "encode", counting)
    return counts


SIZE = {"height": 32, "width": 32}


def test_the_same_images_are_encoded_once_whatever_they_are_called(tiny_random_sd3, tmp_path, encodings):
    pipe, cache = tiny_random_sd3, tmp_path / "cache"
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
        for at in range(3):
            Image.new("RGB", (40, 30), (at * 80, 9, 9)).save(tmp_path / folder / f"{folder}-{at}.png")
    first = NegationSet.of(tmp_path / "one", pipe, cache=cache, **SIZE)
    again = NegationSet.of(tmp_path / "other", pipe, cache=cache, **SIZE)
    assert sum(encodings) == 3 and torch.equal(held(first), held(again))
    assert [path.suffix for path in cache.iterdir()] == [".safetensors"]
    assert cache.stat().st_mode & 0o077 == 0


def test_another_frame_fit_vae_or_image_is_encoded_anew(tmp_path, encodings):
    pipe = tiny_sd3()
    NegationSet.of(rand(2, 3, 40, 32), pipe, cache=tmp_path, **SIZE)
    NegationSet.of(rand(2, 3, 40, 32), pipe, cache=tmp_path, height=16, width=32)
    NegationSet.of(rand(2, 3, 40, 32), pipe, cache=tmp_path, fit="stretch", **SIZE)
    NegationSet.of(rand(2, 3, 40, 32, seed=1), pipe, cache=tmp_path, **SIZE)
    next(pipe.vae.parameters()).data.add_(0.1)
    NegationSet.of(rand(2, 3, 40, 32), pipe, cache=tmp_path, **SIZE)
    assert encodings == [2] * 5 and len(list(tmp_path.iterdir())) == 5
    NegationSet.of(rand(2, 3, 40, 32), pipe, cache=tmp_path, **SIZE)
    assert len(encodings) == 5


def test_an_interrupted_run_goes_on_where_it_was(tiny_random_sd3, tmp_path, monkeypatch, encodings):
    monkeypatch.setattr(cached, "SHARD", 2)
    images, whole = rand(5, 3, 32, 32), cached.encode

    def interrupted(pipe, pixels):
        if len(encodings) == 2:
            raise KeyboardInterrupt
        return whole(pipe, pixels)

    with monkeypatch.context() as patch:
        patch.setattr(cached, "encode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            NegationSet.of(images, tiny_random_sd3, cache=tmp_path, **SIZE)
    assert len(list(tmp_path.iterdir())) == 2
    done = len(encodings)
    assert len(NegationSet.of(images, tiny_random_sd3, cache=tmp_path, **SIZE)) == 5
    assert encodings[done:] == [1]


def test_a_torn_shard_is_encoded_anew(tiny_random_sd3, tmp_path, encodings):
    first = NegationSet.of(rand(2, 3, 32, 32), tiny_random_sd3, cache=tmp_path, **SIZE)
    (shard,) = tmp_path.iterdir()
    shard.write_bytes(shard.read_bytes()[:100])
    again = NegationSet.of(rand(2, 3, 32, 32), tiny_random_sd3, cache=tmp_path, **SIZE)
    assert encodings == [2, 2] and torch.equal(held(first), held(again))


@pytest.mark.parametrize("cache", [True, False])
def test_a_corrupt_image_stops_it_by_name_or_is_left_out_and_counted(tiny_random_sd3, tmp_path, capsys, cache):
    folder = tmp_path / "cache" if cache else None
    (tmp_path / "in").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "in" / "fine.png")
    (tmp_path / "in" / "broken.png").write_bytes(b"no")
    for _ in range(2):
        with pytest.raises(UsageError, match="broken.png' cannot be read.*skip_corrupt=True"):
            NegationSet.of(tmp_path / "in", tiny_random_sd3, cache=folder, **SIZE)
        made = NegationSet.of(tmp_path / "in", tiny_random_sd3, cache=folder, skip_corrupt=True, **SIZE)
        assert len(made) == 1 and "1 corrupt images were left out" in capsys.readouterr().err
    (tmp_path / "in" / "fine.png").unlink()
    with pytest.raises(UsageError, match="There is no readable image"):
        NegationSet.of(tmp_path / "in", tiny_random_sd3, cache=folder, skip_corrupt=True, **SIZE)


def test_an_image_that_was_left_out_is_encoded_once_it_can_be_read(tiny_random_sd3, tmp_path, monkeypatch, encodings):
    """As when the decoder of its format is installed later. Control: whoever skips corrupt ones takes what is there."""
    images, whole = rand(3, 3, 32, 32), cached.framed
    missing = [CorruptError("'1' cannot be read (no decoder)")]

    def without_a_decoder(*given):
        if missing and given[0].equal(images[1]):
            raise missing[0]
        return whole(*given)

    monkeypatch.setattr(cached, "framed", without_a_decoder)
    assert len(NegationSet.of(images, tiny_random_sd3, cache=tmp_path, skip_corrupt=True, **SIZE)) == 2
    missing.clear()
    assert len(
        NegationSet.of(images, tiny_random_sd3, cache=tmp_path, skip_corrupt=True, **SIZE)
    ) == 2 and encodings == [2]
    made = NegationSet.of(images, tiny_random_sd3, cache=tmp_path, **SIZE)
    assert torch.equal(held(made), held(NegationSet.of(images, tiny_random_sd3, cache=None, **SIZE)))
    assert len(NegationSet.of(images, tiny_random_sd3, cache=tmp_path, **SIZE)) == 3 and encodings == [2, 3, 3]


def test_by_default_it_is_the_users_own_cache_and_none_keeps_nothing(tiny_random_sd3, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    NegationSet.of(rand(1, 3, 32, 32), tiny_random_sd3, cache=None, **SIZE)
    assert not list(tmp_path.iterdir())
    NegationSet.of(rand(1, 3, 32, 32), tiny_random_sd3, **SIZE)
    assert len(list((tmp_path / "safedig" / "negation").iterdir())) == 1


def test_left_on_disk_it_is_the_same_set(tiny_random_flux, tmp_path, monkeypatch):
    monkeypatch.setattr(cached, "SHARD", 3)
    images = rand(7, 3, 32, 32)
    inside = NegationSet.of(images, tiny_random_flux, cache=tmp_path, **SIZE)
    outside = NegationSet.of(images, tiny_random_flux, cache=tmp_path, mapped=True, **SIZE)
    x, w = latents(4, inside.d), torch.rand(4, 7)
    assert len(outside) == 7 and outside.shape == inside.shape and outside.frame == (32, 32)
    assert torch.allclose(outside.squared_distances(x), inside.squared_distances(x), rtol=1e-5)
    assert torch.allclose(outside.mean(w), inside.mean(w), atol=1e-5)
    assert not any(isinstance(part, torch.Tensor) for part in outside._parts)
    with pytest.raises(UsageError, match="mapped=True reads the latents from the cache"):
        NegationSet.of(images, tiny_random_flux, cache=None, mapped=True, **SIZE)


def test_what_is_kept_is_latents_and_no_image(tiny_random_sd3, tmp_path):
    NegationSet.of(rand(2, 3, 32, 32), tiny_random_sd3, cache=tmp_path, **SIZE)
    (shard,) = tmp_path.iterdir()
    with safe_open(shard, framework="pt") as file:
        assert list(file.keys()) == ["latents"] and file.metadata() == {"skipped": "0"}


# ---- distances and means


@pytest.mark.parametrize("scale", [1.0, 0.4])
@pytest.mark.parametrize("bytes_in_a_part", [1, 4 * 12 * 3, 2**28])
def test_distances_and_means_do_not_depend_on_the_parts(monkeypatch, bytes_in_a_part, scale):
    from safedig.denoiser import negation as room

    monkeypatch.setattr(room, "PART", bytes_in_a_part)
    z, x = latents(10, 3, 4), latents(5, 12, seed=1)
    made = NegationSet(z)
    assert len(made._parts) == {1: 10, 144: 4, 2**28: 1}[bytes_in_a_part]
    wanted = torch.cdist(x, scale * z.flatten(1)).square()
    assert torch.allclose(made.squared_distances(x, scale), wanted, rtol=1e-4, atol=1e-4)
    for w in (torch.rand(5, 10), torch.eye(10)[:5], torch.zeros(5, 10)):
        assert torch.allclose(made.mean(w), w @ z.flatten(1), atol=1e-5)


def test_what_has_no_weight_is_not_read(monkeypatch):
    from safedig.denoiser import negation as room

    monkeypatch.setattr(room, "PART", 1)
    made, read = NegationSet(latents(6, 4)), []
    monkeypatch.setattr(room, "_read", lambda part, _: read.append(1) or part)
    made.mean(torch.eye(6)[[2]])
    assert len(read) == 1


def test_memory_is_linear_in_the_set_and_nothing_is_tiled():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            owns = isinstance(result, torch.Tensor) and result.untyped_storage().nbytes() < 4 * 64 * 1000
            if owns:
                Largest.numel = max(Largest.numel, result.numel())
            return result

    made, x = NegationSet(latents(64, 1000)), latents(8, 1000)
    with Largest():
        made.mean(made.squared_distances(x).softmax(1))
    assert Largest.numel == 8 * 1000  # the batch itself; [8, 64, 1000] would be 512,000


def test_it_is_moved_to_a_device_once_and_what_lies_on_disk_stays_there():
    made = NegationSet(latents(3, 4))
    assert made.to("cpu") is made
    moved = made.to("meta")
    assert moved is made.to("meta") and moved.shape == made.shape and len(moved) == 3
    assert {part.device.type for part in (*moved._parts, *moved._squares)} == {"meta"}


def test_an_empty_set_has_no_distances():
    made = NegationSet(torch.zeros(0, 4))
    assert len(made) == 0 and made.squared_distances(latents(2, 4)).shape == (2, 0)


def test_low_precision_latents_are_compared_in_float32():
    assert NegationSet(latents(2, 4).bfloat16()).squared_distances(latents(1, 4)).dtype == torch.float32


@pytest.mark.parametrize("wrong", [torch.zeros(3), torch.zeros(2, 3).long(), torch.full((2, 3), torch.nan)])
def test_what_is_no_set_of_latents_is_told(wrong):
    with pytest.raises(UsageError, match="are no negation set: expected finite floats"):
        NegationSet(wrong)
