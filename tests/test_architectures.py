"""In every known transformer a site holds what the papers' formulas put there, and acts as it is said to."""

from collections import Counter
from dataclasses import replace

import diffusers
import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from safedig import architectures
from safedig.architectures import ARCHITECTURES, STAGES
from safedig.config import UsageError
from safedig.sites import Site, places, resolve, sites, stage
from safedig.taps import tap
from tests.recomputed import BLOCKS, arguments_of
from tests.tiny_transformers import BATCH, BUILDERS, IMAGE, TEXT, build, forward

NAMES = list(BUILDERS)
MODELS = {}


@pytest.fixture(params=NAMES)
def tiny(request):
    """A model and the arguments of its forward; built once."""
    if request.param not in MODELS:
        MODELS[request.param] = build(request.param)
    return MODELS[request.param]


def keep(seen, name):
    def function(x):
        seen[name] = x.clone()

    return function


def recorded(model, given, names=None):
    """What passes each site, and what the model puts out meanwhile."""
    seen, fired = {}, Counter()

    def watch(site):
        def function(x):
            seen[str(site)] = x.clone()
            fired[str(site)] += 1

        return function

    chosen = [place.site for place in places(model)] if names is None else resolve(model, names)
    with tap(model, {site: watch(site) for site in chosen}):
        output = forward(model, given)
    assert set(fired.values()) == {1} and len(fired) == len(chosen)
    return seen, output


def parts(model, given, joint):
    """A joint tensor by the order and lengths that each paper tells: (txt, img)."""
    kind = type(model).__name__
    if kind == "ZImageTransformer2DModel":  # image first; both filled up to a multiple of 32
        return pad_sequence([joint[0, 32:64], joint[1, 32:96]], batch_first=True), joint[:, :32]
    if kind == "Lumina2Transformer2DModel":  # the second text is two tokens shorter
        img = torch.stack([joint[0, TEXT : TEXT + IMAGE], joint[1, TEXT - 2 : TEXT - 2 + IMAGE]])
        return pad_sequence([joint[0, :TEXT], joint[1, : TEXT - 2]], batch_first=True), img
    text = TEXT + 8 * (kind == "AuraFlowTransformer2DModel")
    return joint[:, :text], joint[:, text:]


def blocks(model):
    """Each block's prefix in a site's name, and the block."""
    families = ARCHITECTURES[type(model).__name__].families
    return {f"{family}.{at}": block for family in families for at, block in enumerate(getattr(model, family))}


def expected_in_blocks(model, given):
    """Every tensor of every block, from the arguments that it was called with."""
    found = {}
    with arguments_of(blocks(model)) as taken:
        forward(model, given)
    for prefix, block in blocks(model).items():
        args, kwargs = taken[prefix]
        points = BLOCKS[type(block).__name__](block, *args, **kwargs)
        only = {"context_refiner": "txt", "noise_refiner": "img"}.get(prefix.split(".")[0])
        for name, x in points.items():
            stream, _, point = name.partition(".")
            if stream != "joint" or only:
                found[f"{prefix}.{only or stream}.{point}"] = x
                continue
            txt, img = parts(model, given, x)
            both = {} if (point, "FluxSingle" in type(block).__name__) == ("resid_post", True) else {"joint": x}
            found |= {f"{prefix}.{part}.{point}": one for part, one in {"txt": txt, "img": img, **both}.items()}
    return found


def wrong(seen, expected):
    """The names of the sites at which something else passed than expected."""
    return [
        name
        for name, x in expected.items()
        if name not in seen or seen[name].shape != x.shape or not torch.allclose(seen[name], x, atol=1e-6)
    ]


def in_blocks(seen):
    return {name: x for name, x in seen.items() if name.count(".") == 3}


def test_every_block_is_recorded_as_its_formulas_say(tiny):
    seen, _ = recorded(*tiny)
    with torch.no_grad():
        expected = expected_in_blocks(*tiny)
    assert set(in_blocks(seen)) == set(expected)
    assert wrong(seen, expected) == []


