"""`safedig show MODEL --sites` foretells what the hooks will meet, and loads no weights for it."""

import json
from types import SimpleNamespace

import pytest

from safedig import recipes
from safedig.__main__ import main
from safedig.hooks import attach
from safedig.pipelines import Drawing
from safedig.sites import places
from safedig.taps import tap
from safedig.verbs import Options, show, sites_table
from tests.tiny_pipelines import TEXT_TOKENS, draw_images
from tests.tiny_transformers import BUILDERS, SIDE, TEXT, build, forward

LONGEST = {"Z-Image": 40}
CLIP = 2  # tokens


def foretold(name, model):
    """Tokens by the table, as if an autoencoder made 2 × 2 pixels of each latent one."""
    side = SIDE // 2 if name == "Sana" else SIDE
    first = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=CLIP))
    pipe = SimpleNamespace(transformer=model, vae_scale_factor=2, text_encoder=first)
    text = LONGEST.get(name, TEXT) - CLIP * name.startswith("SD3")
    drawing = Drawing(steps=1, guidance=1.0, height=2 * side, width=2 * side, max_sequence_length=text)
    return {place.site: sites_table.tokens(pipe, place, drawing) for place in places(model)}


@pytest.mark.parametrize("name", BUILDERS)
def test_tokens_are_those_that_pass(name):
    (model, given), seen = build(name), {}
    with tap(model, {place.site: counted(seen, place.site) for place in places(model)}):
        forward(model, given)
    assert foretold(name, model) == seen


def counted(seen, site):
    def function(x):
        seen[site] = x.shape[1]

    return function


def test_tokens_of_text_encoders_and_transformer_are_those_that_pass(pipe):
    drawing, seen = Drawing(3, 3.0, 32, 32, max_sequence_length=TEXT_TOKENS), {}
    with attach(pipe, {place.site: lambda x, at: seen.__setitem__(at.site, x.shape[1:]) for place in places(pipe)}):
        draw_images(pipe, ["a cup"])
    for place in places(pipe):
        assert (sites_table.tokens(pipe, place, drawing), place.d_in) == seen[place.site], place.site


@pytest.fixture
def shown(monkeypatch, capsys):
    """Runs `safedig show RECIPE --sites`, in which loading a pipeline is an error."""

    def loaded(*_, **__):
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr(recipes.Recipe, "pipeline", loaded)

    def run(*argv):
        assert main(["show", *argv, "--sites"]) == 0
        out = capsys.readouterr().out
        return json.loads(out) if "--json" in argv else out

    return run


@pytest.mark.parametrize(
    ("recipe", "listed"),
    [
        (
            "flux1-dev",
            {"transformer_blocks.18.img.resid_post": (3072, 4096, 25_165_824), "txt.embed": (3072, 512, None)},
        ),
        ("flux1-schnell", {"transformer_blocks.0.txt.attn_out": (3072, 256, 1_572_864)}),
        (
            "sd3.5-large",
            {"transformer_blocks.37.img.resid_post": (2432, 4096, 19_922_944), "velocity": (16, 16384, None)},
        ),
        (
            "sd3.5-medium",
            {"transformer_blocks.12.img.attn2_out": (1536, 4096, 12_582_912), "pooled.embed": (2048, 1, None)},
        ),
    ],
)
def test_released_models_are_as_wide_and_long_as_they_are(shown, recipe, listed):
    result = shown(recipe, "--json")
    for name, (width, tokens, size) in listed.items():
        site = result["sites"][name]
        assert (site["d_in"], site["tokens"], site["bytes"]) == (width, tokens, size or 2 * width * tokens)
    assert result["dtype"] == "bfloat16" and set(result) == {"model", "class", "dtype", "drawing", "sites"}


def test_dual_attention_is_listed_where_it_is(shown):
    sites = shown("sd3.5-medium", "--json")["sites"]
    assert [f"transformer_blocks.{at}.img.attn2_out" in sites for at in range(24)] == [True] * 13 + [False] * 11
    assert not any("attn2_out" in name for name in shown("sd3.5-large", "--json")["sites"])


def test_the_resolution_may_be_another(shown):
    small, wide = (shown("flux1-dev", f"drawing.width={width}", "--json")["sites"] for width in (512, 2048))
    assert wide["img.embed"]["tokens"] == 4 * small["img.embed"]["tokens"]
    assert wide["txt.embed"] == small["txt.embed"]


def test_what_cannot_be_edited_says_why(shown):
    sites = shown("tiny-sd3", "--json")["sites"]
    closed = {name: row["why_not"] for name, row in sites.items() if not row["editable"]}
    assert {name.split(".")[-1] for name in closed} == {"resid_mid", "attn_out"} and all(closed.values())
    assert [name for name, row in sites.items() if row["dead"]] == [
        name for name in closed if name.endswith("txt.attn_out")
    ]


def test_the_table_puts_like_blocks_on_one_line(shown):
    text = shown("flux1-dev")
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}
    assert lines["transformer_blocks.*.img.resid_post"][1:] == [
        "0-18",
        "img",
        "bind",
        "3,072",
        "4,096",
        "25,165,824",
        "yes",
    ]
    assert lines["(1)"][1:4] == ["only", "the", "norm"]
    assert "single_transformer_blocks.*.txt.resid_post    37      txt" in text
    assert len(text.splitlines()) < 50 and max(map(len, text.splitlines())) < 140


def test_show_without_the_flag_still_loads_the_model(monkeypatch, tiny_random_flux):
    monkeypatch.setattr(recipes.Recipe, "pipeline", lambda *_, **__: tiny_random_flux)
    assert "fingerprint" in show.run(recipes.load("tiny-flux"), Options())["model"]
