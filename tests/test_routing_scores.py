"""Each criterion is its equation, sees what was planted, sees nothing in noise, and does not depend on the frame."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from sklearn.metrics import roc_auc_score

from safedig.config import UsageError
from safedig.routing import power, probes, scores
from safedig.routing.contrast import Contrast, _dealt, contrast
from safedig.routing.probes import PairedRows
from safedig.routing.scorers import DEFAULT, MERITS, SCORERS, scorer
from tests.planted import SOURCE, TARGET, rows

PAIRS, R, STEPS = 30, 10, 2
DOMAINS = ("fire", "weapon", "poison")


def pairs(target=True, per_domain=PAIRS, twins=True, **options: Any) -> Contrast:
    """The planted prompts: two source domains, and a third one as target or source."""
    given = sorted(rows(per_domain, twins=twins, **options), key=lambda row: (row["id"], row["seed"]))
    return contrast(given, SOURCE, TARGET) if target else contrast(given, DOMAINS)


def draw(made: Contrast, lift: dict[str, float], seed=0, scene=1.0, noise=1.0, r=R) -> PairedRows:
    """Twins share a scene; harm lifts the first coordinate."""
    generator = torch.Generator().manual_seed(seed)
    shape = (STEPS, len(made.domain), r)
    common = scene * torch.randn(shape, generator=generator, dtype=torch.float64)
    harmful, safe = (common + noise * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    harmful[..., 0] += torch.tensor([lift.get(name, 0.0) for name in made.domain])
    return PairedRows(harmful, safe)


def same_lift(size=2.0):
    return dict.fromkeys(DOMAINS, size)


FLIPPED = {"fire": 2.0, "weapon": 2.0, "poison": -2.0}
ONES = torch.ones(1, 3 * PAIRS, dtype=torch.float64)


# ---- who stands against whom


def test_twins_stand_against_each_other_whatever_the_order_of_prompts():
    given = rows(9)
    for order in (given, given[::-1]):
        made = contrast(order, SOURCE, TARGET)
        names = [(order[one]["id"], order[other]["id"]) for one, other in zip(made.harmful, made.safe, strict=True)]
        assert names == sorted((row["id"], row["twin"]) for row in given if row["risk"])
        assert made.twins and made.source == ["fire", "weapon"] and made.target == ["poison"]


def test_prompts_name_their_domains_and_leave_the_others_out():
    given = rows(12)
    some = [row for row in given if row["risk"] == "fire"][:9]
    made = contrast(given, some, TARGET)
    assert made.source == ["fire"] and int((~made.is_target).sum()) == 9
    assert {given[at]["id"] for at in made.harmful[~made.is_target]} == {row["id"] for row in some}


@pytest.mark.parametrize("as_prompts", [(True, False), (False, True), (True, True)])
def test_one_side_may_be_named_and_the_other_given_as_prompts(as_prompts):
    """Control: of a side that is given as prompts, no others are taken."""
    given = rows(12)
    some = {name: [row for row in given if row["risk"] == name][:9] for name in ("fire", TARGET)}
    source, target = (some[name] if listed else name for name, listed in zip(some, as_prompts, strict=True))
    made = contrast(given, source, target)
    assert made.source == ["fire"] and made.target == [TARGET]
    counts = [int((made.is_target == wanted).sum()) for wanted in (False, True)]
    assert counts == [9 if listed else 12 for listed in as_prompts]


def test_without_twins_each_prompt_gets_a_stranger_of_its_own():
    made = pairs(twins=False)
    assert not made.twins and len(made.safe.unique()) == len(made.safe) == 3 * PAIRS


def strangers(count: int) -> list[dict[str, Any]]:
    """The planted prompts without twins, and so many safe ones for all domains."""
    given = rows(20, twins=False)
    return [row for row in given if row["risk"]] + [row for row in given if not row["risk"]][:count]


@pytest.mark.parametrize(("count", "each"), [(60, 1), (30, 2), (15, 4)])
def test_strangers_serve_twice_in_one_domain_before_two_domains_share_one(count, each):
    made = contrast(strangers(count), DOMAINS)
    assert sorted(made.cluster.unique().tolist()) == list(range(count)) and made.cluster.bincount().max() == each
    assert sum(len(made.cluster[made.of(name)].unique()) for name in DOMAINS) == count


def test_control_fewer_strangers_than_domains_are_shared():
    given = sorted(strangers(2), key=lambda row: row["id"])
    of = _dealt({row["id"]: row["risk"] for row in given if row["risk"]}, ["one", "other"])
    assert set(of) == {row["id"] for row in given if row["risk"]} and set(of.values()) == {"one", "other"}


def test_a_prompt_drawn_from_several_seeds_stays_together_and_counts_once():
    made = pairs(per_domain=10, seeds=3)
    assert len(made.domain) == 90 and len(made.cluster.unique()) == 30
    for grouped in (made.folds(5, seed=0)[:, None], made.resamples(20, seed=0).T):
        assert all((grouped[made.cluster == one] == grouped[made.cluster == one][0]).all() for one in range(30))
    with pytest.raises(UsageError, match="5 harmful prompts against 5 safe"):
        contrast(rows(5, seeds=8), "fire")


def test_a_bootstrap_draws_as_many_prompts_of_each_domain_as_there_are():
    made = pairs()
    weights = made.resamples(50, seed=1)
    assert torch.equal(weights[:1], ONES)
    for domain in DOMAINS:
        assert (weights[:, made.of(domain)].sum(1) == PAIRS).all()
    assert not torch.equal(weights[1], weights[2])
    generator, by_hand = torch.Generator().manual_seed(1), torch.ones_like(weights)
    for domain in sorted(DOMAINS):
        picked = torch.randint(PAIRS, (50, PAIRS), generator=generator)
        by_hand[1:, made.of(domain)] = torch.stack([draw.bincount(minlength=PAIRS) for draw in picked]).double()
    assert torch.equal(weights, by_hand)


def test_a_prompt_that_domains_share_is_drawn_once_for_all_of_them():
    made = shared(pairs(), 40)
    weights = made.resamples(50, seed=1)
    for cluster in made.cluster.unique():
        assert (weights[:, made.cluster == cluster] == weights[:, made.cluster == cluster][:, :1]).all()
    assert (weights[:, made.of("fire")].sum(1) == PAIRS).all() and not torch.equal(weights[1], weights[2])


@pytest.mark.parametrize(
    ("source", "target", "says"),
    [
        ("fire", "fires", "'fires' is not in the recording. Did you mean 'fire'"),
        ("fire", "fire", "'fire' is a source and the target"),
        ((), None, "The source names no risk domain"),
        ([{"id": "fire-0-safe", "risk": ""}], None, "The source names no risk domain"),
    ],
)
def test_a_wrong_domain_is_an_error(source, target, says):
    with pytest.raises(UsageError, match=says):
        contrast(rows(9), source, target)


@pytest.mark.parametrize("twins", [True, False])
def test_seven_prompts_are_too_few_and_eight_are_not(twins):
    few = [row for row in rows(8, twins=twins) if row["risk"] != "poison" or row["id"] != "poison-0"]
    with pytest.raises(UsageError, match="The target has 7 harmful prompts .* at least 8"):
        contrast(few, SOURCE, TARGET)
    assert len(contrast(few, SOURCE).domain) == 16
    assert len(contrast(rows(8, twins=twins), SOURCE, TARGET).domain) == 24


@pytest.mark.parametrize(("bare", "role"), [(("poison",), "target"), (SOURCE, "source")])
def test_a_side_without_twins_is_an_error_where_the_other_has_them(bare, role):
    given = [row | {"twin": "" if row["risk"] in bare else row["twin"]} for row in rows(9)]
    with pytest.raises(UsageError, match=f"The {role} has 0 harmful prompts against 0 safe twins"):
        contrast(given, SOURCE, TARGET)
    other = contrast(given, TARGET if role == "source" else SOURCE)  # control: not asked for, it is not missed
    assert other.twins and not other.target


def test_without_safe_prompts_nothing_is_ranked():
    with pytest.raises(UsageError, match="0 harmful prompts against 0 safe|against 0 safe"):
        contrast([row for row in rows(9, twins=False) if row["risk"]], SOURCE)


# ---- probes


def test_auroc_is_that_of_scikit_learn_with_ties_and_weights():
    made, generator = pairs(), torch.Generator().manual_seed(0)
    harmful, safe = torch.randint(6, (2, 1, len(made.domain)), generator=generator).double() + torch.tensor(
        [[[1.0]], [[0.0]]]
    )
    weights = made.resamples(3, seed=0)
    labels = [1] * len(made.domain) + [0] * len(made.domain)
    for found, w in zip(probes.auroc((harmful, safe), weights), weights, strict=True):
        expected = roc_auc_score(labels, torch.cat([harmful[0], safe[0]]), sample_weight=torch.cat([w, w]))
        assert found.item() == pytest.approx(expected)


def test_a_draw_in_which_no_pair_counts_says_nothing():
    scores_ = torch.ones(1, 4), torch.zeros(1, 4)
    assert probes.auroc(scores_, torch.stack([torch.zeros(4), torch.ones(4)]).double()).tolist() == [[0.5], [1.0]]


def refitted(rows: PairedRows, fold, signs):
    """By the definition: a ridge regression of the labels on the rows of the other folds, solved anew for each fold."""
    found = torch.zeros(STEPS, len(fold), dtype=torch.float64)
    for step, held_out in itertools.product(range(STEPS), range(5)):
        train = fold != held_out
        x = torch.cat([rows.harmful[step, train], rows.safe[step, train]])
        y = torch.cat([signs[train], -signs[train]])
        x = x - x.mean(0)
        penalty = 0.1 * x.square().sum() / x.shape[1]
        w = torch.linalg.solve(x.T @ x + penalty * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y)
        found[step, ~train] = signs[~train] * (rows.delta[step, ~train] @ w)
    return found


def test_a_fold_is_read_by_a_ridge_regression_of_the_others_under_every_toss():
    made = pairs(target=False)
    rows_, fold, signs = draw(made, same_lift()), made.folds(5, seed=0), power.tosses(made, seed=0)[:, :4]
    (harmful, safe), apart = probes.cross_validated(rows_, fold, signs)
    for toss in range(4):
        torch.testing.assert_close(apart[..., toss], refitted(rows_, fold, signs[:, toss]))
    torch.testing.assert_close(harmful - safe, apart[..., 0])


def source_auroc(rows_, made, weights=ONES, seed=0):
    mask = ~made.is_target
    read, _ = probes.cross_validated(rows_.of(mask), made.folds(5, seed)[mask], power.tosses(made, seed)[:, :1])
    return probes.auroc(read, weights[:, mask])


def test_held_out_prompts_do_not_leak_into_the_probe():
    """Control: read by a probe of all prompts, the same noise looks separable."""
    made, held_out, leaking = pairs(), [], []
    for seed in range(10):
        rows_ = draw(made, {}, seed, r=40)
        held_out.append(source_auroc(rows_, made).mean().item())
        leaking.append(probes.auroc(probes.read(rows_, probes.probe(rows_)), ONES).mean().item())
    assert sum(held_out) / 10 == pytest.approx(0.5, abs=0.04) and min(leaking) > 0.6


def test_a_twin_in_another_fold_would_leak():
    """Twins share a large scene: folds that part them would learn the scene's label from its twin."""
    made = pairs()
    fold = made.folds(5, seed=0)
    assert all(len(fold[made.cluster == one].unique()) == 1 for one in made.cluster.unique())
    assert fold.bincount().tolist() == [18] * 5
    assert all(len(fold[made.of(domain)].unique()) == 5 for domain in DOMAINS)


