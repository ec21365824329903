"""A name finds its place on a live model, a wrong one the nearest; what is listed passes, and acts as it is marked."""

import pytest
import torch

from safedig.config import UsageError
from safedig.hooks import SafetyBypassError, attach
from safedig.recipes import load
from safedig.sites import Site, SiteError, d_in, of_the_prompt, places, ports, resolve, sites, stage
from safedig.skeleton import skeleton
from tests.tiny_pipelines import draw_images
from tests.tiny_transformers import build

NAMES = [
    "transformer_blocks.9.img.resid_post",
    "single_transformer_blocks.3.joint.branch_out",
    "txt.embed",
    "pooled.embed",
    "temb.out",
    "velocity",
]


@pytest.mark.parametrize("name", [*NAMES, "text_encoder_2:final.txt.resid_post", "text_encoder:pooled.embed"])
def test_a_name_survives_parsing(name):
    assert str(Site.parse(name)) == name


@pytest.mark.parametrize("name", ["", "a.b.c", "transformer_blocks.x.img.resid_post", "txt embed", "img."])
def test_what_is_no_name_is_refused_with_an_example(name):
    with pytest.raises(SiteError, match=r"transformer_blocks\.9\.img\.resid_post"):
        Site.parse(name)


def test_the_parts_of_a_name():
    site = Site.parse("transformer_blocks.9.img.resid_post")
    assert (site.component, site.family, site.index) == ("transformer", "transformer_blocks", 9)
    assert (site.stream, site.point) == ("img", "resid_post")


def test_listed_sites_have_distinct_names_that_parse_to_themselves(pipe):
    listed = [place.site for place in places(pipe)]
    assert len({str(site) for site in listed}) == len(listed)
    assert [Site.parse(str(site)) for site in listed] == listed
    assert set(sites(pipe)) < set(listed) == set(ports(pipe))


def test_flux_has_double_and_single_blocks(tiny_random_flux):
    names = [str(site) for site in sites(tiny_random_flux)]
    assert names[:4] == ["txt.embed", "img.embed", "pooled.embed", "temb.out"] and names[-1] == "velocity"
    double, single = 2 * 5, 3 * 3 + 2
    assert len(names) == 6 + 2 * double + 2 * single - len(["attn_heads", "mlp_hidden", "branch_out", "resid_post"])


def test_sd3_has_joint_blocks_only_and_its_last_has_hardly_any_text(tiny_random_sd3):
    assert len(sites(tiny_random_sd3)) == 6 + 3 * 2 * 5 - len(["attn_out", "resid_mid", "mlp_out", "resid_post"])
    last = {str(place.site): place.dead for place in places(tiny_random_sd3) if ".2.txt." in str(place.site)}
    assert last == {"transformer_blocks.2.txt.resid_pre": False, "transformer_blocks.2.txt.attn_out": True}


def test_a_dead_site_is_found_by_its_name_alone_and_marked(tiny_random_flux):
    name = "single_transformer_blocks.1.txt.resid_post"
    assert [str(site) for site in resolve(tiny_random_flux, name)] == [name]
    assert resolve(tiny_random_flux, "single_transformer_blocks.-1.txt.resid_post") == [Site.parse(name)]
    assert Site.parse(name) not in resolve(tiny_random_flux, "single_transformer_blocks.*.txt.resid_post")
    with pytest.raises(SiteError, match=rf"alive: nothing that reaches the image reads.*Name '{name}' in full"):
        resolve(tiny_random_flux, "single_transformer_blocks.1.txt.resid_pos?")


def test_what_passes_no_tensor_is_an_error_that_says_why(tiny_random_sd3):
    with pytest.raises(
        SiteError, match="'transformer_blocks.2.txt.resid_post' passes no tensor.*context_pre_only is set"
    ):
        resolve(tiny_random_sd3, "transformer_blocks.2.txt.resid_post")
    with pytest.raises(
        SiteError, match="'transformer_blocks.1.img.attn2_out' passes no tensor here, its attn2 is miss"
    ):
        resolve(tiny_random_sd3, "transformer_blocks.1.img.attn2_out")


@pytest.mark.parametrize(
    ("model", "pattern", "message"),
    [
        ("PixArt", "transformer_blocks.1.txt.resid_post", "transformer_blocks has no txt stream, only img"),
        ("Sana", "transformer_blocks.*.txt.*", "transformer_blocks has no txt stream, only img"),
        ("Qwen-Image", "pooled.embed", "it has no pooled stream, only img, temb, txt, velocity"),
        ("Lumina2", "noise_refiner.-1.txt.resid_post", "noise_refiner has no txt stream, only img"),
    ],
)
def test_a_stream_that_the_model_does_not_have_is_an_error_that_says_so(model, pattern, message):
    with pytest.raises(SiteError, match=message):
        resolve(build(model)[0], pattern)


def watched(pipe, draw):
    """The shape of what passes each place of the pipeline in one drawing."""
    seen = {}
    with attach(pipe, {site: lambda x, context: seen.__setitem__(context.site, x.shape) for site in ports(pipe)}):
        draw()
    return seen


