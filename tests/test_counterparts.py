"""An edit by counterparts takes what harm has added and no bit of what is harmless, alone or where two things meet."""

from dataclasses import replace

import pytest
import torch

from safedig.config import UsageError
from safedig.features import Counterparts, fit_counterparts
from safedig.features.counterparts import Known
from safedig.hooks import Context
from safedig.steering.edits import Replace
from safedig.steering.gate import Gate
from safedig.steering.material import Material
from safedig.steering.rule import Rule
from tests.phrases import BOTTLE, CUP, D_IN, FLAME, SITE, features, known_dose, recording, sae, token, tokens, told

GUNS = [row for seed in range(6) for row in told("a gun a bottle", seed, "weapon", "a cup a bottle")]
DRIVERS = [row for seed in range(6) for row in told("a bottle a car", seed, "composition", "a cup a car")]
HARMLESS = [row for seed in range(6) for phrase in ("a bottle", "a car a tree") for row in told(phrase, seed)]
ALL = GUNS + DRIVERS + HARMLESS
NOISE = 0.02


def fitted(rows=ALL, noise=NOISE, found=None, **options):
    acts = recording(rows, noise)
    return fit_counterparts({SITE: sae()}, acts, {SITE: found or features()}, **options)[SITE]


def rule(known, nearest=1, scope="image", strength=1.0, found=None):
    found = found or features()
    edit = Replace(strength, "counterparts", nearest)
    material = Material.of(SITE, sae(), found, edit.needs, counterparts=known)
    return Rule(found.index, sae().encoder.columns(found.index), material, Gate(found.threshold, scope), (edit,))


def image(phrase, seed=0, noise=NOISE):
    return tokens({"prompt": phrase, "seed": seed}, noise)


def edited(one, *images):
    x = torch.stack(images)
    out, open_, _ = one(x, Context(SITE, 0, 0.5, ("cond",) * len(x)))
    return out, open_


def same_bits(one, other):
    return torch.equal(one.view(torch.int32), other.view(torch.int32))


# ---- what is harmless


def test_harm_of_a_harmless_known_token_is_exactly_nothing():
    known = fitted().alone
    harmless = known.tokens[(known.delta == 0).all(1)]
    assert len(harmless) > 50 and not known.harm(harmless, 1).any()
    assert known.harm(known.tokens[(known.delta != 0).any(1)], 1).any(1).all(), "the control"


@pytest.mark.parametrize("strength", [0.3, 1.0, 7.0])
def test_an_edit_of_harmless_tokens_changes_no_bit_of_them_though_the_gate_is_open(strength):
    """A coordinate of −0.0 among them: added to 0.0 it would turn."""
    a = image("a bottle", 3)
    a[:, 11] = -0.0
    one = rule(fitted(), strength=strength)
    always = replace(one, gate=Gate(-9.0))
    out, open_ = edited(always, a)
    assert open_.all() and same_bits(out, a[None])
    gun = image("a gun", 3)
    gun[:, 11] = -0.0
    moved = edited(always, gun)[0][0]
    assert not torch.equal(moved[1], gun[1]) and same_bits(moved[[0, 2, 3, 4, 5]], gun[[0, 2, 3, 4, 5]])


def test_with_the_scope_of_an_image_only_the_harm_goes():
    """All its tokens are open, and looked up; by prototypes all of them would be others."""
    out, open_ = edited(rule(fitted()), image("a gun a bottle", 2))
    assert open_.all()
    rest = [0, 2, 3, 4, 5]
    assert same_bits(out[0, rest], image("a gun a bottle", 2)[rest])
    assert out[0, 1, CUP] > 0.9 and (out[0, 1] - token("cup")).norm() < 0.2


def test_behind_a_closed_gate_harm_too_keeps_every_bit():
    closed = rule(fitted(), found=features(threshold=float("inf")))
    x = image("a gun a bottle")
    out, open_ = edited(closed, x)
    assert not open_.any() and same_bits(out[0], x)


