"""Every site that is listed is live: what passes there is of the promised width, and rewriting it changes the image."""

import pytest
import torch

from safedig.config import UsageError
from safedig.hooks import attach
from safedig.sites import Site, SiteError, d_in, resolve, sites, stage
from tests.tiny_pipelines import draw_images

NAMES = ["transformer_blocks.9.img.resid_post", "txt.embed", "pooled.embed", "temb.out", "velocity"]


@pytest.mark.parametrize("name", [*NAMES, "text_encoder_2:final.3.txt.resid_post"])
def test_a_name_survives_parsing(name):
    assert str(Site.parse(name)) == name


@pytest.mark.parametrize("name", ["", "a.b.c", "transformer_blocks.x.img.resid_post", "txt embed"])
def test_what_is_no_name_is_refused_with_an_example(name):
    with pytest.raises(SiteError, match=r"transformer_blocks\.9\.img\.resid_post"):
        Site.parse(name)


def test_the_parts_of_a_name():
    site = Site.parse("transformer_blocks.9.img.resid_post")
    assert (site.component, site.family, site.index) == ("transformer", "transformer_blocks", 9)
    assert (site.stream, site.point) == ("img", "resid_post")


def test_listed_sites_have_distinct_names_that_parse_to_themselves(pipe):
    listed = sites(pipe)
    assert len({str(site) for site in listed}) == len(listed)
    assert [Site.parse(str(site)) for site in listed] == listed


def test_flux_has_double_and_single_blocks(tiny_random_flux):
    names = [str(site) for site in sites(tiny_random_flux)]
    assert names[:4] == ["txt.embed", "img.embed", "pooled.embed", "temb.out"] and names[-1] == "velocity"
    assert "single_transformer_blocks.0.txt.resid_post" in names
    assert len(names) == 5 + 2 * 4 + 2 * 2 - 1


def test_sd3_has_joint_blocks_only(tiny_random_sd3):
    assert len(sites(tiny_random_sd3)) == 5 + 3 * 4 - 1


@pytest.mark.parametrize(
    ("which", "dead"),
    [("flux", "single_transformer_blocks.1.txt.resid_post"), ("sd3", "transformer_blocks.2.txt.resid_post")],
)
def test_the_text_stream_of_the_last_block_is_no_site(request, which, dead):
    pipe = request.getfixturevalue(f"tiny_random_{which}")
    with pytest.raises(SiteError, match="Did you mean"):
        resolve(pipe, dead)


def test_what_passes_a_site_has_the_promised_width_and_tokens(pipe):
    seen = {}
    with attach(pipe, {site: lambda x, context: seen.__setitem__(context.site, x.shape) for site in sites(pipe)}):
        draw_images(pipe, ["a cup", "a gun"])
    for site in sites(pipe):
        assert seen[site][2] == d_in(pipe, site), site
        assert (seen[site][1] == 1) == (site.stream in ("pooled", "temb")), site


def test_the_text_and_image_streams_are_told_apart(pipe):
    """FLUX and SD3 blocks return (txt, img): taking the first output for the image is the classic mistake."""
    tokens = {}
    with attach(pipe, {site: lambda x, context: tokens.__setitem__(context.site, x.shape[1]) for site in sites(pipe)}):
        draw_images(pipe, ["a cup"])
    for stream in ("img", "txt"):
        found = {count for site, count in tokens.items() if site.stream == stream}
        assert found == {tokens[Site.parse(f"{stream}.embed")]}
    assert tokens[Site.parse("img.embed")] == 64 and tokens[Site.parse("txt.embed")] != 64


def test_rewriting_any_site_changes_the_image_and_rewriting_it_by_itself_does_not(pipe):
    plain = draw_images(pipe, ["a cup"])
    for site in sites(pipe):
        with attach(pipe, {site: lambda x, _: x.clone()}):
            assert torch.equal(draw_images(pipe, ["a cup"]), plain), site
        with attach(pipe, {site: lambda x, _: x * 1.5 + 0.1}):
            assert not torch.equal(draw_images(pipe, ["a cup"]), plain), site


def test_patterns(tiny_random_flux):
    def names(pattern):
        return [str(site) for site in resolve(tiny_random_flux, pattern)]

    assert names("transformer_blocks.*.img.resid_post") == [f"transformer_blocks.{i}.img.resid_post" for i in (0, 1)]
    assert names("transformer_blocks.-1.txt.resid_pre") == ["transformer_blocks.1.txt.resid_pre"]
    assert names("{txt,pooled}.embed") == ["txt.embed", "pooled.embed"]
    assert names("transformer:velocity") == ["velocity"]
    assert len(names("*.img.resid_post")) == 4
    assert names(["velocity", Site.parse("txt.embed"), "velocity"]) == ["velocity", "txt.embed"]


@pytest.mark.parametrize(
    "wrong", ["txt.embedd", "transformer_blocks.7.img.resid_post", "transformer_blocks.-4.img.resid_post"]
)
def test_a_wrong_name_points_to_the_nearest(pipe, wrong):
    with pytest.raises(SiteError, match=f"matches '{wrong}'.*Did you mean '"):
        resolve(pipe, wrong)


def test_an_unknown_architecture_is_refused(pipe):
    class Other:
        transformer = torch.nn.Linear(2, 2)

    with pytest.raises(UsageError, match=r"Linear is not supported: expected one of FluxTransformer2DModel"):
        sites(Other())


def test_stages(pipe):
    stages = {str(site): stage(site) for site in sites(pipe)}
    assert stages["txt.embed"] == stages["pooled.embed"] == "text"
    assert stages["transformer_blocks.0.img.resid_post"] == "bind"
    assert {stages[name] for name in stages if name.startswith("single")} <= {"render"}