def test_transfer_is_high_where_the_direction_is_shared_and_below_chance_where_it_flips():
    made = pairs()
    for lift, low, high in ((same_lift(), 0.8, 1.0), (FLIPPED, 0.0, 0.2), ({}, 0.3, 0.7)):
        found = probes.transfer_auroc(draw(made, lift), made, ONES)
        assert found is not None and low <= found.mean() <= high
    assert source_auroc(draw(made, FLIPPED), made).mean() > 0.8


def test_without_a_target_each_domain_is_left_out_in_turn():
    made = pairs(target=False)
    rows_ = draw(made, same_lift())
    expected = [
        probes.auroc(probes.read(rows_.of(made.of(name)), probes.probe(rows_.of(~made.of(name)))), ONES[:, :PAIRS])
        for name in DOMAINS
    ]
    torch.testing.assert_close(probes.transfer_auroc(rows_, made, ONES), torch.stack(expected).mean(0))
    one = contrast(rows(PAIRS), "fire")
    assert probes.transfer_auroc(draw(one, same_lift()), one, ONES[:, :PAIRS]) is None


def shared(made: Contrast, prompts: int) -> Contrast:
    """As if so many safe prompts served all domains alike."""
    return replace(made, cluster=torch.arange(len(made.domain)) % prompts)