@pytest.mark.parametrize("name", ["FLUX.1-dev", "SD3.5-large", "Qwen-Image", "AuraFlow"])
def test_control_streams_taken_the_wrong_way_round_are_noticed(name, monkeypatch):
    """The attention returns (img, txt), the block (txt, img)."""
    model, given = build(name)
    kind = type(model).__name__
    family, points = next(iter(ARCHITECTURES[kind].families.items()))
    swapped = points | {"img.attn_out": points["txt.attn_out"], "txt.attn_out": points["img.attn_out"]}
    families = {**ARCHITECTURES[kind].families, family: swapped}
    monkeypatch.setitem(ARCHITECTURES, kind, replace(ARCHITECTURES[kind], families=families))
    seen, _ = recorded(model, given)
    with torch.no_grad():
        assert {name.split(".", 2)[2] for name in wrong(seen, expected_in_blocks(model, given))} == {
            "img.attn_out",
            "txt.attn_out",
        }


def embedded(model, given):
    """What comes before the blocks, from the arguments of the model."""
    row = ARCHITECTURES[type(model).__name__]
    text, latent, t = given.get("encoder_hidden_states"), given.get("hidden_states"), given.get("timestep", 0.0)
    guidance = [given["guidance"] * 1000] if "guidance" in given else []
    fixed = {"resolution": None, "aspect_ratio": None, "batch_size": BATCH, "hidden_dtype": torch.float32}
    match type(model).__name__:
        case "FluxTransformer2DModel":
            temb = model.time_text_embed(t * 1000, *guidance, given["pooled_projections"])
            found = model.context_embedder(text), model.x_embedder(latent), given["pooled_projections"], temb
        case "SD3Transformer2DModel":
            temb = model.time_text_embed(t, given["pooled_projections"])
            found = model.context_embedder(text), model.pos_embed(latent), given["pooled_projections"], temb
        case "Flux2Transformer2DModel":
            temb = model.time_guidance_embed(t * 1000, *guidance)
            found = model.context_embedder(text), model.x_embedder(latent), temb
        case "QwenImageTransformer2DModel":
            img = model.img_in(latent)
            found = model.txt_in(model.txt_norm(text)), img, model.time_text_embed(t, img)
        case "ChromaTransformer2DModel":
            temb = model.distilled_guidance_layer(model.time_text_embed(t * 1000))
            found = model.context_embedder(text), model.x_embedder(latent), temb
        case "AuraFlowTransformer2DModel":
            temb = model.time_step_proj(model.time_step_embed(t))
            found = model.context_embedder(text), model.pos_embed(latent), temb
        case "PixArtTransformer2DModel":
            found = model.caption_projection(text), model.pos_embed(latent), model.adaln_single.emb(t, **fixed)
        case "SanaTransformer2DModel":
            txt = model.caption_norm(model.caption_projection(text))
            found = txt, model.patch_embed(latent), model.time_embed.emb(t, **fixed)
        case "Lumina2Transformer2DModel":
            patches = latent.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
            embed = model.time_caption_embed
            temb = embed.timestep_embedder(embed.time_proj(t))
            found = embed.caption_embedder(text), model.x_embedder(patches), temb
        case "ZImageTransformer2DModel":
            images = [x[:, 0].unfold(1, 2, 2).unfold(2, 2, 2).permute(1, 2, 3, 4, 0).flatten(2) for x in given["x"]]
            images = [model.all_x_embedder["2-1"](x.flatten(0, 1)) for x in images]
            texts = [model.cap_embedder(x) for x in given["cap_feats"]]
            found = (
                filled(texts, model.cap_pad_token),
                filled(images, model.x_pad_token),
                model.t_embedder(given["t"] * 1000),
            )
    return dict(zip(row.top, found, strict=True))


def filled(rows, token):
    return pad_sequence([torch.cat([x, token.expand(-len(x) % 32, -1)]) for x in rows], batch_first=True)


def test_what_comes_before_the_blocks_is_recorded_as_the_embedders_give_it(tiny):
    seen, _ = recorded(*tiny)
    with torch.no_grad():
        expected = embedded(*tiny)
    assert wrong(seen, {name: x[:, None] if x.ndim == 2 else x for name, x in expected.items()}) == []


def test_control_the_embeddings_of_other_arguments_are_noticed(tiny):
    model, given = tiny
    other = build(next(name for name, built in MODELS.items() if built[0] is model), seed=1)[1]
    seen, _ = recorded(model, given)
    with torch.no_grad():
        expected = embedded(model, other | {"timestep": torch.full((BATCH,), 9.0), "t": torch.full((BATCH,), 9.0)})
    assert set(wrong(seen, {name: x[:, None] if x.ndim == 2 else x for name, x in expected.items()})) == set(expected)


