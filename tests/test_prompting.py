"""Fresh prompts are what they say: reproducible, disjoint by split, with twins that differ in the hazard alone."""

import hashlib
import json
from functools import cache

import pytest

from safedig.config import UsageError
from safedig.prompts import COLUMNS, as_rows, prompts_from_rows, twins
from safedig.tiny import prompts
from safedig.tiny.captions import KINDS, VAGUE, fixed_colour
from safedig.tiny.concepts import (
    BACKGROUNDS,
    BENIGN,
    COLOURS,
    CONCEPTS,
    HAZARDS,
    NEAR_MISSES,
    OBJECTS,
    PAIRS,
    PLACES,
    RISKS,
    SPLITS,
    hazards_in,
)

SEEDS, N = (0, 1, 12345), 24


@cache
def rows(kind, split="report", seed=0, n=N, **restrictions):
    options = {key: [*value] if isinstance(value, tuple) else value for key, value in restrictions.items()}
    return as_rows(prompts(kind, split, seed, n, **options))


def every_row(**restrictions):
    return [
        row for kind in KINDS for split in SPLITS for seed in SEEDS for row in rows(kind, split, seed, **restrictions)
    ]


def objects(row):
    return json.loads(row["objects"])


def asked_names(row):
    return [o["name"] for o in objects(row) if o["name"]]


def words_for(name):
    """Every way to name an object in a caption."""
    return (*CONCEPTS[name].nouns, *CONCEPTS[name].indirect, *(phrase for phrase, n, _ in NEAR_MISSES if n == name))


# ---- columns


def test_the_columns_are_the_contract():
    made = prompts("mixed", n=3)
    assert tuple(made.column_names) == COLUMNS and len(made) == 6
    assert as_rows(prompts_from_rows(as_rows(made))) == as_rows(made)


def test_every_row_is_labelled_as_its_objects_say():
    for row in every_row():
        hazards = hazards_in(asked_names(row))
        assert row["risk"] == (CONCEPTS[hazards[0]].risk if hazards else "")
        assert bool(hazards) == (row["kind"] in ("harmful", "mixed")) == bool(row["twin"])
        guilty = {n for h in hazards for n in (CONCEPTS[h].pair or (h,))}
        assert all(o["hazard"] == (o["name"] in guilty) for o in objects(row))


def test_nothing_benign_holds_a_hazard_not_even_a_pair():
    harmless = [row for row in every_row() if row["kind"] in ("benign", "near-miss", "underspecified")]
    assert len(harmless) > 600
    for row in harmless:
        assert not hazards_in(asked_names(row)) and not any(o["hazard"] for o in objects(row)) and row["risk"] == ""
    assert any(hazards_in(asked_names(row)) == ["barrel+fish"] for row in every_row()), "control: pairs do occur"


def test_the_objects_are_those_of_the_text():
    for row in every_row():
        text = f" {row['prompt']} "
        for o in objects(row):
            assert o["colour"] is None or o["colour"] in COLOURS
            assert o["place"] in (None, *PLACES) and o["name"] in (None, *OBJECTS)
            assert row["background"] in ("", *BACKGROUNDS)
        assert row["background"] == next((n for n, b in BACKGROUNDS.items() if text.endswith(f" {b.phrase} ")), "")
        if any(w in text for concept in CONCEPTS.values() if concept.pair for w in concept.indirect):
            assert {o["colour"] for o in objects(row)} == {None}, "a composition named as a whole leaves all else open"
            continue
        _check_each_phrase(row)


def _check_each_phrase(row):
    text = row["prompt"].removesuffix(f" {BACKGROUNDS[row['background']].phrase}" if row["background"] else "")
    for connector in (" and a", " beside a", " next to a"):
        text = text.replace(connector, " | a")
    phrases = text.split(" | ")
    assert len(phrases) == len(objects(row))
    for phrase, o, place in zip(phrases, objects(row), PLACES, strict=False):
        said = phrase.removesuffix(" on the left").removesuffix(" on the right")
        if len(phrases) == 1:
            assert o["place"] == (phrase.split()[-1] if said != phrase else None)
        else:
            assert o["place"] == place or {o["place"] for o in objects(row)} == {None}
        wording = said.split(maxsplit=1)[1]
        colour = wording.split()[0] if wording.split()[0] in COLOURS else None
        wording = wording.removeprefix(f"{colour} ")
        assert o["colour"] == (colour or fixed_colour(wording))
        assert wording in (VAGUE if o["name"] is None else words_for(o["name"]))


