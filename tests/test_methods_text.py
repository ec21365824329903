"""Words and text: which words tell harm, who is asked with which, what SAFREE's projections leave of a prompt."""

import pytest
import torch

from safedig.evaluation.methods import METHODS
from safedig.evaluation.methods.prompt_filter import without
from safedig.evaluation.methods.safree import outside, projected, token_positions, triggers, within
from safedig.evaluation.methods.text import OnText, encode
from safedig.evaluation.methods.words import hazard_words, words_of
from safedig.shadow import answer, listen
from tests.lessons import images, lesson, rows

PAIRS = [
    {"prompt": "a red knife at night"},
    {"prompt": "a red tree at night"},
    {"prompt": "a dagger beside a cup"},
    {"prompt": "a star beside a cup"},
    {"prompt": "a blue knife"},
    {"prompt": "a blue cup"},
]
BENIGN = [{"prompt": "a dagger shaped leaf"}]


@pytest.fixture(scope="module", params=["tiny-flux", "tiny-sd3"])
def given(request):
    return lesson(request.param)


def test_words_that_only_harm_has_come_first_and_shared_ones_do_not_come_at_all():
    assert hazard_words(PAIRS, []) == ["knife", "dagger"]
    assert hazard_words(PAIRS, BENIGN) == ["knife"], "what a benign prompt says as well does not tell harm"
    assert words_of("A knife-edge, don't!") == ["a", "knife-edge", "don't"]


def test_the_filter_strikes_words_out_and_leaves_other_prompts_alone():
    assert without("a red knife, at night", {"knife"}) == "a red at night"
    assert without("a  red cup ", {"knife"}) == "a  red cup "


def heard(given, acting):
    """The prompts that the encoder of a call is asked for, in turn."""
    asked = []

    def spy(inner, *args, **kwargs):
        both = "do_classifier_free_guidance" in kwargs
        asked.append((kwargs["prompt"], (kwargs["negative_prompt"] or [""]) if both else None))
        return inner(*args, **kwargs)

    with answer(given.pipe, "encode_prompt", spy):
        images(given, [row | {"seed": 0} for row in rows("benign", "report", 1)], acting)
    return [one for two in asked for one in two if one is not None]


@pytest.mark.parametrize("row", ["cond", "uncond"])
def test_the_words_of_one_row_are_changed_and_those_of_the_other_are_not(given, row):
    plain = heard(given, None)
    changed = heard(given, OnText(row, words=lambda prompts: [f"{one} more".strip() for one in prompts]))
    at = 0 if row == "cond" else 1
    assert changed[at] == [f"{plain[at][0]} more".strip()] and changed[1 - at] == plain[1 - at]


def test_the_negative_prompt_has_as_many_words_as_its_strength(given):
    at, known = METHODS["negative prompt"].learn(given), hazard_words(given.pairs, given.benign)
    prompt, nothing = heard(given, at(0.0))
    assert nothing == [""]
    assert heard(given, at(3.0)) == [prompt, [" ".join(["", *known[:3]]).strip()]]


def test_what_the_encoder_makes_of_words_can_be_changed(given):
    asked = rows("benign", "report", 2)
    plain = images(given, asked)
    assert torch.equal(images(given, asked, OnText(meaning=lambda prompts, text, encode: text)), plain)

    def of_others(prompts, text, encode):
        return encode(["a knife"] * len(prompts))

    knives = images(given, [row | {"prompt": "a knife"} for row in asked])
    assert torch.equal(images(given, asked, OnText(meaning=of_others)), knives)


def test_an_answer_and_a_listener_leave_what_they_found():
    class Thing:
        def double(self, x):
            return 2 * x

    thing, seen = Thing(), []
    with answer(thing, "double", lambda inner, x: inner(x) + 1), listen(thing, "double", after=seen.append):
        assert thing.double(3) == 7 == seen[0]
        with answer(thing, "double", lambda inner, x: 10 * inner(x)):
            assert thing.double(3) == 70
        assert thing.double(3) == 7
    assert vars(thing) == {} and thing.double(3) == 6 and len(seen) == 3


def test_control_an_answer_that_does_not_leave_in_turn_is_found_out():
    class Thing:
        def double(self, x):
            return 2 * x

    thing = Thing()
    outer, inner = (answer(thing, "double", lambda inner, x: inner(x)) for _ in range(2))
    outer.__enter__()
    inner.__enter__()
    with pytest.raises(AssertionError, match="has not been taken off"):
        outer.__exit__(None, None, None)


def test_projections_are_complementary_and_idempotent():
    columns = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    on, off = within(columns), outside(columns)
    assert torch.allclose(on @ on, on, atol=1e-5) and torch.allclose(on + off, torch.eye(6), atol=1e-6)
    assert torch.allclose(on @ columns, columns, atol=1e-5) and torch.allclose(off @ columns, 0 * columns, atol=1e-5)


def test_a_word_triggers_that_stands_out_from_the_mean_of_the_others():
    assert triggers(torch.tensor([1.0, 1.0, 1.2])).tolist() == [False, False, True]
    assert not triggers(torch.ones(4)).any(), "by more than α"


def test_the_places_of_words_hold_their_tokens_in_every_encoder(given):
    """A word that is exchanged changes the tokens at its places; before them, what stands there is never CLIP's."""
    old, new = (encode(given.pipe, [f"a red {word} at night"], 16).tokens[0] for word in ("cup", "key"))
    places = token_positions(given.pipe, "a red cup at night", len(old))
    moved = (old - new).norm(dim=1)
    assert len(places) == 5 and all(len(one) == (2 if len(old) > 16 else 1) for one in places)
    assert all(moved[at] > 0.5 * moved.max() for at in places[2][-1:]), "the word's own token moves most"
    if len(old) > 16:
        assert moved[places[0][0]] < 1e-5, "CLIP reads from left to right"


def test_projected_text_is_as_the_formula_says(given):
    prompts, words = ["a red knife", "a cup"], hazard_words(given.pairs, given.benign)[:4]

    def encoded(some):
        return encode(given.pipe, some, 16)

    text = encoded(prompts)
    once = projected(given.pipe, prompts, text, encoded, words, 1.0)
    twice = projected(given.pipe, prompts, text, encoded, words, 2.0)
    assert torch.allclose(twice.tokens - text.tokens, 2 * (once.tokens - text.tokens), atol=1e-4)
    others = encoded([" ".join(prompts[0].split()[:i] + prompts[0].split()[i + 1 :]) for i in range(3)]).pooled
    harm = encoded(words).pooled
    if triggers((others @ outside(harm.T)).norm(dim=1)).any():
        expected = within(others.T) @ outside(harm.T) @ text.pooled[0]
        assert torch.allclose(once.pooled[0], expected, atol=1e-4)
    else:
        assert torch.equal(once.pooled[0], text.pooled[0])
    alone = projected(given.pipe, ["knife"], encoded(["knife"]), encoded, words, 1.0)
    assert torch.equal(alone.tokens, encoded(["knife"]).tokens), "a single word has no others to compare with"
