"""Every Python block of the documentation runs: those of pages without tests of their own here; none is left out."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from safedig.tiny.scenes import Placed, Scene, render
from tests.lessons import lesson

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r"```python\n(.*?)```", flags=re.DOTALL)
ELSEWHERE = {"evaluation.md", "flux.md", "sd3.md", "steering.md"}  # in the tests of these pages
HERE = {"adaptation.md", "denoiser.md", "tiny-world.md"}


def run(page, **scope):
    (code,) = BLOCK.findall((DOCS / page).read_text(encoding="utf-8"))
    exec(compile(code, page, "exec"), scope)
    return scope


def test_no_page_with_python_is_left_out():
    found = {path.name for path in DOCS.glob("*.md") if BLOCK.search(path.read_text(encoding="utf-8"))}
    assert found == ELSEWHERE | HERE


@pytest.mark.parametrize("page", sorted(path.name for path in DOCS.glob("*.md")))
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!http)([^)#]+)\)", (DOCS / page).read_text(encoding="utf-8"))
    assert [link for link in links if not (DOCS / link).exists()] == []


def test_the_tiny_world_draws_and_is_judged():
    scope = run("tiny-world.md")
    assert len(scope["judgements"]) == len(scope["asked"]) > 0


def test_the_safe_denoiser_takes_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "not-to-be-drawn").mkdir()
    for at, colour in enumerate(("red", "blue")):
        picture = Image.fromarray(render(Scene((Placed("knife", colour, "left"),), "day")))
        picture.save(tmp_path / "not-to-be-drawn" / f"{at}.png")
    scope = run("denoiser.md")
    assert scope["image"].size == (64, 64) and len(scope["negation"]) == 2


def test_decoders_move_and_encoders_stay():
    given = lesson("tiny-flux")
    before, known = given.dictionaries, [*given.source, *given.benign]
    site = next(iter(before))
    scope = run(
        "adaptation.md",
        safedig=__import__("safedig"),
        saes=before,
        acts=given.recording,
        features=given.features,
        source=known,
        target=given.target,
        site=site,
    )
    rows = torch.randn(4, before[site].d_in)
    assert torch.equal(scope["saes"][site].encode(rows), before[site].encode(rows)) and site in scope["harm"]
