"""`safedig show` says what a model is; with --quality it draws fresh prompts of every kind and times a batch."""

import json

import pytest

from safedig import tiny
from safedig.__main__ import main
from safedig.pipelines import Drawing
from safedig.prompts import KINDS, prompts_from_rows, save_prompts
from safedig.recipes import Recipe
from safedig.verbs import show

CUP = {"name": "cup", "colour": "red", "place": "left"}


def a_judge(images, asked=None):
    """Sees a red cup on the left everywhere, by day; its second eye sees it by night."""
    own, other = ({"objects": [CUP], "background": background} for background in ("day", "night"))
    return [{"label": "clean", "p_unsafe": 0.0, **own, "second": {"label": "clean", **other}} for _ in images]


@pytest.fixture
def shown(monkeypatch, tiny_random_flux, capsys):
    """Runs `safedig show` on random weights and a judge that always sees the same; gives what it prints."""
    drawing = Drawing(1, 0.0, 32, 32, max_sequence_length=12)
    monkeypatch.setattr(tiny, "judge", a_judge, raising=False)
    monkeypatch.setattr(Recipe, "pipeline", lambda recipe: tiny_random_flux)
    monkeypatch.setattr(Recipe, "drawing_of", lambda recipe, pipe: drawing)
    for name, value in (("PER_KIND", 3), ("QUICK", 2), ("RENDERS", 8), ("MATMUL", 64)):
        monkeypatch.setattr(show, name, value)

    def run(*argv):
        assert main(["show", "tiny-flux", *argv]) == 0
        out = capsys.readouterr().out
        return json.loads(out) if "--json" in argv else out

    return run


def test_without_quality_nothing_is_drawn(shown, monkeypatch):
    monkeypatch.setattr(show, "draw", None)
    result = shown("--json")
    assert set(result) == {"recipe", "recipe_sha", "model"} and result["model"]["class"] == "FluxPipeline"
    assert result["model"]["sites"]["transformer_blocks.1.img.resid_post"] == 32
    assert len(result["model"]["fingerprint"]) == 64 and result["recipe"]["model"] == "tiny-flux"


def test_quality_has_every_kind_for_both_eyes_their_agreement_and_the_judge_on_renders(shown):
    quality = shown("--quality", "--json")["quality"]
    assert set(quality) == {"judge", "second", "agreement", "judge_on_renders"}
    for eye in ("judge", "second"):
        exact = quality[eye]["exact"]
        assert {*KINDS} - {"underspecified"} == {*exact} - {"indirect"}
        assert all(exact[kind]["n"] == 3 for kind in exact if kind != "indirect")
        assert quality[eye]["hazard_unasked"]["k"] == 0 and quality[eye]["hazard_unasked"]["n"] == 6
    assert quality["agreement"] | {"lo": 0, "hi": 0} == quality["agreement"] | {"k": 0, "n": 12, "lo": 0, "hi": 0}
    assert set(quality["judge_on_renders"]) == {"clean", "disturbed", "garbled_unrecognised", "garbled_clean"}


def test_speed_is_per_image_and_per_core_beside_a_matrix_product(shown):
    speed = shown("--quality", "--json")["speed"]
    assert speed["core_seconds_per_image"] > 0 and speed["matmul_gigaflops_per_image"] == pytest.approx(
        speed["matmul_gigaflops_per_second"] * speed["core_seconds_per_image"]
    )


def test_prompts_are_fresh_for_every_seed_and_quick_draws_fewer(shown, monkeypatch):
    asked, real = [], show.draw
    monkeypatch.setattr(
        show, "draw", lambda pipe, rows, **options: (asked.append([*rows]), real(pipe, rows, **options))[1]
    )
    shown("--quality", "--json", "--quick"), shown("--quality", "--json", "--quick", "--seed", "5")
    first, other = ({row["prompt"] for row in rows} for rows in asked[::4])
    assert len(first) == 8 and first != other
    assert {row["split"] for row in asked[0]} == {"report"}


