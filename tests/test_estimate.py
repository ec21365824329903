"""`safedig plan` is exact to the byte, needs neither weights nor network, and is done before a model would load."""

import json
import os
import resource
import subprocess
import sys

import pytest
import torch

from safedig.__main__ import main
from safedig.activations.record import record
from safedig.config import UsageError
from safedig.estimate import estimate
from safedig.pipelines import load_pipeline
from safedig.recipes import load
from tests.reduced_models import write

TIMES = 3  # of what importing the pipeline alone takes, on the same machine


def planned(capsys, *argv):
    assert main(["plan", *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("recipe", "width", "text", "tflop"), [("flux1-dev", 3072, 512, 74.4), ("sd3.5-large", 2432, 77 + 256, 62.2)]
)
def test_two_thousand_prompts_at_six_sigmas_and_three_sites(capsys, recipe, width, text, tflop):
    found = planned(capsys, recipe)
    sites = found["sites"].values()
    assert len(found["sigmas"]) == 6 and found["sigmas"][0] == 1.0
    assert [site["d_in"] for site in sites] == [width] * 3
    assert [site["tokens"] for site in sites] == [text, text, 64 * 64]
    assert [site["rows"] for site in sites] == [2000 * 6 * 256] * 3
    assert found["bytes"] == 2000 * 6 * 256 * 3 * width * 2
    assert found["tflop_per_forward"] == pytest.approx(tflop, abs=0.05)
    assert found["forwards"] == 2000 * 28
    assert found["hours"] == pytest.approx(2000 * 28 * tflop / 300 / 3600, rel=1e-3)
    assert found["weights"]["bytes"]["bfloat16"] == 2 * sum(found["weights"]["parameters"].values())


@pytest.mark.parametrize("recipe", ["flux1-schnell", "sd3.5-medium"])
def test_show_counts_the_tokens_that_pass(capsys, recipe):
    """Two ways to the same number: `show --sites` calculates it, `plan` puts hooks on the sites and looks."""
    found = planned(capsys, recipe, "sites=['*.embed', 'temb.out', 'transformer_blocks.{0,-1}.*', 'velocity']")
    assert main(["show", recipe, "--sites", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["sites"]
    assert len(found["sites"]) > 10
    for site, planned_ in found["sites"].items():
        assert (listed[site]["tokens"], listed[site]["d_in"]) == (planned_["tokens"], planned_["d_in"]), site


def test_it_takes_hardly_longer_than_an_import_and_no_network():
    """Every socket is refused: a name that had to be looked up would be an error."""
    code = (
        "import socket, sys\n"
        "def refuse(*args, **options): raise AssertionError('the network was touched')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from safedig.__main__ import main\n"
        "sys.exit(main(['plan', 'flux1-dev', '--json']))"
    )
    _, importing = ran("from diffusers import FluxPipeline")
    told, planning = ran(code)
    assert json.loads(told)["bytes"] == 56_623_104_000
    assert planning < TIMES * importing
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    assert peak < 2 * 2**20, "kilobytes: no weight was made"


def ran(code):
    """What it prints, and the seconds of processor time that it takes."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    return done.stdout, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("tokens", ["all", "pooled", 5])
@pytest.mark.parametrize("recipe", ["flux1-dev", "sd3.5-large", "sd3.5-medium"])
def test_the_plan_is_what_a_recording_then_takes(tmp_path, recipe, tokens):
    settings = load(
        recipe,
        [
            f"model={write(recipe, tmp_path / recipe, layers=3)}",
            "sites=['*:pooled.embed', '*:final.*', 'temb.out', '*.embed', 'transformer_blocks.{0,-2}.*.resid_*', "
            "'velocity']",
            f"record.tokens={tokens}",
            "record.prompts=2",
            "drawing.steps=2",
        ],
    )
    found = estimate(settings)
    pipe = settings.pipeline()
    prompts = [{"id": str(seed), "prompt": "a cup", "seed": seed} for seed in range(2)]
    rows, size = {}, 0
    for batch in record(pipe, prompts, settings.sites, tokens=tokens, drawing=settings.drawing_of(pipe)):
        rows[str(batch.site)] = rows.get(str(batch.site), 0) + len(batch.x)
        size += batch.x.numel() * batch.x.element_size()
        assert batch.x.shape[1] == found["sites"][str(batch.site)]["d_in"]
    assert rows == {site: one["rows"] for site, one in found["sites"].items()} and size == found["bytes"]
    assert pipe.transformer.dtype == torch.bfloat16
    assert found["weights"]["parameters"]["transformer"] == sum(p.numel() for p in pipe.transformer.parameters())


def test_true_guidance_runs_the_transformer_twice_and_guidance_doubles_the_rows(capsys):
    flux = [planned(capsys, "tiny-flux", f"drawing.true_cfg={cfg}") for cfg in ("false", "true")]
    assert flux[1]["forwards"] == 2 * flux[0]["forwards"]
    weak = planned(capsys, "tiny-flux", "drawing.true_cfg=true", "drawing.guidance=1")
    assert weak["forwards"] == flux[0]["forwards"], "guidance 1 is none"
    sd3 = [planned(capsys, "tiny-sd3", f"drawing.guidance={scale}") for scale in (1.0, 3.0)]
    assert sd3[1]["tflop_per_forward"] == pytest.approx(2 * sd3[0]["tflop_per_forward"])
    assert sd3[1]["bytes"] == sd3[0]["bytes"], "one of the two rows is kept"


@pytest.mark.parametrize(
    ("recipe", "widths"),
    [("flux1-dev", [(77, 768), (77, 768), (512, 4096)]), ("sd3.5-large", [(77, 768), (77, 768), (77, 1280)])],
)
def test_a_text_is_encoded_once_for_all_sigmas(capsys, recipe, widths):
    sites = "['text_encoder:layers.{0,-1}.*', 'text_encoder_2:{final,layers}.*txt.resid_post']"
    last = "text_encoder_2:final.txt.resid_post"
    found = planned(capsys, recipe, f"sites={sites}", "record.tokens=all")["sites"]
    chosen = [*list(found.values())[:2], found[last]]
    assert [(site["tokens"], site["d_in"]) for site in chosen] == widths
    for site in found.values():
        assert site["stage"] == "text" and site["rows"] == 2000 * site["tokens"]
        assert site["bytes"] == site["rows"] * site["d_in"] * 2


def test_the_plan_follows_the_overrides_and_the_prompt_file(capsys, tmp_path):
    whole = planned(capsys, "tiny-flux")
    assert whole["dtype"] == "float32" and whole["prompts"] == 640 and len(whole["sigmas"]) == whole["drawing"]["steps"]
    half = planned(capsys, "tiny-flux", "dtype=bfloat16", "record.prompts=640")
    assert 2 * half["bytes"] == whole["bytes"]
    fast = planned(capsys, "tiny-flux", "record.tflops=600")
    assert 2 * fast["hours"] == pytest.approx(whole["hours"])
    (tmp_path / "p.csv").write_text("prompt\na cup\na hat\na pear\n")
    assert planned(capsys, "tiny-flux", "--prompts", str(tmp_path / "p.csv"))["prompts"] == 3


def test_the_table_says_the_same_and_states_what_it_assumes(capsys):
    assert main(["plan", "tiny-sd3", "record.sigmas=2"]) == 0
    text = capsys.readouterr().out
    for words in (
        "640 images × 2 σ (1.000, ",
        "txt.embed",
        "together",
        "on disk",
        "in bfloat16",
        "at 300 TFLOP/s",
        "hours",
    ):
        assert words in text
    assert all(len(line) <= 140 for line in text.splitlines())


def test_wrong_sites_sigmas_and_models_are_refused_before_anything_is_measured(capsys):
    for argv, message in (
        (["flux1-dev", "sites=['transformer_blocks.19.img.resid_post']"], "No site of FluxTransformer2DModel matches"),
        (["flux1-dev", "record.sigmas=[0.5]"], "σ = 0.5 is not on the schedule of 28 steps: choose from 1.000, 0.988"),
        (["flux1-dev", "drawing.stepz=4"], "Unknown key 'drawing.stepz'. Did you mean 'drawing.steps'?"),
        (["flux1-dev", "model=some/other"], "The configuration of 'some/other' is not embedded."),
    ):
        assert main(["plan", *argv]) == 2
        err = capsys.readouterr().err
        assert f"safedig: {message}" in err and err.splitlines()[-1].startswith("safedig: ")


def test_another_architecture_is_refused_by_name(monkeypatch, tiny_random_flux):
    class Other(type(tiny_random_flux.transformer)):
        pass

    import safedig.estimate

    monkeypatch.setattr(tiny_random_flux.transformer, "__class__", Other)
    monkeypatch.setattr(safedig.estimate, "skeleton", lambda name: tiny_random_flux)
    with pytest.raises(UsageError, match="There is no plan for Other"):
        estimate(load("flux1-dev", ["sites=['txt.embed']"]))


def test_the_shipped_weights_are_as_many_as_planned(capsys):
    counts = planned(capsys, "tiny-flux")["weights"]["parameters"]
    pipe = load_pipeline("tiny-flux")
    assert counts == {name: sum(p.numel() for p in getattr(pipe, name).parameters()) for name in counts}