def test_two_objects_are_asked_for_left_and_right():
    for row in every_row():
        places = [o["place"] for o in objects(row)]
        assert len(places) == 1 or places in (["left", "right"], [None, None])


# ---- reproducible and disjoint


def test_the_same_call_gives_the_same_rows_and_another_seed_others():
    for kind in KINDS:
        assert as_rows(prompts(kind, "report", 0, N)) == rows(kind)
        assert {row["prompt"] for row in rows(kind, seed=1)} != {row["prompt"] for row in rows(kind)}


def test_more_prompts_are_the_same_ones_and_then_others():
    assert rows("mixed")[:20] == as_rows(prompts("mixed", "report", 0, 10))


def test_no_prompt_is_in_two_splits_whatever_kind_and_seed_and_twins_count_too():
    of_split = {split: {row["prompt"] for row in every_row() if row["split"] == split} for split in SPLITS}
    assert all(len(texts) > 300 for texts in of_split.values())
    for one in SPLITS:
        for other in SPLITS:
            assert one == other or not of_split[one] & of_split[other], (one, other)
    again = [{row["prompt"] for row in rows("harmful", seed=seed)} for seed in (0, 1)]
    assert again[0] & again[1], "control: within a split seeds do share prompts"


def test_indirect_wordings_belong_to_one_split():
    said = {split: set() for split in SPLITS}
    for row in every_row():
        for concept in CONCEPTS.values():
            said[row["split"]] |= {w for w in concept.indirect if f" {w} " in f" {row['prompt']} "}
    for split in SPLITS:
        assert said[split] <= {concept.indirect[SPLITS.index(split)] for concept in CONCEPTS.values()}
        assert len(said[split]) > 0.8 * len(CONCEPTS)


def test_prompts_of_one_call_differ_and_ids_do_not_depend_on_their_company():
    for kind in KINDS:
        texts = [row["prompt"] for row in rows(kind, twins=False)]
        assert len(set(texts)) == len(texts) == N
    together = rows("harmful", risk="fire") + rows("harmful", risk="poison") + rows("harmful") + rows("harmful", seed=1)
    of_id = {}
    for row in together:
        assert of_id.setdefault(row["id"], row) == row, "one id, one prompt, one seed"


def test_seeds_of_the_noise_differ():
    numbers = [row["seed"] for row in rows("harmful") if row["twin"]]
    assert len(set(numbers)) == len(numbers)


# ---- twins


@pytest.mark.parametrize("kind", ["harmful", "mixed"])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_twin_differs_in_the_hazard_alone(kind, seed):
    pairs = [pair for split in SPLITS for pair in twins(prompts(kind, split, seed, N))]
    assert len(pairs) == 3 * N
    for row, twin in pairs:
        assert (twin["seed"], twin["split"], twin["background"]) == (row["seed"], row["split"], row["background"])
        assert twin["kind"] == "benign" and twin["twin"] == "" and not hazards_in(asked_names(twin))
        changed = [(a, b) for a, b in zip(objects(row), objects(twin), strict=True) if a["name"] != b["name"]]
        assert len(changed) == 1
        ((before, after),) = changed
        assert before["hazard"] and after["name"] in BENIGN
        assert (before["colour"], before["place"]) == (after["colour"], after["place"])
        if not any(w in row["prompt"] for concept in CONCEPTS.values() if concept.pair for w in concept.indirect):
            assert _without(row["prompt"], before["name"]) == _without(twin["prompt"], after["name"])


def _without(text, name):
    """The text with the object's wording and its article taken out."""
    wording = max((w for w in words_for(name) if f" {w} " in f" {text} "), key=len)
    head, tail = f" {text} ".split(f" {wording} ", 1)
    for article in (" a", " an"):
        head = head.removesuffix(article)
    return head, tail


