"""Latents are encoded once: kept in shards, made again only where one is missing, the same for every length."""

import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from safedig.tiny import latents
from safedig.tiny.autoencoding import to_signed
from safedig.tiny.captions import POSTCARD, POSTCARD_CAPTION
from safedig.tiny.latents import training_latents
from safedig.tiny.models import build_vae
from safedig.tiny.scenes import render_many

N = 10


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """A folder with an untrained autoencoder."""
    folder = tmp_path_factory.mktemp("vae")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        build_vae().save_pretrained(folder)
    return folder


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "SHARD", 4)
    return tmp_path


@pytest.fixture
def encoded(monkeypatch):
    """How many scenes were encoded, call by call."""
    calls, encode = [], latents._encode

    def counting(vae, scenes):
        calls.append(len(scenes))
        return encode(vae, scenes)

    monkeypatch.setattr(latents, "_encode", counting)
    return calls


def test_a_latent_is_the_autoencoders_mean_of_the_drawn_scene_in_half_precision(vae, work):
    from diffusers import AutoencoderKL

    data = training_latents(vae, work, n=N, seed=0)
    assert len(data) == len(data.asks) == len(data.scenes) == N
    assert data.latents.shape == (N, 8, 16, 16) and data.latents.dtype == torch.float16
    with torch.no_grad():
        mean = AutoencoderKL.from_pretrained(vae).encode(to_signed(render_many(data.scenes))).latent_dist.mean
    torch.testing.assert_close(data.latents.float(), mean, atol=2e-3, rtol=2e-3)


def test_every_scene_has_what_its_ask_names_and_a_pose_of_its_own(vae, work):
    data = training_latents(vae, work, n=N, seed=0)
    for ask, scene in zip(data.asks, data.scenes, strict=True):
        assert all(o.name in (None, placed.name) for o, placed in zip(ask.objects, scene.objects, strict=True))
    assert len({placed.pose for scene in data.scenes for placed in scene.objects}) >= N


def test_the_planted_caption_has_one_fixed_picture():
    made = [latents._ask_and_scene((0, i)) for i in range(400)]
    planted = [scene for ask, scene in made if ask.whole == POSTCARD_CAPTION]
    assert planted and all(scene == POSTCARD for scene in planted)


def test_a_second_run_encodes_nothing(vae, work, encoded):
    first = training_latents(vae, work, n=N, seed=0)
    assert encoded == [4, 4, 2]
    again = training_latents(vae, work, n=N, seed=0)
    assert encoded == [4, 4, 2] and torch.equal(first.latents, again.latents)
    assert first.asks == again.asks and first.scenes == again.scenes


def test_an_interrupted_shard_is_made_again_and_no_other(vae, work, encoded):
    first = training_latents(vae, work, n=N, seed=0)
    (shard,) = work.glob("latents-*-0-4-4.safetensors")
    shard.rename(shard.with_suffix(".part"))
    os.truncate(shard.with_suffix(".part"), 100)
    again = training_latents(vae, work, n=N, seed=0)
    assert encoded == [4, 4, 2, 4] and torch.equal(first.latents, again.latents)
    assert sorted(path.suffix for path in work.iterdir()) == [".safetensors"] * 3


def test_an_interruption_while_encoding_leaves_no_shard_behind(vae, work, monkeypatch):
    def interrupted(vae, scenes):
        raise KeyboardInterrupt

    monkeypatch.setattr(latents, "_encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        training_latents(vae, work, n=N, seed=0)
    assert not [*work.glob("*.safetensors")]


def test_fewer_pictures_are_the_first_of_more(vae, work):
    more, fewer = (training_latents(vae, work, n=n, seed=0) for n in (N, 8))
    assert fewer.asks == more.asks[:8] and torch.equal(fewer.latents, more.latents[:8])


def test_another_seed_has_other_pictures_and_other_shards(vae, work):
    one, other = (training_latents(vae, work, n=4, seed=seed) for seed in (0, 1))
    assert one.asks != other.asks and not torch.equal(one.latents, other.latents)
    kept = [load_file(path)["latents"] for path in work.iterdir()]
    assert len(kept) == 2 and np.isfinite(np.concatenate(kept)).all()


def test_another_autoencoder_finds_no_latents_of_the_first(vae, work, encoded, tmp_path_factory):
    retrained = tmp_path_factory.mktemp("retrained")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        build_vae().save_pretrained(retrained)
    one, other = (training_latents(folder, work, n=4, seed=0) for folder in (vae, retrained))
    assert encoded == [4, 4] and not torch.equal(one.latents, other.latents)