def test_what_comes_after_the_blocks_is_the_output_and_what_is_projected_to_it(tiny):
    """The layouts of tokens and pixels differ, so that the numbers are compared in order of size."""
    model, given = tiny
    seen, output = recorded(model, given)
    projection = {
        "ZImageTransformer2DModel": "all_final_layer.2-1.linear",
        "Lumina2Transformer2DModel": "norm_out.linear_2",
    }
    final = seen["img.final"][:, :IMAGE]
    projected = model.get_submodule(projection.get(type(model).__name__, "proj_out"))(final)
    torch.testing.assert_close(projected.flatten().sort().values, output.flatten().sort().values)
    pixels = output.flatten(2).transpose(1, 2) if output.ndim > 3 else output
    assert torch.equal(seen["velocity"], pixels)


def test_the_residual_goes_from_block_to_block(tiny):
    seen, _ = recorded(*tiny)
    pairs = 0
    for name, x in seen.items():
        family, index, *point = name.split(".") if name.count(".") == 3 else ("", "0")
        after = f"{family}.{int(index) + 1}.{'.'.join(point)}".replace("resid_post", "resid_pre")
        if name.endswith("resid_post") and after in seen:
            assert torch.equal(x, seen[after]), name
            pairs += 1
    assert pairs


def test_widths_are_as_promised_and_only_vectors_for_a_whole_image_are_one_token(tiny):
    model, given = tiny
    seen, _ = recorded(model, given)
    for place in places(model):
        x = seen[str(place.site)]
        assert len(x) == BATCH and x.shape[2] == place.d_in, place.site
        whole = place.site.stream in ("pooled", "temb") and "Chroma" not in type(model).__name__
        assert (x.shape[1] == 1) == whole, place.site


def test_an_edit_changes_the_image_where_a_site_can_be_edited_and_nowhere_else(tiny):
    """Giving back a copy changes no bit; a dead site changes nothing; one that can only be read refuses."""
    model, given = tiny
    plain = forward(model, given)
    for place in places(model):
        with tap(model, {place.site: lambda x: x.clone()}) if not place.port.read_only else tap(model, {}):
            assert torch.equal(forward(model, given), plain), place.site
        with tap(model, {place.site: lambda x: x * 1.5 + 0.1}):
            if place.port.read_only:
                with pytest.raises(UsageError, match=f"'{place.site}' cannot be edited.*only the norm before the MLP"):
                    forward(model, given)
            else:
                assert torch.equal(forward(model, given), plain) == place.dead, place.site


def test_the_text_that_comes_out_of_the_last_block_is_dead_and_only_that(tiny):
    model, _ = tiny
    last = list(blocks(model))[-1]
    dead = {str(place.site) for place in places(model) if place.dead}
    text = {str(place.site) for place in places(model) if str(place.site).startswith(f"{last}.txt.")}
    assert dead == {name for name in text if not name.endswith("resid_pre")}
    assert not dead & {str(site) for site in sites(model)}


def test_every_site_knows_its_stage_and_its_stream(tiny):
    for place in places(tiny[0]):
        assert stage(place.site, tiny[0]) in ("text", "bind", "render")
        assert bool(place.why_not) == (place.dead or bool(place.port.read_only))
        assert not place.port.read_only or place.site.point == "resid_mid"


def test_a_text_in_a_batch_is_the_same_as_alone():
    """Rows of different lengths: the part of each image is its own, with zeros behind the shorter text."""
    for name, listed in {"Z-Image": ("x", "t", "cap_feats"), "Lumina2": ()}.items():
        model, given = build(name)
        seen, _ = recorded(model, given, "layers.*.{txt,img}.*")
        lengths = (32, 64) if name == "Z-Image" else (TEXT, TEXT - 2)
        for at in range(BATCH):
            alone = {
                key: value[at : at + 1] if key in listed or torch.is_tensor(value) else value
                for key, value in given.items()
            }
            if name == "Lumina2":
                alone |= {
                    key: alone[key][:, : lengths[at]] for key in ("encoder_hidden_states", "encoder_attention_mask")
                }
            single, _ = recorded(model, alone, "layers.*.{txt,img}.*")
            for site, x in single.items():
                count = lengths[at] if ".txt." in site else x.shape[1]
                torch.testing.assert_close(seen[site][at, :count], x[0], atol=1e-5, rtol=1e-4)
                assert not seen[site][at, count:].any()