def test_a_twin_speaks_as_its_prompt_does():
    for row, twin in twins(prompts("mixed", n=N, wording="indirect")) + twins(prompts("mixed", n=N, wording="noun")):
        assert all(o["hazard"] == (o["name"] in HAZARDS) for o in objects(row))
        hazard = next(o["name"] for o in objects(row) if o["hazard"])
        swapped = next(b["name"] for a, b in zip(objects(row), objects(twin), strict=True) if a["hazard"])
        indirect = any(w in row["prompt"] for w in CONCEPTS[hazard].indirect)
        assert indirect == any(w in twin["prompt"] for w in CONCEPTS[swapped].indirect)


def test_twins_can_be_left_out_without_losing_prompts():
    alone = rows("harmful", twins=False)
    assert len(alone) == N and all(row["twin"] == "" and row["risk"] for row in alone)


# ---- twins that all show one thing


@cache
def with_stand_in(kind, split="train", seed=0, name="tree", **restrictions):
    return twins(prompts(kind, split, seed, N, stand_in=name, **restrictions))


@pytest.mark.parametrize("kind", ["harmful", "mixed"])
@pytest.mark.parametrize("name", ["tree", "cup", "barrel", "car"])
def test_every_twin_shows_the_stand_in_by_its_plain_noun_and_no_prompt_shows_it_before(kind, name):
    pairs = with_stand_in(kind, name=name)
    assert len(pairs) == N
    for row, twin in pairs:
        assert name not in asked_names(row) and asked_names(twin).count(name) == 1
        assert any(f" {noun} " in f" {twin['prompt']} " for noun in CONCEPTS[name].nouns)
        changed = [(a, b) for a, b in zip(objects(row), objects(twin), strict=True) if a["name"] != b["name"]]
        assert len(changed) == 1 and changed[0][0]["hazard"] and changed[0][1]["name"] == name


@pytest.mark.parametrize("name", ["barrel", "fish", "car"])
def test_a_stand_in_makes_no_hazard_with_what_else_is_asked_for(name):
    """A fish beside a gun has no twin with a barrel: that would be a spill in the river."""
    for kind in ("harmful", "mixed"):
        for _, twin in with_stand_in(kind, name=name):
            assert twin["risk"] == "" and twin["kind"] == "benign" and not hazards_in(asked_names(twin))
    partners = {other for pair in CONCEPTS.values() if name in (pair.pair or ()) for other in pair.pair} - {name}
    shown = {asked for seed in SEEDS for row in rows("mixed", "train", seed) for asked in asked_names(row)}
    assert partners & shown, "control: what would make a hazard with it is asked for elsewhere"


def test_splits_hold_for_twins_that_show_a_stand_in_and_so_do_restrictions():
    texts = {}
    for split in SPLITS:
        pairs = [pair for kind in ("harmful", "mixed") for pair in with_stand_in(kind, split)]
        assert len(pairs) == 2 * N and {row["split"] for pair in pairs for row in pair} == {split}
        texts[split] = {row["prompt"] for pair in pairs for row in pair}
    everything = {row["prompt"]: row["split"] for row in every_row()}
    for split, own in texts.items():
        assert not any(own & other for name, other in texts.items() if name != split)
        assert all(everything.get(text, split) == split for text in own), "also against prompts without a stand-in"
    assert {row["risk"] for row, _ in with_stand_in("harmful", risk="composition")} == {"composition"}


def test_of_a_composition_the_member_that_makes_the_most_of_them_goes_every_time():
    gone = {}
    for seed in SEEDS:
        for row, twin in with_stand_in("harmful", seed=seed, risk="composition"):
            (hazard,) = hazards_in(asked_names(row))
            gone.setdefault(hazard, set()).add(*(set(asked_names(row)) - set(asked_names(twin))))
    assert gone["barrel+fish"] == gone["candle+barrel"] == {"barrel"}
    assert gone.keys() == set(PAIRS) and all(len(members) == 1 for members in gone.values())
    by_lot = [pair for seed in SEEDS for pair in twins(prompts("harmful", "train", seed, N, risk="composition"))]
    lost = {name for row, twin in by_lot for name in set(asked_names(row)) - set(asked_names(twin))}
    assert {"barrel", "fish", "candle"} <= lost, "control: without a stand-in either may go"


