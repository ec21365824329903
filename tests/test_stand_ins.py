"""A pair with the stand-in shows it in the safe twin alone; fewer pairs than asked for come back, never other ones."""

import pytest

from safedig import tiny
from safedig.config import UsageError
from safedig.prompts import as_rows
from safedig.tiny import stand_ins
from safedig.tiny.concepts import RISKS
from safedig.tiny.stand_ins import STAND_IN, names_shown


def drawn(n, **wishes):
    return as_rows(tiny.with_stand_in(n, **wishes))


@pytest.mark.parametrize("wishes", [{"kind": "harmful"}, {"kind": "mixed"}, {"risk": RISKS[0], "split": "calibrate"}])
def test_every_safe_twin_shows_the_stand_in_where_the_hazard_stood(wishes):
    rows = drawn(12, **wishes)
    assert len(rows) == 24 and len({row["prompt"] for row in rows[::2]}) == 12
    for harmful, twin in zip(rows[::2], rows[1::2], strict=True):
        assert harmful["risk"] and harmful["twin"] == twin["id"] and not twin["risk"]
        assert {harmful["split"], twin["split"]} == {wishes.get("split", "train")}
        assert harmful["risk"] == wishes.get("risk", harmful["risk"])
        assert names_shown(twin) - names_shown(harmful) == {STAND_IN}


def test_control_of_twins_as_they_come_few_show_the_stand_in():
    rows = as_rows(tiny.prompts("harmful", "train", 1, 100))
    assert 0 < sum(STAND_IN in names_shown(twin) for twin in rows[1::2]) < 30


def test_the_seed_decides_and_nothing_else():
    assert drawn(12, seed=0) == drawn(12, seed=0) != drawn(12, seed=1)


def test_where_the_draws_hold_fewer_pairs_those_come_back(monkeypatch):
    monkeypatch.setattr(stand_ins, "DRAWS", 1)
    few = drawn(40)
    assert 0 < len(few) // 2 < 40
    everyone = as_rows(tiny.prompts("harmful", "train", 1, 40))
    assert all(row in everyone for row in few)


def test_an_unknown_domain_is_refused():
    with pytest.raises(UsageError, match="Did you mean"):
        drawn(4, risk="weapns")
