"""Records survive the disk, joins survive shuffling, no failed score or interrupted write passes for a result."""

import dataclasses
import json
import os
import random

import pytest
import torch

from safedig.config import UsageError
from safedig.evaluation.records import (
    Record,
    Run,
    Score,
    circumstances,
    image_sha,
    join,
    prompt_sha,
    read_run,
    write_run,
)

IMAGES = [torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(6)]


def a_run():
    records = tuple(
        Record(
            "run",
            "repel",
            f"p{i}",
            prompt_sha(f"prompt {i}"),
            i,
            image_sha(image),
            domains=("fire", "weapons"),
            strength=1.5,
        )
        for i, image in enumerate(IMAGES)
    )
    scores = tuple(Score(record.image_sha, "judge", scores={"p_unsafe": record.seed / 10}) for record in records)
    return Run(records, scores, circumstances(model="tiny-flux", steps=8, command="safedig demo tiny-flux"))


def test_a_run_survives_the_disk(tmp_path):
    write_run(tmp_path / "new" / "folder", a_run())
    assert read_run(tmp_path / "new" / "folder") == a_run()


def test_the_files_are_plain_json_with_one_image_a_line(tmp_path):
    write_run(tmp_path, a_run())
    rows = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert [row["prompt_id"] for row in rows] == [f"p{i}" for i in range(6)]
    assert json.loads((tmp_path / "manifest.json").read_text())["packages"]["torch"]


def test_the_join_survives_shuffled_files():
    run, shuffled = a_run(), list(a_run().scores)
    random.Random(0).shuffle(shuffled)
    assert tuple(shuffled) != run.scores
    assert join(run.records, shuffled, "judge") == join(run.records, run.scores, "judge")
    assert all(score.scores["p_unsafe"] == record.seed / 10 for record, score in join(run.records, shuffled, "judge"))


def test_equal_images_share_one_score_and_unequal_ones_do_not():
    same = [dataclasses.replace(record, image_sha=image_sha(IMAGES[0])) for record in a_run().records]
    assert len(join(same, a_run().scores[:1], "judge")) == 6
    assert image_sha(IMAGES[0]) == image_sha(IMAGES[0].double().float())
    assert image_sha(IMAGES[0]) != image_sha(IMAGES[1])
    assert image_sha(torch.zeros(3, 4, 8)) != image_sha(torch.zeros(3, 8, 4))


def test_a_missing_score_is_an_error():
    with pytest.raises(UsageError, match="1 of 6 images have no valid judge score.*p5"):
        join(a_run().records, a_run().scores[:-1], "judge")


def test_a_failed_score_never_counts_as_safe():
    run = a_run()
    broken = (dataclasses.replace(run.scores[0], error="file is corrupt"), *run.scores[1:])
    with pytest.raises(UsageError, match="never counts as safe"):
        join(run.records, broken, "judge")


def test_another_detector_does_not_fill_the_gap():
    with pytest.raises(UsageError, match="6 of 6 images have no valid second score"):
        join(a_run().records, a_run().scores, "second")


def test_two_different_scores_of_one_image_are_refused_and_two_equal_ones_are_not():
    run = a_run()
    assert join(run.records, run.scores + run.scores, "judge") == join(run.records, run.scores, "judge")
    with pytest.raises(UsageError, match="twice, with different results"):
        join(run.records, (*run.scores, dataclasses.replace(run.scores[0], version="2")), "judge")


def test_an_interrupted_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    write_run(tmp_path, a_run())
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_run(tmp_path, Run((), (), {}))
    assert read_run(tmp_path) == a_run()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", "records.jsonl", "scores.jsonl"]


def test_a_folder_without_a_manifest_is_no_run(tmp_path):
    with pytest.raises(UsageError, match="holds no finished run"):
        read_run(tmp_path)
    write_run(tmp_path, a_run())
    (tmp_path / "scores.jsonl").unlink()
    with pytest.raises(UsageError, match="missing beside its manifest"):
        read_run(tmp_path)


@pytest.mark.parametrize("damage", [lambda line: line[:-9], lambda line: line.replace('"seed"', '"sede"')])
def test_a_damaged_line_is_named(tmp_path, damage):
    write_run(tmp_path, a_run())
    lines = (tmp_path / "records.jsonl").read_text().splitlines()
    lines[2] = damage(lines[2])
    (tmp_path / "records.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(UsageError, match=r"records.jsonl', line 3: "):
        read_run(tmp_path)


def test_a_prompt_is_only_ever_a_hash(tmp_path):
    write_run(tmp_path, a_run())
    assert not any("prompt 3" in path.read_text() for path in tmp_path.iterdir())
    assert prompt_sha("prompt 3") in (tmp_path / "records.jsonl").read_text()