def test_out_keeps_the_result_and_a_page_of_pictures_for_every_kind(shown, tmp_path, monkeypatch):
    monkeypatch.setattr(show, "GALLERY", 3)
    result = shown("--out", str(tmp_path), "--json")
    assert json.loads((tmp_path / "tiny-flux.json").read_text()) == result
    pages = {path.name: path.read_bytes() for path in tmp_path.glob("*.png")}
    assert set(pages) == {f"tiny-flux-{kind}.png" for kind in KINDS}
    assert len(set(pages.values())) == len(KINDS) and all(page.startswith(b"\x89PNG") for page in pages.values())


def test_given_prompts_are_drawn_instead(shown, tmp_path):
    rows = [
        {"id": "c", "prompt": "a red cup", "objects": json.dumps([CUP])},
        {"id": "k", "prompt": "a knife", "risk": "weapon", "objects": json.dumps([CUP | {"name": "knife"}])},
        {"id": "u", "prompt": "a thing", "kind": "underspecified"},
    ]
    save_prompts(prompts_from_rows(rows), tmp_path / "p.csv")
    quality = shown("--quality", "--json", "--prompts", str(tmp_path / "p.csv"))["quality"]
    assert {kind: rate["rate"] for kind, rate in quality["judge"]["exact"].items()} == {"benign": 1.0, "harmful": 0.0}
    assert quality["agreement"]["n"] == 3


def test_the_seed_of_given_prompts_counts_on_from_the_commands(shown, tmp_path, monkeypatch):
    drawn, real = [], show.draw
    monkeypatch.setattr(show, "draw", lambda pipe, rows, **how: (drawn.append([*rows]), real(pipe, rows, **how))[1])
    (tmp_path / "p.csv").write_text("prompt,seed\na cup,8\na hat,8\n")
    argv = ["--quality", "--json", "--prompts", str(tmp_path / "p.csv")]
    shown(*argv), shown(*argv, "--seed", "5")
    seeds = [[row["seed"] for row in rows] for rows in drawn if [row["prompt"] for row in rows] == ["a cup", "a hat"]]
    assert seeds == [[8, 8], [5, 6]]


def test_prompts_without_a_benign_one_are_refused(shown, tmp_path, capsys):
    save_prompts(prompts_from_rows([{"prompt": "a knife", "risk": "weapon"}]), tmp_path / "p.csv")
    assert main(["show", "tiny-flux", "--quality", "--prompts", str(tmp_path / "p.csv")]) == 2
    assert "holds no benign prompt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--prompts", "FILE"], "--prompts has no say in `safedig show`: leave it out, or add --quality."),
        (
            ["--out", "FOLDER", "--prompts", "FILE"],
            "--prompts has no say in `safedig show --out`: leave it out, or add",
        ),
        (["--seed", "5"], "--seed has no say in `safedig show`: leave it out, or add --quality."),
        (["--sites", "--quality"], "--quality has no say in `safedig show --sites`: leave it out."),
        (["--sites", "--out", "FOLDER"], "--out has no say in `safedig show --sites`: leave it out."),
        (["--sae", "FOLDER", "--quick"], "--quick has no say in `safedig show --sae`: leave it out."),
        (["--feature", "3"], "--feature 3: give the autoencoder that it is of, --sae FOLDER."),
    ],
)
def test_a_flag_that_would_do_nothing_is_refused(shown, tmp_path, capsys, argv, message):
    (tmp_path / "p.csv").write_text("prompt\na cup\n")
    places = {"FILE": str(tmp_path / "p.csv"), "FOLDER": str(tmp_path)}
    assert main(["show", "tiny-flux", *(places.get(word, word) for word in argv)]) == 2
    assert capsys.readouterr().err.startswith(f"safedig: {message}")


def test_the_table_shows_every_rate(shown):
    text = shown("--quality")
    for words in (
        "drawn exactly as asked", "the asked objects and no other", "each object as asked", "a hazard unasked",
        "the two agree", "indirect", "near-miss", "disturbed", "half-denoised", "and clean", "s an image on one core",
    ):  # fmt: skip
        assert words in text
    assert all(len(line) < 120 for line in text.split("percent of images")[1].splitlines())
