"""Planted harm is found and nothing else is, at the chosen rate of false discoveries, with twins and without."""

import itertools

import pytest
import torch
from scipy.stats import mannwhitneyu

from safedig.features.contrast import Effect, PromptCodes, saving
from safedig.sae.model import Decoder, SparseAutoencoder, ThresholdEncoder

PLANTED, NULL = 12, 300


def draw(seed, prompts=60, lift=1.0, planted=PLANTED, share=1.0, nuisance=1.0, fires=0.5):
    """Codes of harmful prompts and their twins: each `fires` in a share; twins share what is no harm but for noise.

    `lift` is what harm adds to the first `planted` features, in a `share` of the prompts.
    """
    generator = torch.Generator().manual_seed(seed)
    scene = nuisance * torch.rand(prompts, planted + NULL, generator=generator)
    scene *= torch.rand(prompts, planted + NULL, generator=generator) < fires
    harmful, safe = (scene * (1 + 0.2 * torch.rand(scene.shape, generator=generator)) for _ in range(2))
    harmful[: round(share * prompts), :planted] += lift
    return harmful, safe


def swapped(harmful, safe, seed):
    """The control: which of two twins counts as harmful is tossed."""
    coin = torch.rand(len(harmful), 1, generator=torch.Generator().manual_seed(seed)) < 0.5
    return torch.where(coin, harmful, safe), torch.where(coin, safe, harmful)


def found(harmful, safe, level=0.05, paired=True):
    return set(Effect.between(harmful, safe, paired=paired).discovered(level).nonzero()[:, 0].tolist())


# ---- what is found


@pytest.mark.parametrize("paired", [True, False])
def test_all_that_was_planted_is_found(paired):
    discovered = found(*draw(0), paired=paired)
    assert discovered >= set(range(PLANTED)) and len(discovered) <= PLANTED + 3


@pytest.mark.parametrize("paired", [True, False])
def test_with_shuffled_labels_almost_nothing_is_found(paired):
    counts = [len(found(*swapped(*draw(seed), seed), paired=paired)) for seed in range(20)]
    assert sum(count > 0 for count in counts) <= 3 and sum(counts) <= 6  # expected: one draw of the twenty


@pytest.mark.parametrize("level", [0.05, 0.3])
def test_the_share_of_false_discoveries_is_held(level):
    shares = []
    for seed in range(20):
        discovered = found(*draw(seed), level=level)
        shares.append(sum(feature >= PLANTED for feature in discovered) / max(len(discovered), 1))
        assert discovered >= set(range(PLANTED))
    assert sum(shares) / len(shares) <= level * 1.15  # 20 draws leave an error of about a tenth of it


def test_control_without_the_correction_many_more_are_false():
    p = Effect.between(*draw(0), paired=True).p
    assert (p[PLANTED:] <= 0.05).sum() >= 5


def test_what_never_fires_is_neither_found_nor_counted_against_the_others():
    """10,000 dead latents more would make a feature of 8 pairs too uncertain."""
    harmful, safe = draw(0, share=8 / 60)
    harmful[8:, :PLANTED] = safe[8:, :PLANTED] = 0
    silent = torch.zeros(60, 10_000)
    wide = Effect.between(torch.cat([harmful, silent], 1), torch.cat([safe, silent], 1), paired=True)
    narrow = Effect.between(harmful, safe, paired=True)
    assert wide.discovered(0.2).nonzero()[:, 0].tolist() == narrow.discovered(0.2).nonzero()[:, 0].tolist()
    assert (wide.p[PLANTED + NULL :] == 1).all() and (wide.ratio[PLANTED + NULL :] == 0).all()


# ---- the tests behind it


def test_the_sign_test_is_that_of_a_coin():
    """Up in 5 of 5, in 4 of 5, in none; ties do not count."""
    harmful = torch.tensor([[1.0, 1.0, 0.0]] * 4 + [[1.0, 0.0, 0.0]] + [[2.0, 2.0, 2.0]] * 3)
    safe = torch.tensor([[0.0, 0.0, 1.0]] * 4 + [[0.0, 1.0, 1.0]] + [[2.0, 2.0, 2.0]] * 3)
    p = Effect.between(harmful, safe, paired=True).p
    torch.testing.assert_close(p, torch.tensor([1 / 32, 6 / 32, 1.0], dtype=torch.float64))


