"""Latents are weighed together: what harmless words share with harm counts for little, and two that meet are heard."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from safedig.activations.record import Activations
from safedig.config import UsageError
from safedig.features import Dose, Weighing, find_features, load_features, meeting, save_features, weigh, weighing
from safedig.features.heights import Heights
from safedig.sae.model import SparseAutoencoder, TopKEncoder
from tests.phrases import BOTTLE, CAR, CUP, D_IN, DULL, FLAME, GUN, SHARP, SITE, recording, sae, told

GUNS = [row for seed in range(12) for row in told("a gun", seed, "weapon", "a cup")]
FLAMES = [row for seed in range(12) for row in told("a flame", seed, "fire", "a cup")]
DRIVERS = [row for seed in range(12) for row in told("a bottle a car", seed, "composition", "a cup a car")]
NEAR_MISSES = [row for seed in range(12) for row in told("a sharp", seed, kind="near-miss")]
HARMLESS = [row for seed in range(12) for phrase in ("a bottle", "a car", "a tree") for row in told(phrase, seed)]
ALL = GUNS + FLAMES + DRIVERS + NEAR_MISSES + HARMLESS


def weighed(rows=ALL, autoencoder=None, noise=0.02, ridge=0.01, **options: Any):
    """By a small ridge: of twelve features all are alive, and the default is in units of all of them."""
    return weigh({SITE: autoencoder or sae()}, recording(rows, noise), weighing=Weighing(ridge=ridge, **options))[SITE]


def weight(found, feature):
    """What the features say of a single token that holds this one."""
    return found.dose.weights[found.index.tolist().index(feature)].item()


def heights(found, rows, noise=0.02, dose=True):
    """Of each prompt, by the dose or by the plain sum."""
    measured = Heights(sae(), found.index, found.dose if dose else None)
    for batch in recording(rows, noise):
        for image, at in batch.images():
            measured.add(image, batch.x[at])
    return {name: torch.tensor([*values.values()]) for name, values in vars(measured).items() if name in PARTS}


PARTS = ("of", "own", "together")


def of(rows, kind):
    return [row for row in rows if row["kind"] == kind]


# ---- what is shared


def test_a_feature_that_harmless_words_share_with_harm_gets_little_weight():
    found = weighed()
    assert abs(weight(found, SHARP)) < 0.1 * min(weight(found, GUN), weight(found, FLAME))
    unknown = weighed([row for row in ALL if row["kind"] != "near-miss"])
    assert weight(unknown, SHARP) > 0.5 * weight(unknown, GUN), "the control: where no harmless word is known to share"


def test_the_dose_tells_harm_from_what_sounds_like_it_and_the_plain_sum_does_not():
    found = weighed(GUNS + FLAMES + NEAR_MISSES + HARMLESS)
    harm, near = of(GUNS + FLAMES, "harmful"), NEAR_MISSES
    assert heights(found, harm)["of"].min() > 2 * heights(found, near)["of"].max()
    contrast = find_features({SITE: sae()}, recording(GUNS + FLAMES + NEAR_MISSES + HARMLESS, 0.02), fdr=1.0)[SITE]
    assert {GUN, FLAME, SHARP} <= set(contrast.index.tolist())
    sums = [heights(contrast, rows, dose=False)["of"] for rows in (harm, near)]
    assert sums[1].min() > sums[0].max(), "the control: by the sum the near-misses are the worst of all"


def test_a_harmless_feature_that_comes_with_the_shared_one_may_speak_against_harm():
    assert weight(weighed(), DULL) < 0 < weight(weighed(), GUN)


def test_on_what_harm_changes_it_is_higher_than_on_any_harmless_prompt():
    found = weighed(GUNS + FLAMES + NEAR_MISSES + HARMLESS)
    benign = [row for row in GUNS + FLAMES + NEAR_MISSES + HARMLESS if not row["risk"]]
    assert heights(found, of(GUNS + FLAMES, "harmful"))["of"].min() > heights(found, benign)["of"].max()
    assert found.threshold == float("inf"), "and no gate is open before it was calibrated"


def test_the_strongest_come_first_and_no_more_than_asked_for():
    found = weighed(GUNS + FLAMES + NEAR_MISSES + HARMLESS, size=3)
    assert len(found) == 3 and {GUN, FLAME} <= set(found.index.tolist()) and found.dose.weights.shape == (3,)
    size = recording(GUNS + FLAMES + NEAR_MISSES + HARMLESS, 0.02)
    assert len(weigh({SITE: sae()}, size)[SITE]) == D_IN, "the control: there are more"


def test_the_weights_are_those_of_the_ridge_regression_written_out():
    """Each domain of weight 1, harmless tokens 3 times that of a domain; an intercept that is not penalised."""
    rows = GUNS + FLAMES + NEAR_MISSES
    found = weighed(rows, noise=0.0, ridge=1.0)
    words = {name: sae().encode(torch.stack([one])).double() for name, one in vocabulary().items()}
    guns = flames = 12
    counts = {".": 24 * 8 + 12 * 4, "a": 24 * 2 + 12, "cup": 24, "sharp": 12}
    x = torch.cat([words["gun"], words["flame"], *(words[name] for name in counts)])
    y = torch.tensor([1.0, 1.0, *[0.0] * len(counts)]).double()
    share = torch.tensor([guns / 12, flames / 12, *(6.0 * n / sum(counts.values()) for n in counts.values())]).double()
    ones = torch.cat([x, torch.ones(len(x), 1)], 1)
    gram = ones.T @ (share[:, None] * ones)
    penalty = torch.full((D_IN + 1,), gram.diagonal()[:-1].mean().item()).double()
    penalty[-1] = 0.0
    expected = torch.linalg.solve(gram + penalty.diag(), ones.T @ (share * y))[:-1]
    torch.testing.assert_close(found.dose.weights, expected[found.index].float(), atol=1e-6, rtol=1e-5)


def vocabulary():
    from tests.phrases import WORDS, token

    return {word: token(word) for word in WORDS}


# ---- domains


def test_every_domain_weighs_the_same_whatever_its_number_of_prompts():
    """Three guns beside twelve flames weigh what twelve do; by the number of tokens they would weigh less."""
    few = weighed(GUNS[:6] + FLAMES, noise=0.0, ridge=1.0)
    assert weight(few, GUN) == pytest.approx(weight(few, FLAME), rel=1e-4)
    even = weighed(GUNS + FLAMES, noise=0.0, ridge=1.0)
    assert weight(few, GUN) == pytest.approx(weight(even, GUN), rel=1e-4)
    pooled = weighed([row | {"risk": row["risk"] and "any"} for row in GUNS[:6] + FLAMES], noise=0.0, ridge=1.0)
    assert weight(pooled, GUN) < 0.6 * weight(pooled, FLAME), "the control: as one domain"


def test_the_facts_say_what_it_was_learnt_from():
    facts = weighed(pair_ridge=0.5, size=7).facts
    assert facts["weighing"] == {"size": 7, "ridge": 0.01, "pair_ridge": 0.5}
    assert facts["harmful"] == {"weapon": 12, "fire": 12, "composition": 12} and facts["model"] == "fingerprint"
    assert facts["safe"] == 36 + 12 + 36 and 8 <= facts["heard_in_pairs"] <= 12


def test_a_harmful_prompt_without_a_named_domain_is_harm_all_the_same():
    nameless = [row | {"risk": ""} for row in GUNS]
    assert nameless[0]["kind"] == "harmful"
    found = weighed(nameless + NEAR_MISSES)
    assert weight(found, GUN) == pytest.approx(weight(weighed(GUNS + NEAR_MISSES), GUN))
    assert found.facts["harmful"] == {"unnamed": 12}


def test_a_part_of_the_prompts_can_be_asked_for_and_batches_and_steps_do_not_matter():
    given = recording(ALL, 0.02)
    part = weigh({SITE: sae()}, given, GUNS + NEAR_MISSES, weighing=Weighing(ridge=0.01))[SITE]
    torch.testing.assert_close(part.dose.weights, weighed(GUNS + NEAR_MISSES).dose.weights)
    one = weigh({SITE: sae()}, recording(ALL, 0.0, steps=1))[SITE].dose
    two = weigh({SITE: sae()}, recording(ALL, 0.0, steps=2))[SITE].dose
    for name, tensor in vars(one).items():
        torch.testing.assert_close(vars(two)[name], tensor)


# ---- two that meet


def test_two_features_that_are_harmless_alone_are_heard_together_and_by_no_single_token():
    found = weighed()
    harm, alone = (heights(found, rows) for rows in (of(DRIVERS, "harmful"), of(ALL, "benign")))
    assert harm["together"].min() > alone["together"].max() + 0.5
    assert harm["own"].min() <= alone["own"].max(), "the control: of single tokens some harmless prompt says as much"
    pairs = found.index[found.dose.pairs].tolist()
    best = sorted(pairs[int(found.dose.pair_weights.argmax())])
    assert best == [BOTTLE, CAR]


def test_a_threshold_on_the_whole_dose_hears_all_harm_and_no_harmless_prompt():
    found = weighed()
    limits = [heights(found, of(ALL, "benign") + NEAR_MISSES)[part].max().item() for part in ("own", "together")]
    lowered = replace(found, dose=found.dose.lowered(*limits))
    assert (heights(lowered, of(ALL, "harmful"))["of"] > 0).all()
    assert not (heights(lowered, of(ALL, "benign") + NEAR_MISSES)["of"] > 0).any()


def _many_stray_latents():
    """Missed images of which most are raised a little in sixty latents each, few hold two that mean harm together."""
    generator = torch.Generator().manual_seed(0)
    others, drivers, harmless = torch.zeros(80, 100), torch.zeros(24, 100), torch.zeros(200, 100)
    others[:, :60] = (torch.rand(80, 60, generator=generator) < 0.5).float()
    drivers[:, [90, 91]] = 1.0
    harmless[:25, 90] = harmless[25:50, 91] = 1.0
    return others, drivers, harmless


def _told_by_pairs():
    others, drivers, harmless = _many_stray_latents()
    peak = torch.cat([others, drivers, harmless])
    harmful = torch.arange(len(peak)) < len(others) + len(drivers)
    at = meeting.members(peak, harmful, harmful)
    dose = meeting.with_pairs(Dose.of(torch.zeros(100)), at, peak, harmful, harmful, 0.03)
    said = dose.together(peak[:, None])
    return said[len(others) : len(others) + len(drivers)], said[-len(harmless) :]


def test_latents_that_tell_one_domain_of_many_are_among_those_of_which_pairs_are_made(monkeypatch):
    drivers, harmless = _told_by_pairs()
    assert drivers.min() > harmless.max()
    monkeypatch.setattr(meeting, "MEMBERS", 48)  # control: stray latents of the others take the places
    drivers, harmless = _told_by_pairs()
    assert drivers.min() <= harmless.max()


def test_without_pairs_what_only_they_tell_of_is_not_heard():
    found = weighed(pair_ridge=0.0)
    assert len(found.dose.pairs) == len(found.dose.pair_weights) == 0 and found.facts["heard_in_pairs"] == 0
    harm, alone = (heights(found, rows)["of"] for rows in (of(DRIVERS, "harmful"), of(ALL, "benign")))
    assert harm.min() <= alone.max()
    assert weight(found, GUN) == weight(weighed(), GUN), "and pairs change nothing of what single tokens say"


def test_where_single_tokens_hear_all_harm_no_pairs_are_learnt():
    assert len(weighed(GUNS + FLAMES + HARMLESS).dose.pairs) == 0
    few = weighed(GUNS + DRIVERS[:14] + HARMLESS)
    assert 0 < few.facts["heard_in_pairs"] < 8 and len(few.dose.pairs) == 0, "nor of a handful of images"


def test_a_feature_of_pairs_that_single_tokens_did_not_need_is_kept_without_a_weight_of_its_own():
    """With room for one feature only: BOTTLE and CAR come on top of it."""
    found = weighed(size=1)
    assert {BOTTLE, CAR} <= set(found.index.tolist()) and len(found) > 2
    assert found.dose.weights[1:].eq(0).all() and found.dose.weights[0] != 0
    assert len(found.dose.weights) == len(found.dose.units) == len(found.ratio) == len(found.support) == len(found)
    assert len(found.index.unique()) == len(found)


# ---- dictionaries of any size and kind


def test_of_a_large_dictionary_the_latents_that_tell_harm_best_are_weighed(monkeypatch):
    """1,100 latents, of which the last twelve are alive: more than are weighed together."""
    place = torch.arange(1088, 1100)
    large = sae(place, 1100)
    assert weighing.CANDIDATES < 1100
    rows = GUNS[:8] + FLAMES[:8] + NEAR_MISSES[:4] + HARMLESS[:6]
    found = weighed(rows, large, size=4)
    assert {1088 + GUN, 1088 + FLAME} <= set(found.index.tolist()) and max(found.index.tolist()) < 1100
    harm, benign = of(rows, "harmful"), [row for row in rows if not row["risk"]]
    measured = Heights(large, found.index, found.dose)
    for batch in recording(rows, 0.02):
        for image, at in batch.images():
            measured.add(image, batch.x[at])
    high = [measured.of[row["id"], row["seed"]] for row in harm]
    assert min(high) > max(measured.of[row["id"], row["seed"]] for row in benign)


def test_cut_to_a_few_candidates_a_small_dictionary_gives_the_same_weights(monkeypatch):
    """Of those that tell nothing, none is needed."""
    rows = GUNS + FLAMES + NEAR_MISSES + HARMLESS
    monkeypatch.setattr(weighing, "CANDIDATES", 5)
    cut = weighed(rows)
    assert len(cut) == 5 and {GUN, FLAME, SHARP, CUP} - {CUP} <= set(cut.index.tolist())
    assert min(weight(cut, GUN), weight(cut, FLAME)) > 5 * abs(weight(cut, SHARP))


def test_codes_that_compete_for_their_places_are_weighed_as_they_are():
    encoder = sae().encoder
    two = SparseAutoencoder(TopKEncoder(encoder.W_enc, encoder.b_enc, 2), sae().decoder, sae().metadata)
    found = weighed(GUNS + FLAMES + NEAR_MISSES + HARMLESS, two, noise=0.0)
    torch.testing.assert_close(
        found.dose.weights, weighed(GUNS + FLAMES + NEAR_MISSES + HARMLESS, noise=0.0).dose.weights
    )


def test_as_it_is_before_any_calibration_it_can_be_saved(tmp_path):
    found = weighed()
    save_features({SITE: found}, tmp_path)
    after = load_features(tmp_path)[SITE]
    assert after.threshold == found.threshold and after.facts == found.facts
    assert all(torch.equal(vars(after.dose)[name], tensor) for name, tensor in vars(found.dose).items())


# ---- what is asked for in vain


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row | {"twin": ""} for row in GUNS], "There are 0 harmful prompts with safe twins and 12 benign prompts"),
        (of(GUNS, "harmful"), "There are 0 harmful prompts with safe twins and 0 benign prompts"),
        (HARMLESS, "0 harmful prompts with safe twins and 36 benign.*record harmful prompts with their safe twins"),
        ([row | {"kind": "mixed"} for row in GUNS], "There are 0 harmful .* and 0 benign prompts.*beside them"),
    ],
)
def test_a_recording_without_twins_or_harmless_prompts_is_refused(rows, message):
    with pytest.raises(UsageError, match=message):
        weighed(rows)


def test_a_site_where_twins_are_alike_is_refused_by_name():
    """As the first input of the image is, recorded on the same noise."""
    given = recording(GUNS + FLAMES, 0.0)
    alike = [replace(batch, x=batch.x[:6].repeat(len(batch.x) // 6, 1)) for batch in given]
    still = Activations(lambda sites, ids: alike, [SITE], given.prompts, "fingerprint")
    with pytest.raises(UsageError, match=r"At 'txt\.embed' no token of a prompt of fire, weapon differs from its safe"):
        weigh({SITE: sae()}, still)


@pytest.mark.parametrize("options", [{"size": 0}, {"ridge": 0.0}, {"ridge": -1.0}, {"pair_ridge": -0.1}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(UsageError, match=r"Weighing\(.*expected at least 1 latent, a ridge above 0, and one of pairs"):
        Weighing(**options)