def test_what_passes_a_site_has_the_promised_width_and_tokens(pipe):
    seen = watched(pipe, lambda: draw_images(pipe, ["a cup", "a gun"]))
    for place in places(pipe):
        assert seen[place.site][2] == place.d_in == d_in(pipe, place.site), place.site
        assert (seen[place.site][1] == 1) == (place.site.stream in ("pooled", "temb")), place.site


def test_the_text_and_image_streams_are_told_apart(pipe):
    """FLUX and SD3 blocks return (txt, img): taking the first output for the image is the classic mistake."""
    tokens = {site: shape[1] for site, shape in watched(pipe, lambda: draw_images(pipe, ["a cup"])).items()}
    img, txt = (tokens[Site.parse(f"{stream}.embed")] for stream in ("img", "txt"))
    assert img == 64 != txt
    for site, count in tokens.items():
        if site.component == "transformer":
            assert count == {"img": img, "txt": txt, "joint": img + txt}.get(site.stream, count)


def test_where_only_the_prompt_passes_it_is_the_same_in_every_step_and_the_timestep_is_not(pipe):
    seen = {}
    live = [place.site for place in places(pipe) if place.site.component == "transformer" and not place.dead]

    def keep(x, context):
        seen.setdefault((context.site, context.rows), []).append(x.clone())

    with attach(pipe, dict.fromkeys(live, keep)):
        draw_images(pipe, ["a cup"])
    same = {site: all(torch.equal(steps[0], one) for one in steps[1:]) for (site, _), steps in seen.items()}
    assert {str(site) for site in same if of_the_prompt(site)} == {"txt.embed", "pooled.embed"}
    assert all(same[site] for site in same if of_the_prompt(site))
    assert not same[Site.parse("temb.out")] and not same[Site.parse("img.embed")], "the control"
    assert of_the_prompt(Site.parse("text_encoder_2:final.txt.resid_post"))


def test_rewriting_changes_the_image_if_and_only_if_the_site_can_be_edited(pipe):
    """Text encoders too: transformers collects their hidden states by hooks of its own, which must not come first."""
    plain = draw_images(pipe, ["a cup"])
    for place in places(pipe):
        if place.port.read_only:
            with pytest.raises(UsageError, match="cannot be edited"), attach(pipe, {place.site: lambda x, _: x + 1}):
                draw_images(pipe, ["a cup"])
            continue
        with attach(pipe, {place.site: lambda x, _: x.clone()}):
            assert torch.equal(draw_images(pipe, ["a cup"]), plain), place.site
        with attach(pipe, {place.site: lambda x, _: x * 1.5 + torch.linspace(0, 1, x.shape[2])}):
            assert torch.equal(draw_images(pipe, ["a cup"]), plain) == place.dead == (place.why_not != ""), place.site


def test_text_encoders_are_read_before_the_first_step_in_their_own_rows(pipe):
    seen = []
    chosen = resolve(pipe, "text_encoder*:{final.txt.resid_post,pooled.embed,*.-1.txt.resid_post}")
    with attach(pipe, {site: lambda x, context: seen.append((context, len(x))) for site in chosen}):
        draw_images(pipe, ["a cup", "a gun"])
    assert {(context.step, context.sigma, count) for context, count in seen} == {(-1, 1.0, 2)}
    for site in chosen:
        rows = [context.rows for context, _ in seen if context.site == site]
        assert rows == [("cond",) * 2, ("uncond",) * 2], site


def test_a_text_encoder_that_does_not_run_stops_the_image(tiny_random_sd3):
    """Embeddings that the caller made elsewhere have not passed the site."""
    pipe, site = tiny_random_sd3, Site.parse("text_encoder_3:final.txt.resid_post")
    embeds = pipe.encode_prompt("a gun", "a gun", "a gun", max_sequence_length=12)
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    given = dict(zip(names, embeds, strict=True))
    with (
        pytest.raises(SafetyBypassError, match=r"no prompt was read at 'text_encoder_3:final.txt.resid_post'"),
        attach(pipe, {site: lambda x, _: x}),
    ):
        pipe(**given, height=32, width=32, num_inference_steps=2, output_type="pt")


@pytest.mark.parametrize("negative", ["a tree", None])
def test_a_negative_prompt_in_words_does_not_stand_in_for_a_prompt_in_embeddings(pipe, negative):
    """The encoder reads the negative prompt alone. The control: with the prompt in words as well, both are read."""
    flux = "Flux" in type(pipe).__name__
    site = Site.parse(f"text_encoder_{2 if flux else 3}:final.txt.resid_post")
    options = {"height": 32, "width": 32, "num_inference_steps": 2, "max_sequence_length": 12, "output_type": "pt"}
    options |= {"true_cfg_scale" if flux else "guidance_scale": 3.0, "negative_prompt": negative}
    if flux:
        embeds, pooled, _ = pipe.encode_prompt("a gun", None, max_sequence_length=12)
    else:
        embeds, _, pooled, _ = pipe.encode_prompt(
            "a gun", None, None, max_sequence_length=12, do_classifier_free_guidance=False
        )
    rows: list[tuple[str, ...]] = []
    with (
        pytest.raises(SafetyBypassError, match=f"no prompt was read at '{site}'"),
        attach(pipe, {site: lambda x, context: rows.append(context.rows)}),
    ):
        pipe(prompt_embeds=embeds, pooled_prompt_embeds=pooled, **options)
    assert rows == ([("uncond",)] if negative or not flux else [])
    rows.clear()
    with attach(pipe, {site: lambda x, context: rows.append(context.rows)}):
        pipe("a gun", **options)
    assert rows == [("cond",), ("uncond",)][: len(rows)] and len(rows) == (2 if negative or not flux else 1)


