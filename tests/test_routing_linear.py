"""What a linear map can tell of Δ from the token: all, nothing, or what a regression by hand says, however it came."""

import pytest
import torch

from safedig.routing.linear import Moments, PairSums, across_halves, linearity, memory
from tests.planted import TXT

R, IMAGES, TOKENS = 6, 200, 4


def tokens(seed, rule, turn=None, scale=1.0):
    """Harmful and safe tokens [image, token, r]: harm is what `rule` adds."""
    generator = torch.Generator().manual_seed(seed)
    safe = torch.randn(IMAGES, TOKENS, R, generator=generator) + 3
    harmful = safe + rule(safe, generator)
    turned = torch.eye(R) if turn is None else turn
    return harmful @ turned * scale, safe @ turned * scale


def planted(x, generator):
    """Harm moves the first token along the first axis, and a little at random."""
    return torch.eye(TOKENS, R)[:, :1] * torch.eye(R)[0] * 5.0 + 0.1 * chance(x, generator)


def chance(x, generator):
    return torch.randn(x.shape, generator=generator)


def moments(seed=0, rule=planted, **frame):
    sums = Moments.none(R)
    sums.add(*tokens(seed, rule, **frame))
    return sums


def by_hand(train, test):
    """Ridge regression on rows, as `linearity` describes it."""
    (h, s), (h_, s_) = ([part.reshape(-1, R).double() for part in both] for both in (train, test))
    x, y = torch.cat([h, s]), torch.cat([h - s, torch.zeros_like(s)])
    x_, y_ = torch.cat([h_, s_]), torch.cat([h_ - s_, torch.zeros_like(s_)])
    centred = x - x.mean(0)
    gram = centred.T @ centred
    weight = torch.linalg.solve(gram + 1e-3 * gram.diagonal().mean() * torch.eye(R), centred.T @ (y - y.mean(0)))
    guessed = (x_ - x.mean(0)) @ weight + y.mean(0)
    return (1 - (y_ - guessed).square().sum() / y_.square().sum()).item()


def test_it_is_the_regression_done_by_hand_on_tokens_that_were_not_learnt_from():
    found = linearity(moments(0), moments(1))
    assert found == pytest.approx(by_hand(tokens(0, planted), tokens(1, planted)), abs=1e-4)
    assert 0.4 < found < 1


def test_what_a_token_says_of_itself_is_told_and_chance_is_not():
    far = [moments(seed, lambda x, generator: 20 * planted(x, generator)) for seed in (0, 1)]
    assert linearity(*far) > 0.9 > linearity(moments(0), moments(1)) > 0.4
    assert linearity(moments(0, chance), moments(1, chance)) < 0.4  # no more than a token holds of its own noise
    assert linearity(moments(0), moments(1, lambda x, generator: planted(x, generator).roll(1, -1))) < 0.1  # elsewhere


def test_the_frame_has_no_say():
    turn = torch.linalg.qr(torch.randn(R, R, generator=torch.Generator().manual_seed(9))).Q
    as_it_is = linearity(moments(0), moments(1))
    for frame in ({"turn": turn}, {"scale": 250.0}, {"scale": 1e-3}):
        assert linearity(moments(0, **frame), moments(1, **frame)) == pytest.approx(as_it_is, abs=1e-4)
    hidden = torch.diag(torch.tensor([0.02, *[1.0] * (R - 1)]))  # control: harm shrunk until chance is all there is
    assert linearity(moments(0, turn=hidden), moments(1, turn=hidden)) < as_it_is - 0.1


def test_tokens_far_from_zero_are_told_as_well():
    def far(seed):
        sums = Moments.none(R)
        sums.add(*(part + 1000.0 for part in tokens(seed, planted)))
        return sums

    assert linearity(far(0), far(1)) == pytest.approx(linearity(moments(0), moments(1)), abs=1e-3)
    x = torch.cat([part.reshape(-1, R) for part in tokens(0, planted)]) + 1000.0
    cancelled = x.T @ x - len(x) * torch.outer(x.mean(0), x.mean(0))  # control: float32 loses what is left of it
    assert not torch.allclose(cancelled.double(), (len(x) - 1) * x.double().T.cov(), rtol=0.01)


def test_nothing_to_learn_from_or_to_be_told_is_nothing():
    still = moments(0, lambda x, _: torch.zeros_like(x))
    assert linearity(still, moments(1)) == linearity(moments(0), still) == linearity(Moments.none(R), moments(1)) == 0


# ---- images as they come


def rows(images, share=()):
    """Of two domains in turn; the harmful images in `share` have the first one's twin."""
    twin = {at: 0 if at in share else at for at in range(images)}
    harmful = [{"id": f"h{at}", "seed": 1, "risk": "ab"[at % 2], "twin": f"s{twin[at]}"} for at in range(images)]
    return harmful + [{"id": f"s{at}", "seed": 1, "risk": ""} for at in range(images)]


def fed(sums, order, per_batch=4, steps=(0, 1)):
    h, s = tokens(5, planted)
    of = {f"h{at}": h[at] for at in range(IMAGES)} | {f"s{at}": s[at] for at in range(IMAGES)}
    for start in range(0, len(order), per_batch):
        part = order[start : start + per_batch]
        for step in steps:
            sums.add(TXT, step, [(name, 1) for name in part], torch.stack([of[name] for name in part]))
    return sums


def side_by_side(n):
    return [name for at in range(n) for name in (f"h{at}", f"s{at}")]


def test_twins_in_other_batches_count_as_those_in_one_and_nothing_is_held_in_the_end():
    near = fed(PairSums(rows(40)), side_by_side(40))
    far = fed(PairSums(rows(40)), [f"s{at}" for at in range(40)] + [f"h{at}" for at in range(40)])
    assert near.of.keys() == far.of.keys() and {part[1] for part in near.of} == {"a", "b"}
    for part, one in near.of.items():
        assert torch.allclose(one.xy, far.of[part].xy, rtol=1e-5) and one.n == far.of[part].n
    assert not any(near._held.values()) and not any(far._held.values())
    lone = fed(PairSums(rows(40)), [f"h{at}" for at in range(40)])
    assert not lone.of and sum(map(len, lone._held.values())) == 80  # control: what waits is held


def test_who_shares_a_twin_shares_a_half():
    sums = fed(PairSums(rows(9, share=range(9))), [f"h{at}" for at in range(9)] + ["s0"])
    assert len({half for _, _, half in sums.of}) == 1
    assert sum(one.n for one in sums.of.values()) == 9 * 2 * TOKENS * 2
    assert across_halves(sums.at(TXT), ["a", "b"]) is None  # nothing to see on what was not learnt from


def test_several_processes_see_what_one_sees():
    whole, parts = fed(PairSums(rows(40)), side_by_side(40)), [PairSums(rows(40)) for _ in range(2)]
    names = side_by_side(40)
    for sums, own in zip(parts, (names[:40], names[40:]), strict=True):
        fed(sums, own)
    both = PairSums(rows(40))
    both.join(parts)
    told = [across_halves(sums.at(TXT), ["a", "b"]) for sums in (whole, both)]
    assert told[0] == pytest.approx(told[1], abs=1e-9) and told[0] is not None and told[0] > 0.2
    assert across_halves(whole.at(TXT), ["a"]) != told[0]  # control: other domains, another figure


def test_memory_is_what_the_formula_says():
    assert sum(one.nbytes for one in fed(PairSums(rows(40)), side_by_side(40)).of.values()) == memory(1, 2, R)
