"""The world is as large as it must be, nothing in it is ambiguous, and harm is said of the right pictures."""

import itertools

import pytest

from safedig.tiny.captions import VAGUE
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
    wording_kind,
)


def wordings(name):
    return (*CONCEPTS[name].nouns, *CONCEPTS[name].indirect)


def test_there_is_enough_of_everything():
    assert len(BENIGN) >= 12 and len(COLOURS) >= 6 and len(BACKGROUNDS) >= 5 and len(RISKS) >= 5
    for risk in RISKS:
        assert sum(concept.risk == risk for concept in CONCEPTS.values()) >= 3, risk
    for name in OBJECTS:
        assert len(wordings(name)) >= 3 and CONCEPTS[name].nouns[0] == name


def test_every_split_has_an_indirect_wording_of_its_own():
    for concept in CONCEPTS.values():
        assert len(set(concept.indirect)) == len(SPLITS)


def test_no_wording_means_two_things():
    said = [*itertools.chain(*map(wordings, CONCEPTS)), *(phrase for phrase, _, _ in NEAR_MISSES)]
    assert len(set(said)) == len(said)
    assert not {*said} & {*VAGUE, *COLOURS, *PLACES}


def test_no_noun_is_given_away_by_an_indirect_wording():
    for concept in CONCEPTS.values():
        assert not {*concept.nouns} & {word for phrase in concept.indirect for word in phrase.split()}


def test_near_misses_are_benign_and_name_their_risky_neighbour_in_words_or_shape():
    assert {name for _, name, _ in NEAR_MISSES} == set(BENIGN), "each benign object has one"
    assert all(colour is None or colour in COLOURS for _, _, colour in NEAR_MISSES)


def test_a_composition_is_made_of_two_benign_objects_and_has_no_noun():
    for name in PAIRS:
        assert len(set(CONCEPTS[name].pair)) == 2 and set(CONCEPTS[name].pair) <= set(BENIGN)
        assert CONCEPTS[name].nouns == () and CONCEPTS[name].risk == "composition"


def test_risk_marks_hazards_and_pairs_and_nothing_else():
    assert {name for name in CONCEPTS if CONCEPTS[name].risk} == {*HAZARDS, *PAIRS}


@pytest.mark.parametrize("name", OBJECTS)
def test_one_object_is_a_hazard_or_is_not(name):
    assert hazards_in([name]) == ([name] if name in HAZARDS else [])


def test_two_benign_objects_are_harmful_exactly_where_they_are_a_pair_in_any_order():
    pairs = {frozenset(CONCEPTS[name].pair): name for name in PAIRS}
    for names in itertools.permutations(BENIGN, 2):
        assert hazards_in([*names]) == ([pairs[frozenset(names)]] if frozenset(names) in pairs else [])
    assert hazards_in([]) == [] and hazards_in(["knife", "barrel", "fish"]) == ["knife", "barrel+fish"]


def test_a_wording_is_a_noun_or_indirect():
    assert wording_kind("knife", "dagger") == "noun" and wording_kind("knife", "slicing edge") == "indirect"
    assert wording_kind("gun", "slicing edge") == "noun", (
        "control: of another concept it is not this one's circumlocution"
    )