def test_patterns(tiny_random_flux):
    def names(pattern):
        return [str(site) for site in resolve(tiny_random_flux, pattern)]

    assert names("transformer_blocks.*.img.resid_post") == [f"transformer_blocks.{i}.img.resid_post" for i in (0, 1)]
    assert names("transformer_blocks.-1.txt.resid_pre") == ["transformer_blocks.1.txt.resid_pre"]
    assert names("transformer_blocks.{-2,-1}.{img,txt}.attn_out") == [
        f"transformer_blocks.{i}.{stream}.attn_out" for i in (0, 1) for stream in ("txt", "img")
    ]
    assert names("{txt,pooled}.embed") == ["txt.embed", "pooled.embed"]
    assert names("transformer:velocity") == ["velocity"]
    assert len(names("*.img.resid_post")) == 4
    assert names(["velocity", Site.parse("txt.embed"), "velocity"]) == ["velocity", "txt.embed"]
    assert names("text_encoder_2:final.txt.resid_post") == ["text_encoder_2:final.txt.resid_post"]
    assert names("text_encoder_2:block.-1.txt.*") == ["text_encoder_2:block.1.txt.resid_post"]
    assert names("text_encoder*:final.*") == [
        f"{one}:final.txt.resid_post" for one in ("text_encoder", "text_encoder_2")
    ]
    assert all(site.component == "transformer" for site in resolve(tiny_random_flux, "*"))


@pytest.mark.parametrize(
    "wrong", ["txt.embedd", "transformer_blocks.7.img.resid_post", "transformer_blocks.-4.img.resid_post"]
)
def test_a_wrong_name_points_to_the_nearest(pipe, wrong):
    with pytest.raises(SiteError, match=f"matches '{wrong}'.*Did you mean '"):
        resolve(pipe, wrong)


def test_one_wrong_name_among_right_ones_is_an_error_too(pipe):
    with pytest.raises(SiteError, match=r"matches 'transformer_blocks\.\{0,7\}.*Did you mean '"):
        resolve(pipe, "transformer_blocks.{0,7}.img.resid_post")


def test_a_wrong_component_points_to_the_nearest(pipe):
    with pytest.raises(SiteError, match="No component matches 'text_encoder_9'. Did you mean 'text_encoder"):
        resolve(pipe, "text_encoder_9:final.txt.resid_post")


def test_a_bare_transformer_has_the_sites_of_its_pipeline(pipe):
    assert sites(pipe.transformer) == sites(pipe)
    assert resolve(pipe.transformer, "*.img.*") == resolve(pipe, "*.img.*")


def test_an_unknown_architecture_is_refused(pipe):
    class Other:
        transformer = torch.nn.Linear(2, 2)

    with pytest.raises(UsageError, match=r"Linear is not supported: expected one of FluxTransformer2DModel"):
        sites(Other())


def test_stages(pipe):
    stages = {str(place.site): stage(place.site) for place in places(pipe)}
    assert stages["txt.embed"] == stages["pooled.embed"] == stages["text_encoder:final.txt.resid_post"] == "text"
    assert stages["transformer_blocks.0.img.resid_post"] == "bind" and stages["velocity"] == "render"
    assert {stages[name] for name in stages if name.startswith("single")} <= {"render"}


@pytest.mark.parametrize(("name", "first"), [("tiny-sd3", 4), ("sd3.5-medium", 16), ("sd3.5-large", 26)])
def test_where_there_are_joint_blocks_alone_the_last_third_renders(name, first):
    pipe = skeleton(load(name).model)
    blocks = [site for site in sites(pipe) if site.index is not None]
    assert {site.index for site in blocks if stage(site, pipe) == "render"} == set(range(first, blocks[-1].index + 1))
    assert {stage(site, pipe) for site in blocks} == {"bind", "render"}
    assert stage(resolve(pipe, "img.final")[0], pipe) == "render" and stage(blocks[0], pipe) == "bind"
    assert {stage(site) for site in blocks} == {"bind"}  # nothing tells how many there are


@pytest.mark.parametrize("name", ["tiny-flux", "flux1-dev"])
def test_where_single_blocks_render_all_double_blocks_bind(name):
    pipe = skeleton(load(name).model)
    blocks = [site for site in sites(pipe) if site.index is not None]
    assert {(site.family, stage(site, pipe)) for site in blocks} == {
        ("transformer_blocks", "bind"),
        ("single_transformer_blocks", "render"),
    }
