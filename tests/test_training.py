"""The training loop: an interruption changes no bit, the state on disk is always whole, the log says what happened."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from safedig.config import UsageError
from safedig.tiny import training
from safedig.tiny.training import CONSTANT, EMA_DECAY, WARM_UP, _decay, _optimizers, _warm_average, fit


class Regression:
    """Learns a random linear map; has matrices for Muon, and biases and outer layers for AdamW."""

    batch, learning_rate = 4, 1e-2

    def __init__(self, stop_at=None):
        torch.manual_seed(0)
        self.net = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)]), "out": nn.Linear(3, 1)})
        self.stop_at, self.drawn = stop_at, []

    @property
    def module(self):
        return self.net

    def loss(self, rng, progress):
        if len(self.drawn) == self.stop_at:
            raise KeyboardInterrupt
        x = torch.from_numpy(rng.standard_normal((self.batch, 3), dtype=np.float32))
        self.drawn.append((round(float(x.sum()), 4), progress))
        y = x
        for block in self.net["blocks"]:
            y = block(y).tanh()
        loss = (self.net["out"](y)[:, 0] - x.sum(1)).square().mean()
        return {"loss": loss, "half": loss.detach() / 2}

    def publish(self, averaged, folder):
        folder.mkdir(parents=True, exist_ok=True)
        save_file(averaged.state_dict(), folder / "net.safetensors")


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """`trained("a")` trains in folder a and gives the published weights and the log; `stop_at` interrupts it."""
    monkeypatch.setattr(training, "LOG_EVERY", 5)

    def train(name, stop_at=None, samples=100, seed=0, work=None):
        objective = Regression(stop_at)
        arguments = {"name": "toy", "samples": samples, "folder": tmp_path / name, "seed": seed}
        arguments["work"] = tmp_path / (work or f"{name}-work")
        if stop_at is not None:
            with pytest.raises(KeyboardInterrupt):
                fit(objective, **arguments)
            return objective, None
        return objective, fit(objective, **arguments)

    return train


def weights(folder):
    return load_file(folder / "net.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def without_seconds(log):
    return [{key: value for key, value in entry.items() if key != "seconds"} for entry in log["log"]]


# ---- interrupted


@pytest.mark.parametrize("stops", [[1], [12], [24], [3, 4, 9]])
def test_an_interrupted_run_ends_bit_for_bit_as_an_undisturbed_one(trained, tmp_path, stops):
    _, whole = trained("whole")
    for stop in stops:
        trained("parts", stop_at=stop)
    objective, log = trained("parts")
    assert len(objective.drawn) == 25 - sum(stops), "nothing is drawn twice"
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert [entry["samples"] for entry in log["log"]] == [entry["samples"] for entry in whole["log"]]


def test_control_another_seed_ends_elsewhere(trained, tmp_path):
    trained("one"), trained("other", seed=1)
    assert not same(weights(tmp_path / "one"), weights(tmp_path / "other"))


def test_going_on_with_another_seed_is_refused_and_leaves_the_run_as_it_was(trained, tmp_path):
    trained("whole")
    trained("parts", stop_at=12)
    with pytest.raises(UsageError, match=r"begun with seed 0, not 1: go on with that seed, or give another --work"):
        trained("parts", seed=1)
    trained("parts")
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


def test_a_killed_run_goes_on_from_its_last_checkpoint(trained, tmp_path, monkeypatch):
    """The power fails after step 10: what was written then is all that is left."""
    trained("whole")
    trained("killed", stop_at=10)
    shutil.copytree(tmp_path / "killed-work", tmp_path / "left")
    trained("killed", stop_at=7)
    objective, _ = trained("again", work="left")
    assert len(objective.drawn) == 15 and same(weights(tmp_path / "again"), weights(tmp_path / "whole"))


def test_a_finished_run_is_published_again_without_a_step(trained, tmp_path):
    trained("one")
    first = weights(tmp_path / "one")
    shutil.rmtree(tmp_path / "one")
    objective, log = trained("one")
    assert objective.drawn == [] and same(weights(tmp_path / "one"), first) and log["log"][-1]["samples"] == 100


@pytest.mark.parametrize("steps_after", [0, 3])
def test_a_crash_while_saving_leaves_the_last_state_whole(trained, tmp_path, monkeypatch, steps_after):
    """The disk fills up halfway through the tensors, be it the same step's or a later one's."""
    trained("whole")
    trained("full", stop_at=10)

    def half(tensors, path):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(training, "save_file", half)
        with pytest.raises(OSError, match="No space left"):
            fit(
                Regression(steps_after),
                name="toy",
                samples=100,
                folder=tmp_path / "full",
                work=tmp_path / "full-work",
                seed=0,
            )
    objective, _ = trained("full")
    assert len(objective.drawn) == 15 and same(weights(tmp_path / "full"), weights(tmp_path / "whole"))
    assert len([*(tmp_path / "full-work" / "toy").iterdir()]) == 2, "nothing half-written is left over"


def test_only_the_last_state_is_kept_and_named_by_its_json(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "SAVE_EVERY", 0.0)
    trained("often")
    folder = tmp_path / "often-work" / "toy"
    state = json.loads((folder / "state.json").read_text())
    assert sorted(path.name for path in folder.iterdir()) == ["state-25.safetensors", "state.json"]
    assert state["tensors"] == "state-25.safetensors" and state["step"] == 25


def test_saving_often_changes_no_bit(trained, tmp_path, monkeypatch):
    trained("seldom")
    monkeypatch.setattr(training, "SAVE_EVERY", 0.0)
    trained("often")
    assert same(weights(tmp_path / "seldom"), weights(tmp_path / "often"))


# ---- log and budget


def test_a_term_that_ends_within_a_stretch_of_the_log_is_averaged_over_what_there_was(trained, monkeypatch):
    loss = Regression.loss
    monkeypatch.setattr(
        Regression, "loss", lambda self, rng, progress: loss(self, rng, progress) | _until_half(progress)
    )
    _, log = trained("run", samples=80)  # 20 steps, a line of the log for every 5 of them
    assert [line.get("early") for line in log["log"]] == [1.0, 1.0, None, None]
    _, log = trained("other", samples=60)  # 15 steps: the term ends after 2 of the 5 of the second line
    assert [line.get("early") for line in log["log"]] == [1.0, 1.0, None]


def _until_half(progress):
    return {"early": torch.tensor(1.0)} if progress < 0.5 else {}


@pytest.mark.parametrize(("samples", "steps"), [(100, 25), (101, 26), (3, 1), (4, 1)])
def test_it_draws_as_many_samples_as_asked_rounded_up_to_a_batch(trained, samples, steps):
    objective, log = trained("run", samples=samples)
    assert len(objective.drawn) == steps and log["samples"] == samples
    progress = [share for _, share in objective.drawn]
    assert progress[0] == 0 and progress == sorted(progress) and progress[-1] < 1


def test_every_batch_is_new(trained):
    objective, _ = trained("run")
    assert len({batch for batch, _ in objective.drawn}) == 25


def test_the_log_is_returned_and_lies_beside_the_weights(trained, tmp_path):
    _, log = trained("run", seed=3)
    assert json.loads((tmp_path / "run" / "training.json").read_text()) == log
    assert {key: log[key] for key in ("name", "samples", "batch", "seed", "device")} == {
        "name": "toy", "samples": 100, "batch": 4, "seed": 3, "device": "cpu",
    }  # fmt: skip
    assert log["threads"] == 1 and log["parameters"] == 28 and log["seconds"] >= 0
    assert [entry["samples"] for entry in log["log"]] == [20, 40, 60, 80, 100]
    assert all(entry["half"] == pytest.approx(entry["loss"] / 2, abs=1e-4) for entry in log["log"])
    seconds = [entry["seconds"] for entry in log["log"]]
    assert seconds == sorted(seconds)


def test_the_time_of_all_parts_is_counted(trained, tmp_path, monkeypatch):
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr(training.time, "monotonic", lambda: float(next(clock)))
    trained("run", stop_at=5)
    before = json.loads((tmp_path / "run-work" / "toy" / "state.json").read_text())["seconds"]
    _, log = trained("run")
    assert before >= 50 and log["seconds"] > before + 100


def test_it_learns(trained):
    _, log = trained("run", samples=2000)
    assert log["log"][-1]["loss"] < 0.2 * log["log"][0]["loss"]


# ---- schedule, optimizers, average


def test_the_rate_is_constant_and_then_falls_to_nothing():
    assert {_decay(x) for x in (0.0, 0.2, CONSTANT - 1e-9)} == {1.0}
    later = [_decay(x) for x in np.linspace(CONSTANT, 1, 20)]
    assert later == sorted(later, reverse=True) and later[0] == 1.0 and later[-1] == pytest.approx(0, abs=1e-12)
    assert _decay(1.5) == pytest.approx(0, abs=1e-12)


def test_the_first_steps_are_small(tmp_path):
    objective = Regression()
    run = training._Run(objective, 10_000, tmp_path / "none", 0)
    rates = []
    for step in range(WARM_UP + 5):
        run.advance(np.random.default_rng(step))
        rates.append({group["lr"] for optimizer in run.optimizers for group in optimizer.param_groups})
    assert rates[0] == {objective.learning_rate / WARM_UP} and rates[-1] == {objective.learning_rate}


def test_muon_takes_the_matrices_of_blocks_and_adam_everything_else():
    net = Regression().net
    adam, muon = _optimizers(net, 1e-2)
    of = [{id(p) for group in optimizer.param_groups for p in group["params"]} for optimizer in (adam, muon)]
    assert of[1] == {id(block.weight) for block in net["blocks"]}
    assert not of[0] & of[1] and of[0] | of[1] == {id(p) for p in net.parameters()}
    assert len(_optimizers(nn.Linear(3, 3), 1e-2)) == 1, "no blocks, no Muon"


def averaged(values):
    """The average of a one-number model that takes these values one after the other."""
    model = nn.Linear(1, 1, bias=False)
    average = AveragedModel(model, multi_avg_fn=_warm_average)
    for value in values:
        with torch.no_grad():
            model.weight.fill_(value)
        average.update_parameters(model)
    return average.module.weight.item()


def test_the_average_is_the_warmed_up_moving_average():
    values = np.random.default_rng(0).standard_normal(50)
    expected = values[0]
    for count, value in enumerate(values[1:], start=1):
        decay = min(EMA_DECAY, (1 + count) / (10 + count))
        expected = decay * expected + (1 - decay) * value
    assert averaged(values) == pytest.approx(expected, abs=1e-5)


def test_the_average_soon_forgets_the_random_start():
    assert averaged([1000.0] + [0.0] * 100) < 1e-3
    assert 1000 * EMA_DECAY**100 > 900, "control: with a constant decay nine tenths of it would still be there"


def test_what_stands_still_is_its_own_average():
    assert averaged([0.3] * 20) == pytest.approx(0.3)


def test_the_average_is_what_is_published(trained, tmp_path):
    objective, _ = trained("run")
    last = objective.module.state_dict()
    assert not same(weights(tmp_path / "run"), last)
    state = load_file(tmp_path / "run-work" / "toy" / "state-25.safetensors")
    assert same({key: state[f"module.{key}"] for key in last}, last)
    assert same({key: state[f"averaged.module.{key}"] for key in last}, weights(tmp_path / "run"))
