"""The tiny pipelines are ordinary ones: known words are one token, folders load anywhere, training and use agree."""

import numpy as np
import pytest
import torch

from safedig.pipelines import Drawing, draw, load_pipeline
from safedig.tiny import corpus
from safedig.tiny.captions import training_ask
from safedig.tiny.flow_matching import FAMILIES, _Words
from safedig.tiny.models import (
    CLIP_LENGTH,
    LATENT_CHANNELS,
    MAX_WORDS,
    SCENE_TOKENS,
    build_flux_transformer,
    build_sd3_transformer,
    build_vae,
    clip_tokenizer,
    start_at_zero,
    t5_tokenizer,
)
from tests.tiny_training import untrained

WORDS = corpus.vocabulary()
LENGTHS = {"t5": MAX_WORDS, "clip": CLIP_LENGTH}
SPECIALS = {"t5": 1, "clip": 2}  # </s>; <|startoftext|> and <|endoftext|>
ROWS = [{"prompt": prompt, "seed": seed} for seed, prompt in enumerate(["a red cup", "", "a zebra"])]


def captions(n=60):
    rng = np.random.default_rng(0)
    return [training_ask(rng).text for _ in range(n)]


@pytest.fixture(scope="module", params=["t5", "clip"])
def named(request):
    return request.param, {"t5": t5_tokenizer, "clip": clip_tokenizer}[request.param](WORDS)


# ---- tokenizers


def test_every_known_word_is_one_token_of_its_own(named):
    name, tokenizer = named
    ids = [tokenizer(word).input_ids for word in WORDS]
    assert {len(row) for row in ids} == {1 + SPECIALS[name]}
    assert len({tuple(row) for row in ids}) == len(WORDS)


def test_a_caption_is_as_many_tokens_as_words(named):
    name, tokenizer = named
    for text in captions():
        assert len(tokenizer(text).input_ids) == len(text.split()) + SPECIALS[name]


def test_control_a_word_outside_the_vocabulary_falls_back_to_its_letters(named):
    name, tokenizer = named
    for word in ("zebra", "cups"):
        ids = tokenizer(word).input_ids
        assert len(ids) > 1 + SPECIALS[name]
        spelt = "".join(tokenizer.convert_ids_to_tokens(ids, skip_special_tokens=True))
        assert spelt.replace("</w>", "").replace("▁", "") == word


def test_a_letter_nobody_knows_does_no_harm_to_the_words_around_it(named):
    _, tokenizer = named
    known, strange = tokenizer("a knife").input_ids, tokenizer("a é knife").input_ids
    assert strange[:-2][: len(known) - 2] == known[:-2] and strange[-2:] == known[-2:]


def test_what_is_too_long_is_cut_at_the_end_as_the_pipelines_do(named):
    name, tokenizer = named
    ids = tokenizer("cup " * 40, truncation=True, max_length=LENGTHS[name], padding="max_length").input_ids
    assert len(ids) == LENGTHS[name] == tokenizer.model_max_length and ids[-1] == tokenizer.eos_token_id


def test_a_tokenizer_survives_saving(named, tmp_path):
    _, tokenizer = named
    tokenizer.save_pretrained(tmp_path)
    loaded = type(tokenizer).from_pretrained(tmp_path)
    texts = [*captions(), "zebra", "", "a é knife", "Knife, 9"]
    assert [loaded(text).input_ids for text in texts] == [tokenizer(text).input_ids for text in texts]
    assert loaded.model_max_length == tokenizer.model_max_length


def test_looking_words_up_gives_the_tokenizers_own_ids(named):
    name, tokenizer = named
    texts = ["", *captions(), "cup " * 40]
    asked = tokenizer(texts, padding="max_length", max_length=LENGTHS[name], truncation=True, return_tensors="pt")
    assert torch.equal(_Words(tokenizer, LENGTHS[name])(texts), asked.input_ids)


# ---- networks


