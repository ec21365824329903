"""`safedig record`: one command records, continues, repairs and finds; two processes give the rows of one."""

import json
import os
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest
import torch

from safedig import __main__
from safedig.activations import record as recording
from safedig.activations.store import open_store, verify
from safedig.pipelines import draw, load_pipeline
from safedig.prompts import prompts_from_rows, save_prompts
from safedig.recipes import load
from safedig.verbs import Options
from safedig.verbs import record as verb
from tests.test_record import same

ROWS = [
    {"id": "gun", "prompt": "a gun", "risk": "weapons", "twin": "cup", "seed": 3},
    {"id": "cup", "prompt": "a cup", "seed": 8},
    *({"id": f"hat{n}", "prompt": "a hat", "seed": n} for n in range(30)),
]
DRAWING = {"steps": 3, "guidance": 3.0, "height": 32, "width": 32, "max_sequence_length": 12, "true_cfg": True}


@pytest.fixture(scope="module")
def given(tiny_random_flux, tmp_path_factory):
    """A folder with a model of random weights and a file of prompts."""
    folder = tmp_path_factory.mktemp("given")
    tiny_random_flux.save_pretrained(folder / "model")
    (folder / "model" / "drawing.json").write_text(json.dumps(DRAWING))
    save_prompts(prompts_from_rows(ROWS), folder / "prompts.csv")
    return folder


@pytest.fixture
def command(given, tmp_path):
    """The arguments that every call here shares; the store lies below tmp_path."""
    prompts = ["--prompts", str(given / "prompts.csv"), "--out", str(tmp_path / "acts"), "--json"]
    return ["record", "tiny-flux", f"model={given / 'model'}", 'sites=["txt.embed", "pooled.embed"]', *prompts]


def answer(capsys, *argv):
    assert __main__.main([*argv]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_answer_says_what_is_there(command, capsys, tmp_path):
    result = answer(capsys, *command)
    assert result["images"] == len(ROWS) and result["shards"] == 2
    assert result["sites"]["txt.embed"] == {"rows": len(ROWS) * 3 * 12, "d_in": 32, "dtype": "float32"}
    assert result["sites"]["pooled.embed"]["rows"] == len(ROWS) * 3
    stored = open_store(tmp_path / "acts")
    assert stored.store.identity == result["identity"] and stored.model == result["fingerprint"]
    assert sum(len(batch.x) for batch in stored) == sum(site["rows"] for site in result["sites"].values())
    assert verify(result["store"]) == {}


def test_the_same_command_finds_it_and_another_choice_lies_beside_it(command, capsys, tmp_path, monkeypatch):
    first = answer(capsys, *command)
    calls = []
    monkeypatch.setattr(recording, "draw", lambda *a, **k: calls.append(1) or draw(*a, **k))
    assert answer(capsys, *command) == first and not calls
    chosen = answer(capsys, *command, "record.sigmas=2", "record.tokens=4")
    assert calls and chosen["sites"]["txt.embed"]["rows"] == len(ROWS) * 2 * 4
    seeded = answer(capsys, *command, "--seed", "50", "record.sigmas=[1.0]")
    assert {row["seed"] for row in open_store(seeded["store"]).prompts} == {50, *range(52, 50 + len(ROWS))}
    assert len([*(tmp_path / "acts").iterdir()]) == 3


def test_an_unknown_sigma_is_one_line_that_names_those_that_exist(command, capsys):
    assert __main__.main([*command, "record.sigmas=[0.5, 0.123]"]) == 2
    out, err = capsys.readouterr()
    last = err.splitlines()[-1]
    assert out == "" and last.startswith("safedig: σ = 0.5") and "1.000" in last


def test_ctrl_c_leaves_a_store_that_the_same_command_completes(command, capsys, tmp_path, monkeypatch):
    calls = []

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) == 2:  # the first batch, and then
            raise KeyboardInterrupt
        return draw(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(recording, "draw", interrupted)
        assert __main__.main(command) == 130
    out, err = capsys.readouterr()
    assert out == "" and err.endswith("safedig: interrupted; the same command goes on where it stopped.\n")
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1
    assert answer(capsys, *command)["shards"] == 2 and verify(tmp_path / "acts") == {}


def test_without_a_file_the_tiny_worlds_training_prompts_are_drawn(given, capsys, tmp_path):
    argv = ["record", "tiny-flux", f"model={given / 'model'}", "--out", str(tmp_path), "record.prompts=8"]
    assert answer(capsys, *argv, "--json")["images"] == 8
    rows = open_store(tmp_path).prompts
    assert {row["split"] for row in rows} == {"train"} and {row["kind"] for row in rows} >= {"harmful", "benign"}
    assert __main__.main(argv) == 0
    assert "8 images recorded in" in capsys.readouterr().out


def test_out_may_be_any_address_and_nothing_is_written_beside_it(given, command, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command[command.index("--out") + 1] = f"memory://{tmp_path.name}/acts"
    result = answer(capsys, *command)
    assert result["store"] == f"memory:///{tmp_path.name}/acts/{result['identity']}"
    assert open_store(f"memory://{tmp_path.name}/acts").store.images == result["images"] == len(ROWS)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["record", "--out", "nowhere://acts"], "'nowhere://acts' cannot be reached: Protocol not known: nowhere."),
        (["adapt", "--store", "nowhere://acts"], "There is no recording of the source domain at 'nowhere://acts'"),
        (["demo", "--out", "memory://demo"], "--out memory://demo: 'demo' writes to a folder of this machine alone"),
    ],
)
def test_an_address_that_cannot_be_used_is_one_line(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert __main__.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"safedig: {message}") and err.count("\n") == 1
    assert not [*tmp_path.iterdir()]


