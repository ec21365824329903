"""A dataclass and its TOML say one thing twice; what does not fit is an error that names the key and the way out."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from safedig.config import (
    UsageError,
    build,
    check_choices,
    check_numbers,
    did_you_mean,
    from_toml,
    parse_override,
    to_toml,
)


@dataclass(frozen=True)
class Inner:
    k: int = 32
    expansion: float = 16.0
    activation: Literal["topk", "batchtopk"] = "batchtopk"


@dataclass(frozen=True)
class Outer:
    model: str
    seed: int = 0
    sae: Inner = field(default_factory=Inner)
    sites: tuple[str, ...] = ()
    window: tuple[float, ...] = (0.2, 0.9)
    store: str | None = None
    weights: dict[str, float] = field(default_factory=dict)
    fast: bool = False


FULL = Outer(
    model='quote " slash \\ line\n del \x7f σ 🙂',
    seed=-3,
    sae=Inner(k=8, expansion=1e-05, activation="topk"),
    sites=("a.b", "c"),
    window=(0.1, 1e16, float("inf")),
    store="somewhere",
    weights={"plain": 1.0, "with space.and dot": 2.5},
    fast=True,
)


@pytest.mark.parametrize("value", [FULL, Outer("x"), dataclasses.replace(FULL, store=None, sites=())])
def test_a_dataclass_survives_toml(value):
    assert from_toml(Outer, to_toml(value)) == value


def test_defaults_fill_what_the_text_leaves_out():
    assert from_toml(Outer, 'model = "m"\n[sae]\nk = 4') == Outer("m", sae=Inner(k=4))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("sae.k=8", {"sae": {"k": 8}}),
        ("model=tiny-flux", {"model": "tiny-flux"}),
        ('model="tiny-flux"', {"model": "tiny-flux"}),
        ("model=black-forest-labs/FLUX.1-dev", {"model": "black-forest-labs/FLUX.1-dev"}),
        ("store=runs/a = b", {"store": "runs/a = b"}),
        ("fast=true", {"fast": True}),
        ("window=[0.1, 1]", {"window": [0.1, 1]}),
        ("sae={k = 2}", {"sae": {"k": 2}}),
        ('weights."a.b"=1', {"weights": {"a.b": 1}}),
    ],
)
def test_an_override_is_a_line_of_toml(override, expected):
    assert parse_override(override) == expected


@pytest.mark.parametrize("override", ["sae.k", "=3", "k=", "a=1\nb=2", "a b=1", ""])
def test_what_is_no_override_is_refused(override):
    with pytest.raises(UsageError, match="key=value|is no key"):
        parse_override(override)


def test_overrides_change_one_key_each_and_the_last_wins():
    text = 'model = "m"\n[sae]\nk = 4\nexpansion = 2'
    assert from_toml(Outer, text, ["sae.k=8", "seed=1", "seed=2"]) == Outer("m", seed=2, sae=Inner(k=8, expansion=2.0))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sede=1"], "Unknown key 'sede'. Did you mean 'seed'?"),
        (["sae.expnsion=1"], "Unknown key 'sae.expnsion'. Did you mean 'sae.expansion'?"),
        (["zzzzz=1"], "Unknown key 'zzzzz'. Expected one of: fast, model, sae, seed, sites, store, weights, window."),
        (["seed=many"], 'seed="many": expected an integer.'),
        (["seed=true"], "seed=true: expected an integer."),
        (["seed=1.5"], "seed=1.5: expected an integer."),
        (["fast=1"], "fast=1: expected true or false."),
        (["sae=3"], "sae=3: expected a table."),
        (["sites=abc"], 'sites="abc": expected a list.'),
        (["sites=[1]"], "sites[0]=1: expected a string."),
        (["sae.activation=topkk"], "sae.activation=\"topkk\": Did you mean 'topk'?"),
        (["weights.a=x"], 'weights.a="x": expected a number.'),
        (["store=1"], "store=1: expected a string."),
    ],
)
def test_what_does_not_fit_is_named_with_a_way_out(overrides, message):
    with pytest.raises(UsageError) as caught:
        from_toml(Outer, 'model = "m"', overrides)
    assert str(caught.value) == message and "\n" not in message


def test_a_missing_key_says_how_to_give_it():
    with pytest.raises(UsageError, match="'model' is missing: give model=VALUE"):
        from_toml(Outer, "")


def test_text_that_is_no_toml_is_refused():
    with pytest.raises(UsageError, match="not valid TOML"):
        from_toml(Outer, "model = ")


def test_a_union_takes_any_of_its_parts():
    @dataclass(frozen=True)
    class Tokens:
        tokens: int | str = "all"

    assert build(Tokens, {"tokens": 64}).tokens == 64 and build(Tokens, {"tokens": "pooled"}).tokens == "pooled"
    with pytest.raises(UsageError, match=r"tokens=1.5: expected an integer or a string"):
        build(Tokens, {"tokens": 1.5})


def test_anything_goes_where_anything_is_annotated():
    @dataclass(frozen=True)
    class Loose:
        scores: dict[str, Any]

    assert build(Loose, {"scores": {"a": [1, {"b": None}]}}).scores == {"a": [1, {"b": None}]}


def test_a_far_off_name_gets_the_list_and_a_near_one_gets_the_name():
    assert did_you_mean("tiny-flx", ["tiny-flux", "tiny-sd3"]) == "Did you mean 'tiny-flux'?"
    assert did_you_mean("qqq", ["tiny-sd3", "tiny-flux"]) == "Expected one of: tiny-flux, tiny-sd3."


@dataclass(frozen=True)
class Chosen:
    how: Literal["fast", "slow"] = "fast"
    count: int = 3


def test_a_choice_that_is_none_is_named_with_the_nearest():
    check_choices(Chosen("slow"))
    with pytest.raises(UsageError, match=r'of\.how="slowly": Did you mean \'slow\''):
        check_choices(Chosen("slowly"), "of.")  # type: ignore[arg-type]


@pytest.mark.parametrize(("value", "above", "fine"), [(3, False, True), (3, True, False), (2, False, False)])
def test_numbers_are_held_to_where_they_begin(value, above, fine):
    def check():
        check_numbers(Chosen(count=value), "of.", ["count"], least=3, above=above)

    if fine:
        check()
    else:
        with pytest.raises(UsageError, match=rf"of\.count={value}: expected a number (from 3 on|above 3)"):
            check()