def test_the_autoencoder_shrinks_a_scene_fourfold_to_the_pipelines_tokens():
    vae = build_vae()
    latents = vae.encode(torch.zeros(1, 3, 64, 64)).latent_dist.mean
    assert latents.shape == (1, LATENT_CHANNELS, 16, 16) and SCENE_TOKENS == (16 // 2) ** 2
    assert vae.decode(latents).sample.shape == (1, 3, 64, 64)


@pytest.mark.parametrize("build", [build_flux_transformer, build_sd3_transformer])
def test_starting_at_zero_makes_every_block_the_identity(build):
    transformer = build()
    blocks = [*transformer.transformer_blocks, *getattr(transformer, "single_transformer_blocks", [])]
    assert not all(_is_identity(block) for block in blocks), "control"
    start_at_zero(transformer)
    assert all(_is_identity(block) for block in blocks)
    assert not transformer.proj_out.weight.any() and transformer.context_embedder.weight.any()


def _is_identity(block):
    generator = torch.Generator().manual_seed(0)
    img, txt, temb = (torch.randn(*size, generator=generator) for size in ((2, 4, 96), (2, 3, 96), (2, 96)))
    rotary = {} if "Joint" in type(block).__name__ else {"image_rotary_emb": (torch.ones(7, 32), torch.zeros(7, 32))}
    txt_out, img_out = block(hidden_states=img, encoder_hidden_states=txt, temb=temb, **rotary)
    return torch.equal(img_out, img) and (txt_out is None or torch.equal(txt_out, txt))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pipeline_is_small_and_the_same_for_the_same_seed(family):
    first, again, other = untrained(family), untrained(family), untrained(family, seed=1)
    states = [objective.module.state_dict() for objective in (first, again, other)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not all(torch.equal(states[0][key], states[2][key]) for key in states[0])
    size = sum(p.numel() for part in (first.module, first.vae) for p in part.parameters())
    assert 4 * size < 15e6, "bytes in float32"


# ---- pipelines


@pytest.fixture(scope="module", params=FAMILIES)
def published(request, tmp_path_factory):
    """A family's objective with random weights everywhere, and the pipeline that its folder loads as."""
    objective = untrained(request.param)
    generator = torch.Generator().manual_seed(0)
    for parameter in objective.module.parameters():
        with torch.no_grad():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    objective.module.requires_grad_(False).eval()
    folder = tmp_path_factory.mktemp("weights") / request.param
    objective.publish(objective.module, folder)
    return objective, folder


def test_a_published_folder_loads_as_a_plain_diffusers_pipeline_and_draws(published):
    from diffusers import DiffusionPipeline

    _, folder = published
    pipe = DiffusionPipeline.from_pretrained(folder)
    assert type(pipe).__name__ in ("FluxPipeline", "StableDiffusion3Pipeline")
    assert all(path.suffix in (".json", ".safetensors", ".model", ".txt") for path in folder.rglob("*.*"))
    (rows, images), = draw(pipe, ROWS)  # fmt: skip
    assert rows == ROWS and images.shape == (3, 3, 64, 64) and images.isfinite().all()
    assert len({image.sum().item() for image in images}) == 3


def test_a_published_folder_says_how_it_draws(published):
    objective, folder = published
    pipe = load_pipeline(folder)
    assert Drawing.of(pipe) == Drawing(8, 2.5, 64, 64, MAX_WORDS, true_cfg=objective.family.true_cfg)
    assert pipe.tokenizer.model_max_length == CLIP_LENGTH


def seen_by_the_transformer(transformer, run):
    """The keyword arguments of the transformer's first call while `run` runs."""
    calls = []
    hook = transformer.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    try:
        run()
    finally:
        hook.remove()
    assert calls[0][0] == ()
    return {key: value for key, value in calls[0][1].items() if value is not None and key != "return_dict"}


def both_paths(objective, folder, texts, asked_texts):
    """What the transformer is given in training at σ = 1, and what the pipeline gives it, for the same latents."""
    pipe = load_pipeline(folder)
    pipe.set_progress_bar_config(disable=True)
    latents = torch.randn(len(texts), LATENT_CHANNELS, 16, 16, generator=torch.Generator().manual_seed(0))
    flux = hasattr(pipe, "_pack_latents")
    packed = pipe._pack_latents(latents, len(texts), LATENT_CHANNELS, 16, 16) if flux else latents
    trained = seen_by_the_transformer(
        objective.parts["transformer"],
        lambda: objective.family.velocity(
            objective.parts, latents, torch.ones(len(texts)), objective.t5_ids(texts), objective.clip_ids(texts)
        ),
    )
    call = {"num_inference_steps": 1, "guidance_scale": 1.0, "max_sequence_length": MAX_WORDS, "output_type": "latent"}
    used = seen_by_the_transformer(
        pipe.transformer, lambda: pipe(asked_texts, latents=packed, height=64, width=64, **call)
    )
    return trained, used


def differing(one, other):
    return [key for key in one.keys() | other.keys() if not _same(one.get(key), other.get(key))]


def _same(one, other):
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return one == other or (not one and not other)
    return torch.equal(one.float(), other.float())


def test_the_transformer_is_given_in_training_exactly_what_the_pipeline_gives_it(published):
    texts = ["", *captions(10), "a star next to a key on the sand"]
    assert differing(*both_paths(*published, texts, texts)) == []


def test_control_other_words_are_seen_in_the_text_and_in_the_pooled_state_alone(published):
    texts = ["a cup", "a red knife on the left"]
    assert sorted(differing(*both_paths(*published, texts, ["a cup", "a red knife on the right"]))) == [
        "encoder_hidden_states",
        "pooled_projections",
    ]


def test_training_predicts_what_the_scheduler_steps_along(published):
    """One Euler step from σ = 1 to 0 gives x − v: with v = ε − x0 that is the picture's own latent."""
    pipe = load_pipeline(published[1])
    pipe.scheduler.set_timesteps(sigmas=[1.0])
    noise, x0 = torch.randn(2, 1, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    assert pipe.scheduler.sigmas.tolist() == [1.0, 0.0]
    stepped = pipe.scheduler.step(noise - x0, pipe.scheduler.timesteps[0], noise).prev_sample
    torch.testing.assert_close(stepped, x0, atol=1e-6, rtol=0)