def noise_that_shares(made: Contrast, seed: int) -> PairedRows:
    rows_ = draw(made, {}, seed, r=64)
    return PairedRows(rows_.harmful, rows_.safe[:, made.cluster])


@pytest.mark.parametrize("target", [True, False])
def test_safe_prompts_that_domains_share_do_not_leak_into_transfer(target):
    """Control: with those pairs learnt from, the same noise looks as if it transferred."""
    made, found, leaking = shared(pairs(target), 45), [], []
    apart = replace(made, cluster=torch.arange(len(made.domain)))
    for seed in range(20):
        rows_ = noise_that_shares(made, seed)
        found.append(probes.transfer_auroc(rows_, made, ONES))
        leaking.append(probes.transfer_auroc(rows_, apart, ONES))
    assert torch.stack(found).mean() == pytest.approx(0.5, abs=0.04) and torch.stack(leaking).mean() > 0.6


@pytest.mark.parametrize("target", [True, False])
def test_where_all_pairs_share_their_safe_prompts_there_is_no_transfer(target):
    made = shared(pairs(target), PAIRS)
    assert probes.transfer_auroc(noise_that_shares(made, 0), made, ONES) is None


# ---- family-wise control


def null(seed, sites=6):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 1 + power.TOSSES, generator=generator) for _ in range(sites)]


