"""`python -m safedig.tiny.train` makes folders that load as plain pipelines, and says in one line what is missing."""

import json
import subprocess
import sys
from functools import partial

import pytest
import torch

from safedig.pipelines import Drawing, draw
from safedig.tiny import autoencoding, train
from safedig.tiny.train import SAMPLES, main


@pytest.fixture
def small(monkeypatch):
    """A smaller bank of cluttered scenes: drawing the full one takes longer than everything else here."""
    monkeypatch.setattr(autoencoding, "Autoencoding", partial(autoencoding.Autoencoding, bank=16))


@pytest.fixture
def folders(tmp_path):
    return [
        "--work",
        str(tmp_path / "work"),
        "--weights",
        str(tmp_path / "weights"),
        "--samples",
        "32",
        "--scenes",
        "8",
    ]


@pytest.mark.parametrize("name", ["tiny-flux", "tiny-sd3"])
def test_without_an_autoencoder_the_next_step_is_named(folders, capsys, tmp_path, name):
    assert main([name, *folders]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("safedig.tiny.train: There is no trained autoencoder in ")
    assert "run `python -m safedig.tiny.train vae` first" in err
    assert not [*tmp_path.iterdir()]


def test_an_autoencoder_and_both_pipelines_are_trained_into_folders_that_load(small, folders, tmp_path, capsys):
    from diffusers import DiffusionPipeline

    assert [main([name, *folders]) for name in ("vae", "tiny-flux", "tiny-sd3")] == [0, 0, 0]
    err = capsys.readouterr().err
    assert "train vae: 1/1" in err and err.count("draw and encode scenes") == 4, "progress is shown"
    for name, kind in (("tiny-flux", "FluxPipeline"), ("tiny-sd3", "StableDiffusion3Pipeline")):
        folder = tmp_path / "weights" / name
        pipe = DiffusionPipeline.from_pretrained(folder)
        assert type(pipe).__name__ == kind and Drawing.of(pipe).steps == 8
        ((_, images),) = draw(pipe, [{"prompt": "a red cup by day", "seed": 0}])
        assert images.shape == (1, 3, 64, 64) and images.isfinite().all()
        for part, trained in (("", name), ("vae", "vae")):
            log = json.loads((folder / part / "training.json").read_text())
            assert (log["name"], log["samples"]) == (trained, 32) and {"seconds", "device", "log"} <= log.keys()
    vaes = [(tmp_path / "weights" / name / "vae").glob("*.safetensors") for name in ("tiny-flux", "tiny-sd3")]
    assert len({path.read_bytes() for paths in vaes for path in paths}) == 1, "both pipelines share one autoencoder"


def test_an_interruption_is_one_line_and_the_same_command_goes_on(small, folders, capsys, tmp_path, monkeypatch):
    folders[folders.index("32")] = "64"
    loss, calls = autoencoding.Autoencoding.func.loss, []

    def until(self, rng, progress):
        calls.append(progress)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return loss(self, rng, progress)

    monkeypatch.setattr(autoencoding.Autoencoding.func, "loss", until)
    assert main(["vae", *folders]) == 130
    assert capsys.readouterr().err.endswith("interrupted; the same command goes on from the last checkpoint.\n")
    assert main(["vae", *folders]) == 0 and calls == [0.0, 0.5, 0.5]
    assert (tmp_path / "work" / "autoencoder" / "diffusion_pytorch_model.safetensors").is_file()


def test_all_are_trained_in_the_order_they_need_each_other(monkeypatch):
    order = []
    monkeypatch.setattr(train, "_train", lambda name, given: order.append(name))
    assert main(["all"]) == 0
    assert order == [*SAMPLES] and order[0] == "vae" and set(order) == {"vae", "tiny-flux", "tiny-sd3", "judge"}


@pytest.mark.parametrize("argv", [[], ["tiny-flx"], ["vae", "--samples", "many"]])
def test_a_wrong_name_or_number_is_exit_code_2(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2 and "error:" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--samples", "--scenes"])
def test_no_samples_are_refused(folders, flag, capsys):
    assert main(["vae", *folders, flag, "0"]) == 2
    assert capsys.readouterr().err == f"safedig.tiny.train: {flag} 0: expected an integer from 1 on.\n"


def test_a_device_that_is_not_there_is_said_before_the_training(folders, capsys, monkeypatch):
    monkeypatch.setattr(train, "_train", lambda name, given: pytest.fail("it trained"))
    assert main(["vae", *folders, "--device", "abacus"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("safedig.tiny.train: --device abacus cannot be used here (") and err.count("\n") == 1


@pytest.mark.parametrize("flag", ["--weights", "--work"])
def test_a_folder_that_cannot_be_written_is_said_before_the_training(folders, flag, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "_train", lambda name, given: pytest.fail("it trained"))
    (tmp_path / "file").touch()
    assert main(["vae", *folders, flag, str(tmp_path / "file" / "folder")]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"safedig.tiny.train: {flag} ") and "give a folder that can" in err and err.count("\n") == 1


@pytest.mark.slow
def test_the_command_itself_trains_the_autoencoder_from_nothing(folders, tmp_path):
    command = [sys.executable, "-m", "safedig.tiny.train", "vae", *folders]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and f"vae is in {tmp_path / 'work' / 'autoencoder'}" in done.stderr
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(tmp_path / "work" / "autoencoder")
    assert vae.encode(torch.zeros(1, 3, 64, 64)).latent_dist.mean.shape == (1, 8, 16, 16)