# ---- what is harmful


def test_a_known_harmful_token_becomes_exactly_its_twins():
    """In numbers that have an exact difference, to the bit; elsewhere up to one rounding."""
    exact = edited(rule(fitted(noise=0.0)), image("a gun a bottle", noise=0.0))[0][0]
    assert torch.equal(exact, image("a cup a bottle", noise=0.0))
    for seed in range(6):
        out = edited(rule(fitted()), image("a gun a bottle", seed))[0][0]
        torch.testing.assert_close(out[1], image("a cup a bottle", seed)[1], atol=1e-6, rtol=1e-5)
    half = edited(rule(fitted(noise=0.0), strength=0.5), image("a gun a bottle", noise=0.0))[0][0, 1]
    torch.testing.assert_close(half, (token("gun") + token("cup")) / 2)


def test_of_an_unknown_token_the_mean_of_what_its_nearest_have_lost_goes():
    known = fitted()
    a = image("a gun a bottle", 77)
    harmful = (known.alone.delta != 0).any(1)
    near = (known.alone.tokens - a[1]).norm(dim=1).argsort()[:4]
    assert harmful[near].all()
    out = edited(rule(known, nearest=4), a)[0][0, 1]
    torch.testing.assert_close(out, a[1] - known.alone.delta[near].mean(0))


def test_the_harmful_ones_are_those_that_harm_has_added_something_to():
    known = fitted().alone
    harmful = known.harmful()
    assert len(harmful.tokens) == 6 < len(known.tokens) and harmful.delta.any(1).all()
    assert torch.equal(harmful.harm(harmful.tokens, 1), harmful.delta)


def test_more_nearest_than_there_are_known_are_all_of_them():
    bank = Known(torch.eye(3), torch.tensor([[3.0, 0, 0], [0, 3, 0], [0, 0, 3]]))
    assert torch.equal(bank.harm(torch.zeros(2, 3), 99), torch.ones(2, 3))
    assert bank.harm(torch.zeros(0, 3), 5).shape == (0, 3)
    nobody = Known(torch.zeros(0, 1), torch.zeros(0, 1))
    assert not nobody.harm(torch.ones(2, 3), 5).any() and nobody.harm(torch.ones(2, 3), 5).shape == (2, 3)


def test_a_twin_of_other_length_lends_its_words_and_not_its_places():
    """The twin is a word longer: by place the bottle and some padding would have changed too."""
    longer = [row for seed in range(6) for row in told("a gun bottle", seed, "weapon", "a tree cup bottle")]
    known = fitted(longer + HARMLESS, noise=0.0).alone
    changed = known.tokens[(known.delta != 0).any(1)].unique(dim=0)
    assert torch.equal(changed, token("gun")[None])


# ---- alone and together


def test_what_is_harmful_only_together_is_looked_up_apart():
    known = fitted()
    bottle = token("bottle")
    assert not known.alone.harm(bottle[None], 6).any() and known.together.harm(bottle[None], 6)[0, BOTTLE] > 0.9
    mixed, composition = image("a gun a bottle", 1), image("a bottle a car", 1)
    out, open_ = edited(rule(known), mixed, composition)  # in one batch
    assert open_.all()
    assert same_bits(out[0, 3], mixed[3]), "a bottle beside a gun stays"
    assert out[1, 1, BOTTLE].abs() < 0.1 and out[1, 1, CUP] > 0.9, "a bottle beside a car goes"
    assert same_bits(out[1, [0, 2, 3, 4, 5]], composition[[0, 2, 3, 4, 5]]), "and the car stays"


def test_control_with_the_two_banks_exchanged_the_wrong_bottle_goes():
    known = fitted()
    swapped = Counterparts(known.together, known.alone)
    mixed, composition = image("a gun a bottle", 1), image("a bottle a car", 1)
    out, _ = edited(rule(swapped), mixed, composition)
    assert out[0, 3, BOTTLE].abs() < 0.1 and same_bits(out[1], composition)