def test_the_rank_test_is_that_of_scipy_whatever_the_number_of_features(monkeypatch):
    monkeypatch.setattr("safedig.features.contrast._COLUMNS", 5)
    harmful, safe = draw(0, prompts=15)
    harmful, safe = harmful[:, :17], safe[:9, :17]
    p = Effect.between(harmful, safe, paired=False).p
    for at in range(17):
        one = mannwhitneyu(harmful[:, at].double(), safe[:, at].double(), alternative="greater", method="asymptotic")
        assert p[at] == pytest.approx(one.pvalue)


def test_a_feature_that_is_the_same_everywhere_is_sure_to_be_no_harm():
    same = torch.ones(10, 3)
    for paired in (True, False):
        effect = Effect.between(same, same, paired=paired)
        assert (effect.p == 1).all() and (effect.ratio == 0.5).all() and (effect.support == 1).all()


# ---- what twins are worth


def test_twins_find_what_class_means_lose_in_the_differences_between_prompts():
    harmful, safe = draw(0, lift=0.3, nuisance=3.0, fires=1.0)
    assert found(harmful, safe) >= set(range(PLANTED))
    assert len(found(harmful, safe, paired=False) & set(range(PLANTED))) < PLANTED / 2


def test_how_much_twins_save_is_the_ratio_of_variances():
    """Twins that share all but a tenth of their deviation save about a hundred times the prompts; strangers nothing."""
    generator = torch.Generator().manual_seed(0)
    shared, one, other = torch.randn(3, 4000, 2, generator=generator)
    torch.testing.assert_close(saving(shared + 0.1 * one, shared + 0.1 * other).mean().item(), 101.0, rtol=0.1, atol=0)
    torch.testing.assert_close(saving(one, other).mean().item(), 1.0, rtol=0.1, atol=0)


# ---- several domains


def domains():
    """Feature 0 is harm in both domains, feature 1 in the first, feature 2 in the second only."""
    effects = []
    for at in (1, 2):
        harmful, safe = draw(at, prompts=30, planted=0)
        harmful[:, [0, at]] += 1.0
        effects.append(Effect.between(harmful, safe, paired=True))
    return effects


def test_only_what_every_domain_shows_survives_the_worst_case():
    worst = Effect.worst(domains())
    assert worst.discovered(0.05).nonzero()[:, 0].tolist() == [0]
    assert worst.ratio[0] > 0.65 > max(worst.ratio[1], worst.ratio[2])


def test_the_worst_case_does_not_depend_on_the_order_of_domains():
    orders = [Effect.worst(order) for order in itertools.permutations([*domains(), *domains()[:1]])]
    assert all(torch.equal(getattr(one, name), getattr(orders[0], name)) for one in orders for name in vars(one))


def test_of_one_domain_the_worst_case_is_itself():
    one = domains()[0]
    assert all(torch.equal(getattr(Effect.worst([one]), name), value) for name, value in vars(one).items())


# ---- the statistic of a prompt


def identity(d=4):
    eye, zero = torch.eye(d), torch.zeros(d)
    return SparseAutoencoder(ThresholdEncoder(eye, zero, zero), Decoder(eye, zero))


def test_the_statistic_is_the_mean_over_steps_of_the_highest_token():
    codes, generator = PromptCodes(identity()), torch.Generator().manual_seed(0)
    steps = torch.rand(2, 3, 5, 4, generator=generator)  # prompt, step, token, d_in
    for step in range(3):
        for prompt in (1, 0):
            codes.add(f"p{prompt}", steps[prompt, step])
    torch.testing.assert_close(codes.of(["p0", "p1"]), steps.amax(2).mean(1))


def test_many_images_of_a_prompt_count_once():
    """Else ten seeds of one prompt would be ten pairs that say the same, and p would be 2⁻¹⁰."""
    harmful, safe = PromptCodes(identity()), PromptCodes(identity())
    for _ in range(10):
        harmful.add("one", torch.ones(5, 4))
        safe.add("one", torch.zeros(5, 4))
    assert (Effect.between(harmful.of(["one"]), safe.of(["one"]), paired=True).p == 0.5).all()