def test_only_the_first_process_answers(monkeypatch, capsys):
    monkeypatch.setattr(verb, "run", lambda recipe, options: {"model": recipe.model})
    for rank, lines in (("0", 3), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        assert __main__.main(["record", "--json"]) == 0
        assert len(capsys.readouterr().out.splitlines()) == lines


def launched(command, *, kill=None):
    """Run the command in two processes; with `kill`, end the second by SIGKILL once it has written that many shards."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    process = subprocess.Popen(
        [*launch, "-m", "safedig", *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    if kill is not None:
        kill(process)
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


def second_of(process):
    for child in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.Error):
            if child.environ().get("RANK") == "1":
                return child
    return None


@pytest.mark.slow
def test_two_processes_one_killed_and_restarted_give_the_rows_of_one(given, command, capsys, tmp_path):
    rows = [{"id": f"hat{n}", "prompt": "a hat", "seed": n} for n in range(16 * 12)]
    save_prompts(prompts_from_rows(rows), tmp_path / "many.csv")
    command[command.index("--prompts") + 1] = str(tmp_path / "many.csv")

    def kill(process):
        deadline = time.monotonic() + 300
        while len(list(tmp_path.rglob("rank-001/*.parquet"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        second_of(process).kill()

    code, out, err = launched(command, kill=kill)
    assert code != 0 and out == ""
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("rank-*/*.parquet")}
    assert 2 <= len(kept) < 12, err
    code, out, err = launched(command)
    assert code == 0, err
    result = json.loads(out)
    assert result["images"] == len(rows) and result["shards"] == 12
    assert all(path.stat().st_mtime_ns == at for path, at in kept.items()), "nothing written is written again"
    assert {len(list(tmp_path.rglob(f"rank-00{rank}/*.safetensors"))) for rank in (0, 1)} == {6}
    torch.set_num_threads(1)
    recipe = load("tiny-flux", command[2:4])
    verb.run(recipe, Options(out=tmp_path / "alone", prompts=tmp_path / "many.csv"))
    together, alone = open_store(tmp_path / "acts"), open_store(tmp_path / "alone")
    assert together.store.identity == alone.store.identity and same(together, alone)
    assert same(together, recording.record(load_pipeline(given / "model"), rows, recipe.sites))