def test_without_a_dose_all_is_looked_up_as_if_alone():
    plain = replace(features(), dose=None)
    known = fitted(found=plain)
    assert len(known.together.tokens) == 0
    always = replace(rule(known, found=plain), gate=Gate(-1.0))
    assert not torch.equal(edited(always, image("a gun a bottle", 1))[0][0, 1], image("a gun a bottle", 1)[1])


def test_harmless_tokens_of_a_composition_are_known_beside_its_harm():
    together = fitted(noise=0.0).together
    still = together.tokens[(together.delta == 0).all(1)].unique(dim=0)
    assert sorted(map(tuple, still.tolist())) == sorted(tuple(token(word).tolist()) for word in (".", "a", "car"))
    assert torch.equal(together.tokens[(together.delta != 0).any(1)].unique(dim=0), token("bottle")[None])


# ---- what is unknown


QUIET = [row for seed in range(20, 30) for row in told("a cup a tree", seed)]


def knife(seed=0):
    """A word that nothing was learnt of, some way from all others; its codes say harm."""
    a = image("a gun a bottle", seed)
    a[1] = 3 * torch.eye(D_IN)[FLAME]
    return a


def repelling(known, unknown=2.0):
    edit = Replace(1.0, "counterparts", 1, unknown)
    made = rule(known)
    rows = torch.zeros(D_IN, D_IN)
    rows[FLAME, FLAME] = 0.5
    return replace(made, edits=(edit,), material=replace(made.material, directions=rows))


def test_unknown_is_what_lies_farther_from_all_known_tokens_than_so_many_of_the_quiet_ones():
    acts = recording(QUIET, NOISE)
    x = torch.cat([batch.x for batch in acts])
    for within in (0.5, 0.9):
        known = fitted(quiet=acts, within=within)
        far = torch.cdist(x, known.all().tokens).amin(1)
        torch.testing.assert_close(known.radius, far.quantile(within))
        assert abs(known.unknown(x).float().mean() - (1 - within)) < 0.03
        assert known.unknown(knife())[1] and not known.unknown(known.all().tokens).any()
    assert not fitted().unknown(knife()).any(), "without quiet prompts all are taken for known"


def test_an_unknown_token_is_repelled_and_a_known_one_beside_it_replaced():
    known = fitted(quiet=recording(QUIET, NOISE))
    known = replace(known, radius=torch.tensor(0.5))
    a = torch.cat([knife()[:2], image("a gun a bottle")[:4]])
    out = edited(repelling(known), a)[0][0]
    torch.testing.assert_close(out[1], a[1] - 2 * 0.5 * a[1] * (a[1] > 0.1))  # 3 by the code, half of it by the row
    assert out[3, CUP] > 0.9 and same_bits(out[[0, 2, 4, 5]], a[[0, 2, 4, 5]])


@pytest.mark.parametrize("control", ["no strength", "no radius"])
def test_control_where_nothing_is_unknown_or_repelled_it_is_looked_up(control):
    known, a = replace(fitted(), radius=torch.tensor(0.5)), knife()
    looked_up = edited(rule(fitted()), a)[0]
    made = repelling(known, 0.0) if control == "no strength" else repelling(replace(known, radius=None))
    assert torch.equal(edited(made, a)[0], looked_up)
    assert not torch.equal(edited(repelling(known), a)[0], looked_up)


def test_a_token_of_which_neither_a_token_nor_a_pair_tells_is_looked_up_among_all():
    """Its gate was opened elsewhere: whichever of all known tokens is nearest lends what harm has added to it."""
    eye = torch.eye(4)
    known = Counterparts(Known(eye[:2], 3 * eye[:2]), Known(eye[2:], 5 * eye[2:]))
    no, yes = torch.tensor([False, False]), torch.tensor([True, True])
    a = eye[[0, 2]]
    assert torch.equal(known.harm(a, no, no, 1), torch.stack([3 * eye[0], 5 * eye[2]]))
    for alone, together, only in ((yes, no, 3 * eye[:2]), (no, yes, 5 * eye[2:])):
        assert all((row == only).all(1).any() for row in known.harm(a, alone, together, 1)), "the control: of one bank"


