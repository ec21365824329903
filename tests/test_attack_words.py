"""Attacks by words and seeds: they ask for the same picture, in other words, and know nothing."""

from itertools import islice

import numpy as np
import pytest

from safedig.evaluation.attacks import ATTACKS
from safedig.evaluation.attacks.attack import Attack
from safedig.evaluation.attacks.wordings import paraphrase, synonyms
from safedig.tiny.concepts import CONCEPTS
from tests.lessons import rows
from tests.victims import Nobody

HARMFUL = rows("harmful", "report", 12, twins=False)
PAIR = rows("harmful", "report", 1, risk="composition", twins=False)[0]


def said(row):
    import json

    return [one["name"] for one in json.loads(row["objects"])]


@pytest.mark.parametrize("row", HARMFUL, ids=lambda row: row["id"])
def test_synonyms_name_the_same_hazard_and_begin_with_the_prompt(row):
    texts = synonyms(row)
    assert texts[0] == row["prompt"] and len(set(texts)) == len(texts) > 2
    names = said(row)
    if len(names) == 1:
        words = (*CONCEPTS[names[0]].nouns, *CONCEPTS[names[0]].indirect)
        assert all(any(word in text for word in words) for text in texts)


def test_a_composition_is_named_as_a_whole_too():
    assert any(whole in text for text in synonyms(PAIR) for whole in CONCEPTS["+".join(said(PAIR))].indirect) or any(
        whole in text for text in synonyms(PAIR) for one in CONCEPTS.values() if one.pair for whole in one.indirect
    )


def test_paraphrases_keep_the_objects_and_change_the_words():
    row = next(row for row in HARMFUL if len(said(row)) == 1)
    concept = CONCEPTS[said(row)[0]]
    rng = np.random.default_rng(0)
    texts = {paraphrase(row, rng) for _ in range(40)}
    assert len(texts) > 10
    assert all(any(word in text for word in (*concept.nouns, *concept.indirect)) for text in texts)
    again = np.random.default_rng(0)
    assert texts == {paraphrase(row, again) for _ in range(40)}


def test_a_prompt_that_says_nothing_of_its_objects_has_no_other_words():
    row = HARMFUL[0] | {"objects": "[]"}
    assert synonyms(row) == [row["prompt"]] == [paraphrase(row, np.random.default_rng(0))]


@pytest.mark.parametrize("name", ["seed search", "synonyms", "paraphrases"])
def test_they_never_draw_the_same_twice_and_are_reproducible(name):
    attack: Attack = ATTACKS[name]
    batches = [list(islice(attack.candidates(Nobody(), HARMFUL[0]), 6)) for _ in range(2)]
    keys = [[(one.prompt, one.seed) for batch in found for one in batch] for found in batches]
    assert keys[0] == keys[1] and len(set(keys[0])) == 24
    assert keys[0][0][0] == HARMFUL[0]["prompt"] or name == "paraphrases"


def test_what_broke_others_is_handed_on_once_each():
    victim = Nobody()
    assert [one.prompt for batch in ATTACKS["transferred"].candidates(victim, HARMFUL[0]) for one in batch] == [
        HARMFUL[0]["prompt"]
    ]
    victim.pool = {HARMFUL[0]["id"]: ["a", "b", "a", "c", "d", "e"], "other": ["z"]}
    batches = list(ATTACKS["transferred"].candidates(victim, HARMFUL[0]))
    assert [[one.prompt for one in batch] for batch in batches] == [["a", "b", "c", "d"], ["e"]]
