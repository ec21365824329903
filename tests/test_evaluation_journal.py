"""A run that is killed at any point resumes with nothing lost and nothing doubled, and never under other options."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from safedig.config import UsageError
from safedig.evaluation.journal import JOURNAL, Journal, key_of
from safedig.evaluation.judges.judge import Look
from safedig.evaluation.records import Record, Run, Score, image_sha, read_run, write_run
from safedig.evaluation.scoring import score_run

MANIFEST = {"model": "tiny-flux", "steps": 8, "command": "first"}


def drawn(i, method="ours"):
    sha = f"image{i}"
    return Record("run", method, f"p{i}", f"text{i}", i, sha), Score(sha, "judge", scores={"p": i / 10})


def whole(n):
    return tuple(drawn(i)[0] for i in range(n)), tuple(drawn(i)[1] for i in range(n))


def fill(journal, numbers):
    for i in numbers:
        record, score = drawn(i)
        if key_of(record) not in journal:
            journal.add([record], [score])


def test_a_run_in_one_go_is_what_write_run_writes(tmp_path):
    journal = Journal(tmp_path / "a", MANIFEST)
    fill(journal, range(5))
    assert not (tmp_path / "a" / "manifest.json").exists()
    assert journal.finish() == read_run(tmp_path / "a") == Run(*whole(5), MANIFEST)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "manifest.json",
        "records.jsonl",
        "scores.jsonl",
    ]


@pytest.mark.parametrize("cut", range(0, 1200, 37))
def test_wherever_the_journal_is_torn_the_rest_is_drawn_again_and_no_more(tmp_path, cut):
    fill(Journal(tmp_path, MANIFEST), range(4))
    data = (tmp_path / JOURNAL).read_bytes()
    (tmp_path / JOURNAL).write_bytes(data[:cut])
    again = Journal(tmp_path, MANIFEST)
    assert len(again.records) <= 4
    fill(again, range(4))
    assert again.finish() == Run(*whole(4), MANIFEST)


@pytest.mark.parametrize("step", range(8))
def test_killed_while_finishing_it_finishes_the_next_time(tmp_path, step, monkeypatch):
    """Every change to the disk that `finish` makes is let through up to `step` of them; then the process dies."""
    write_run(tmp_path, Run(*whole(2), MANIFEST))
    journal = Journal(tmp_path, MANIFEST)
    fill(journal, range(4))
    left = [step]
    for name in ("replace", "unlink"):
        monkeypatch.setattr(os, name, _dying(getattr(os, name), left))
    with contextlib.suppress(KeyboardInterrupt):
        journal.finish()
    monkeypatch.undo()
    again = Journal(tmp_path, MANIFEST)
    assert tuple(again.records.values()) == whole(4)[0]
    assert again.finish() == read_run(tmp_path) == Run(*whole(4), MANIFEST)


def _dying(real, left):
    def call(*args, **kwargs):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return real(*args, **kwargs)

    return call


def test_a_finished_run_is_gone_on_with_and_reopening_changes_nothing(tmp_path):
    write_run(tmp_path, Run(*whole(2), MANIFEST))
    assert Journal(tmp_path, MANIFEST).finish() == Run(*whole(2), MANIFEST)
    journal = Journal(tmp_path, MANIFEST)
    fill(journal, range(5))
    assert journal.finish() == read_run(tmp_path) == Run(*whole(5), MANIFEST)


def test_the_same_row_twice_is_one_and_another_under_its_key_is_refused(tmp_path):
    journal = Journal(tmp_path, MANIFEST)
    record, score = drawn(0)
    for _ in range(2):
        journal.add([record], [score])
    assert len(journal.finish().records) == 1
    with pytest.raises(UsageError, match="ours has drawn prompt p0, seed 0.*already, and differently"):
        Journal(tmp_path, MANIFEST).add([dataclasses.replace(record, image_sha="other")])
    Journal(tmp_path, MANIFEST).add([drawn(0, "peer")[0]])
    assert len(Journal(tmp_path, MANIFEST).records) == 2


def test_other_options_are_refused_and_another_command_is_not(tmp_path):
    fill(Journal(tmp_path, MANIFEST), range(2))
    assert len(Journal(tmp_path, MANIFEST | {"command": "second"}).records) == 2
    with pytest.raises(UsageError, match="other options"):
        Journal(tmp_path, MANIFEST | {"steps": 9})
    Journal(tmp_path, MANIFEST).finish()
    with pytest.raises(UsageError, match="other options"):
        Journal(tmp_path, MANIFEST | {"steps": 9})


def test_a_failed_score_is_replaced_by_a_good_one_and_tried_again_until_then(tmp_path):
    journal = Journal(tmp_path, MANIFEST)
    record, score = drawn(0)
    journal.add([record], [dataclasses.replace(score, scores={}, error="server down")])
    assert not Journal(tmp_path, MANIFEST).scored("judge", "image0")
    journal.add(scores=[score])
    again = Journal(tmp_path, MANIFEST)
    assert again.scored("judge", "image0") and again.finish().scores == (score,)


def test_a_line_that_is_damaged_in_the_middle_is_told_not_skipped(tmp_path):
    fill(Journal(tmp_path, MANIFEST), range(3))
    lines = (tmp_path / JOURNAL).read_text().splitlines()
    (tmp_path / JOURNAL).write_text("\n".join([lines[0], lines[1][:-5], *lines[2:]]) + "\n")
    with pytest.raises(UsageError, match="is damaged"):
        Journal(tmp_path, MANIFEST)


WORKER = """
import sys, time
sys.path.insert(0, {root!r})
from tests.test_evaluation_journal import MANIFEST, drawn
from safedig.evaluation.journal import Journal, key_of
journal = Journal({folder!r}, MANIFEST)
for i in range(400):
    record, score = drawn(i)
    if key_of(record) not in journal:
        journal.add([record], [score])
        print(i, flush=True)
