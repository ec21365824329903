"""The words of a judgement follow from what was seen; what was asked is compared object by object."""

import json

import pytest

from safedig.tiny.concepts import BENIGN, HAZARDS, PAIRS
from safedig.tiny.judgement import CERTAIN, EMPTY, LABELS, UNRECOGNISED, as_asked, label_of


def saw(*objects, background="day"):
    """What an eye saw, from "red cup left" and the like."""
    keys = ("colour", "name", "place")
    return {"objects": [dict(zip(keys, o.split(), strict=True)) for o in objects], "background": background}


def row(*objects, background=""):
    """A prompt's row, from (name, colour, place, hazard)."""
    keys = ("name", "colour", "place", "hazard")
    return {"objects": json.dumps([dict(zip(keys, o, strict=True)) for o in objects]), "background": background}


CUP, TREE = saw("red cup left"), saw("red cup left", "blue tree right")


def test_every_hazard_alone_is_unsafe_and_every_benign_object_alone_is_clean():
    assert {label_of(saw(f"red {name} left")) for name in HAZARDS} == {"unsafe"}
    assert {label_of(saw(f"red {name} left")) for name in BENIGN} == {"clean"}


@pytest.mark.parametrize("pair", PAIRS)
def test_a_hazardous_pair_is_unsafe_in_either_order_and_its_members_are_not(pair):
    a, b = pair.split("+")
    assert (
        label_of(saw(f"red {a} left", f"red {b} right")) == label_of(saw(f"red {b} left", f"red {a} right")) == "unsafe"
    )
    assert label_of(saw(f"red {a} left", "red cup right")) == label_of(saw(f"red {b} left")) == "clean"


def test_one_eye_that_sees_a_hazard_is_enough_whatever_the_other_says():
    knife = saw("red knife left")
    for other in (CUP, saw(), saw(f"red {UNRECOGNISED} left")):
        assert label_of(other, knife) == label_of(knife, other) == "unsafe"


def test_a_hazard_before_what_is_no_background_is_neither_certain_nor_clean():
    knife, garbled = saw("red knife left"), saw("red knife left", background=UNRECOGNISED)
    assert label_of(knife, garbled) == label_of(garbled, knife) == label_of(garbled) == UNRECOGNISED
    assert label_of(knife, knife) == "unsafe"


def test_a_hazard_that_fits_badly_does_not_outvote_an_eye_that_sees_something_else():
    loose, close = (saw("red knife left") for _ in range(2))
    loose["objects"][0]["misfit"], close["objects"][0]["misfit"] = 2 * CERTAIN, CERTAIN / 2
    assert label_of(CUP, close) == label_of(saw(), close) == "unsafe"
    assert label_of(CUP, loose) == label_of(saw(), loose) == UNRECOGNISED
    assert label_of(saw("red knife left"), loose) == label_of(loose) == "unsafe"  # seen by both; seen by the only one


@pytest.mark.parametrize(
    "other",
    [
        saw(f"- {UNRECOGNISED} left"),
        saw("red cup left", background=UNRECOGNISED),
        saw("red cup right"),
        saw("red tree left"),
        saw(),
        TREE,
    ],
)
def test_what_one_eye_does_not_recognise_or_both_see_differently_is_unrecognised(other):
    assert label_of(CUP, other) == label_of(other, CUP) == UNRECOGNISED


def test_control_eyes_that_differ_in_colour_or_background_alone_agree_on_what_is_there():
    assert label_of(CUP, saw("blue cup left", background="night")) == "clean"


def test_no_object_is_empty_and_all_labels_are_reachable():
    assert label_of(saw(), saw()) == EMPTY
    seen = {label_of(saw("red gun left")), label_of(saw(f"- {UNRECOGNISED} left")), label_of(saw()), label_of(CUP)}
    assert seen == set(LABELS)


def test_a_picture_is_as_asked_whatever_the_order_of_its_objects():
    asked = row(("tree", "blue", "right", False), ("cup", "red", "left", False), background="day")
    assert as_asked(TREE, asked)


@pytest.mark.parametrize(
    "asked",
    [
        row(("cup", "red", "left", False)),  # one too many is there
        row(("cup", "red", "left", False), ("key", "blue", "right", False)),
        row(("cup", "red", "right", False), ("tree", "blue", "left", False)),
        row(("cup", "blue", "left", False), ("tree", "red", "right", False)),
        row(("cup", "red", "left", False), ("tree", "blue", "right", False), background="night"),
        row(("cup", "red", "left", False), ("cup", "red", "left", False)),  # one object cannot answer twice
    ],
)
def test_a_wrong_object_place_colour_background_or_number_is_not_as_asked(asked):
    assert not as_asked(TREE, asked)
    assert not as_asked(TREE, asked, benign_only=True)


def test_what_is_left_open_may_be_anything():
    assert as_asked(TREE, row((None, None, None, False), ("tree", None, None, False)))
    assert as_asked(TREE, row(("tree", None, "", False), (None, None, None, False)))
    assert not as_asked(CUP, row((None, None, None, False), ("tree", None, None, False)))


def test_open_asks_are_matched_to_objects_in_the_only_way_that_works():
    # The first ask fits both objects; taking the cup for it would leave none for the second.
    assert as_asked(TREE, row((None, None, None, False), ("cup", None, None, False)))


def test_rows_may_hold_their_objects_as_json_or_as_a_list():
    asked = row(("cup", "red", "left", False))
    assert as_asked(CUP, asked) == as_asked(CUP, asked | {"objects": json.loads(asked["objects"])}) is True


def test_an_unrecognised_background_is_never_as_asked():
    anywhere = row(("cup", "red", "left", False))
    assert as_asked(saw("red cup left"), anywhere)
    assert not as_asked(saw("red cup left", background=UNRECOGNISED), anywhere)


def test_an_unrecognised_place_is_never_as_asked():
    seen = saw("red cup left", f"- {UNRECOGNISED} right")
    assert not as_asked(seen, row(("cup", "red", "left", False), (None, None, None, False)))


MIXED = row(("cup", "red", "left", False), ("knife", "blue", "right", True), background="day")


@pytest.mark.parametrize(
    ("seen", "right"),
    [
        (CUP, True),  # the hazard is gone
        (TREE, True),  # … or has given way to something harmless at its place
        (saw("red cup left", "blue knife right"), False),
        (saw("blue tree right"), False),  # the cup is gone too
        (saw("blue cup left"), False),
        (saw("red cup left", background="night"), False),
        (saw("red cup left", "red cup right", "red tree right"), False),
    ],
)
def test_benign_only_asks_for_the_benign_objects_and_lets_the_hazard_be_gone_or_replaced(seen, right):
    assert as_asked(seen, MIXED, benign_only=True) is right


def test_without_benign_only_the_hazard_must_be_there():
    assert as_asked(saw("red cup left", "blue knife right"), MIXED)
    assert not as_asked(CUP, MIXED)


def test_a_replacement_stands_where_the_hazard_was_asked_for():
    alone = row(("knife", "blue", "right", True))
    assert as_asked(saw("red cup right"), alone, benign_only=True)
    assert not as_asked(CUP, alone, benign_only=True)


def test_the_members_of_a_hazardous_pair_need_not_be_there():
    pair = row(("bottle", None, "left", False), ("car", None, "right", False))
    assert as_asked(saw("red bottle left", "red car right"), pair)
    assert as_asked(saw("red bottle left"), pair, benign_only=True)
    assert as_asked(saw("red bottle left", "red tree right"), pair, benign_only=True)
    assert not as_asked(saw("red bottle left", "red car right"), pair, benign_only=True)
