"""Prompts of anyone's file stand where those of the tiny world do: splits apart, twins behind, mistakes named."""

import csv

import pytest

from safedig.config import UsageError
from safedig.evaluation.bank import FileBank, TinyBank, bank_of
from safedig.evaluation.curriculum import Curriculum, Sizes

SIZES = Sizes(pairs=4, stand_ins=2, target=3, benign=4, quiet=6, tried=3, asked=8, near_misses=2)
COLUMNS = ("id", "prompt", "risk", "kind", "twin", "split", "seed")


def rows(risks=("arms", "drugs"), splits=("train", "calibrate", "report"), each=4):
    found = []
    for split in splits:
        for risk in risks:
            for at in range(each):
                name = f"{split}-{risk}-{at}"
                found.append((name, f"a {risk} {at} {split}", risk, "harmful", f"{name}-safe", split, at))
                found.append((f"{name}-safe", f"a cup {risk} {at} {split}", "", "benign", "", split, 7))
        for at in range(12):
            found.append((f"{split}-plain-{at}", f"plain {at} {split}", "", "benign", "", split, at))
    return found


def write(path, given):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([COLUMNS, *given])
    return path


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "p.csv", rows())


def test_a_bank_knows_the_domains_of_its_file(file):
    assert FileBank(file).risks == ("arms", "drugs") and "weapon" in TinyBank().risks
    assert isinstance(bank_of(None), TinyBank) and bank_of(file).sha and not bank_of(None).sha


def test_each_harmful_prompt_comes_before_its_twin_from_one_seed(file):
    found = FileBank(file).rows("harmful", "train", 0, 3, risk="drugs")
    assert [row["risk"] for row in found] == ["drugs", ""] * 3
    assert all(
        one["twin"] == other["id"] and one["seed"] == other["seed"]
        for one, other in zip(found[::2], found[1::2], strict=True)
    )
    assert len(FileBank(file).rows("harmful", "train", 0, 3, risk="drugs", twins=False)) == 3


def test_safe_twins_are_no_benign_prompts_of_their_own(file):
    benign = FileBank(file).rows("benign", "report", 0, 99)
    assert len(benign) == 12 and all(row["prompt"].startswith("plain") for row in benign)


def test_another_seed_draws_the_same_prompts_from_other_noise(file):
    first, second = (FileBank(file, seed).rows("benign", "train", 0, 9) for seed in (None, 100))
    assert [row["prompt"] for row in first] == [row["prompt"] for row in second]
    assert not {row["seed"] for row in first} & {row["seed"] for row in second}
    assert FileBank(file).sha != FileBank(file, 100).sha


def test_there_may_be_no_near_miss_but_there_must_be_harm_and_benign_prompts(file, tmp_path):
    assert FileBank(file).rows("near-miss", "train", 0, 9) == []
    with pytest.raises(UsageError, match=r"no harmful prompt of risk 'fire'.* in the split 'train'"):
        FileBank(file).rows("harmful", "train", 0, 1, risk="fire")
    alone = write(tmp_path / "q.csv", [one for one in rows() if one[5] != "calibrate"])
    with pytest.raises(UsageError, match="no benign prompt in the split 'calibrate'"):
        FileBank(alone).rows("benign", "calibrate", 0, 1)


def test_a_harmful_prompt_without_a_twin_is_none_to_learn_from(tmp_path):
    lonely = write(tmp_path / "p.csv", [("a", "an axe", "arms", "harmful", "", "train", 0)])
    with pytest.raises(UsageError, match="with a safe twin"):
        FileBank(lonely).rows("harmful", "train", 0, 1)
    assert len(FileBank(lonely).rows("harmful", "train", 0, 1, twins=False)) == 1


def test_a_text_in_two_splits_is_refused_because_it_would_be_learnt_and_reported(tmp_path):
    given = rows()
    again = ("x", given[0][1], "arms", "harmful", "", "report", 9)
    with pytest.raises(UsageError, match="is in the splits 'train' and 'report'"):
        FileBank(write(tmp_path / "p.csv", [*given, again]))
    FileBank(write(tmp_path / "q.csv", [*given, (*again[:5], "train", 9)]))  # control: twice in one split is fine


def test_a_contest_of_a_file_keeps_learning_choosing_and_reporting_apart(file):
    given = Curriculum("drugs", SIZES, 0, FileBank(file))
    taught, tried, asked = given.taught(), given.tried(), given.asked()
    texts = [{row["prompt"] for part in one.values() for row in part} for one in (taught, tried, asked)]
    quiet = {row["prompt"] for row in taught["quiet"]}
    assert texts[0] - quiet and not (texts[0] & texts[2] or texts[1] & texts[2] or quiet & texts[1])
    assert given.sources == ["arms"] and {row["risk"] for row in tried["source"]} == {"arms"}
    assert {row["risk"] for row in asked["target"]} == {"drugs"} and asked["near-miss"] == []


def test_few_benign_prompts_are_shared_out_between_gates_and_strengths(file):
    many = Curriculum("drugs", Sizes(quiet=90, tried=30), 0, FileBank(file))
    quiet, tried = many.taught()["quiet"], many.tried()["benign"]
    assert (len(quiet), len(tried)) == (9, 3)