def test_any_of_many_sites_is_called_separable_no_more_often_than_the_level_says():
    """Control: each site tested by itself, every fifth run or more has one that chance made."""
    runs, level = 200, 0.05
    together = sum(min(power.family_wise(null(seed))) <= level for seed in range(runs)) / runs
    alone = sum(min(power.family_wise([site])[0] for site in null(seed)) <= level for seed in range(runs)) / runs
    assert together <= level + 0.04 and alone > 0.2


def test_what_was_planted_is_found_beside_noise():
    made = pairs()
    mask, fold, signs = ~made.is_target, made.folds(5, seed=0), power.tosses(made, seed=0)
    found = []
    for at, lift in enumerate((same_lift(), {}, {})):
        _, apart = probes.cross_validated(draw(made, lift, seed=at).of(mask), fold[mask], signs)
        found.append(power.statistic(apart))
    p = power.family_wise(found)
    assert p[0] <= power.LEVEL and min(p[1:]) > 0.05


def test_where_nothing_differs_nothing_is_significant():
    made = pairs()
    mask = ~made.is_target
    constant = torch.ones(STEPS, len(made.domain), R, dtype=torch.float64)
    rows_ = PairedRows(constant, constant).of(mask)
    _, apart = probes.cross_validated(rows_, made.folds(5, seed=0)[mask], power.tosses(made, seed=0))
    assert power.family_wise([power.statistic(apart)]) == [1.0]


def test_power_is_called_low_where_no_toss_could_be_rare_enough():
    assert [power.enough(contrast(rows(n), "fire")) for n in (8, 9, 20)] == [False, True, True]


# ---- the criteria


def test_agreement_is_the_cosine_free_of_noise():
    """Control: the plain cosine of noisy means is far below 1 where the directions are one."""
    made = pairs()
    weak = [draw(made, same_lift(1.0), seed) for seed in range(12)]
    agreed = [scores.agreement(one, made, ONES).mean() for one in weak]
    means = [(one.delta[:, made.is_target].mean(1), one.delta[:, ~made.is_target].mean(1)) for one in weak]
    plain = [torch.cosine_similarity(*both).mean() for both in means]
    assert sum(agreed) / 12 > 0.85 > sum(plain) / 12 + 0.05
    assert scores.agreement(draw(made, FLIPPED), made, ONES).mean() < -0.9
    one_sided = {"fire": 2.0, "weapon": 2.0, "poison": 0.0}
    assert scores.agreement(draw(made, one_sided), made, ONES).abs().mean() < 0.75
    one = contrast(rows(PAIRS), "fire")
    assert scores.agreement(draw(one, same_lift()), one, ONES[:, :PAIRS]) is None


def test_stability_is_one_minus_the_normalised_variance():
    """Δ of length 2 along one axis and noise of total variance 2·R: ‖mean‖² / mean ‖·‖² = 4 / (4 + 2·R)."""
    made = pairs(per_domain=400)
    ones = torch.ones(1, 1200, dtype=torch.float64)
    assert scores.stability(draw(made, same_lift()), made, ones).item() == pytest.approx(4 / (4 + 2 * R), abs=0.02)
    exact = draw(made, same_lift(), noise=0.0)
    assert scores.stability(exact, made, ones).item() == pytest.approx(1.0)
    assert scores.stability(draw(made, FLIPPED), made, ones) < scores.stability(draw(made, same_lift()), made, ones)