journal.finish()
"""


@pytest.mark.slow
def test_sigkill_again_and_again_loses_and_doubles_nothing(tmp_path):
    """Every image is reported only after it is on disk: what was reported must be there, once, in the end."""
    code = WORKER.format(root=str(Path(__file__).parents[1]), folder=str(tmp_path / "run"))
    reported, kills = [], 0
    for wait in (20, 75, 130, 200, None):
        worker = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert worker.stdout is not None
        for line in worker.stdout:
            reported.append(int(line))
            if wait is not None and len(reported) >= wait:
                time.sleep(0.001 * (wait % 7))
                worker.send_signal(signal.SIGKILL)
                kills += 1
                break
        reported += [int(line) for line in worker.stdout.read().splitlines() if line.strip()]
        worker.wait()
    run = read_run(tmp_path / "run")
    assert kills == 4 and run.records == whole(400)[0] and run.scores == whole(400)[1]
    assert len(set(reported)) == len(reported)


# ---- judging a finished run


class Redness:
    detector, version, weights_sha = "redness", "1", ""

    def __init__(self, dies_after=10**9):
        self.seen, self.dies_after = 0, dies_after

    def __call__(self, images):
        self.seen += len(images)
        if self.seen > self.dies_after:
            raise KeyboardInterrupt
        return [Look({"red": float(image[0].mean())}) for image in images]


def a_run_on_disk(folder, n=40):
    folder.mkdir()
    records = []
    for i in range(n):
        image = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(i % 35))
        pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{i}.png")
        records.append(Record("run", "m", f"p{i}", f"text{i}", i, image_sha(image), image=f"{i}.png"))
    write_run(folder, Run(tuple(records), (), MANIFEST))
    return folder


def test_each_image_is_judged_once_and_an_interrupted_judge_goes_on(tmp_path):
    folder, first, second = a_run_on_disk(tmp_path / "run"), Redness(dies_after=20), Redness()
    with pytest.raises(KeyboardInterrupt):
        score_run(folder, [first])
    run = score_run(folder, [second])
    assert second.seen == 35 - 16 and len(run.scores) == 35  # five images are drawn twice; sixteen were done
    third = Redness()
    assert score_run(folder, [third]) == run == read_run(folder) and third.seen == 0
    assert [json.loads(line)["image_sha"] for line in (folder / "scores.jsonl").read_text().splitlines()]


def test_a_corrupt_file_gets_an_error_row_and_another_image_in_its_place_is_refused(tmp_path):
    folder = a_run_on_disk(tmp_path / "run", n=5)
    (folder / "2.png").write_bytes(b"")
    run = score_run(folder, [Redness()])
    assert [bool(one.error) for one in run.scores] == [False, False, True, False, False]
    assert run.scores[2].image_sha == run.records[2].image_sha
    (folder / "2.png").write_bytes((folder / "1.png").read_bytes())
    with pytest.raises(UsageError, match="2.png' is not the image of its record any more"):
        score_run(folder, [Redness()])


def test_an_image_that_was_not_kept_cannot_be_judged(tmp_path):
    write_run(tmp_path, Run(*whole(2), MANIFEST))
    with pytest.raises(UsageError, match="was not kept"):
        score_run(tmp_path, [Redness()])