def test_counterparts_that_take_all_for_known_cannot_say_what_is_to_be_repelled():
    needs = Replace(by="counterparts", unknown=2.0).needs
    with pytest.raises(UsageError, match="take all for known: give fit_counterparts benign prompts as quiet="):
        Material.of(SITE, sae(), features(), needs, counterparts=fitted())
    known = fitted(quiet=recording(QUIET))
    assert Material.of(SITE, sae(), features(), needs, counterparts=known).counterparts is known


@pytest.mark.parametrize("options", [{"within": 0.0}, {"within": 1.5}])
def test_a_share_that_is_none_is_refused(options):
    with pytest.raises(UsageError, match="expected at least 1 known token, and a share"):
        fitted(quiet=recording(QUIET), **options)


@pytest.mark.parametrize("options", [{"unknown": -1.0}, {"unknown": float("nan")}, {"unknown": 2.0, "by": "map"}])
def test_a_strength_for_unknown_tokens_that_makes_no_sense_is_refused(options):
    with pytest.raises(UsageError, match="expected unknown from 0 on, and above it with by='counterparts'"):
        Replace(**({"by": "counterparts"} | options))


# ---- how many are known


@pytest.mark.parametrize("size", [1, 5, 4096])
def test_no_more_than_so_many_of_each_sort_are_kept(size):
    known = fitted(size=size)
    for bank in (known.alone, known.together):
        harmful = (bank.delta != 0).any(1)
        assert 1 <= harmful.sum() <= size and 1 <= (~harmful).sum() <= size
        assert bank.tokens.shape == bank.delta.shape == (len(bank.tokens), D_IN) and bank.tokens.is_contiguous()
    everything = fitted()
    assert (everything.alone.delta != 0).any(1).sum() == (everything.together.delta != 0).any(1).sum() == 6
    assert (everything.together.delta == 0).all(1).sum() == 6 * 5


def test_which_are_kept_is_a_matter_of_the_seed_alone():
    one, same, other = (fitted(size=9, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.alone.tokens, same.alone.tokens) and torch.equal(one.together.delta, same.together.delta)
    assert not torch.equal(one.alone.tokens, other.alone.tokens)


def test_a_part_of_the_prompts_can_be_asked_for():
    known = fitted(prompts=GUNS + HARMLESS)
    assert len(known.together.tokens) == 0 and (known.alone.delta != 0).any(1).sum() == 6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fitted(size=0), "size=0, within=0.9: expected at least 1 known token"),
        (lambda: fitted(HARMLESS), "There are 0 harmful prompts with safe twins and 12 benign prompts"),
        (lambda: fitted([row | {"twin": ""} for row in GUNS]), "record harmful prompts with their safe twins"),
        (lambda: rule(None), r"looks up counterparts at 'txt\.embed' and there are none: give those of fit_counterpar"),
        (lambda: Replace(nearest=0, by="counterparts"), "expected at least 1 nearest"),
        (lambda: fit_counterparts({SITE: sae()}, recording(ALL), {SITE: features()}, [{"id": "x"}]), "None of the 1"),
    ],
)
def test_what_cannot_be_is_explained(make, message):
    with pytest.raises(UsageError, match=message):
        make()


def test_a_dose_kept_with_the_rule_says_what_is_alone():
    one = rule(fitted())
    assert one.material.dose is not None and torch.equal(one.material.dose.weights, known_dose().weights)
    assert one.material.bank is None and one.material.reconstruction is None, "and nothing else is kept"
    assert torch.equal(one.material.directions, sae().decoder.W_dec)