def test_noise_is_not_stable():
    """Control: without the correction the mean of the same few Δ has a length."""
    made = pairs(per_domain=9)
    ones = torch.ones(1, 27, dtype=torch.float64)
    found = [scores.stability(draw(made, {}, seed), made, ones).item() for seed in range(10)]
    assert sum(found) / 10 < 0.02
    naive = draw(made, {}, 0).delta
    assert naive.mean((0, 1)).square().sum() / naive.square().sum(2).mean() > 0.01


def test_share_is_the_variance_along_the_difference():
    """Rows with variances 1 + scene² + noise² and tokens with a known covariance about them."""
    made = pairs(per_domain=400)
    within = torch.diag(torch.tensor([3.0] + [1.0] * (R - 1), dtype=torch.float64)).expand(STEPS, 2, R, R)
    rows_ = draw(made, same_lift(), scene=0.5, noise=0.5)
    along, across = 3.0 + 0.5 + 1.0, 1.0 + 0.5  # the two classes lie 2 apart: a variance of 1 along
    expected = along / (along + (R - 1) * across)
    assert scores.share(rows_, within, made).mean().item() == pytest.approx(expected, rel=0.05)


def test_shift_is_the_frechet_distance_relative_to_the_spread():
    """N(0, 1) against N(m, s²) in R dimensions: (‖m‖² + R·(1 − s)²) / (R·(1 + s²))."""
    made = pairs(per_domain=2000)
    generator = torch.Generator().manual_seed(0)
    safe = torch.randn(STEPS, 6000, R, generator=generator, dtype=torch.float64)
    same = PairedRows(safe, safe)
    assert scores.shift(same, made).max() < 0.01
    moved = safe.clone()
    moved[:, made.is_target] = 2 * moved[:, made.is_target] + 0.5
    expected = (R * 0.25 + R) / (R * 5)
    assert scores.shift(PairedRows(moved, moved), made).mean().item() == pytest.approx(expected, rel=0.05)
    one = contrast(rows(30), "fire")
    assert scores.shift(draw(one, {}), one) is None