@pytest.mark.parametrize("name", ["FLUX.1-dev", "Z-Image", "Lumina2"])
def test_an_edit_of_one_part_leaves_the_other_as_it_was(name):
    model, given = build(name)
    family = "single_transformer_blocks" if "FLUX" in name else "layers"
    point = "branch_out" if "FLUX" in name else "resid_post"
    sites_of = {part: Site.parse(f"{family}.0.{part}.{point}") for part in ("txt", "img", "joint")}
    plain, _ = recorded(model, given, list(sites_of.values()))
    for part, other in (("txt", "img"), ("img", "txt")):
        seen = {}
        functions = {
            sites_of[part]: lambda x: x + 1,
            sites_of[other]: keep(seen, other),
            sites_of["joint"]: keep(seen, "joint"),
        }
        with tap(model, functions):
            forward(model, given)
        assert torch.equal(seen[other], plain[str(sites_of[other])])
        edited = (seen["joint"] - plain[str(sites_of["joint"])]).abs().amax(dim=2) > 0.5
        count = [32, 64] if name == "Z-Image" else [TEXT, TEXT - 2 * (name == "Lumina2")]
        image = 32 if name == "Z-Image" else IMAGE
        assert edited.sum(dim=1).tolist() == (count if part == "txt" else [image] * BATCH)


def test_a_joint_tensor_whose_length_is_not_text_and_image_together_is_refused(monkeypatch):
    model, given = build("FLUX.1-schnell")
    kind = type(model).__name__
    monkeypatch.setitem(ARCHITECTURES, kind, replace(ARCHITECTURES[kind], lengths=lambda given, config: (TEXT, 7)))
    with (
        pytest.raises(ValueError, match=r"\[5\] text and 7 image tokens.*FluxTransformer2DModel.*not understood"),
        tap(model, {Site.parse("single_transformer_blocks.0.img.branch_out"): lambda x: None}),
    ):
        forward(model, given)


def test_a_family_of_blocks_that_returns_pixels_is_read_and_written_token_by_token():
    """Sana's MLP is a convolution over the image: an edit of token 5 is an edit of the pixel in row 1, column 1."""
    model, given = build("Sana")
    site, outputs = Site.parse("transformer_blocks.0.img.mlp_out"), []

    def edit(x):
        x = x.clone()
        x[:, 5] = 9.0
        return x

    with tap(model, {site: edit}):
        late = model.transformer_blocks[0].ff.register_forward_hook(lambda module, args, output: outputs.append(output))
        forward(model, given)
        late.remove()
    assert (outputs[0][:, :, 1, 1] == 9).all() and (outputs[0] == 9).sum() == outputs[0][:, :, 0, 0].numel()


def test_every_row_has_a_tiny_model_a_class_in_diffusers_and_stages():
    assert {type(build(name)[0]).__name__ for name in NAMES} == set(ARCHITECTURES)
    for kind, row in ARCHITECTURES.items():
        assert isinstance(getattr(diffusers, kind), type)
        assert {*row.families, *row.top, *row.end} <= set(STAGES), kind


def test_a_family_is_a_row_and_not_code():
    """No source file but the tables speaks of a model by name."""
    import ast
    from pathlib import Path

    folder = Path(architectures.__file__).parent
    for file in ("sites.py", "taps.py", "hooks.py"):
        words = {
            node.value for node in ast.walk(ast.parse((folder / file).read_text())) if isinstance(node, ast.Constant)
        }
        assert not {
            word for word in words if isinstance(word, str) and "Transformer2DModel" in word and " " not in word
        }


def test_chunked_feed_forward_takes_its_sites_away_and_says_why():
    model, _ = build("SD3.5-large")
    model.enable_forward_chunking(1)
    with pytest.raises(UsageError, match=r"img.mlp_out' passes no tensor here, its _chunk_size is set"):
        resolve(model, "transformer_blocks.0.img.mlp_out")
    model.disable_forward_chunking()
    assert resolve(model, "transformer_blocks.0.img.mlp_out")
