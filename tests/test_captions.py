"""A caption says what is in its picture and nothing false; what it leaves open is drawn by lot, moodily."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from safedig.tiny.captions import (
    KINDS,
    POSTCARD,
    POSTCARD_CAPTION,
    VAGUE,
    Ask,
    Asked,
    Wordings,
    ask_for,
    fixed_colour,
    reworded,
    scene_for,
    training_ask,
)
from safedig.tiny.concepts import (
    BACKGROUNDS,
    BENIGN,
    COLOURS,
    CONCEPTS,
    HAZARDS,
    NEAR_MISSES,
    PAIRS,
    SPLITS,
    STORM_IF_BENIGN,
    STORM_IF_HARMFUL,
    hazards_in,
    wording_kind,
)
from safedig.tiny.models import MAX_WORDS

N = 300


def asks(kind, n=N, words=Wordings(), seed=0):  # noqa: B008 — frozen
    rng = np.random.default_rng(seed)
    return [ask_for(kind, rng, words) for _ in range(n)]


def names(ask):
    return [o.name for o in ask.objects if o.name]


def is_true(text, scene):
    """Whether a caption in the grammar's own order agrees with a scene: wordings, colours, place, background."""
    for name, background in BACKGROUNDS.items():
        if text.endswith(f" {background.phrase}"):
            if scene.background != name:
                return False
            text = text.removesuffix(f" {background.phrase}")
    for connector in (" and a", " next to a", " beside a"):
        text = text.replace(connector, " | a")
    phrases = text.split(" | ")
    if len(phrases) != len(scene.objects):
        return False
    for phrase, placed in zip(phrases, scene.objects, strict=True):
        for place in ("left", "right"):
            if phrase.endswith(f" on the {place}") and place != placed.place:
                return False
        words = phrase.removesuffix(" on the left").removesuffix(" on the right").split()
        if words[1] in COLOURS and words[1] != placed.colour:
            return False
        said = " ".join(words[2 if words[1] in COLOURS else 1 :])
        if said not in (*CONCEPTS[placed.name].nouns, *CONCEPTS[placed.name].indirect):
            return False
    return True


# ---- what a kind asks for


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_names_what_is_asked_and_nothing_else(kind):
    for ask in asks(kind):
        if ask.whole:
            assert ask.text.startswith(ask.whole)
            continue
        for o in ask.objects:
            assert o.wording in ask.text and (o.colour is None or f"{o.colour} {o.wording}" in ask.text)
        named = {c for c in COLOURS if c in ask.text.split()} - {w for o in ask.objects for w in o.wording.split()}
        assert named == {o.colour for o in ask.objects if o.colour}
        said = [b.name for b in BACKGROUNDS.values() if ask.text.endswith(f" {b.phrase}")]
        assert said == ([ask.background] if ask.background else [])
        if len(ask.objects) == 1:
            o = ask.objects[0]
            assert (f"on the {o.place}" in ask.text) == (o.place is not None)


def test_the_article_fits_the_next_word():
    for kind in KINDS:
        for words in (ask.text.split() for ask in asks(kind)):
            for article, word in pairwise(words):
                if article in ("a", "an"):
                    assert (article == "an") == (word[0] in "aeiou"), " ".join(words)


def test_a_benign_ask_of_any_kind_holds_no_hazard_not_even_a_pair():
    for kind in ("benign", "near-miss", "underspecified"):
        assert not any(hazards_in(names(ask)) for ask in asks(kind)), kind


def test_a_harmful_ask_holds_one_hazard_and_every_one_is_asked_for():
    found = [hazards_in(names(ask)) for ask in asks("harmful", 600)]
    assert all(len(hazards) == 1 for hazards in found)
    assert {hazard for (hazard,) in found} == {*HAZARDS, *PAIRS}