def test_binding_is_what_the_text_explains_of_the_image():
    made = pairs()
    text, other = draw(made, {}, 0), draw(made, {}, 1)
    turn = torch.randn(R, R + 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    image = PairedRows(text.harmful @ turn, text.safe @ turn)
    fold = made.folds(3, seed=0)
    assert scores.binding(text, image, fold, ONES).mean() > 0.95
    assert scores.binding(text, other, fold, ONES).mean() < 0.05
    still = PairedRows(text.harmful, text.harmful)
    assert scores.binding(text, still, fold, ONES).max() == 0 and scores.binding(still, text, fold, ONES).max() < 0.05


def test_redundant_sites_tell_the_same_prompts_apart():
    made = pairs()
    one, other = draw(made, {}, 0).delta, draw(made, {}, 1).delta
    turned = 7 * one @ rotation(R)
    alike = scores.redundancy([one, turned, other])
    assert alike[0, 1].item() == pytest.approx(1.0) and alike[0, 2] < 0.5


def test_distance_and_cost_are_shares():
    assert [scores.distance(at, 5) for at in (0, 2, 4)] == [1.0, 0.6, 0.2] and scores.distance(0, 1) == 1
    assert scores.cost(64, 1, 64 * 100) == 0.01 and scores.cost(64, 100, 64 * 100) == 1


# ---- the frame has no say


def rotation(r):
    generator = torch.Generator().manual_seed(9)
    return torch.linalg.qr(torch.randn(r, r, generator=generator, dtype=torch.float64)).Q


def criteria(rows_: PairedRows, made: Contrast, turn=None):
    """Every one of a site, by all prompts and by three resamples."""
    weights, within = made.resamples(3, seed=0), torch.eye(R, dtype=torch.float64).expand(STEPS, 2, R, R)
    scale = 1.0 if turn is None else (turn.T @ turn)[0, 0]
    text = draw(made, same_lift(), seed=8)
    mask, fold = ~made.is_target, made.folds(5, seed=0)
    _, apart = probes.cross_validated(rows_.of(mask), fold[mask], power.tosses(made, seed=0)[:, :5])
    return {
        "source_auroc": source_auroc(rows_, made, weights),
        "transfer": probes.transfer_auroc(rows_, made, weights),
        "agreement": scores.agreement(rows_, made, weights),
        "stability": scores.stability(rows_, made, weights),
        "share": scores.share(rows_, scale * within, made),
        "shift": scores.shift(rows_, made),
        "binding": scores.binding(text, rows_, fold, weights),
        "bound": scores.binding(rows_, text, fold, weights),
        "separable": power.statistic(apart),
    }


def frames():
    stretched = torch.diag(torch.linspace(1, 30, R, dtype=torch.float64))
    return {"rotated": rotation(R), "scaled": 40.0 * torch.eye(R, dtype=torch.float64), "stretched": stretched}


@pytest.mark.parametrize("frame", ["rotated", "scaled"])
def test_no_criterion_depends_on_the_frame(frame):
    made, turn = pairs(), frames()[frame]
    rows_ = draw(made, same_lift(0.8))
    turned = criteria(PairedRows(rows_.harmful @ turn, rows_.safe @ turn), made, turn)
    for name, value in criteria(rows_, made).items():
        torch.testing.assert_close(turned[name], value, msg=name)


def test_control_stretching_single_features_changes_them():
    made, turn = pairs(), frames()["stretched"]
    rows_ = draw(made, same_lift(0.8))
    turned = criteria(PairedRows(rows_.harmful @ turn, rows_.safe @ turn), made)
    changed = [name for name, value in criteria(rows_, made).items() if not torch.allclose(turned[name], value)]
    assert len(changed) >= 7


def test_the_order_of_pairs_does_not_count():
    made = pairs()
    rows_ = draw(made, same_lift(0.8))
    order = torch.randperm(len(made.domain), generator=torch.Generator().manual_seed(1))
    shuffled = replace(
        made,
        harmful=made.harmful[order],
        safe=made.safe[order],
        domain=[made.domain[at] for at in order],
        cluster=made.cluster[order],
        is_target=made.is_target[order],
    )
    moved = PairedRows(rows_.harmful[:, order], rows_.safe[:, order])
    for name in ("agreement", "stability"):
        criterion = getattr(scores, name)
        torch.testing.assert_close(
            criterion(moved, shuffled, shuffled.resamples(3, seed=0)), criterion(rows_, made, made.resamples(3, seed=0))
        )
    torch.testing.assert_close(source_auroc(moved, shuffled), source_auroc(rows_, made))


# ---- scorers


def terms(**given):
    """Of a site at which no whole image was judged, unless that is given."""
    every = dict.fromkeys(MERITS.keys() - {"judged"}, 0.5) | {"source_auroc": 0.9, "transfer": 0.8, "interchange": 0.15}
    every |= given
    return {name: torch.tensor([value, value]).double() for name, value in every.items()}


def test_the_default_is_what_transfers_can_be_told_reaches_the_image_and_lies_early():
    given = terms(linearity=0.4, reach=0.2, distance=0.9)
    assert scorer("default")(given)[0].item() == pytest.approx((0.6 * 0.4 * 0.2 * 0.9) ** 0.25)
    for nothing in ({"transfer": 0.4}, {"linearity": 0.0}, {"reach": 0.0}):
        assert scorer("default")(terms(**nothing))[0] == 0


def test_the_default_does_with_what_there_is():
    without = {name: value for name, value in terms().items() if name not in DEFAULT}
    assert scorer("default")(without)[0].item() == pytest.approx(0.8)


def test_the_paper_scorer_is_the_published_sum():
    found = scorer("paper")(terms(binding=0.4, stability=0.3, cost=0.2))
    assert found[0].item() == pytest.approx(0.25 * 0.8 + 0.35 * 0.4 + 0.25 * 0.3 - 0.15 * 0.2)


def test_criteria_are_joined_by_name_so_that_one_can_be_left_out():
    assert scorer("transfer")(terms())[0].item() == pytest.approx(0.6)
    assert scorer("transfer*interchange*stability")(terms())[0].item() == pytest.approx((0.6 * 0.15 * 0.5) ** (1 / 3))
    assert torch.equal(scorer("*".join(DEFAULT))(terms()), scorer("default")(terms()))
    assert torch.equal(scorer("causal")(terms()), scorer("interchange")(terms()))


def test_a_wrong_or_unmeasured_criterion_is_an_error():
    with pytest.raises(UsageError, match="no scorer 'tranfer'. Did you mean 'transfer'"):
        scorer("tranfer*interchange")
    with pytest.raises(UsageError, match="'judged' was not measured"):
        scorer("judged")({name: value for name, value in terms().items() if name != "judged"})


@pytest.mark.parametrize("name", [*SCORERS, *MERITS])
def test_every_scorer_takes_all_draws_at_once(name):
    found = scorer(name)(terms(judged=0.5))
    assert found.shape == (2,) and found[0] == found[1] and found.isfinite().all()