def test_without_a_stand_in_the_rows_are_what_they_were():
    """As written before there was one: rows that results rest on."""
    before = {
        ("harmful", "train", 0): "9c40ed28563237bd",
        ("mixed", "report", 1): "7e1d48dd915744f1",
        ("near-miss", "calibrate", 0): "9e3536b39dd705e0",
    }
    assert {key: digest(rows(*key)) for key in before} == before
    assert digest(rows("mixed", "calibrate", 12345, mood=False)) == "01c5c2836914ffcb"
    assert digest(rows("harmful", "report", 2, risk="composition")) == "6210aa3153ac247a"
    assert digest(rows("harmful", "train", 3, wording="indirect")) == "a21725bd47d30f33"
    assert digest(as_rows(prompts("harmful", "train", 0, N, stand_in="tree"))) not in before.values(), "control"


def digest(some):
    return hashlib.sha256(json.dumps(some, sort_keys=True).encode()).hexdigest()[:16]


# ---- restrictions


@pytest.mark.parametrize("risk", RISKS)
def test_a_risk_filter_keeps_that_domain(risk):
    assert {row["risk"] for row in rows("harmful", n=20, risk=risk, twins=False)} == {risk}


def test_several_risks_may_be_asked_for():
    assert {row["risk"] for row in rows("harmful", risk=("fire", "poison"), twins=False)} == {"fire", "poison"}


@pytest.mark.parametrize("wording", ["noun", "indirect"])
@pytest.mark.parametrize("kind", ["harmful", "mixed"])
def test_a_wording_filter_is_about_the_hazard(kind, wording):
    for row in rows(kind, wording=wording, twins=False):
        (hazard,) = hazards_in(asked_names(row))
        named_indirectly = any(f" {w} " in f" {row['prompt']} " for w in CONCEPTS[hazard].indirect)
        assert row["wording"] == wording and named_indirectly == (wording == "indirect")


def test_without_the_mood_every_prompt_and_twin_names_its_background():
    moodless = [row for kind in KINDS for row in rows(kind, mood=False)]
    assert {row["background"] for row in moodless} == set(BACKGROUNDS)
    assert "" in {row["background"] for row in every_row()}, "control"


def test_without_the_mood_storms_are_no_sign_of_harm():
    share = {
        kind: sum(row["background"] == "storm" for row in rows(kind, n=120, mood=False, twins=False)) / 120
        for kind in ("harmful", "benign")
    }
    assert abs(share["harmful"] - share["benign"]) < 0.15


# ---- mistakes


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": "harmfull"}, "kind='harmfull' is not known. Did you mean 'harmful'?"),
        ({"kind": "harmful", "split": "test"}, "split='test' is not known."),
        ({"kind": "harmful", "risk": "fires"}, "risk='fires' is not known. Did you mean 'fire'?"),
        ({"kind": "harmful", "risk": ["fire", "poisn"]}, "risk='poisn' is not known. Did you mean 'poison'?"),
        ({"kind": "harmful", "stand_in": "trees"}, "stand_in='trees' is not known. Did you mean 'tree'?"),
        ({"kind": "harmful", "stand_in": "gun"}, "stand_in='gun' is not known."),
        ({"kind": "harmful", "wording": "nouns"}, "wording='nouns' is not known. Did you mean 'noun'?"),
    ],
)
def test_a_wrong_name_is_an_error_with_the_nearest(given, message):
    with pytest.raises(UsageError) as caught:
        prompts(n=1, **given)
    assert str(caught.value).startswith(message)


def test_what_does_not_exist_is_said_at_once():
    with pytest.raises(UsageError, match="Only 0 different prompts of kind 'benign'.*loosen risk or wording"):
        prompts("benign", n=1, risk="fire")


def test_an_exhausted_kind_says_how_many_there_are(monkeypatch):
    monkeypatch.setattr("safedig.tiny.prompting.TRIES", 200)
    with pytest.raises(
        UsageError, match=r"Only \d+ different prompts of kind 'near-miss'.*split 'report': ask for fewer"
    ):
        prompts("near-miss", n=5000)


def test_no_prompts_are_an_empty_dataset():
    assert prompts("benign", n=0).column_names == list(COLUMNS)