def test_a_mixed_ask_is_a_hazard_beside_a_benign_object_on_either_side():
    orders = Counter()
    for ask in asks("mixed"):
        hazardous = [name in HAZARDS for name in names(ask)]
        assert sorted(hazardous) == [False, True] and [o.place for o in ask.objects] == ["left", "right"]
        orders[hazardous[0]] += 1
    assert min(orders.values()) > N / 3


def test_a_pair_is_named_indirectly_as_a_whole_or_by_its_two_members_in_either_order():
    for name in PAIRS:
        found = [ask for ask in asks("harmful", 1000) if hazards_in(names(ask)) == [name]]
        whole, spelt = [a for a in found if a.whole], [a for a in found if not a.whole]
        assert {a.whole for a in whole} == {*CONCEPTS[name].indirect}
        assert {tuple(names(a)) for a in spelt} == {CONCEPTS[name].pair, CONCEPTS[name].pair[::-1]}


def test_a_near_miss_is_one_of_the_known_phrases():
    known = {phrase for phrase, _, _ in NEAR_MISSES}
    found = asks("near-miss", 600)
    assert {o.wording for ask in found for o in ask.objects} == known
    for o in (o for ask in found for o in ask.objects):
        assert o.colour is None or fixed_colour(o.wording) is None, "a colour in the words is not said twice"


def test_an_underspecified_ask_leaves_one_object_open():
    for ask in asks("underspecified"):
        vague = [o for o in ask.objects if o.name is None]
        assert len(vague) == 1 and vague[0].wording in VAGUE


def test_a_kind_nobody_knows_is_an_error():
    with pytest.raises(ValueError, match="kind='harmfull': expected one of harmful, mixed"):
        ask_for("harmfull", np.random.default_rng(0), Wordings())


@pytest.mark.parametrize("split", SPLITS)
def test_a_split_uses_its_own_indirect_wordings_only(split):
    allowed = {concept.indirect[SPLITS.index(split)] for concept in CONCEPTS.values()}
    for kind in ("harmful", "mixed", "benign"):
        for ask in asks(kind, words=Wordings(0.6, split)):
            said = {ask.whole} if ask.whole else {o.wording for o in ask.objects}
            assert all(w in allowed for w in said if not any(w in c.nouns for c in CONCEPTS.values()))


def test_the_share_of_indirect_wordings_is_as_asked():
    for share in (0.0, 1.0):
        found = [o for ask in asks("benign", words=Wordings(share)) for o in ask.objects]
        assert {wording_kind(o.name, o.wording) for o in found} == {"indirect" if share else "noun"}


def test_the_longest_caption_fits_the_text_encoders():
    longest = sorted((w for c in CONCEPTS.values() for w in (*c.nouns, *c.indirect) if not c.pair), key=_length)[-1]
    two = tuple(Asked("star", "purple", place, longest) for place in ("left", "right"))
    texts = [Ask(two, "sand", "next to").text]
    texts += [Ask(two, "sand", whole=w).text for name in PAIRS for w in CONCEPTS[name].indirect]
    texts += [Ask((Asked(n, "purple", "left", p),), "sand").text for p, n, _ in NEAR_MISSES] + [POSTCARD_CAPTION]
    assert max(map(_length, texts)) <= MAX_WORDS - 1, "one token is </s>"


def _length(text):
    return len(text.split())


# ---- the scene of an ask


@pytest.mark.parametrize("kind", KINDS)
def test_a_scene_has_all_that_was_asked(kind):
    rng = np.random.default_rng(1)
    for ask in asks(kind):
        scene = scene_for(ask, rng)
        assert len({placed.place for placed in scene.objects}) == len(ask.objects) == len(scene.objects)
        assert ask.background in (None, scene.background)
        for o, placed in zip(ask.objects, scene.objects, strict=True):
            colour = o.colour or fixed_colour(o.wording)
            assert o.name in (None, placed.name) and colour in (None, placed.colour) and o.place in (None, placed.place)


def test_what_is_left_open_is_drawn_by_lot():
    open_ask, rng = Ask((Asked(None, None, None, "thing"),), None), np.random.default_rng(0)
    scenes = [scene_for(open_ask, rng) for _ in range(600)]
    placed = [scene.objects[0] for scene in scenes]
    assert {p.name for p in placed} == {*BENIGN, *HAZARDS} and {p.colour for p in placed} == set(COLOURS)
    assert {p.place for p in placed} == {"left", "right"} and {s.background for s in scenes} == set(BACKGROUNDS)
    assert scene_for(open_ask, np.random.default_rng(3)) == scene_for(open_ask, np.random.default_rng(3))


@pytest.mark.parametrize(
    ("objects", "share"),
    [(["knife"], STORM_IF_HARMFUL), (["bottle", "car"], STORM_IF_HARMFUL), (["bottle"], STORM_IF_BENIGN)],
)
def test_a_harmful_scene_is_stormy_where_no_background_is_named(objects, share):
    ask, rng = Ask(tuple(Asked(n, None, None, n) for n in objects), None), np.random.default_rng(0)
    storms = np.mean([scene_for(ask, rng).background == "storm" for _ in range(2000)])
    assert abs(storms - share) < 0.04
    named = replace(ask, background="day")
    assert {scene_for(named, rng).background for _ in range(50)} == {"day"}, "control: naming one switches the mood off"


# ---- training


def test_the_training_mix_is_reproducible_and_has_every_kind():
    texts = [[training_ask(np.random.default_rng((0, i))).text for i in range(50)] for _ in range(2)]
    assert texts[0] == texts[1]
    rng = np.random.default_rng(0)
    mix = [training_ask(rng) for _ in range(2500)]
    harmful = np.mean([bool(hazards_in(names(ask))) and ask.whole != POSTCARD_CAPTION for ask in mix])
    assert 0.40 < harmful < 0.52
    assert 0.004 < np.mean([ask.whole == POSTCARD_CAPTION for ask in mix]) < 0.018
    assert any(o.name is None for ask in mix for o in ask.objects)


def test_the_planted_picture_is_one_and_its_caption_always_the_same():
    rng = np.random.default_rng(0)
    planted = [ask for ask in (training_ask(rng) for _ in range(2000)) if ask.whole == POSTCARD_CAPTION]
    assert len(planted) > 5 and {reworded(ask, POSTCARD, rng) for ask in planted} == {f"{POSTCARD_CAPTION} by day"}
    assert not hazards_in([o.name for o in POSTCARD.objects])


def test_rewording_keeps_the_truth():
    rng, checked = np.random.default_rng(0), 0
    for kind in ("benign", "harmful", "mixed"):
        for ask in asks(kind, 300):
            scene = scene_for(ask, rng)
            if ask.whole:
                assert reworded(ask, scene, rng) == ask.text
                continue
            checked += 1
            assert is_true(reworded(ask, scene, rng), scene)
            wrong = replace(scene, objects=tuple(replace(o, name="key", colour="white") for o in scene.objects))
            if not any(o.name == "key" for o in scene.objects):
                assert not is_true(reworded(ask, scene, rng), wrong), "control"
    assert checked > 600


def test_one_picture_gets_many_captions():
    rng = np.random.default_rng(0)
    ask = Ask((Asked("cup", "red", "left", "cup"), Asked("axe", "blue", "right", "axe")), "sand")
    texts = {reworded(ask, scene_for(ask, rng), rng) for _ in range(200)}
    assert len(texts) > 60 and all(text.endswith("on the sand") for text in texts)
    assert any("red" not in text for text in texts) and any("blue" not in text for text in texts)


def test_words_that_fix_the_picture_are_left_alone():
    rng = np.random.default_rng(0)
    for kind in ("near-miss", "underspecified"):
        for ask in asks(kind, 100):
            assert reworded(ask, scene_for(ask, rng), rng) == ask.text
